# SPDX-License-Identifier: Apache-2.0
"""Runs a loss and its four gradients on a Case and measures the distance to the oracle."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_vlm.losses.pairs import Pairs


def make_pairs(case, **changes):
    return Pairs(
        **{k: None if v is None else jnp.asarray(v) for k, v in case.pairs.items()} | changes
    )


def value_and_gradients(loss, case, cotangent, dtype=jnp.float32):
    """(loss [B], gradients of sum(cotangent * loss)) of loss(image, text, scale, bias), as NumPy
    float64."""

    def total(image, text, scale, bias):
        each = loss(image, text, scale, bias)
        return (each * jnp.asarray(cotangent, each.dtype)).sum(), each

    arguments = [jnp.asarray(x, dtype) for x in (case.image, case.text, case.scale, case.bias)]
    run = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
    gradients, each = run(*arguments)
    assert each.dtype == dtype
    names = ("image", "text", "scale", "bias")
    return np.asarray(each, np.float64), {
        k: np.asarray(g, np.float64) for k, g in zip(names, gradients, strict=True)
    }


def distance(found, expected):
    """Greatest relative distance, in the norm of each array (absolute where the truth is 0)."""
    loss, gradients = found
    true_loss, true_gradients = expected
    pairs = [(loss, true_loss)] + [(gradients[k], true_gradients[k]) for k in true_gradients]
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3)) for a, b in pairs)
