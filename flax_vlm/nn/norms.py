# SPDX-License-Identifier: Apache-2.0
"""LayerNorm (Ba et al. 2016, arXiv:1607.06450), RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)
and L2 normalisation, all in float32.

LayerNorm differs from flax.linen.LayerNorm: the variance is E[(x - mean)^2], never E[x^2] - mean^2,
which loses all digits at the large activations of real checkpoints; epsilon has no default, because
it belongs to the checkpoint (ViT 1e-12 in Hugging Face files, CLIP 1e-5, SigLIP 1e-6). RMSNorm
multiplies by its scale before it rounds to the dtype of its input, as Gemma does; LLaMA rounds
first, which is the same in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


class LayerNorm(nn.Module):
    """Normalises the last axis: scale (x - mean) / sqrt(variance + epsilon) + bias.

    Attributes:
        epsilon: added to the variance.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., D] in the dtype of `x`, computed in float32."""
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        variance = jnp.square(y).mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.epsilon)
        return (y * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Divides the last axis by its root mean square: scale x / sqrt(mean(x^2) + epsilon).

    Attributes:
        epsilon: added to the mean square.
        plus_one: the parameter is what is added to a scale of one (Gemma).
    """

    epsilon: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., D] in the dtype of `x`, computed in float32."""
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * (1.0 + scale if self.plus_one else scale)).astype(x.dtype)


def l2_normalize(x: jax.Array, epsilon: float = 1e-8) -> jax.Array:
    """Returns x / (||x|| + epsilon) along the last axis, float32.

    A zero vector stays zero and has a finite gradient.

    Args:
        x: [..., E], any float dtype.
        epsilon: added to the norm, not to its square.

    Source: big_vision `models/proj/image_text/two_towers.py` (epsilon 1e-8); CLIP divides by the
    bare norm, which for embeddings of ordinary size is the same float32 number.
    """
    x = x.astype(jnp.float32)
    # the gradient of sqrt at 0 is infinite: the floor is far below any square that epsilon lets
    # through
    norm = jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-30))
    return x / (norm + epsilon)
