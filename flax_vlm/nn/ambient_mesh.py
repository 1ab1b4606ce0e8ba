# SPDX-License-Identifier: Apache-2.0
"""What a layer may know of the devices: the mesh of `jax.set_mesh`, where there is one.

Layers hold no shardings. Two things cannot be left to the compiler, though: which kernel an
attention takes, and that rows of a batch stay where they are. Without a mesh nothing happens here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"


def ambient_mesh_shape() -> Mapping[str, int] | None:
    """Returns the axes that XLA partitions over; {} inside a shard_map over all of them, None
    without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}


def num_devices() -> int:
    """Returns how many devices the program may be partitioned over."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if mesh.empty else mesh.size


def target_platform() -> str:
    """Returns "cpu", "tpu", "cuda" or "rocm": what a program traced now is going to run on.

    It is the platform of the ambient mesh, which need not be here (tools/aot_compile), or jax's
    default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def keep_rows(x: jax.Array) -> jax.Array:
    """Returns x [B, ...] with its rows split over the batch axes of the mesh, as they came in.

    A parameter that is split over `fsdp` is meant to be gathered where it is used. XLA may find it
    cheaper to gather the *rows* of the activations instead and to split their width: for a 16-way
    fsdp axis that is 16 times the batch on every device. This constraint rules it out; its
    transpose does the same for the gradient.
    """
    mesh_shape = ambient_mesh_shape() or {}
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh_shape)
    if not axes or x.shape[0] % math.prod(mesh_shape[axis] for axis in axes):
        return x
    rest = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(axes, *rest))
