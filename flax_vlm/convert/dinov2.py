# SPDX-License-Identifier: Apache-2.0
"""DINOv2, without and with registers, in the Hugging Face format.

Files fuse the two input matrices of the giant's SwiGLU, the gate first; transformers 5 has them
apart in memory, and files written with `save_original_format=False` are not read for the giant.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.convert.family import (
    Config,
    Family,
    check_value,
    fill,
    read_activation,
    write_activation,
)
from flax_vlm.convert.layers import dense, mlp, norm
from flax_vlm.convert.rules import DENSE, TOKENS, Rule, Shape, rule
from flax_vlm.convert.vit import (
    ATTENTION_RENAMES,
    attention_rules,
    embedding_rules,
    encoder_config,
    encoder_fields,
)
from flax_vlm.models.vit import VisionTransformer

# Source: transformers 5.24 and 4.46, Dinov2Config, Dinov2WithRegistersConfig
DEFAULTS = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    mlp_ratio=4.0,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    image_size=224,
    qkv_bias=True,
    layerscale_value=1.0,
    use_swiglu_ffn=False,
    num_register_tokens=4,
)
PATCH_SIZE = {False: 14, True: 16}  # the two classes differ: without registers, with them


def gated_mlp_dim(width: int, ratio: float) -> int:
    """Returns M of the giant's SwiGLU: two thirds of the plain width, rounded up to eights."""
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


def read(config: Config, tensors: Mapping[str, Shape], has_registers: bool) -> dict[str, Any]:
    """Returns the config of our model."""
    c = fill(config, {**DEFAULTS, "patch_size": PATCH_SIZE[has_registers]})
    check_value(config, "num_channels", 3)
    width, ratio, gated = c["hidden_size"], c["mlp_ratio"], c["use_swiglu_ffn"]
    return dict(
        name="vit",
        **encoder_fields(c),
        mlp_dim=gated_mlp_dim(width, ratio) if gated else int(width * ratio),
        activation="silu" if gated else read_activation(c["hidden_act"]),
        gated_mlp=gated,
        layer_scale=c["layerscale_value"],
        num_registers=c["num_register_tokens"] if has_registers else 0,
        mask_token="embeddings.mask_token" in tensors,
    )


def write(model: nn.Module, has_registers: bool) -> dict[str, Any]:
    """Returns config.json."""
    ratio = model.mlp_dim / model.width
    config = dict(
        **encoder_config(model),
        architectures=["Dinov2WithRegistersModel" if has_registers else "Dinov2Model"],
        mlp_ratio=round(ratio * 3 / 2 if model.gated_mlp else ratio),
        hidden_act="gelu" if model.gated_mlp else write_activation(model.activation),
        use_swiglu_ffn=model.gated_mlp,
        layerscale_value=model.layer_scale,
    )
    if has_registers:
        return {**config, "num_register_tokens": model.num_registers}
    return {**config, "use_mask_token": model.mask_token}


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of DINOv2."""
    layer, block = "encoder.layer.{layer}", "encoder/blocks"
    gated = tuple(f"{block}/mlp/{name}" for name in ("gate", "fc1"))
    gated_mlp = [
        Rule(f"{layer}.mlp.weights_in.weight", tuple(f"{n}/kernel" for n in gated), DENSE),
        Rule(f"{layer}.mlp.weights_in.bias", tuple(f"{n}/bias" for n in gated)),
        *dense(f"{layer}.mlp.weights_out", f"{block}/mlp/fc2"),
    ]
    plain_mlp = mlp(f"{layer}.mlp.fc1", f"{layer}.mlp.fc2", f"{block}/mlp")
    return [
        *embedding_rules(""),
        rule("embeddings.mask_token", "mask"),
        rule("embeddings.register_tokens", "registers", TOKENS),
        *norm(f"{layer}.norm1", f"{block}/ln1"),
        *attention_rules(layer, block),
        rule(f"{layer}.layer_scale1.lambda1", f"{block}/scale1"),
        *norm(f"{layer}.norm2", f"{block}/ln2"),
        *(gated_mlp if model.gated_mlp else plain_mlp),
        rule(f"{layer}.layer_scale2.lambda1", f"{block}/scale2"),
        *norm("layernorm", "encoder/norm"),
    ]


def _family(has_registers: bool, resize: str) -> Family:
    return Family(
        (VisionTransformer,),
        functools.partial(read, has_registers=has_registers),
        functools.partial(write, has_registers=has_registers),
        rules,
        renames=ATTENTION_RENAMES,
        resize=resize,
    )


FAMILY = _family(has_registers=False, resize="bicubic_torch")
WITH_REGISTERS = _family(has_registers=True, resize="bicubic_antialias")
