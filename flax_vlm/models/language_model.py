# SPDX-License-Identifier: Apache-2.0
"""The decoder-only language model: LLaMA, Vicuna, Mistral, Qwen2, Qwen3, Gemma 1 and 2 by fields.

    x = embedding[text];  x = norm(blocks(x));  logits = cap(x W)

Papers: LLaMA arXiv:2302.13971, LLaMA 2 arXiv:2307.09288, Mistral arXiv:2310.06825, Qwen2
arXiv:2407.10671, Qwen3 arXiv:2505.09388, Gemma arXiv:2403.08295, Gemma 2 arXiv:2408.00118. What
tells them apart is the table PRESETS in models/language_model_sizes.py and the readers in
convert/language_model.py. No dropout: none of them was trained with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_vlm.build import build, lookup
from flax_vlm.models.language_model_sizes import PRESETS
from flax_vlm.nn.attention import MultiHeadAttention
from flax_vlm.nn.decoder import (
    DecoderBlock,
    distances,
    positions_of,
    read_slots,
)
from flax_vlm.nn.initializers import INITS
from flax_vlm.nn.int8 import dequantize
from flax_vlm.nn.kv_cache import KVCache, init_cache
from flax_vlm.nn.mlp import Mlp
from flax_vlm.nn.norms import RMSNorm
from flax_vlm.nn.rope_scaling import ROPE_SCALINGS, RopeScaling
from flax_vlm.nn.rotary import rotary1d
from flax_vlm.nn.transformer import REMAT_POLICIES
from flax_vlm.nn.vocabulary import Vocabulary
from flax_vlm.shapes import check_shapes

WEIGHTS = ("float", "int8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanguageOutput:
    """What a language model returns.

    Attributes:
        logits: [B, S, V] float32, of the token after each one.
        tokens: [B, S, D] after the final norm.
        cache: with the S tokens added; None where none was given.
    """

    logits: jax.Array
    tokens: jax.Array
    cache: KVCache | None


class LanguageModel(nn.Module):
    """A decoder-only language model.

    Attributes:
        vocab_size: V.
        width: D.
        depth: number of blocks.
        mlp_dim: M of the gated MLP.
        num_heads: N of the queries.
        num_kv_heads: M of keys and values; must divide N.
        head_dim: K.
        length: the context that it was trained on; longer texts are computed all the same.
        activation: a key of mlp.ACTIVATIONS.
        norm_eps: epsilon of every norm.
        norm_plus_one: scales of norms are stored as their distance from one (Gemma).
        post_norms: norms after attention and MLP too (Gemma 2).
        qkv_bias: which of q, k and v have a bias: "qkv" (Qwen2) or "".
        o_bias: the attention's output has one.
        mlp_bias: the MLP has biases.
        qk_norm: a norm on every head of q and k (Qwen3).
        attention_scale: of the attention's logits; None takes 1 / sqrt(K).
        attention_cap: c of c tanh(x / c) on the attention's logits (Gemma 2); None has none.
        logit_cap: the same on the output.
        window: how many tokens a query sees, itself included, in layers with a sliding window;
            None: there are none.
        window_pattern: a letter per layer, repeated: "s" sees the window, "f" everything.
        rope_theta: base of the rotary embedding.
        rope_scaling: an instance of rope_scaling.RopeScaling.
        embedding_scale: token embeddings are multiplied by sqrt(D) (Gemma); others given to the
            model are not.
        tied: the output uses the embedding; otherwise it is `lm_head`.
        init_scheme: a key of initializers.INITS.
        weights: "float", or "int8" for parameters of quantization.quantize.
        dtype: of the matmuls, "float32" or "bfloat16"; parameters are float32.
        remat: a key of transformer.REMAT_POLICIES.
        unroll: layers per iteration of the scan.
        attention_implementation: "auto" or a key of attention.IMPLEMENTATIONS.
    """

    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    length: int = 2048
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    qkv_bias: str = ""
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    window: int | None = None
    window_pattern: str = "s"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    embedding_scale: bool = False
    tied: bool = False
    init_scheme: str = "language_model"
    weights: str = "float"
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention_implementation: str = "auto"

    def setup(self) -> None:
        """Creates the parts; their names are the parameter paths."""
        self._check()
        inits = lookup(INITS, self.init_scheme, "init_scheme")(self.width, self.depth)
        self.embedding = Vocabulary(
            self.vocab_size,
            self.width,
            is_int8=self.weights == "int8",
            dtype=self.dtype,
            init=inits.embedding,
        )
        self.norm = RMSNorm(self.norm_eps, plus_one=self.norm_plus_one)
        self.blocks = self._make_blocks(self.depth)
        if not self.tied:
            self.lm_head = self._stored(nn.Dense)(
                self.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=inits.head,
                # logits in float32: softmax and sampling need the digits
                dot_general=functools.partial(
                    jax.lax.dot_general, preferred_element_type=jnp.float32
                ),
            )

    def _check(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"unknown weights {self.weights!r}, choose one of {list(WEIGHTS)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} for {self.num_heads}"
            )
        if not self.window_pattern or set(self.window_pattern) - set("sf"):
            raise ValueError(
                "window_pattern is a row of the letters s (sliding window) and f (full), "
                f"got {self.window_pattern!r}"
            )

    def _stored(self, kind: type[nn.Module]) -> Any:
        if self.weights == "float":
            return kind
        return nn.map_variables(kind, "params", dequantize)

    def _make_blocks(self, length: int, **place: Any) -> nn.Module:
        """Returns layers that share one scan: all of them, or a range (models/fastv.py)."""
        block = self._stored(DecoderBlock)
        policy = lookup(REMAT_POLICIES, self.remat, "remat policy")
        if self.remat != "none":
            block = nn.remat(block, policy=policy, prevent_cse=self.unroll > 1)
        whole = nn.broadcast
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, whole if self.window is None else 0, whole, whole, whole),
            length=length,
            unroll=min(self.unroll, length),
        )
        inits = lookup(INITS, self.init_scheme, "init_scheme")(self.width, self.depth)
        return scanned(
            make_norm=functools.partial(RMSNorm, self.norm_eps, plus_one=self.norm_plus_one),
            make_attention=functools.partial(
                MultiHeadAttention,
                self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                qkv_bias=self.qkv_bias,
                o_bias=self.o_bias,
                qk_norm_eps=self.norm_eps if self.qk_norm else None,
                scale=self.attention_scale,
                logit_cap=self.attention_cap,
                implementation=self.attention_implementation,
                dtype=self.dtype,
                in_init=inits.attention_in,
                out_init=inits.attention_out,
            ),
            make_mlp=functools.partial(
                Mlp,
                self.mlp_dim,
                activation=self.activation,
                gated=True,
                use_bias=self.mlp_bias,
                dtype=self.dtype,
                in_init=inits.mlp_in,
                out_init=inits.mlp_out,
                bias_init=inits.mlp_bias,
            ),
            post_norms=self.post_norms,
            **place,
        )

    def layer_windows(self) -> np.ndarray | None:
        """Returns [layers] int32, how many tokens a query of each layer sees; None: all see all."""
        if self.window is None:
            return None
        everything = np.iinfo(np.int32).max
        letters = (self.window_pattern * self.depth)[: self.depth]
        return np.array([self.window if x == "s" else everything for x in letters], np.int32)

    def example_inputs(self) -> list[jax.ShapeDtypeStruct]:
        """Returns what the model is called with, as shapes, for a batch of one."""
        return [jax.ShapeDtypeStruct((1, 2), jnp.int32)]

    def init_cache(
        self, batch: int, capacity: int, dtype: str | None = None, *, visual: bool = False
    ) -> KVCache:
        """Returns an empty cache for this model.

        Args:
            batch: B.
            capacity: slots for the prompt and all that is generated.
            dtype: of the store, "int8" for half the bytes of bfloat16; None takes the model's.
            visual: changes nothing here, but in models/fastv.py.

        Raises:
            ValueError: see `check_capacity`.
        """
        self.check_capacity(capacity)
        dtype = dtype or self.dtype
        return init_cache(self.depth, batch, capacity, self.num_kv_heads, self.head_dim, dtype)

    def check_capacity(self, capacity: int) -> None:
        """Raises ValueError if the rotary embedding depends on the length of the text and a cache
        of so many slots is longer than the context that was trained on.
        """
        if self.rope_scaling.needs_length and capacity > self.rope_scaling.context:
            raise ValueError(
                "dynamic rope scaling turns all keys anew when a text outgrows the "
                f"{self.rope_scaling.context} tokens trained on, which a cache cannot; "
                f"got a cache of {capacity}, make it shorter or use linear or yarn scaling"
            )

    def embed(self, text: jax.Array) -> jax.Array:
        """Returns the embeddings of tokens [B, S, D], scaled where the model scales them.

        Args:
            text: [B, S] int32 token ids.
        """
        x = self.embedding(text)
        return x * jnp.asarray(self.width**0.5, x.dtype) if self.embedding_scale else x

    def decode(
        self,
        embeddings: jax.Array,
        mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        visual: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns (tokens [B, S, D] after the final norm, cache).

        Arguments as in __call__; visual [B, S] bool, True = visual token, changes nothing here, but
        in models/fastv.py.
        """
        check_shapes("B S D; B S; B S; B S; B S", embeddings, mask, positions, segments, visual)
        positions = self._positions(embeddings, mask, positions, cache)
        cache, windows, *seen = self._layer_inputs(positions, mask, segments, cache)
        x = embeddings.astype(self.dtype)
        (x, cache), _ = self.blocks((x, cache), jnp.arange(self.depth), windows, *seen)
        return self.norm(x), cache

    def _positions(self, x: jax.Array, mask: Any, positions: Any, cache: Any) -> jax.Array:
        if positions is None:
            real = jnp.ones(x.shape[:2], bool) if mask is None else mask
            return positions_of(real, 0 if cache is None else cache.next_position())
        return positions if mask is None else jnp.where(mask, positions, -1)

    def _layer_inputs(self, positions: jax.Array, mask: Any, segments: Any, cache: Any) -> tuple:
        """Returns the cache with slots claimed, and what layers read: windows [layers], visible,
        distance, rotary.
        """
        keys, visible, cache = read_slots(positions, mask, segments, cache)
        windows = self.layer_windows()
        frequencies = self.rope_scaling.frequencies(self.rope_theta, self.head_dim, keys.max() + 1)
        rotary = rotary1d(positions, frequencies, self.rope_scaling.attention_factor)
        if windows is None:
            return cache, None, visible, None, rotary
        return cache, jnp.asarray(windows), visible, distances(positions, keys), rotary

    def logits(self, tokens: jax.Array) -> jax.Array:
        """Returns [..., V] float32, of the token after each one.

        Args:
            tokens: [..., D] after the final norm.
        """
        if self.tied:
            logits = self.embedding(tokens, predict=True)
        else:
            logits = self.lm_head(tokens)
        if self.logit_cap is None:
            return logits
        return self.logit_cap * jnp.tanh(logits / self.logit_cap)

    def __call__(
        self,
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        train: bool = False,
    ) -> LanguageOutput:
        """Returns logits, tokens, and the cache with these tokens added.

        Args:
            text: [B, S] int32 token ids; or give embeddings.
            mask: [B, S] bool, True = real token; padding may stand on either side.
            embeddings: [B, S, D], `embed(text)` with visual tokens put in their places.
            positions: [B, S] int32 for the rotary embedding and the window; None counts the real
                tokens of each row, on from those of the cache.
            segments: [B, S] int32, the number of each token's text where several are packed in a
                row; give positions that start anew with each. Not with a cache.
            cache: of the tokens before; it must have S free slots.
            train: changes nothing here.

        Raises:
            ValueError: if both or neither of text and embeddings are given, or shapes disagree.
        """
        if (text is None) == (embeddings is None):
            raise ValueError("a language model reads text or embeddings, give one of the two")
        x = self.embed(text) if embeddings is None else embeddings
        tokens, cache = self.decode(x, mask, positions=positions, segments=segments, cache=cache)
        return LanguageOutput(self.logits(tokens), tokens, cache)


def build_language_model(
    variant: str | None = None,
    *,
    rope_scaling: Mapping[str, Any] | RopeScaling | None = None,
    **fields: Any,
) -> LanguageModel:
    """Returns a LanguageModel.

    Args:
        variant: a key of language_model_sizes.PRESETS, "Qwen2-0.5B"; None takes all from `fields`.
        rope_scaling: {"name": a key of rope_scaling.ROPE_SCALINGS, **its fields}; None scales
            nothing, or as the variant does.
        **fields: other fields of LanguageModel; they win over the variant. num_kv_heads is N and
            head_dim D / N where they are left out or None.

    Raises:
        ValueError: for an unknown variant, field or scaling.
    """
    spec = dict(lookup(PRESETS, variant, "variant")) if variant is not None else {}
    scaling = rope_scaling or spec.pop("rope_scaling", None)
    if isinstance(scaling, Mapping):
        scaling = build(ROPE_SCALINGS, scaling, "rope_scaling")
    spec = {**spec, **fields, "name": "language_model", "rope_scaling": scaling or RopeScaling()}
    if "width" in spec and "num_heads" in spec:
        spec["num_kv_heads"] = spec.get("num_kv_heads") or spec["num_heads"]
        spec["head_dim"] = spec.get("head_dim") or _head_dim(spec["width"], spec["num_heads"])
    return build({"language_model": LanguageModel}, spec, "language model")


def _head_dim(width: int, num_heads: int) -> int:
    if width % num_heads:
        raise ValueError(
            f"num_heads must divide the width where no head_dim is given, got {num_heads} "
            f"for width {width}"
        )
    return width // num_heads
