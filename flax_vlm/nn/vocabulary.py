# SPDX-License-Identifier: Apache-2.0
"""The table of token embeddings, which a language model may also use the other way round.

Press and Wolf 2017, arXiv:1608.05859: the vector that a token is read as and the one that it is
predicted by are the same ("tied").
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.nn.int8 import SCALE, VALUES, quantize_kernel


class Vocabulary(nn.Module):
    """Token ids to vectors, and vectors to logits, by one table `embedding` [V, D].

    Attributes:
        vocab_size: V.
        width: D.
        is_int8: the table is stored in int8, with a scale per token (nn/int8.py).
        dtype: of the vectors and of the matmul; the table is float32.
        init: initialiser of the table.
    """

    vocab_size: int
    width: int
    is_int8: bool = False
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
        stored = self.param("embedding", self._init_table, shape)
        table = stored[VALUES] if self.is_int8 else stored
        if not predict:  # rows are taken first: the table never becomes floats as a whole
            rows = jnp.take(table, x, axis=0)
            rows = rows * jnp.take(stored[SCALE], x, axis=0) if self.is_int8 else rows
            return rows.astype(self.dtype)
        table, x = table.astype(self.dtype), x.astype(self.dtype)
        logits = jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)
        if not self.is_int8:
            return logits
        return logits * stored[SCALE].reshape((1,) * (logits.ndim - 1) + (-1,))

    def _init_table(self, key: jax.Array, shape: tuple[int, int]) -> Any:
        table = self.init(key, shape, jnp.float32)
        return quantize_kernel(table, (-1,)) if self.is_int8 else table
