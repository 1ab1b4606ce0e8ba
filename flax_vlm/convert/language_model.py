# SPDX-License-Identifier: Apache-2.0
"""Language models in the Hugging Face format: LLaMA (Vicuna, SmolLM2), Mistral, Qwen2, Qwen3, Gemma
and Gemma 2, the *ForCausalLM classes.

All of them share one table of tensors; what tells them apart is their config.json: which keys stand
for fields, and what the class says where a key is missing (`DEFAULTS`). Both generations of configs
are read: rope_theta and rope_scaling up to transformers 4, rope_parameters since 5; both are
written. A model's `window_pattern` is read from layer_types, or from max_window_layers (Qwen).

Not here: LongRoPE, rotary embedding of a part of the head, attention in both directions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.convert.family import (
    Config,
    Family,
    fill,
    read_activation,
    write_activation,
)
from flax_vlm.convert.layers import attention, dense, norm
from flax_vlm.convert.rope import read_rope, write_rope
from flax_vlm.convert.rules import DENSE, Ignored, Rule, Shape, rule
from flax_vlm.models.language_model import LanguageModel

# Source: transformers 5.24 and 4.46, the Config class of each model_type.
_SHARED = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=False,
    sliding_window=None,
    attention_bias=False,
    mlp_bias=False,
)
_QWEN = dict(
    vocab_size=151936,
    intermediate_size=22016,
    max_position_embeddings=32768,
    num_key_value_heads=32,
    sliding_window=4096,
)
_GEMMA = dict(
    vocab_size=256000,
    max_position_embeddings=8192,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _SHARED
    | dict(vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048),
    "mistral": _SHARED
    | dict(
        vocab_size=32000,
        intermediate_size=14336,
        max_position_embeddings=131072,
        num_key_value_heads=8,
        sliding_window=4096,
    ),
    "qwen2": _SHARED | _QWEN,
    "qwen3": _SHARED | _QWEN | dict(head_dim=128),
    "gemma": _SHARED
    | _GEMMA
    | dict(
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
    ),
    "gemma2": _SHARED
    | _GEMMA
    | dict(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read_fields(model_type: str, config: Config) -> dict[str, Any]:
    """Returns the fields of a LanguageModel; also for the text_config of larger models.

    Args:
        model_type: a key of DEFAULTS.
        config: config.json, whose missing keys take the defaults of the class.
    """
    c = fill(config, DEFAULTS[model_type])
    is_gemma = model_type.startswith("gemma")
    activation = config.get("hidden_activation") or c["hidden_act"]
    if is_gemma:
        if config.get("use_bidirectional_attention"):
            raise ValueError("use_bidirectional_attention of config.json must be false here")
        # configs of the first Gemma say "gelu" and mean its tanh form
        activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    window, pattern = _read_window(model_type, config, c)
    head_dim = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    scalar = c.get("query_pre_attn_scalar", head_dim)
    return dict(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        mlp_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=head_dim,
        length=c["max_position_embeddings"],
        activation=read_activation(activation),
        norm_eps=c["rms_norm_eps"],
        norm_plus_one=is_gemma,
        post_norms=model_type == "gemma2",
        qkv_bias="qkv" if model_type == "qwen2" or c["attention_bias"] else "",
        o_bias=bool(c["attention_bias"]) and model_type != "qwen2",
        mlp_bias=bool(c["mlp_bias"]),
        qk_norm=model_type == "qwen3",
        attention_scale=None if scalar == head_dim else scalar**-0.5,
        attention_cap=c.get("attn_logit_softcapping"),
        logit_cap=c.get("final_logit_softcapping"),
        window=window,
        window_pattern=pattern,
        embedding_scale=is_gemma,
        tied=c["tie_word_embeddings"],
        **read_rope(config, c["max_position_embeddings"]),
    )


def _read_window(model_type: str, config: Config, c: Config) -> tuple[int | None, str]:
    window, depth = c["sliding_window"], c["num_hidden_layers"]
    if model_type in ("llama", "gemma"):
        return None, "s"  # their classes have no window
    if model_type.startswith("qwen") and not config.get("use_sliding_window", False):
        return None, "s"
    kinds = config.get("layer_types")
    if model_type == "mistral":
        letters = "s"
    elif kinds is not None:
        letters = "".join({SLIDING: "s", FULL: "f"}[kind] for kind in kinds)
    elif model_type == "gemma2":
        letters = "sf"
    else:
        first = config.get("max_window_layers", 28)
        letters = "".join("s" if i >= first else "f" for i in range(depth))
    if window is None or "s" not in letters:
        return None, "s"
    return window, _shortest_pattern(letters, depth)


def _shortest_pattern(letters: str, depth: int) -> str:
    row = (letters * depth)[:depth]
    lengths = range(1, depth + 1)
    return next(row[:n] for n in lengths if (row[:n] * depth)[:depth] == row)


def read(model_type: str, config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    return dict(name="language_model", **read_fields(model_type, config))


def write_fields(model_type: str, model: LanguageModel) -> dict[str, Any]:
    """Returns the keys of config.json, or of the text_config of a larger model."""
    config = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        intermediate_size=model.mlp_dim,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.length,
        hidden_act=write_activation(model.activation),
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied,
        **write_rope(model.rope_theta, model.rope_scaling),
    )
    if model_type.startswith("gemma"):
        config["hidden_activation"] = config["hidden_act"]
    if model_type in ("llama", "qwen3", "gemma", "gemma2"):
        config["attention_bias"] = model.o_bias
    if model_type == "llama":
        config["mlp_bias"] = model.mlp_bias
    if model_type == "gemma2":
        scale = model.head_dim**-0.5 if model.attention_scale is None else model.attention_scale
        scalar = scale**-2
        config |= dict(
            query_pre_attn_scalar=round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
            attn_logit_softcapping=model.attention_cap,
            final_logit_softcapping=model.logit_cap,
        )
    return {**config, **_write_window(model_type, model)}


def _write_window(model_type: str, model: LanguageModel) -> dict[str, Any]:
    if model_type in ("llama", "gemma"):
        return {}
    if model_type == "mistral":
        return dict(sliding_window=model.window)
    letters = (model.window_pattern * model.depth)[: model.depth]
    if model.window is None:
        letters = "f" * model.depth
    kinds = [SLIDING if letter == "s" else FULL for letter in letters]
    config = dict(sliding_window=model.window, layer_types=kinds)
    return (
        config
        if model_type == "gemma2"
        else {
            **config,
            "use_sliding_window": model.window is not None,
            "max_window_layers": letters.find("s") if "s" in letters else model.depth,
        }
    )


def write(model_type: str, model: nn.Module) -> dict[str, Any]:
    """Returns config.json."""
    return dict(architectures=[CLASSES[model_type]], **write_fields(model_type, model))


def decoder_rules(
    model: LanguageModel, tensor: str = "model.", head: str = "", leaf: str = ""
) -> list[Rule]:
    """Returns the table of all families.

    Args:
        model: the language model.
        tensor: prefix of the decoder's tensors.
        head: prefix of lm_head.
        leaf: prefix of the leaves' paths, "language_model/" in a larger model.
    """
    layer, block = f"{tensor}layers.{{layer}}", f"{leaf}blocks"
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    norms = {"post_attention_layernorm": "norm2"}
    if model.post_norms:  # the first of these names means another norm then
        norms = {
            "post_attention_layernorm": "post_norm1",
            "pre_feedforward_layernorm": "norm2",
            "post_feedforward_layernorm": "post_norm2",
        }
    return [
        rule(f"{tensor}embed_tokens.weight", f"{leaf}embedding/embedding"),
        *norm(f"{layer}.input_layernorm", f"{block}/norm1"),
        *attention([f"{attn}.{n}_proj" for n in "qkv"], f"{attn}.o_proj", f"{block}/attention"),
        *norm(f"{attn}.q_norm", f"{block}/attention/q_norm"),
        *norm(f"{attn}.k_norm", f"{block}/attention/k_norm"),
        *(r for name, ours in norms.items() for r in norm(f"{layer}.{name}", f"{block}/{ours}")),
        *dense(f"{mlp}.gate_proj", f"{block}/mlp/gate"),
        *dense(f"{mlp}.up_proj", f"{block}/mlp/fc1"),
        *dense(f"{mlp}.down_proj", f"{block}/mlp/fc2"),
        *norm(f"{tensor}norm", f"{leaf}norm"),
        rule(f"{head}lm_head.weight", f"{leaf}lm_head/kernel", DENSE),
    ]


IGNORED = (
    Ignored(r".*rotary_emb\.inv_freq", "a buffer of old files: it follows from the config"),
    Ignored(
        "lm_head.weight", "the output is tied to the embedding", same_as="model.embed_tokens.weight"
    ),
)
# files of the bare decoder (LlamaModel ...)
RENAMES = ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),)

FAMILIES: dict[str, Family] = {
    model_type: Family(
        (LanguageModel,),
        functools.partial(read, model_type),
        functools.partial(write, model_type),
        decoder_rules,
        renames=RENAMES,
        ignored=IGNORED,
    )
    for model_type in DEFAULTS
}
