# SPDX-License-Identifier: Apache-2.0
"""Rules of the layers that checkpoints are made of, so that a family's table reads like its model.

Each function takes a tensor's name without ".weight" and a leaf's path without "/kernel". Biases
that a model does not have are left out by `rules.expand`.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax_vlm.convert.rules import (
    CONV,
    DENSE,
    HEADS,
    HEADS_BIAS,
    MERGE_HEADS,
    Layout,
    Rule,
    rule,
)


def norm(tensor: str, leaf: str) -> list[Rule]:
    """Returns the rules of a LayerNorm."""
    return [rule(f"{tensor}.weight", f"{leaf}/scale"), rule(f"{tensor}.bias", f"{leaf}/bias")]


def dense(tensor: str, leaf: str, layout: Layout = DENSE) -> list[Rule]:
    """Returns the rules of a linear layer."""
    return [
        rule(f"{tensor}.weight", f"{leaf}/kernel", layout),
        rule(f"{tensor}.bias", f"{leaf}/bias"),
    ]


def conv(tensor: str, leaf: str) -> list[Rule]:
    """Returns the rules of a patch convolution."""
    return dense(tensor, leaf, CONV)


def attention(qkv: Sequence[str], out: str, leaf: str) -> list[Rule]:
    """Returns the rules of an attention layer with separate q, k and v.

    Args:
        qkv: names of the three tensors.
        out: name of the output projection.
        leaf: path of the MultiHeadAttention.
    """
    rules = dense(out, f"{leaf}/o", MERGE_HEADS)
    for tensor, name in zip(qkv, "qkv", strict=True):
        rules += [
            rule(f"{tensor}.weight", f"{leaf}/{name}/kernel", HEADS),
            rule(f"{tensor}.bias", f"{leaf}/{name}/bias", HEADS_BIAS),
        ]
    return rules


def fused_attention(weight: str, bias: str, out: str, leaf: str) -> list[Rule]:
    """Returns the rules of an attention layer whose q, k and v are rows of one tensor.

    Args:
        weight: name of the tensor [3 D, D].
        bias: name of the tensor [3 D].
        out: name of the output projection.
        leaf: path of the MultiHeadAttention.
    """
    return [
        *dense(out, f"{leaf}/o", MERGE_HEADS),
        Rule(weight, tuple(f"{leaf}/{name}/kernel" for name in "qkv"), HEADS),
        Rule(bias, tuple(f"{leaf}/{name}/bias" for name in "qkv"), HEADS_BIAS),
    ]


def mlp(fc1: str, fc2: str, leaf: str) -> list[Rule]:
    """Returns the rules of a plain MLP."""
    return dense(fc1, f"{leaf}/fc1") + dense(fc2, f"{leaf}/fc2")


def openai_block(tensor: str, leaf: str) -> list[Rule]:
    """Returns the rules of a block in the names of CLIP and SigLIP in transformers."""
    attn = f"{tensor}.self_attn"
    return [
        *norm(f"{tensor}.layer_norm1", f"{leaf}/ln1"),
        *attention([f"{attn}.{n}_proj" for n in "qkv"], f"{attn}.out_proj", f"{leaf}/attention"),
        *norm(f"{tensor}.layer_norm2", f"{leaf}/ln2"),
        *mlp(f"{tensor}.mlp.fc1", f"{tensor}.mlp.fc2", f"{leaf}/mlp"),
    ]
