# SPDX-License-Identifier: Apache-2.0
"""Sizes of transformers by name: "B", and with a patch size "B/16"."""

from __future__ import annotations

from flax_vlm.build import lookup


def _size(width: int, depth: int, mlp_dim: int, num_heads: int) -> dict[str, int]:
    return dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)


# Source: big_vision `models/vit.py` at 0127fb6, decode_variant. Papers: B, L, H ViT; Ti DeiT
# (arXiv:2012.12877); g, G arXiv:2106.04560, table 2; e PaLI (arXiv:2209.06794); So400m
# arXiv:2305.13035; g-opt SigLIP 2 (arXiv:2502.14786).
VARIANTS: dict[str, dict[str, int]] = {
    "mu": _size(32, 1, 128, 2),
    "Ti": _size(192, 12, 768, 3),
    "S": _size(384, 12, 1536, 6),
    "M": _size(512, 12, 2048, 8),
    "B": _size(768, 12, 3072, 12),
    "L": _size(1024, 24, 4096, 16),
    "So400m": _size(1152, 27, 4304, 16),
    "H": _size(1280, 32, 5120, 16),
    "g": _size(1408, 40, 6144, 16),
    "g-opt": _size(1536, 40, 6144, 16),
    "G": _size(1664, 48, 8192, 16),
    "G-opt": _size(1536, 48, 8192, 16),
    "e": _size(1792, 56, 15360, 16),
}


def decode_variant(variant: str) -> dict[str, int]:
    """Returns the fields that "B/16" stands for: width, depth, mlp_dim, num_heads, patch_size.

    Without "/16" there is no patch_size.

    Raises:
        ValueError: if the size is not in VARIANTS or the patch size is not a number.
    """
    size, _, patch = variant.partition("/")
    fields = dict(lookup(VARIANTS, size, "variant"))
    if not patch:
        return fields
    if not patch.isdigit():
        raise ValueError(f'a variant is a size and a patch size such as "B/16", got {variant!r}')
    return {**fields, "patch_size": int(patch)}
