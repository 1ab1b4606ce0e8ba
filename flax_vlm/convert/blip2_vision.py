# SPDX-License-Identifier: Apache-2.0
"""EVA-01-g as BLIP-2's vision tower in the Hugging Face format (Blip2VisionModel).

It is EVA-01 without its last block, and keeps one fused bias with a row for the keys, zero in
released files. Its `pooler_output` in transformers is normed twice; ours is once, the class token
of the tokens: BLIP-2 reads the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.convert.clip import tower_config, vision_fields
from flax_vlm.convert.family import Config, Family, fill, write_size
from flax_vlm.convert.layers import conv, fused_attention, mlp, norm
from flax_vlm.convert.rules import TOKENS, Rule, Shape, rule
from flax_vlm.models.vit import VisionTransformer

# Source: transformers 5.24, Blip2VisionConfig
DEFAULTS = dict(
    hidden_size=1408,
    intermediate_size=6144,
    num_hidden_layers=39,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    qkv_bias=True,
)


def read(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    c = fill(config, DEFAULTS)
    return {**vision_fields(c), "qkv_bias": "qkv" if c["qkv_bias"] else ""}


def write(model: nn.Module) -> dict[str, Any]:
    """Returns config.json."""
    return dict(
        **tower_config(model),
        architectures=["Blip2VisionModel"],
        image_size=write_size(model.image_size),
        patch_size=write_size(model.patch_size),
        qkv_bias=model.qkv_bias == "qkv",
    )


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of BLIP-2's vision tower."""
    layer, block = "encoder.layers.{layer}", "encoder/blocks"
    attn = f"{layer}.self_attn"
    return [
        rule("embeddings.class_embedding", "cls", TOKENS),
        rule("embeddings.position_embedding", "positions", TOKENS),
        *conv("embeddings.patch_embedding", "patches"),
        *norm(f"{layer}.layer_norm1", f"{block}/ln1"),
        *fused_attention(
            f"{attn}.qkv.weight", f"{attn}.qkv.bias", f"{attn}.projection", f"{block}/attention"
        ),
        *norm(f"{layer}.layer_norm2", f"{block}/ln2"),
        *mlp(f"{layer}.mlp.fc1", f"{layer}.mlp.fc2", f"{block}/mlp"),
        *norm("post_layernorm", "encoder/norm"),
    ]


FAMILY = Family((VisionTransformer,), read, write, rules)
