# SPDX-License-Identifier: Apache-2.0
"""Splash attention for TPU: a flash kernel in Pallas that never writes the [S, T] scores to memory.

Wraps jax.experimental.pallas.ops.tpu.splash_attention, which wants [N, S, K], scaled queries and
lengths in blocks of 128: sequences are padded here, and segment ids keep the padding apart. Paper:
Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128  # block lengths are multiples of the TPU's vector lanes
MAX_BLOCK = 512


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool, interpret: bool
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(K)) v: [B, S, N, K], on one device.

    Args:
        q: [B, S, N, K].
        k: [B, T, N, K].
        v: [B, T, N, K].
        is_causal: hide what comes after each query.
        interpret: run the kernel in Python instead of compiling it; for tests away from a TPU.
    """
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (_blocks(x) for x in (q * q.shape[-1] ** -0.5, k, v))  # [B, N, S', K]
    shape = (q.shape[2], k.shape[2])
    mask = splash.CausalMask(shape) if is_causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_block_sizes(*shape),
        interpret=interpret,
    )
    segments = None
    if shape != (queries, keys):
        segments = splash.SegmentIds(
            (jnp.arange(shape[0]) < queries).astype(jnp.int32),
            (jnp.arange(shape[1]) < keys).astype(jnp.int32),
        )
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)
    return out.transpose(0, 2, 1, 3)[:, :queries]  # [B, S, N, K]


def _blocks(x: jax.Array) -> jax.Array:
    padding = -x.shape[1] % LANES
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    block_q, block_kv = _largest_block(queries), _largest_block(keys)
    return splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )


def _largest_block(length: int) -> int:
    return next(b for b in range(MAX_BLOCK, 0, -LANES) if length % b == 0)
