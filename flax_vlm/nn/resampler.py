# SPDX-License-Identifier: Apache-2.0
"""The Perceiver Resampler: any number of visual tokens in, a fixed number out.

Paper: Flamingo, Alayrac et al. 2022, arXiv:2204.14198, section 2.1 and its listing. Learned latents
attend to the visual tokens and to themselves, layer by layer:

    x = flatten(x + time_embedding)                              [B, F P, D]
    latents = latents + attention(q = latents, kv = [x, latents])
    latents = latents + feed_forward(latents)                    depth times
    return norm(latents)                                         [B, Q, D]

Implementations differ, so what differs is a field:

                   activation      heads     time embeddings   norm of q and k
    Flamingo       relu_squared    16 x 96   yes               no
    OpenFlamingo   gelu_erf         8 x 64   learned, optional no
    IDEFICS        relu            16 x 96   no                optional

Differs from the paper: the time embeddings of more frames than were learned are an error, not an
interpolation. How latents and queries start is a field, too: latents of deviation 0.02 here, 1 in
IDEFICS and OpenFlamingo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.nn.attention import attend
from flax_vlm.nn.mlp import Mlp
from flax_vlm.nn.norms import LayerNorm


class PerceiverAttention(nn.Module):
    """Latents attend to [x, latents], without biases; x and latents have a norm of their own.

    Attributes:
        num_heads: N.
        head_dim: K.
        norm_eps: epsilon of all norms.
        qk_norm: a LayerNorm over K of every query and key.
        query_gain: see PerceiverResampler.
        dtype: of the matmuls; parameters are float32.
        implementation: "auto" or a key of attention.IMPLEMENTATIONS.
    """

    num_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    qk_norm: bool = False
    query_gain: float = 1.0
    dtype: str = "float32"
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, latents: jax.Array, x: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns [B, Q, D].

        Args:
            latents: [B, Q, D].
            x: [B, P, D].
            mask: [B, 1, 1, P + Q] bool, True = may be attended to; None keeps all.
        """
        width = latents.shape[-1]
        latents = LayerNorm(self.norm_eps, name="latents_norm")(latents)
        x = LayerNorm(self.norm_eps, name="context_norm")(x)
        both = jnp.concatenate([x, latents], axis=1)  # [B, P + Q, D]

        def project(name: str, y: jax.Array, gain: float = 1.0) -> jax.Array:
            return nn.DenseGeneral(
                (self.num_heads, self.head_dim),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal"),
                name=name,
            )(y)

        q, k, v = project("q", latents, self.query_gain), project("k", both), project("v", both)
        if self.qk_norm:
            q = LayerNorm(self.norm_eps, name="q_norm")(q)
            k = LayerNorm(self.norm_eps, name="k_norm")(k)
        out = attend(q, k, v, mask=mask, implementation=self.implementation)  # [B, Q, N, K]
        return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="o")(
            out
        )  # [B, Q, D]


class ResamplerBlock(nn.Module):
    """One layer: latents + attention(latents, x), then latents + mlp(norm(latents)).

    Attributes:
        attention: arguments of PerceiverAttention.
        mlp_dim: M.
        activation: a key of mlp.ACTIVATIONS.
        norm_eps: epsilon of all norms.
        dtype: of the matmuls; parameters are float32.
    """

    attention: Mapping[str, Any]
    mlp_dim: int
    activation: str
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(
        self, latents: jax.Array, x: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        """Returns ([B, Q, D], None): the carry of the scan, and nothing per layer.

        Args:
            latents: [B, Q, D].
            x: [B, P, D].
            mask: [B, 1, 1, P + Q] bool, True = may be attended to; None keeps all.
        """
        shared = dict(norm_eps=self.norm_eps, dtype=self.dtype)
        latents += PerceiverAttention(**self.attention, **shared, name="attention")(
            latents, x, mask
        )
        h = LayerNorm(self.norm_eps, name="mlp_norm")(latents)
        h = Mlp(
            self.mlp_dim, activation=self.activation, use_bias=False, dtype=self.dtype, name="mlp"
        )(h)
        return latents + h, None


class PerceiverResampler(nn.Module):
    """Resamples visual tokens to `num_latents` tokens of the same width.

    Attributes:
        num_latents: Q.
        depth: layers.
        num_heads: N.
        head_dim: K; N K need not be the width.
        mlp_ratio: hidden units of the feed-forward net per unit of width.
        activation: a key of mlp.ACTIVATIONS.
        num_frames: learned time embeddings; 0 has none.
        qk_norm: a LayerNorm over K of every query and key.
        latent_std: deviation of the latents before training.
        query_gain: deviation of the query kernels before training, in units of LeCun's 1 / sqrt(D).
            At 1 every latent starts with a broad mean of all tokens; at 4 its heads look at a few
            each, which short training from scratch has no time to learn.
        norm_eps: epsilon of all norms.
        dtype: of the matmuls; parameters are float32.
        attention_implementation: "auto" or a key of attention.IMPLEMENTATIONS.
    """

    num_latents: int = 64
    depth: int = 6
    num_heads: int = 16
    head_dim: int = 96
    mlp_ratio: int = 4
    activation: str = "relu_squared"
    num_frames: int = 0
    qk_norm: bool = False
    latent_std: float = 0.02
    query_gain: float = 1.0
    norm_eps: float = 1e-5
    dtype: str = "float32"
    attention_implementation: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns [B, Q, D].

        Args:
            x: [B, P, D], or frames [B, F, P, D] that get time embeddings 0 ... F - 1.
            mask: [B, P] or [B, F, P] bool, True = real token; None keeps all. Latents of an example
                without any see themselves alone.

        Raises:
            ValueError: if there are more frames than time embeddings.
        """
        x = self._with_time(x) if x.ndim == 4 else x
        batch, _, width = x.shape
        if mask is not None:
            latents_seen = jnp.ones((batch, self.num_latents), bool)
            mask = jnp.concatenate([mask.reshape(batch, -1), latents_seen], axis=1)
            mask = mask[:, None, None]  # [B, 1, 1, P + Q]
        latents = self.param(
            "latents",
            nn.initializers.normal(self.latent_std),
            (self.num_latents, width),
            jnp.float32,
        )
        latents = jnp.broadcast_to(latents.astype(x.dtype), (batch, *latents.shape))  # [B, Q, D]
        blocks = nn.scan(
            ResamplerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )(
            attention={
                "num_heads": self.num_heads,
                "head_dim": self.head_dim,
                "qk_norm": self.qk_norm,
                "query_gain": self.query_gain,
                "implementation": self.attention_implementation,
            },
            mlp_dim=self.mlp_ratio * width,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            name="blocks",
        )
        latents, _ = blocks(latents, x, mask)
        return LayerNorm(self.norm_eps, name="norm")(latents)

    def _with_time(self, x: jax.Array) -> jax.Array:
        """Returns [B, F P, D]: the frames with their time embeddings, one after the other."""
        batch, frames, tokens, width = x.shape
        if self.num_frames:
            if frames > self.num_frames:
                raise ValueError(
                    f"the resampler has time embeddings for {self.num_frames} frames, got {frames};"
                    f" set num_frames or sample fewer"
                )
            time = self.param(
                "time", nn.initializers.normal(0.02), (self.num_frames, width), jnp.float32
            )
            x = x + time[None, :frames, None].astype(x.dtype)  # [B, F, P, D]
        return x.reshape(batch, frames * tokens, width)
