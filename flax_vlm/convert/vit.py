# SPDX-License-Identifier: Apache-2.0
"""ViT in the Hugging Face format: ViTModel, with and without pooler, and ViTForImageClassification.

Files use the names of transformers 4; transformers 5 has others in memory, and writes those with
`save_original_format=False`: they are read too.
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
from flax_vlm.convert.layers import attention, conv, dense, mlp, norm
from flax_vlm.convert.rules import TOKENS, Rule, Shape, rule
from flax_vlm.models.vit import VisionTransformer, ViTClassifier

# Source: transformers 5.24 and 4.46, ViTConfig
DEFAULTS = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    image_size=224,
    patch_size=16,
    qkv_bias=True,
)


def encoder_fields(c: Config) -> dict[str, Any]:
    """Returns the fields of a VisionTransformer that ViT and DINOv2 configs share."""
    return dict(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        image_size=read_size(c["image_size"]),
        patch_size=read_size(c["patch_size"]),
        drop_remainder=drops_remainder(c["image_size"], c["patch_size"]),
        norm_eps=c["layer_norm_eps"],
        qkv_bias="qkv" if c["qkv_bias"] else "",
    )


def encoder_config(model: nn.Module) -> dict[str, Any]:
    """Returns the keys of config.json that ViT and DINOv2 share."""
    return dict(
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        image_size=write_size(model.image_size),
        patch_size=write_size(model.patch_size),
        layer_norm_eps=model.norm_eps,
        qkv_bias=model.qkv_bias == "qkv",
        num_channels=3,
    )


def read(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    c = fill(config, DEFAULTS)
    check_value(config, "num_channels", 3)
    spec = dict(
        name="vit",
        **encoder_fields(c),
        mlp_dim=c["intermediate_size"],
        activation=read_activation(c["hidden_act"]),
        mask_token=any(name.endswith("embeddings.mask_token") for name in tensors),
    )
    if "classifier.weight" in tensors:
        # class names are kept by their number; without names there are two, as in transformers
        fill(config.get("id2label"), {})
        return {**spec, "num_classes": len(config.get("id2label") or "ab")}
    if "pooler.dense.weight" in tensors:
        check_value(config, "pooler_act", "tanh")
        width = fill(config, dict(pooler_output_size=None))["pooler_output_size"]
        return {**spec, "embed_dim": width or c["hidden_size"], "head_tanh": True}
    return spec


def write(model: nn.Module) -> dict[str, Any]:
    """Returns config.json."""
    config = dict(
        **encoder_config(model),
        architectures=["ViTModel"],
        intermediate_size=model.mlp_dim,
        hidden_act=write_activation(model.activation),
    )
    if not isinstance(model, ViTClassifier):
        return {**config, "pooler_output_size": model.embed_dim or model.width}
    labels = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
    config |= {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    return {**config, "architectures": ["ViTForImageClassification"]}


def embedding_rules(prefix: str) -> list[Rule]:
    """Returns the rules of the embeddings that ViT and DINOv2 share."""
    return [
        *conv(f"{prefix}embeddings.patch_embeddings.projection", "patches"),
        rule(f"{prefix}embeddings.cls_token", "cls", TOKENS),
        rule(f"{prefix}embeddings.position_embeddings", "positions", TOKENS),
    ]


def attention_rules(tensor: str, leaf: str) -> list[Rule]:
    """Returns the rules of an attention layer of ViT and DINOv2."""
    qkv = [f"{tensor}.attention.attention.{name}" for name in ("query", "key", "value")]
    return attention(qkv, f"{tensor}.attention.output.dense", f"{leaf}/attention")


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of ViT."""
    is_classifier = isinstance(model, ViTClassifier)
    prefix = "vit." if is_classifier else ""
    layer, block = f"{prefix}encoder.layer.{{layer}}", "encoder/blocks"
    return [
        *embedding_rules(prefix),
        rule(f"{prefix}embeddings.mask_token", "mask", TOKENS),
        *norm(f"{layer}.layernorm_before", f"{block}/ln1"),
        *attention_rules(layer, block),
        *norm(f"{layer}.layernorm_after", f"{block}/ln2"),
        *mlp(f"{layer}.intermediate.dense", f"{layer}.output.dense", f"{block}/mlp"),
        *norm(f"{prefix}layernorm", "encoder/norm"),
        *dense("classifier" if is_classifier else "pooler.dense", "head"),
    ]


# attention of transformers 5 in memory
ATTENTION_RENAMES = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
RENAMES = (
    (r"^(vit\.)?layers\.", r"\1encoder.layer."),
    *ATTENTION_RENAMES,
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

FAMILY = Family((VisionTransformer, ViTClassifier), read, write, rules, renames=RENAMES)
