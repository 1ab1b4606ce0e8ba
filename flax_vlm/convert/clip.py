# SPDX-License-Identifier: Apache-2.0
"""CLIP in the Hugging Face format (CLIPModel), and the text tower's config that SigLIP shares.

Configs of OpenAI's models carry `eos_token_id` 2, which is not the id of any end of text: it says
that the largest id is pooled. Very old ones carry "text_config_dict" and "vision_config_dict",
which win over "text_config" and "vision_config".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.convert.family import (
    Config,
    Family,
    check_value,
    drops_remainder,
    fill,
    read_activation,
    read_size,
    write_activation,
    write_size,
)
from flax_vlm.convert.layers import conv, dense, norm, openai_block
from flax_vlm.convert.rules import VECTOR, Rule, Shape, rule
from flax_vlm.models.clip import CLIP

# Source: transformers 5.24 and 4.46, CLIPVisionConfig, CLIPTextConfig, CLIPConfig
VISION_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
TEXT_DEFAULTS = dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    eos_token_id=49407,
)
PROJECTION_DIM = 512
LARGEST_ID = 2  # the eos_token_id that stands for the largest id


def vision_fields(c: Config) -> dict[str, Any]:
    """Returns the fields of the image tower that the configs of CLIP and SigLIP share."""
    return dict(
        name="vit",
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        mlp_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        image_size=read_size(c["image_size"]),
        patch_size=read_size(c["patch_size"]),
        drop_remainder=drops_remainder(c["image_size"], c["patch_size"]),
        activation=read_activation(c["hidden_act"]),
        norm_eps=c["layer_norm_eps"],
    )


def text_fields(c: Config) -> dict[str, Any]:
    """Returns the fields of the text tower that the configs of CLIP and SigLIP share."""
    return dict(
        name="text_encoder",
        vocab_size=c["vocab_size"],
        length=c["max_position_embeddings"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        mlp_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        activation=read_activation(c["hidden_act"]),
        norm_eps=c["layer_norm_eps"],
    )


def tower_config(tower: nn.Module) -> dict[str, Any]:
    """Returns the keys of config.json that both towers of CLIP and SigLIP have."""
    return dict(
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        intermediate_size=tower.mlp_dim,
        num_attention_heads=tower.num_heads,
        hidden_act=write_activation(tower.activation),
        layer_norm_eps=tower.norm_eps,
    )


def vision_config(tower: nn.Module) -> dict[str, Any]:
    """Returns the vision_config of CLIP and SigLIP."""
    return dict(
        **tower_config(tower),
        image_size=write_size(tower.image_size),
        patch_size=write_size(tower.patch_size),
        num_channels=3,
    )


def text_config(tower: nn.Module) -> dict[str, Any]:
    """Returns the text_config of CLIP and SigLIP."""
    return dict(
        **tower_config(tower),
        vocab_size=tower.vocab_size,
        max_position_embeddings=tower.length,
    )


def read(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    vision = fill(config.get("vision_config_dict") or config.get("vision_config"), VISION_DEFAULTS)
    text = fill(config.get("text_config_dict") or config.get("text_config"), TEXT_DEFAULTS)
    check_value(config.get("vision_config"), "num_channels", 3)
    eos = text["eos_token_id"]
    return dict(
        name="clip",
        image=vision_fields(vision),
        text={**text_fields(text), "eos_id": None if eos == LARGEST_ID else eos},
        embed_dim=fill(config, dict(projection_dim=PROJECTION_DIM))["projection_dim"],
    )


def write(model: nn.Module) -> dict[str, Any]:
    """Returns config.json."""
    eos = LARGEST_ID if model.text.eos_id is None else model.text.eos_id
    width = model.image.embed_dim
    return dict(
        architectures=["CLIPModel"],
        projection_dim=width,
        vision_config={
            **vision_config(model.image),
            "model_type": "clip_vision_model",
            "projection_dim": width,
        },
        text_config={
            **text_config(model.text),
            "model_type": "clip_text_model",
            "projection_dim": width,
            "eos_token_id": eos,
        },
    )


def text_rules() -> list[Rule]:
    """Returns the rules of the text tower of CLIP and SigLIP, without its head."""
    tensor, leaf = "text_model", "text"
    return [
        rule(f"{tensor}.embeddings.token_embedding.weight", f"{leaf}/embedding/embedding"),
        rule(f"{tensor}.embeddings.position_embedding.weight", f"{leaf}/positions"),
        *openai_block(f"{tensor}.encoder.layers.{{layer}}", f"{leaf}/encoder/blocks"),
        *norm(f"{tensor}.final_layer_norm", f"{leaf}/encoder/norm"),
    ]


def vision_rules(tensor: str = "vision_model") -> list[Rule]:
    """Returns the rules of the image tower, without its head.

    Args:
        tensor: prefix of its tensors.
    """
    leaf = "image"
    return [
        rule(f"{tensor}.embeddings.class_embedding", f"{leaf}/cls", VECTOR),
        *conv(f"{tensor}.embeddings.patch_embedding", f"{leaf}/patches"),
        rule(f"{tensor}.embeddings.position_embedding.weight", f"{leaf}/positions"),
        *norm(f"{tensor}.pre_layrnorm", f"{leaf}/ln_pre"),  # spelled so in the files
        *openai_block(f"{tensor}.encoder.layers.{{layer}}", f"{leaf}/encoder/blocks"),
        *norm(f"{tensor}.post_layernorm", f"{leaf}/encoder/norm"),
    ]


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of CLIP."""
    return [
        *vision_rules(),
        *dense("visual_projection", "image/head"),
        *text_rules(),
        *dense("text_projection", "text/head"),
        rule("logit_scale", "logit_scale"),
    ]


FAMILY = Family((CLIP,), read, write, rules)
