# SPDX-License-Identifier: Apache-2.0
"""Initialisers of the transformers, one scheme per family of papers.

    "vit"         big_vision `models/vit.py` and `text_transformer.py` (ViT, SigLIP): xavier uniform
                  for attention and MLP, MLP biases N(0, 1e-6^2), positions and token embedding N(0,
                  1/D), class token 0, patches and head lecun normal.
    "vit_small" as "vit", but positions N(0, 2^2): of a patch it is then kept where it lies, and not
                only what it shows. For towers of few patches that are trained from nothing.
    "clip_image"  CLIP's vision tower: class token, positions and projection N(0, 1/D); the rest is
                  torch's default: fused qkv xavier uniform, other kernels U(-1/sqrt(fan_in),
                  1/sqrt(fan_in)).
    "clip_text"   CLIP's text tower: embedding N(0, 0.02^2), positions N(0, 0.01^2), qkv N(0, 1/D),
                  attention output and MLP output N(0, 1/(2 D depth)), MLP input N(0, 1/(2 D)),
                  projection N(0, 1/D).
    "language_model"  N(0, 0.02^2) for every kernel and the embedding, biases 0: initializer_range
                  of LLaMA, Qwen and Gemma.

Differs from CLIP: MLP biases start at 0 where torch draws them from U(-1/sqrt(fan_in),
1/sqrt(fan_in)).
Sources: big_vision 0127fb6; open_clip 89fb801 `transformer.py` (the same as openai/CLIP).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flax import linen as nn

Initializer = nn.initializers.Initializer
normal, zeros = nn.initializers.normal, nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Init:
    """The initialisers of one tower, by the part that they fill."""

    attention_in: Initializer
    attention_out: Initializer
    mlp_in: Initializer
    mlp_out: Initializer
    mlp_bias: Initializer
    patches: Initializer
    class_token: Initializer
    positions: Initializer
    embedding: Initializer
    head: Initializer


def init_vit(width: int, depth: int) -> Init:
    """Returns big_vision's scheme for a tower of the given width."""
    xavier = nn.initializers.xavier_uniform()
    return Init(
        attention_in=xavier,
        attention_out=xavier,
        mlp_in=xavier,
        mlp_out=xavier,
        mlp_bias=normal(1e-6),
        patches=nn.initializers.lecun_normal(),
        class_token=zeros,
        positions=normal(width**-0.5),
        embedding=normal(width**-0.5),
        head=nn.initializers.lecun_normal(),
    )


def init_vit_small(width: int, depth: int) -> Init:
    """Returns big_vision's scheme with positions that are as large as what patches show."""
    return dataclasses.replace(init_vit(width, depth), positions=normal(2.0))


def init_clip_image(width: int, depth: int) -> Init:
    """Returns the scheme of CLIP's vision tower."""
    # U(-1/sqrt(fan_in), 1/sqrt(fan_in)) has the variance 1 / (3 fan_in)
    torch_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    # torch draws q, k, v as one [D, 3 D] kernel: 2 / (D + 3 D)
    fused_xavier = nn.initializers.variance_scaling(0.5, "fan_in", "uniform")
    return Init(
        attention_in=fused_xavier,
        attention_out=torch_default,
        mlp_in=torch_default,
        mlp_out=torch_default,
        mlp_bias=zeros,
        patches=torch_default,
        class_token=normal(width**-0.5),
        positions=normal(width**-0.5),
        embedding=normal(width**-0.5),
        head=normal(width**-0.5),
    )


def init_clip_text(width: int, depth: int) -> Init:
    """Returns the scheme of CLIP's text tower."""
    output = normal(width**-0.5 * (2 * depth) ** -0.5)
    return Init(
        attention_in=normal(width**-0.5),
        attention_out=output,
        mlp_in=normal((2 * width) ** -0.5),
        mlp_out=output,
        mlp_bias=zeros,
        patches=normal(width**-0.5),
        class_token=normal(width**-0.5),
        positions=normal(0.01),
        embedding=normal(0.02),
        head=normal(width**-0.5),
    )


def init_language_model(width: int, depth: int) -> Init:
    """Returns the scheme of a language model."""
    kernel = normal(0.02)
    return Init(
        attention_in=kernel,
        attention_out=kernel,
        mlp_in=kernel,
        mlp_out=kernel,
        mlp_bias=zeros,
        patches=kernel,
        class_token=zeros,
        positions=kernel,
        embedding=kernel,
        head=kernel,
    )


INITS: dict[str, Callable[[int, int], Init]] = {
    "vit": init_vit,
    "vit_small": init_vit_small,
    "clip_image": init_clip_image,
    "clip_text": init_clip_text,
    "language_model": init_language_model,
}
