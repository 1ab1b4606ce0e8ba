# SPDX-License-Identifier: Apache-2.0
"""Published language models by name: the fields of LanguageModel that each of them sets.

Source: config.json of each repository on the Hugging Face hub, as known from the papers named in
models/language_model.py and the class defaults of transformers; the parameter counts of
models/published.py hold them to it.
"""

from __future__ import annotations

from typing import Any


def _family(**shared: Any) -> Any:
    def preset(
        width: int, depth: int, mlp_dim: int, num_heads: int, num_kv_heads: int, **more: Any
    ) -> dict[str, Any]:
        size = dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)
        return {**shared, **size, "num_kv_heads": num_kv_heads, **more}

    return preset


_llama = _family(vocab_size=32000, length=4096, norm_eps=1e-5)
_smollm2 = _family(vocab_size=49152, length=8192, norm_eps=1e-5, rope_theta=100_000.0, tied=True)
_llama3 = _family(vocab_size=128256, length=131072, norm_eps=1e-5, rope_theta=500_000.0)
_mistral = _family(vocab_size=32000, length=32768, norm_eps=1e-5)
_qwen2 = _family(vocab_size=151936, length=32768, norm_eps=1e-6, rope_theta=1e6, qkv_bias="qkv")
_qwen3 = _family(
    vocab_size=151936, length=40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True, head_dim=128
)
_gemma = _family(
    vocab_size=256000,
    length=8192,
    head_dim=256,
    activation="gelu_tanh",
    norm_plus_one=True,
    embedding_scale=True,
    tied=True,
)
_gemma2 = _family(
    vocab_size=256000,
    length=8192,
    head_dim=256,
    activation="gelu_tanh",
    norm_plus_one=True,
    embedding_scale=True,
    tied=True,
    post_norms=True,
    attention_cap=50.0,
    logit_cap=30.0,
    window=4096,
    window_pattern="sf",
)
_LLAMA31_ROPE = dict(
    name="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, context=8192
)

PRESETS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _smollm2(576, 30, 1536, 9, 3),
    "SmolLM2-360M": _smollm2(960, 32, 2560, 15, 5),
    "SmolLM2-1.7B": _smollm2(2048, 24, 8192, 32, 32, rope_theta=130_000.0),
    "Llama-2-7b": _llama(4096, 32, 11008, 32, 32),
    "Llama-2-13b": _llama(5120, 40, 13824, 40, 40),
    "Llama-3.1-8B": _llama3(4096, 32, 14336, 32, 8, rope_scaling=_LLAMA31_ROPE),
    "Mistral-7B-v0.2": _mistral(4096, 32, 14336, 32, 8, rope_theta=1e6),
    "Qwen2-0.5B": _qwen2(896, 24, 4864, 14, 2, tied=True, length=131072),
    "Qwen2-7B": _qwen2(3584, 28, 18944, 28, 4, vocab_size=152064, length=131072),
    "Qwen3-0.6B": _qwen3(1024, 28, 3072, 16, 8, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 12288, 32, 8),
    "Gemma-2b": _gemma(2048, 18, 16384, 8, 1),
    "Gemma-7b": _gemma(3072, 28, 24576, 16, 16),
    "Gemma-2-2b": _gemma2(2304, 26, 9216, 8, 4),
    "Gemma-2-9b": _gemma2(3584, 42, 14336, 16, 8),
}
