# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model as shapes: nothing is computed and nothing is allocated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.nn.patches import as_pair


def example_inputs(model: nn.Module) -> list[jax.ShapeDtypeStruct]:
    """Returns what a model of MODELS is called with, as shapes, for a batch of one."""
    if hasattr(model, "example_inputs"):
        return model.example_inputs()
    image_tower = getattr(model, "image", model)
    size = as_pair(image_tower.image_size)
    inputs = [jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)]
    if hasattr(model, "text"):
        length = (1, model.text.length)
        inputs += [jax.ShapeDtypeStruct(length, jnp.int32), jax.ShapeDtypeStruct(length, bool)]
    return inputs


def parameter_shapes(model: nn.Module) -> dict[str, Any]:
    """Returns the nested dict of ShapeDtypeStructs of a model of MODELS."""
    return jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model))["params"]
