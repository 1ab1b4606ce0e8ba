# SPDX-License-Identifier: Apache-2.0
"""The table of token embeddings, which a language model may also use the other way round.

Press and Wolf 2017, arXiv:1608.05859: the vector that a token is read as and the one that it is
predicted by are the same ("tied").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


class Vocabulary(nn.Module):
    """Token ids to vectors, and vectors to logits, by one table `embedding` [V, D].

    Attributes:
        vocab_size: V.
        width: D.
        dtype: of the vectors and of the matmul; the table is float32.
        init: initialiser of the table.
    """

    vocab_size: int
    width: int
    dtype: str = "float32"
    init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array, *, predict: bool = False) -> jax.Array:
        """Returns [..., D] in the compute dtype, or logits [..., V] float32.

        Args:
            x: [...] int32 token ids; to predict, [..., D] vectors.
            predict: the second of the two.
        """
        shape = (self.vocab_size, self.width)
        table = self.param("embedding", self.init, shape, jnp.float32)
        if not predict:
            return jnp.take(table, x, axis=0).astype(self.dtype)
        table = table.astype(self.dtype)
        x = x.astype(self.dtype)
        return jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)
