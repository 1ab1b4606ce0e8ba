# SPDX-License-Identifier: Apache-2.0
"""Attention: the one place that decides which kernel computes it, and the multi-head layer.

    "xla"       jax.nn.dot_product_attention; everywhere, every mask
    "cudnn"     cuDNN flash attention; NVIDIA, bfloat16 and float16
    "splash"    Pallas splash attention; TPU, long sequences without a mask or causal (interpreted
                on other platforms)
    "explicit"  two einsums and a softmax one can read; the reference, and what attention maps are
                taken from

All of them take the softmax in float32, and a query that may attend to nothing gets zeros, never
NaN. Keys and values may have fewer heads than queries, M for N: query head n attends to head
n M // N (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245).

Paper: Vaswani et al. 2017, arXiv:1706.03762, section 3.2. The choice follows what the kernels
support; that cuDNN pays at every length, and splash from 1024 tokens, is not measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from flax_vlm.build import lookup
from flax_vlm.nn.ambient_mesh import (
    BATCH_AXES,
    HEAD_AXIS,
    ambient_mesh_shape,
    num_devices,
    target_platform,
)
from flax_vlm.nn.kv_cache import KVCache
from flax_vlm.nn.masks import causal_mask, combine_masks
from flax_vlm.nn.norms import LayerNorm, RMSNorm
from flax_vlm.nn.rotary import Rotary, rotate
from flax_vlm.nn.splash import splash_attention
from flax_vlm.shapes import check_shapes

SCOPE = "attention_"  # and the name of the implementation: how operations are labelled
SPLASH_MIN_LENGTH = 1024  # below it the score matrix is small enough that XLA's fusion does well


def choose_implementation(
    platform: str,
    dtype: Any,
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    *,
    has_mask: bool = False,
    has_cap: bool = False,
    mesh_shape: Mapping[str, int] | None = None,
    num_devices: int = 1,
) -> str:
    """Returns the name of the implementation that "auto" stands for; a pure function.

    Args:
        platform: "cpu", "cuda", "rocm" or "tpu".
        dtype: of q, k and v.
        query_shape: [B, S, N, K].
        key_shape: [B, T, M, K].
        has_mask: is there a mask besides the causal one?
        has_cap: are the logits capped?
        mesh_shape: axis sizes of the ambient mesh (`jax.set_mesh`), axes that a shard_map has
            taken left out; None if there is no mesh.
        num_devices: how many devices the program may be partitioned over.
    """
    batch, queries, heads, head_dim = query_shape
    keys = key_shape[1]
    if has_cap:
        return "explicit"
    if platform == "cuda":
        flash = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        flash &= head_dim % 8 == 0 and head_dim <= 128  # 256 needs Hopper
        flash &= queries > 1  # one query (MAP head) has nothing to save
        flash &= not has_mask or (queries % 2 == 0 and keys % 2 == 0)  # cuDNN's rule for a bias
        return "cudnn" if flash else "xla"
    if platform == "tpu":
        splash = min(queries, keys) >= SPLASH_MIN_LENGTH and not has_mask and head_dim % 64 == 0
        # XLA cannot partition a Pallas kernel: it needs one device, or a mesh to be mapped over
        splash &= num_devices == 1 or _is_divisible(batch, heads, mesh_shape)
        return "splash" if splash else "xla"
    return "xla"


def _is_divisible(batch: int, heads: int, mesh_shape: Mapping[str, int] | None) -> bool:
    if mesh_shape is None:
        return False
    shards = 1
    for axis in BATCH_AXES:
        shards *= mesh_shape.get(axis, 1)
    return batch % shards == 0 and heads % mesh_shape.get(HEAD_AXIS, 1) == 0


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logit_cap: float | None = None,
) -> jax.Array:
    """Returns softmax(cap(scale q k^T)): [B, N, S, T] float32.

    Rows sum to one; the row of a query that may see nothing is zero.

    Args:
        q: [B, S, N, K].
        k: [B, T, M, K], M divides N.
        mask: [B|1, N|1, S|1, T] bool, True = keep; None keeps all.
        is_causal: also hide what comes after each query.
        scale: None takes 1 / sqrt(K).
        logit_cap: c of cap(x) = c tanh(x / c) (Gemma 2, arXiv:2408.00118, section 2); None leaves
            the logits as they are.
    """
    batch, queries, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    q = q.reshape(batch, queries, groups, heads // groups, head_dim)
    logits = jnp.einsum("BSMGK,BTMK->BMGST", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, queries, keys)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    visible = combine_masks(mask, causal_mask(queries) if is_causal else None)
    if visible is None:
        return jax.nn.softmax(logits, axis=-1)
    # a finite fill: softmax over a row of -inf alone is NaN, and jax_debug_nans stops there
    weights = jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1)
    return jnp.where(visible, weights, 0.0)


def weighted_sum(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Returns [B, S, N, K] in v's dtype: weights [B, N, S, T] applied to v [B, T, M, K]."""
    batch, heads, queries, keys = weights.shape
    groups, head_dim = v.shape[2:]
    weights = weights.astype(v.dtype).reshape(batch, groups, heads // groups, queries, keys)
    out = jnp.einsum("BMGST,BTMK->BSMGK", weights, v)
    return out.reshape(batch, queries, heads, head_dim)


def _explicit(q, k, v, mask, is_causal, scale, logit_cap, platform):
    weights = attention_weights(q, k, mask, is_causal=is_causal, scale=scale, logit_cap=logit_cap)
    return weighted_sum(weights, v)


def _library(implementation: str) -> Callable[..., jax.Array]:
    def attention(q, k, v, mask, is_causal, scale, logit_cap, platform):
        _refuse_cap(logit_cap, implementation)
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=is_causal, scale=scale, implementation=implementation
        )
        return out if mask is None else _zero_blind_queries(out, mask, is_causal)

    return attention


def _refuse_cap(logit_cap: float | None, implementation: str) -> None:
    if logit_cap is not None:
        raise ValueError(
            f'attention implementation "{implementation}" cannot cap logits, '
            f'choose "auto" or "explicit"'
        )


def _zero_blind_queries(out: jax.Array, mask: jax.Array, is_causal: bool) -> jax.Array:
    visible = combine_masks(mask, causal_mask(out.shape[1]) if is_causal else None)
    sees = visible.any(-1, keepdims=True)  # [B|1, N|1, S|1, 1]
    return jnp.where(sees.transpose(0, 2, 1, 3), out, 0)


def _splash(q, k, v, mask, is_causal, scale, logit_cap, platform):
    _refuse_cap(logit_cap, "splash")
    if mask is not None:
        raise ValueError('attention implementation "splash" takes no mask, choose "auto" or "xla"')

    if scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)  # the kernel's own is 1 / sqrt(K)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))

    def attention(q, k, v):
        return splash_attention(q, k, v, is_causal=is_causal, interpret=platform != "tpu")

    mesh_shape = ambient_mesh_shape()
    if not mesh_shape:
        return attention(q, k, v)
    batch_axes = tuple(axis for axis in BATCH_AXES if axis in mesh_shape)
    spec = P(batch_axes, None, HEAD_AXIS if HEAD_AXIS in mesh_shape else None)
    # check_vma=False: the kernel's outputs carry no record of the axes they vary over
    return jax.shard_map(attention, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(
        q, k, v
    )


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _library("xla"),
    "cudnn": _library("cudnn"),
    "splash": _splash,
    "explicit": _explicit,
}


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    logit_cap: float | None = None,
    implementation: str = "auto",
    platform: str | None = None,
) -> jax.Array:
    """Returns softmax(cap(scale q k^T)) v: [B, S, N, K] in the dtype of q.

    Args:
        q: [B, S, N, K].
        k: [B, T, M, K], M divides N.
        v: [B, T, M, K].
        mask: [B|1, N|1, S|1, T] bool, True = keep; None keeps all.
        is_causal: also hide what comes after each query; S must equal T.
        scale: None takes 1 / sqrt(K).
        logit_cap: see `attention_weights`; "explicit" alone can.
        implementation: "auto" or a key of IMPLEMENTATIONS.
        platform: what the program will run on; None asks `target_platform`. Give it when compiling
            for another machine.

    Raises:
        ValueError: if shapes disagree, the implementation is unknown or cannot take the mask or
            the cap.
    """
    sizes = check_shapes("B S N K; B T M K; B T M K; _ _ _ T", q, k, v, mask)
    if sizes["N"] % sizes["M"]:
        raise ValueError(
            f"the heads of keys must divide those of queries, got {sizes['M']} for {sizes['N']}"
        )
    if is_causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs as many queries as keys, got {q.shape[1]} and {k.shape[1]}"
        )
    platform = platform or target_platform()
    if implementation == "auto":
        implementation = choose_implementation(
            platform,
            q.dtype,
            q.shape,
            k.shape,
            has_mask=mask is not None,
            has_cap=logit_cap is not None,
            mesh_shape=ambient_mesh_shape(),
            num_devices=num_devices(),
        )
    function = lookup(IMPLEMENTATIONS, implementation, "attention implementation")
    # in every profile, and in the compiled program for tools/bench to read
    with jax.named_scope(f"{SCOPE}{implementation}"):
        return function(q, k, v, mask, is_causal, scale, logit_cap, platform)


QKV_BIASES = ("qkv", "qv", "")


class MultiHeadAttention(nn.Module):
    """Multi-head attention with parameters q [D, N, K], k, v [D, M, K] and o [N, K, D].

    Asked for the collection "intermediates" (`apply(..., mutable=["intermediates"])`), it sows
    "attention_weights" [B, N, S, T] float32 and computes its output from them; inside a scanned
    encoder they get a leading layer axis.

    Attributes:
        num_heads: N; must divide the width where no head_dim is given.
        num_kv_heads: M, heads of keys and values; None takes N.
        head_dim: K; None takes D / N.
        qkv_bias: which of q, k and v have a bias: "qkv", "qv" (EVA-02) or "".
        o_bias: o has one.
        norm_eps: epsilon of a LayerNorm `norm` before o (sub-LN, EVA-02); None has none.
        qk_norm_eps: epsilon of the RMSNorms `q_norm` and `k_norm` of every head, before it is
            turned (Qwen3); None has none.
        scale: of the logits; None takes 1 / sqrt(K).
        logit_cap: see `attention_weights`.
        implementation: "auto" or a key of IMPLEMENTATIONS.
        dtype: of the matmuls; parameters are float32.
        in_init: initialiser of the q, k, v kernels.
        out_init: initialiser of o's kernel.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: str = "qkv"
    o_bias: bool = True
    norm_eps: float | None = None
    qk_norm_eps: float | None = None
    scale: float | None = None
    logit_cap: float | None = None
    implementation: str = "auto"
    dtype: str = "float32"
    in_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    out_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        is_causal: bool = False,
        rotary: Rotary | None = None,
        cache: tuple[KVCache, jax.Array] | None = None,
    ) -> Any:
        """Returns [B, S, D]; with a cache, a pair of that and the cache.

        Args:
            x: [B, S, D], where the queries come from.
            context: [B, T, D'], where keys and values come from; None takes `x` (self-attention).
            mask: [B|1, N|1, S|1, T] bool, True = keep; with a cache T are its slots.
            is_causal: also hide what comes after each query.
            rotary: angles that q and k are turned by; None turns nothing.
            cache: (a KVCache that has claimed slots for the S tokens, number of the layer): keys
                and values are written there, and all that it holds is attended to.
        """
        width = x.shape[-1]
        heads, kv_heads, head_dim = self._sizes(width)
        context = x if context is None else context

        def project(name: str, heads: int, y: jax.Array) -> jax.Array:
            return nn.DenseGeneral(
                (heads, head_dim),
                use_bias=name in self.qkv_bias,
                dtype=self.dtype,
                kernel_init=self.in_init,
                name=name,
            )(y)

        q = project("q", heads, x)  # [B, S, N, K]
        k, v = project("k", kv_heads, context), project("v", kv_heads, context)  # [B, T, M, K]
        if self.qk_norm_eps is not None:
            q = RMSNorm(self.qk_norm_eps, name="q_norm")(q)
            k = RMSNorm(self.qk_norm_eps, name="k_norm")(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            store, layer = cache
            store = store.write(layer, k, v)
            k, v = store.read(layer, q.dtype)  # [B, T, M, K], all slots
        logits = dict(is_causal=is_causal, scale=self.scale, logit_cap=self.logit_cap)
        if self.is_mutable_collection("intermediates"):
            weights = attention_weights(q, k, mask, **logits)
            self.sow("intermediates", "attention_weights", weights)
            out = weighted_sum(weights, v)
        else:
            out = attend(q, k, v, mask=mask, implementation=self.implementation, **logits)
        if self.norm_eps is not None:
            out = out.reshape(*out.shape[:2], heads * head_dim)  # the norm is over all heads
            out = LayerNorm(self.norm_eps, name="norm")(out)
            out = out.reshape(*out.shape[:2], heads, head_dim)  # [B, S, N, K]
        out = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            use_bias=self.o_bias,
            dtype=self.dtype,
            kernel_init=self.out_init,
            name="o",
        )(out)  # [B, S, D]
        return out if cache is None else (out, store)

    def _sizes(self, width: int) -> tuple[int, int, int]:
        if self.qkv_bias not in QKV_BIASES:
            raise ValueError(f"unknown qkv_bias {self.qkv_bias!r}, choose one of {QKV_BIASES}")
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(
                f"num_heads must divide the width, got width {width} and {self.num_heads} heads"
            )
        head_dim = self.head_dim or width // self.num_heads
        return self.num_heads, self.num_kv_heads or self.num_heads, head_dim
