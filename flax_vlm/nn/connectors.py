# SPDX-License-Identifier: Apache-2.0
"""Connectors: from the tokens of a vision encoder to tokens of the language model.

All have one signature, (visual tokens [B, P, D], mask [B, P]) -> (tokens [B, Q, W], mask [B, Q]),
and say with `num_tokens` how many come out of P, so that placeholders can be counted before
anything runs.

    linear          LLaVA v1 (arXiv:2304.08485, section 4.1), PaliGemma
    mlp             LLaVA-1.5 (arXiv:2310.03744, section 3.3): linear, exact GELU, linear
    pixel_shuffle   Idefics3 and SmolVLM (arXiv:2408.12637, section 4.1): r x r patches side by side
                    in one token, then linear without bias
    resampler       Flamingo (arXiv:2204.14198): resampler.PerceiverResampler, then linear
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from flax_vlm.build import build, lookup
from flax_vlm.nn.mlp import ACTIVATIONS
from flax_vlm.nn.resampler import PerceiverResampler

Tokens = tuple[jax.Array, jax.Array | None]


class LinearConnector(nn.Module):
    """One linear map of every token.

    Attributes:
        width: W, of the language model.
        use_bias: has it a bias?
        dtype: of the matmul; parameters are float32.
    """

    width: int
    use_bias: bool = True
    dtype: str = "float32"

    def num_tokens(self, patches: int) -> int:
        """Returns Q for P patches: as many."""
        return patches

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> Tokens:
        """Returns ([B, P, W], mask)."""
        dense = nn.Dense(self.width, use_bias=self.use_bias, dtype=self.dtype, name="fc1")
        return dense(x), mask


class MlpConnector(nn.Module):
    """fc2(activation(fc1(x))) of every token, both of the language model's width.

    Attributes:
        width: W, of the language model.
        activation: a key of mlp.ACTIVATIONS.
        dtype: of the matmuls; parameters are float32.
    """

    width: int
    activation: str = "gelu_erf"
    dtype: str = "float32"

    def num_tokens(self, patches: int) -> int:
        """Returns Q for P patches: as many."""
        return patches

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> Tokens:
        """Returns ([B, P, W], mask)."""
        activation = lookup(ACTIVATIONS, self.activation, "activation")
        x = nn.Dense(self.width, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(self.width, dtype=self.dtype, name="fc2")(activation(x)), mask


class PixelShuffleConnector(nn.Module):
    """Puts r x r neighbouring patches into one token, then one linear map.

    Before, on a grid of 4 x 4 and r = 2, and after:

        a b | c d
        e f | g h        [a b e f]  [c d g h]
        ---------   ->   [i j m n]  [k l o p]
        i j | k l
        m n | o p

    Attributes:
        width: W, of the language model.
        scale: r; must divide both sides of the grid.
        dtype: of the matmul; parameters are float32.
    """

    width: int
    scale: int = 2
    dtype: str = "float32"

    def num_tokens(self, patches: int) -> int:
        """Returns Q for P patches: P / r^2."""
        return patches // self.scale**2

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> Tokens:
        """Returns ([B, P / r^2, W], None).

        Raises:
            ValueError: for a grid that is not square or that r does not divide, or a mask: patches
                that are joined must all be there.
        """
        if mask is not None:
            raise ValueError("pixel_shuffle joins patches of whole images, it takes no mask")
        x = pixel_shuffle(x, self.scale)
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="fc1")(x), None


def pixel_shuffle(x: jax.Array, scale: int) -> jax.Array:
    """Returns [B, P / r^2, r^2 D]: r x r patches of a square grid in one token, row by row.

    Args:
        x: [B, P, D], row-major.
        scale: r.

    Raises:
        ValueError: if the grid is not square, or r does not divide its side.
    """
    batch, patches, width = x.shape
    side = math.isqrt(patches)
    if side * side != patches or side % scale:
        raise ValueError(
            f"pixel_shuffle needs a square grid whose side {scale} divides, got {patches} patches"
        )
    rows = side // scale
    x = x.reshape(batch, rows, scale, rows, scale, width)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * rows, scale * scale * width)


class ResamplerConnector(nn.Module):
    """The Perceiver Resampler, then one linear map.

    Attributes:
        width: W, of the language model.
        resampler: arguments of resampler.PerceiverResampler.
        dtype: of the matmuls; parameters are float32.
    """

    width: int
    resampler: Mapping[str, Any]
    dtype: str = "float32"

    def num_tokens(self, patches: int) -> int:
        """Returns Q, whatever P is."""
        return self.resampler.get("num_latents", PerceiverResampler.num_latents)

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> Tokens:
        """Returns ([B, Q, W], None): all that comes out is real.

        Args:
            x: [B, P, D], or frames [B, F, P, D].
            mask: [B, P] or [B, F, P] bool, True = real token; None keeps all.
        """
        x = PerceiverResampler(**self.resampler, dtype=self.dtype, name="resampler")(x, mask)
        return nn.Dense(self.width, dtype=self.dtype, name="fc1")(x), None


CONNECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearConnector,
    "mlp": MlpConnector,
    "pixel_shuffle": PixelShuffleConnector,
    "resampler": ResamplerConnector,
}


def build_connector(spec: Mapping[str, Any], width: int, dtype: str = "float32") -> nn.Module:
    """Returns the connector of a config, {"name": a key of CONNECTORS, ...}."""
    return build(CONNECTORS, spec, "connector", width=width, dtype=dtype)
