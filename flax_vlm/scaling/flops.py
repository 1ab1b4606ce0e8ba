# SPDX-License-Identifier: Apache-2.0
"""FLOPs per example in closed form: the numerator of MFU and the x axis of scaling laws.

Conventions, to be stated wherever a number is shown:

- one multiply-add is 2 FLOPs; matmuls alone are counted (projections, scores q k^T, weights times
  v, patch embedding, heads); softmax, norms, activations, embedding look-ups and the loss are not;
- attention is counted in full, causal or not (MaxText halves causal attention, Levanter does not);
- the backward pass costs twice the forward pass: a trained tower counts 3 times, a frozen one once,
  and a frozen language model behind a connector that is trained twice, for the gradient passes it;
- what rematerialisation computes again is not counted, nor are patches that patch dropout drops.

Published tables differ: Cherti et al. 2022 print GMAC (half of these FLOPs) and open_clip GFLOP,
both with the attention's score and value products and forward alone; Nezhurina et al. 2025 print
GFLOP without them (`attention=False`), forward alone.

XLA counts a few per cent more on an unrolled model without remat; its count of a scanned model is
meaningless (the loop's body is counted once). Source: Kaplan et al. 2020,
arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn

from flax_vlm.models.language_model import LanguageModel
from flax_vlm.models.llava import Llava
from flax_vlm.models.text_encoder import TextEncoder
from flax_vlm.models.two_towers import TwoTowers
from flax_vlm.models.vit import VisionTransformer, ViTClassifier
from flax_vlm.nn.compression import PixelShuffle
from flax_vlm.nn.connectors import (
    LinearConnector,
    MlpConnector,
    PixelShuffleConnector,
    ResamplerConnector,
)
from flax_vlm.nn.patches import Size, as_pair, grid_size, num_kept
from flax_vlm.nn.resampler import PerceiverResampler
from flax_vlm.scaling.decoder_flops import language_model_flops

TOWERS = ("image", "text")
LLAVA_PARTS = ("image", "connector", "language_model")  # in the order of the forward pass
PARTS = ("image", "text", "connector", "language_model", "encoder")  # what can be frozen


def encoder_flops(
    depth: int,
    width: int,
    mlp_dim: int,
    tokens: int,
    *,
    gated_mlp: bool = False,
    attention: bool = True,
) -> int:
    """Returns the forward FLOPs of a transformer encoder on one sequence.

    depth * (tokens * 2 * (4 D^2 + 2 D M) + 4 tokens^2 D), with 3 D M where the MLP is gated

    Args:
        depth: number of blocks.
        width: D.
        mlp_dim: M.
        tokens: length of the sequence.
        gated_mlp: see nn.mlp.Mlp.
        attention: count scores and weights times v, the last summand.
    """
    matmuls = tokens * 2 * (4 * width * width + (3 if gated_mlp else 2) * width * mlp_dim)
    return depth * (matmuls + (4 * tokens * tokens * width if attention else 0))


def map_head_flops(width: int, mlp_dim: int, tokens: int, *, attention: bool = True) -> int:
    """Returns the forward FLOPs of a MAP head: all keys and values, and one query."""
    keys_values = 2 * tokens * 2 * width * width
    products = 4 * tokens * width if attention else 0
    return keys_values + products + 2 * (2 * width * width + 2 * width * mlp_dim)


def resampler_flops(
    width: int, resampler: PerceiverResampler, tokens: int, *, attention: bool = True
) -> int:
    """Returns the forward FLOPs of a Perceiver Resampler on the tokens of one example.

    depth * (2 D N K (2 Q + 2 (P + Q)) + 4 Q (P + Q) N K + 4 Q D M): q and o of the latents, k and v
    of both

    Args:
        width: D.
        resampler: its fields.
        tokens: P.
        attention: count scores and weights times v.
    """
    latents, both = resampler.num_latents, resampler.num_latents + tokens
    inner = resampler.num_heads * resampler.head_dim
    projections = 2 * width * inner * (2 * latents + 2 * both)
    products = 4 * latents * both * inner if attention else 0
    mlp = 4 * latents * width * resampler.mlp_ratio * width
    return resampler.depth * (projections + products + mlp)


def vision_flops(
    model: VisionTransformer,
    image_size: Size | None = None,
    channels: int = 3,
    *,
    attention: bool = True,
) -> int:
    """Returns the forward FLOPs of an image encoder on one image, in a training step.

    Args:
        model: a VisionTransformer or ViTClassifier.
        image_size: pixels; None takes the model's.
        channels: C.
        attention: count scores and weights times v.
    """
    patch_h, patch_w = as_pair(model.patch_size)
    patches, tokens = num_tokens(model, image_size)
    flops = 2 * patches * patch_h * patch_w * channels * model.width
    flops += encoder_flops(
        model.depth,
        model.width,
        model.mlp_dim,
        tokens,
        gated_mlp=model.gated_mlp,
        attention=attention,
    )
    if model.pooling == "map":
        flops += map_head_flops(model.width, model.mlp_dim, tokens, attention=attention)
    if model.pooling == "resampler":
        resampler = PerceiverResampler(**model.resampler)
        flops += resampler_flops(model.width, resampler, tokens, attention=attention)
    outputs = model.num_classes if isinstance(model, ViTClassifier) else model.embed_dim or 0
    return flops + 2 * model.width * outputs


def connector_flops(
    connector: nn.Module, width: int, tokens: int, *, attention: bool = True
) -> int:
    """Returns the forward FLOPs of a connector on the tokens of one image.

    Args:
        connector: one of nn.connectors.CONNECTORS.
        width: D, of the tokens.
        tokens: P.
        attention: count scores and weights times v.

    Raises:
        ValueError: for a connector that has no formula here.
    """
    out = connector.width
    if isinstance(connector, LinearConnector):
        return 2 * tokens * width * out
    if isinstance(connector, MlpConnector):
        return 2 * tokens * (width * out + out * out)
    if isinstance(connector, PixelShuffleConnector):
        return 2 * connector.num_tokens(tokens) * connector.scale**2 * width * out
    if isinstance(connector, ResamplerConnector):
        resampler = PerceiverResampler(**connector.resampler)
        inside = resampler_flops(width, resampler, tokens, attention=attention)
        return inside + 2 * resampler.num_latents * width * out
    raise ValueError(f"there is no formula for a {type(connector).__name__}")


def llava_flops(
    model: Llava,
    image_size: Size | None = None,
    text_length: int | None = None,
    *,
    images: int = 1,
    attention: bool = True,
) -> dict[str, int]:
    """Returns {part: forward FLOPs of one example} of a language model that sees.

    Blocks of the encoder behind the feature layer are not run; compression is not counted, but what
    it saves is.

    Args:
        model: a Llava whose encoder is a VisionTransformer.
        image_size: pixels; None takes the model's.
        text_length: L, visual tokens included; None takes the language model's context.
        images: I per example.
        attention: count scores and weights times v.
    """
    tower, used = model.image, model.feature_layer
    tower = tower.clone(
        depth=tower.depth if used is None else used,
        pooling="gap",  # the features of patches are taken, not a pooled vector
        resampler=None,
        embed_dim=None,
    )
    patches, tokens = num_tokens(tower, image_size)
    tokens = tokens if model.keep_prefix else patches
    width = tower.width
    if model.compression is not None:
        wider = isinstance(model.compression, PixelShuffle)
        width *= model.compression.scale**2 if wider else 1
        tokens = model.compression.num_tokens(tokens)
    return {
        "image": images * vision_flops(tower, image_size, attention=attention),
        "connector": images * connector_flops(model.connector, width, tokens, attention=attention),
        "language_model": language_model_flops(
            model.language_model, text_length, attention=attention
        ),
    }


def num_tokens(model: VisionTransformer, image_size: Size | None = None) -> tuple[int, int]:
    """Returns how many patches are embedded and how many tokens the blocks see, in training."""
    size = model.image_size if image_size is None else image_size
    rows, columns = grid_size(size, model.patch_size, drop_remainder=model.drop_remainder)
    return rows * columns, num_kept(rows * columns, model.patch_dropout) + model.num_prefix


def text_flops(
    model: TextEncoder, text_length: int | None = None, *, attention: bool = True
) -> int:
    """Returns the forward FLOPs of a text encoder on one text.

    Args:
        model: a TextEncoder.
        text_length: tokens, padding included; None takes the model's context.
        attention: count scores and weights times v.
    """
    tokens = model.length if text_length is None else text_length
    flops = encoder_flops(model.depth, model.width, model.mlp_dim, tokens, attention=attention)
    return flops + 2 * model.width * (model.embed_dim or 0)


def tower_costs(
    model: nn.Module,
    table: Sequence[tuple[type, Callable[..., int]]],
    image_size: Size | None = None,
    text_length: int | None = None,
    **options: Any,
) -> dict[str, int]:
    """Returns {tower: cost}, the tower of a single encoder being "encoder".

    Args:
        model: a model of MODELS, or an encoder.
        table: (type, function(encoder, its input's size, **options)); the first that fits is taken.
        image_size: pixels; None takes the model's.
        text_length: tokens per text; None takes the model's context.
        **options: of the function.

    Raises:
        ValueError: for a model that has no formula here.
    """
    two = isinstance(model, TwoTowers)
    towers = {name: getattr(model, name) for name in TOWERS} if two else {"encoder": model}
    costs = {}
    for name, tower in towers.items():
        function = next((f for kind, f in table if isinstance(tower, kind)), None)
        if function is None:
            known = [kind.__name__ for kind, _ in table]
            raise ValueError(
                f"there is a formula for {known}, alone or as towers, got {type(tower).__name__}"
            )
        size = text_length if isinstance(tower, (TextEncoder, LanguageModel)) else image_size
        costs[name] = function(tower, size, **options)
    return costs


def forward_flops(
    model: nn.Module,
    image_size: Size | None = None,
    text_length: int | None = None,
    *,
    images: int = 1,
    attention: bool = True,
) -> dict[str, int]:
    """Returns {tower: forward FLOPs of one example}, the tower of a single encoder "encoder".

    Args:
        model: a VisionTransformer, ViTClassifier, TextEncoder, CLIP, SigLIP, LanguageModel or
            Llava.
        image_size: pixels; None takes the model's.
        text_length: tokens per text; None takes the model's context.
        images: per example, of a Llava.
        attention: count scores and weights times v; Nezhurina et al. do not.

    Raises:
        ValueError: for a model that has no formula here.
    """
    if isinstance(model, Llava):
        return llava_flops(model, image_size, text_length, images=images, attention=attention)
    return tower_costs(model, FLOPS, image_size, text_length, attention=attention)


# a new kind of encoder is one more line
FLOPS: list[tuple[type, Callable[..., int]]] = [
    (VisionTransformer, vision_flops),
    (TextEncoder, text_flops),
    (LanguageModel, language_model_flops),
]


def train_flops_per_example(
    model: nn.Module,
    image_size: Size | None = None,
    text_length: int | None = None,
    frozen: Sequence[str] = (),
    images: int = 1,
) -> int:
    """Returns the FLOPs of one training step divided by its batch size.

    Args:
        model: as in `forward_flops`.
        image_size: pixels; None takes the model's.
        text_length: tokens per text; None takes the model's context.
        frozen: what is not trained: towers of a two-tower model ("image", "text"), LLAVA_PARTS, or
            the "encoder" of a single one (the backward pass of its head is left out).
        images: per example, of a Llava.

    Raises:
        ValueError: for a model that has no formula here, or a part that it does not have.
    """
    forward = forward_flops(model, image_size, text_length, images=images)
    unknown = [name for name in frozen if name not in forward]
    if unknown:
        raise ValueError(
            f"frozen names parts of a {type(model).__name__} ({list(forward)}), got {unknown}"
        )
    in_order = isinstance(model, Llava)
    total, trained_before = 0, False
    for name, flops in forward.items():
        times = 3 if name not in frozen else 2 if in_order and trained_before else 1
        total += times * flops
        trained_before |= name not in frozen
    return total
