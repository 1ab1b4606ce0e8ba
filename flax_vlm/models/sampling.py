# SPDX-License-Identifier: Apache-2.0
"""How the next token is drawn: temperature, the k most probable, the nucleus of mass p.

Nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751, section 3.1; top k: Fan et al. 2018,
arXiv:1805.04833, section 5. In that order, each on what the one before has left, as transformers
does. Tokens as probable as the last one kept are kept too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Numbers, or arrays [B] with one of each row; others of the same type compile nothing anew.

    Attributes:
        temperature: logits are divided by it; above 0.
        top_k: how many tokens are kept; 0 keeps all.
        top_p: the fewest most probable tokens whose probabilities reach it are kept; 1 keeps all.
    """

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError if a number is outside of its range."""
    for name, rule, holds in (
        ("temperature", "be above 0; greedy is sampling=None", lambda x: x > 0),
        ("top_k", "be at least 0", lambda x: x >= 0),
        ("top_p", "lie in (0, 1]", lambda x: (x > 0) & (x <= 1)),
    ):
        value = np.asarray(getattr(sampling, name))
        if not holds(value).all():
            raise ValueError(f"{name} must {rule}, got {value}")


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns [B, V] float32: logits over temperature, -inf for tokens that are not kept.

    Args:
        logits: [B, V].
        sampling: see there.
    """
    rows = logits.shape[0]
    temperature, top_k, top_p = (
        jnp.broadcast_to(jnp.asarray(x), (rows,)).reshape(rows, 1)
        for x in (sampling.temperature, sampling.top_k, sampling.top_p)
    )
    logits = logits.astype(jnp.float32) / temperature
    ordered = -jnp.sort(-logits, axis=-1)  # from the most probable
    rank = jnp.arange(logits.shape[-1])[None]
    kept = (rank < top_k) | (top_k == 0)
    probability = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    above = jnp.cumsum(probability, axis=-1) - probability  # mass of more probable tokens
    kept &= (above < top_p) | (top_p >= 1) | (rank == 0)
    least = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def choose_tokens(
    logits: jax.Array, sampling: Sampling | None, keys: jax.Array, step: jax.Array
) -> jax.Array:
    """Returns [B] int32: the most probable tokens, or drawn ones.

    Args:
        logits: [B, V].
        sampling: None takes the most probable.
        keys: [B], one random key per row, so that a row's text does not depend on its neighbours.
        step: [] int32, how many tokens were drawn before.
    """
    if sampling is None:
        return logits.argmax(-1).astype(jnp.int32)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys, filter_logits(logits, sampling)).astype(jnp.int32)
