# SPDX-License-Identifier: Apache-2.0
"""EVA-02-CLIP and EVA-01-g with the tensor names of timm: the vision tower, and the whole CLIP.

"timm" is a folder of timm: config.json names an architecture, and `model_args` may change its
sizes. "open_clip" is a folder of open_clip: open_clip_config.json and open_clip_model.safetensors,
where the vision tower is `visual.trunk` and the text tower that of CLIP with the exact GELU.

Papers: EVA-02, Fang et al. 2023, arXiv:2303.11331; EVA-CLIP, Sun et al. 2023, arXiv:2303.15389.
Not held: EVA-02-E (norms after the sub-layers) and the text towers of other libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.build import lookup
from flax_vlm.convert.family import Config, Family, check_kind, fill, read_size, write_size
from flax_vlm.convert.layers import attention, conv, dense, fused_attention, mlp, norm
from flax_vlm.convert.rules import (
    HEADS,
    HEADS_BIAS,
    MERGE_HEADS,
    TOKENS,
    Ignored,
    Rule,
    Shape,
    rule,
)
from flax_vlm.models.clip import CLIP
from flax_vlm.models.vit import VisionTransformer

EVA01 = dict(mlp_ratio=6144 / 1408, activation="gelu_erf", qkv_bias="qv", norm_eps=1e-6)
EVA02 = dict(
    mlp_ratio=4 * 2 / 3,
    activation="silu",
    gated_mlp=True,
    sub_norm=True,
    rotary_grid=(16, 16),
    qkv_bias="qv",
    norm_eps=1e-6,
)


def _size(
    width: int, depth: int, num_heads: int, patch_size: int, image_size: int
) -> dict[str, Any]:
    return dict(
        width=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        image_size=image_size,
    )


# Source: timm 1.0.31, models/eva.py. M is int(mlp_ratio D), for other widths too
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "eva_giant_patch14_clip_224": {**EVA01, **_size(1408, 40, 16, 14, 224)},
    "eva02_base_patch16_clip_224": {**EVA02, **_size(768, 12, 12, 16, 224)},
    "eva02_large_patch14_clip_224": {**EVA02, **_size(1024, 24, 16, 14, 224)},
    "eva02_large_patch14_clip_336": {**EVA02, **_size(1024, 24, 16, 14, 336)},
}
# names of timm's arguments: ours
ARGUMENTS = dict(
    embed_dim="width",
    depth="depth",
    num_heads="num_heads",
    mlp_ratio="mlp_ratio",
    img_size="image_size",
    patch_size="patch_size",
)


def vision_fields(name: str, arguments: Config) -> dict[str, Any]:
    """Returns the fields of the vision tower of a timm architecture.

    Args:
        name: a key of ARCHITECTURES.
        arguments: of timm's constructor, as `model_args` has them.

    Raises:
        ValueError: for an unknown architecture or argument.
    """
    fields = dict(lookup(ARCHITECTURES, name, "architecture (of timm)"))
    for key, value in arguments.items():
        ours = lookup(ARGUMENTS, key, "key of model_args")
        check_kind(key, value, fields[ours])
        fields[ours] = value
    fields["mlp_dim"] = int(fields["width"] * fields.pop("mlp_ratio"))
    sizes = {key: read_size(fields[key]) for key in ("image_size", "patch_size")}
    return {**fields, **sizes}


def _architecture(tower: nn.Module) -> tuple[str, dict[str, Any]]:
    """Returns the architecture that a tower is, or is with other sizes, and those sizes."""
    first = "eva02_base_patch16_clip_224" if tower.gated_mlp else "eva_giant_patch14_clip_224"
    for name in ARCHITECTURES:
        if all(getattr(tower, key) == value for key, value in vision_fields(name, {}).items()):
            return name, {}
    return first, dict(
        embed_dim=tower.width,
        depth=tower.depth,
        num_heads=tower.num_heads,
        img_size=write_size(tower.image_size),
        patch_size=write_size(tower.patch_size),
        mlp_ratio=(tower.mlp_dim + 0.5) / tower.width,  # timm rounds down
    )


def read_timm(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    c = fill(config, dict(architecture="", num_classes=0))
    fill(config.get("model_args"), {})
    fields = vision_fields(c["architecture"], config.get("model_args") or {})
    return dict(name="vit", **fields, embed_dim=c["num_classes"] or None)


def write_timm(model: nn.Module) -> dict[str, Any]:
    """Returns config.json."""
    name, arguments = _architecture(model)
    config = dict(architecture=name, num_classes=model.embed_dim or 0, global_pool="token")
    config |= {"num_features": model.width, "pretrained_cfg": {"architecture": name}}
    return {**config, "model_args": arguments} if arguments else config


def vision_rules(tensor: str, leaf: str) -> list[Rule]:
    """Returns the rules of the vision tower.

    Args:
        tensor: in front of every tensor, "" or "visual.trunk.".
        leaf: in front of every leaf, "" or "image/".
    """
    layer, block = f"{tensor}blocks.{{layer}}", f"{leaf}encoder/blocks"
    attn, inner = f"{layer}.attn", f"{block}/attention"
    return [
        rule(f"{tensor}cls_token", f"{leaf}cls", TOKENS),
        rule(f"{tensor}pos_embed", f"{leaf}positions", TOKENS),
        *conv(f"{tensor}patch_embed.proj", f"{leaf}patches"),
        *norm(f"{layer}.norm1", f"{block}/ln1"),
        *norm(f"{attn}.norm", f"{inner}/norm"),
        *norm(f"{layer}.norm2", f"{block}/ln2"),
        *norm(f"{layer}.mlp.norm", f"{block}/mlp/norm"),
        *dense(f"{layer}.mlp.fc2", f"{block}/mlp/fc2"),
        *norm(f"{tensor}norm", f"{leaf}encoder/norm"),
        *dense(f"{tensor}head", f"{leaf}head"),
    ]


def eva02_rules(tensor: str, leaf: str) -> list[Rule]:
    """Returns the rules that are EVA-02's alone: q, k and v apart, and a gated MLP."""
    layer, block = f"{tensor}blocks.{{layer}}", f"{leaf}encoder/blocks"
    attn = f"{layer}.attn"
    return [
        *attention([f"{attn}.{n}_proj" for n in "qkv"], f"{attn}.proj", f"{block}/attention"),
        *dense(f"{layer}.mlp.fc1_g", f"{block}/mlp/gate"),
        *dense(f"{layer}.mlp.fc1_x", f"{block}/mlp/fc1"),
    ]


def eva01_rules(tensor: str, leaf: str) -> list[Rule]:
    """Returns the rules that are EVA-01's alone: q, k and v in one tensor, and a plain MLP."""
    layer, block = f"{tensor}blocks.{{layer}}", f"{leaf}encoder/blocks"
    attn, inner = f"{layer}.attn", f"{block}/attention"
    return [
        Rule(f"{attn}.qkv.weight", tuple(f"{inner}/{name}/kernel" for name in "qkv"), HEADS),
        rule(f"{attn}.q_bias", f"{inner}/q/bias", HEADS_BIAS),
        rule(f"{attn}.v_bias", f"{inner}/v/bias", HEADS_BIAS),
        *dense(f"{attn}.proj", f"{inner}/o", MERGE_HEADS),
        *dense(f"{layer}.mlp.fc1", f"{block}/mlp/fc1"),
    ]


def tower_rules(tower: nn.Module, tensor: str, leaf: str) -> list[Rule]:
    """Returns the whole table of a vision tower."""
    own = eva02_rules if tower.gated_mlp else eva01_rules
    return [*vision_rules(tensor, leaf), *own(tensor, leaf)]


# Source: open_clip 3.3.0, CLIPTextCfg and constants.py
OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]
TEXT_DEFAULTS = dict(
    context_length=77, vocab_size=49408, width=512, heads=8, layers=12, mlp_ratio=4.0
)


def read_open_clip(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model.

    Raises:
        ValueError: if the vision tower is not one of timm's EVA.
    """
    parts = fill(config.get("model_cfg"), dict(embed_dim=512, quick_gelu=False))
    model = config["model_cfg"] or {}
    vision, text = model.get("vision_cfg"), fill(model.get("text_cfg"), TEXT_DEFAULTS)
    name = fill(vision, dict(timm_model_name=""))["timm_model_name"]
    if not name:
        raise ValueError(
            "of open_clip's models those with an EVA tower of timm are supported, got vision_cfg "
            f"{vision}; other CLIP models are read from folders of transformers"
        )
    arguments = {"img_size": vision["image_size"]} if "image_size" in vision else {}
    fields = vision_fields(name, arguments)
    return dict(
        name="clip",
        image=dict(**fields, name="vit", pre_norm=False, patch_bias=True, head_bias=True),
        text=dict(
            vocab_size=text["vocab_size"],
            length=text["context_length"],
            width=text["width"],
            depth=text["layers"],
            mlp_dim=int(text["width"] * text["mlp_ratio"]),
            num_heads=text["heads"],
            activation="quick_gelu" if parts["quick_gelu"] else "gelu_erf",
        ),
        embed_dim=parts["embed_dim"],
    )


def write_open_clip(model: nn.Module) -> dict[str, Any]:
    """Returns open_clip_config.json."""
    name, _ = _architecture(model.image)
    text = dict(
        context_length=model.text.length,
        vocab_size=model.text.vocab_size,
        width=model.text.width,
        heads=model.text.num_heads,
        layers=model.text.depth,
        mlp_ratio=model.text.mlp_dim / model.text.width,
    )
    vision = dict(
        image_size=write_size(model.image.image_size),
        timm_model_name=name,
        timm_model_pretrained=False,
        timm_pool="token",
        timm_proj=None,
    )
    config = dict(embed_dim=model.image.embed_dim, vision_cfg=vision, text_cfg=text)
    if model.text.activation == "quick_gelu":
        config["quick_gelu"] = True
    return {
        "model_cfg": {**config, "custom_text": True},
        "preprocess_cfg": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
    }


def open_clip_rules(model: nn.Module) -> list[Rule]:
    """Returns the table of the whole CLIP."""
    layer, block = "text.transformer.resblocks.{layer}", "text/encoder/blocks"
    attn = f"{layer}.attn"
    return [
        *tower_rules(model.image, "visual.trunk.", "image/"),
        rule("text.token_embedding.weight", "text/embedding/embedding"),
        rule("text.positional_embedding", "text/positions"),
        *norm(f"{layer}.ln_1", f"{block}/ln1"),
        *fused_attention(
            f"{attn}.in_proj_weight",
            f"{attn}.in_proj_bias",
            f"{attn}.out_proj",
            f"{block}/attention",
        ),
        *norm(f"{layer}.ln_2", f"{block}/ln2"),
        *mlp(f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj", f"{block}/mlp"),
        *norm("text.ln_final", "text/encoder/norm"),
        rule("text.text_projection", "text/head/kernel"),
        rule("logit_scale", "logit_scale"),
    ]


TIMM = Family((VisionTransformer,), read_timm, write_timm, lambda model: tower_rules(model, "", ""))
OPEN_CLIP = Family(
    (CLIP,),
    read_open_clip,
    write_open_clip,
    open_clip_rules,
    ignored=(Ignored(r"text\.attn_mask", "a buffer: the causal mask"),),
    config_file="open_clip_config.json",
    weights_file="open_clip_model.safetensors",
)
