# SPDX-License-Identifier: Apache-2.0
"""SigLIP in the Hugging Face format (SiglipModel); SigLIP 2 of fixed resolution is the same.

Configs of SigLIP leave out sizes of the base model, so that class defaults fill much of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.convert.clip import text_config, text_fields, text_rules, vision_config, vision_fields
from flax_vlm.convert.family import Config, Family, check_value, fill
from flax_vlm.convert.layers import conv, dense, fused_attention, mlp, norm, openai_block
from flax_vlm.convert.rules import SCALAR, Rule, Shape, rule
from flax_vlm.models.siglip import SigLIP

# Source: transformers 5.24 and 4.46, SiglipVisionConfig, SiglipTextConfig
VISION_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=16,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
TEXT_DEFAULTS = dict(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=64,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    projection_size=None,
)


def read_text(config: Config | None) -> dict[str, Any]:
    """Returns the fields of the text tower, with the width of the embedding."""
    text = fill(config, TEXT_DEFAULTS)
    return {**text_fields(text), "embed_dim": text["projection_size"] or text["hidden_size"]}


def read(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    given = config.get("vision_config")
    vision = fill(given, VISION_DEFAULTS)
    check_value(given, "num_channels", 3)
    check_value(given, "vision_use_head", True)
    text = read_text(config.get("text_config"))
    return dict(name="siglip", image=vision_fields(vision), text=text, embed_dim=text["embed_dim"])


def write_text(tower: nn.Module, model_type: str) -> dict[str, Any]:
    """Returns the text_config."""
    return {
        **text_config(tower),
        "model_type": model_type,
        "projection_size": tower.embed_dim,
    }


def write(model: nn.Module) -> dict[str, Any]:
    """Returns config.json."""
    return dict(
        architectures=["SiglipModel"],
        vision_config={**vision_config(model.image), "model_type": "siglip_vision_model"},
        text_config=write_text(model.text, "siglip_text_model"),
    )


def vision_rules(tensor: str = "vision_model") -> list[Rule]:
    """Returns the rules of the image tower without the patch embedding, which NaFlex has otherwise.

    Args:
        tensor: prefix of its tensors.
    """
    leaf = "image"
    head, pool = f"{tensor}.head", f"{leaf}/pool"
    return [
        rule(f"{tensor}.embeddings.position_embedding.weight", f"{leaf}/positions"),
        *openai_block(f"{tensor}.encoder.layers.{{layer}}", f"{leaf}/encoder/blocks"),
        *norm(f"{tensor}.post_layernorm", f"{leaf}/encoder/norm"),
        rule(f"{head}.probe", f"{pool}/probe"),
        *fused_attention(
            f"{head}.attention.in_proj_weight",
            f"{head}.attention.in_proj_bias",
            f"{head}.attention.out_proj",
            f"{pool}/attention",
        ),
        *norm(f"{head}.layernorm", f"{pool}/norm"),
        *mlp(f"{head}.mlp.fc1", f"{head}.mlp.fc2", f"{pool}/mlp"),
    ]


def shared_rules() -> list[Rule]:
    """Returns the table of SigLIP without the patch embedding."""
    return [
        *vision_rules(),
        *text_rules(),
        *dense("text_model.head", "text/head"),
        rule("logit_scale", "logit_scale", SCALAR),
        rule("logit_bias", "logit_bias", SCALAR),
    ]


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of SigLIP."""
    return [*conv("vision_model.embeddings.patch_embedding", "image/patches"), *shared_rules()]


FAMILY = Family((SigLIP,), read, write, rules)
