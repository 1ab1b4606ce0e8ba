# SPDX-License-Identifier: Apache-2.0
"""What a language model costs in closed form: training, reading a prompt, each token, its cache.

Conventions as in scaling/flops.py: a multiply-add is 2 FLOPs, matrix products alone count, and
attention is counted in full: over every slot that scores are computed for, seen or not. A sliding
window saves nothing here, because masked scores are computed too.

Per token, with N heads of queries and M of keys of width K:

    layer    2 (D (N + 2 M) K + N K D + 3 D M_mlp) + 4 N K T     T: slots attended to
    output   2 D V

A FastV has fewer tokens and slots in its later layers, where a prompt has visual tokens; choosing
them costs nothing that is counted.
"""

from __future__ import annotations

import numpy as np

from flax_vlm.models.fastv import FastV
from flax_vlm.models.language_model import LanguageModel


def layer_groups(model: LanguageModel) -> list[tuple[int, int]]:
    """Returns [(number of layers, tokens of a prompt that they no longer see)]."""
    if not isinstance(model, FastV):
        return [(model.depth, 0)]
    return [(model.prune_layer, 0), (model.depth - model.prune_layer, model.prune_tokens)]


def layer_weights(model: LanguageModel) -> int:
    """Returns the number of weights in the kernels of one layer."""
    heads = model.num_heads + 2 * model.num_kv_heads
    attention = model.width * heads * model.head_dim
    attention += model.num_heads * model.head_dim * model.width
    return attention + 3 * model.width * model.mlp_dim


def decoder_flops(model: LanguageModel, tokens: int, slots: int, outputs: int) -> int:
    """Returns the forward FLOPs on one row.

    Args:
        model: the language model.
        tokens: that are read.
        slots: that each of them attends to: as many without a cache, its capacity with one.
        outputs: tokens that logits are computed for.
    """
    layers = model.depth * tokens * _layer_flops(model, slots)
    return layers + 2 * outputs * model.width * model.vocab_size


def language_model_flops(
    model: LanguageModel, tokens: int | None = None, *, attention: bool = True
) -> int:
    """Returns the forward FLOPs on one text, logits of every token included.

    Args:
        model: the language model.
        tokens: of the text; None takes the model's context.
        attention: count scores and weights times v.
    """
    tokens = model.length if tokens is None else tokens
    return decoder_flops(model, tokens, tokens if attention else 0, tokens)


def prefill_flops(model: LanguageModel, tokens: int, capacity: int) -> int:
    """Returns the FLOPs of reading a prompt into the cache: models/generate.start on one row.

    Args:
        model: the language model.
        tokens: of the prompt, padding included.
        capacity: slots of the cache.
    """
    flops = decoder_flops(model, 0, 0, 1)
    for layers, gone in layer_groups(model):
        flops += layers * (tokens - gone) * _layer_flops(model, capacity - gone)
    return flops


def decode_flops(model: LanguageModel, capacity: int) -> int:
    """Returns the FLOPs of one more token of one row: a step of models/generate.advance.

    Args:
        model: the language model.
        capacity: slots of the cache.
    """
    flops = decoder_flops(model, 0, 0, 1)
    for layers, gone in layer_groups(model):
        flops += layers * _layer_flops(model, capacity - gone)
    return flops


def _layer_flops(model: LanguageModel, slots: int) -> int:
    return 2 * layer_weights(model) + 4 * model.num_heads * model.head_dim * slots


def cache_bytes(model: LanguageModel, batch: int, capacity: int, dtype: str | None = None) -> int:
    """Returns the bytes of the keys and values: 2 layers B T M K per element's byte; with a FastV
    those of a prompt with visual tokens.

    int8 has a float32 scale per vector besides; the positions of the slots are not counted.

    Args:
        model: the language model.
        batch: B.
        capacity: T.
        dtype: of the cache; None takes the model's compute dtype.
    """
    dtype = np.dtype("uint16" if (dtype or model.dtype) == "bfloat16" else dtype or model.dtype)
    vector = model.head_dim * dtype.itemsize + (4 if dtype == np.int8 else 0)
    slots = sum(layers * (capacity - gone) for layers, gone in layer_groups(model))
    return 2 * batch * slots * model.num_kv_heads * vector


def bytes_per_token(
    model: LanguageModel, batch: int, capacity: int, weight_bytes: int, dtype: str | None = None
) -> int:
    """Returns the bytes that one decoding step reads: every weight once, and the whole cache.

    Divided by the memory's bandwidth it is the least time of a step, which is what limits decoding
    of small batches.

    Args:
        model: the language model.
        batch: B.
        capacity: T.
        weight_bytes: per weight: 4, 2, or 1 for int8.
        dtype: of the cache; None takes the model's compute dtype.
    """
    weights = model.depth * layer_weights(model) + model.width * model.vocab_size
    return weights * weight_bytes + cache_bytes(model, batch, capacity, dtype)
