# SPDX-License-Identifier: Apache-2.0
"""From tokens [B, T, D] to one vector [B, D]: class token, mean, MAP, last token, end of text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.nn.attention import MultiHeadAttention
from flax_vlm.nn.initializers import Init
from flax_vlm.nn.mlp import Mlp
from flax_vlm.nn.norms import LayerNorm
from flax_vlm.shapes import check_shapes


def pool_class_token(tokens: jax.Array) -> jax.Array:
    """Returns [B, D]: the first token."""
    return tokens[:, 0]


def pool_mean(tokens: jax.Array, num_prefix: int = 0) -> jax.Array:
    """Returns [B, D]: the mean, taken in float32, of the tokens after the first `num_prefix`."""
    return tokens[:, num_prefix:].astype(jnp.float32).mean(1).astype(tokens.dtype)


def pool_last(tokens: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """Returns [B, D]: the token at the last position, be it padding or not.

    SigLIP's text tower is trained so: texts are padded to the full length, and the padding is
    attended to.

    Args:
        tokens: [B, L, D].
        keep: [B, L] bool, True = real token; if given, the last real token is taken instead.
    """
    check_shapes("B L D; B L", tokens, keep)
    if keep is None:
        return tokens[:, -1]
    last = jnp.where(keep, jnp.arange(keep.shape[1])[None, :], 0).max(1)  # [B]
    return _take(tokens, last)


def pool_end_of_text(tokens: jax.Array, text: jax.Array, eos_id: int | None) -> jax.Array:
    """Returns [B, D]: the token where the text ends.

    Args:
        tokens: [B, L, D].
        text: [B, L] int32 token ids.
        eos_id: the first position with this id is taken (position 0 if there is none, as in Hugging
            Face). None takes the position of the largest id: in CLIP's vocabulary the end-of-text
            token, 49407, is the largest.
    """
    check_shapes("B L D; B L", tokens, text)
    score = text if eos_id is None else (text == eos_id).astype(jnp.int32)
    return _take(tokens, score.argmax(1))  # argmax returns the first maximum


def _take(tokens: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens, index[:, None, None], axis=1)[:, 0]


class MAPHead(nn.Module):
    """Multi-head attention pooling: one learned query attends to all tokens, then a residual MLP.

        y = attention(probe, tokens);  pooled = y + mlp(norm(y))

    No residual around the attention and no norm before it: the encoder has ended in one.
    Source: big_vision `models/vit.py`, MAPHead; paper: Lee et al. 2019, arXiv:1810.00825 (PMA).

    Attributes:
        num_heads: N.
        mlp_dim: M.
        inits: initialisers of the tower.
        activation: a key of mlp.ACTIVATIONS.
        norm_eps: epsilon of the norm.
        dtype: of the matmuls; parameters are float32.
        attention_implementation: "auto" or a key of attention.IMPLEMENTATIONS.
    """

    num_heads: int
    mlp_dim: int
    inits: Init
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dtype: str = "float32"
    attention_implementation: str = "auto"

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns [B, D].

        Args:
            tokens: [B, T, D].
            mask: [B, 1, 1, T] bool, True = may be attended to; None keeps all.
        """
        batch, _, width = tokens.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), jnp.float32)
        probe = jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width))
        x = MultiHeadAttention(
            self.num_heads,
            implementation=self.attention_implementation,
            dtype=self.dtype,
            in_init=self.inits.attention_in,
            out_init=self.inits.attention_out,
            name="attention",
        )(probe, tokens, mask=mask)  # [B, 1, D]
        y = LayerNorm(self.norm_eps, name="norm")(x)
        y = Mlp(
            self.mlp_dim,
            activation=self.activation,
            dtype=self.dtype,
            in_init=self.inits.mlp_in,
            out_init=self.inits.mlp_out,
            bias_init=self.inits.mlp_bias,
            name="mlp",
        )(y)
        return (x + y)[:, 0]  # [B, D]
