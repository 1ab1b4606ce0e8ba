# SPDX-License-Identifier: Apache-2.0
"""The mesh, and which device holds which part of which tensor, decided by rules over parameter
paths.

Axes: `data` replicates parameters and splits the batch; `fsdp` splits the batch and the parameters;
`tensor` splits heads, hidden units and vocabulary. Models carry no device knowledge: a parameter is
known by its path, and optimizer state follows the parameter it belongs to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_vlm import trees

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the global batch is split over both

Rule = tuple[str, tuple[str | None, ...]]

# Tensor parallelism. A spec speaks of the last axes of a tensor, so that the leading layer axis of
# scanned blocks needs no rule of its own. First full match wins.
TENSOR_RULES: tuple[Rule, ...] = (
    # a kernel in int8 (models/quantization.py) is a leaf below the path of the kernel
    (r".*/(q|k|v)/kernel(/int8)?", (None, "tensor", None)),  # [D, N, K]
    (r".*/(q|k|v)/bias", ("tensor", None)),  # [N, K]
    (r".*/o/kernel(/int8)?", ("tensor", None, None)),  # [N, K, D]
    (r".*/(fc1|gate)/kernel(/int8)?", (None, "tensor")),  # [D, M]
    (r".*/(fc1|gate)/bias", ("tensor",)),
    (r".*/fc2/kernel(/int8)?", ("tensor", None)),  # [M, D]
    (r"(.*/)?embedding/embedding(/int8)?", ("tensor", None)),  # [V, D]
    (r"(.*/)?lm_head/kernel(/int8)?", (None, "tensor")),  # [D, V]
    # adapters are split as what they adapt, so that merging them moves nothing over tensor
    (r".*/(q|k|v)/kernel/b", (None, "tensor", None)),  # [r, N, K]
    (r".*/o/kernel/a", ("tensor", None, None)),  # [N, K, r]
    (r".*/(fc1|gate)/kernel/b", (None, "tensor")),  # [r, M]
    (r".*/fc2/kernel/a", ("tensor", None)),  # [M, r]
)

# A tensor below this many elements is not worth a gather over fsdp: it is replicated.
FSDP_MIN_SIZE = 2**14


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the device mesh with axes data, fsdp, tensor.

    Several TPU slices are laid along `data`, whose traffic (one sum of gradients a step) is what
    the network between slices can carry; fsdp and tensor stay inside a slice.

    Args:
        data: size of the data axis; -1 takes all devices that the other axes leave.
        fsdp: size of the fsdp axis.
        tensor: size of the tensor axis.
        devices: default all devices of all processes.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices, or the slices do not
            divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if data == -1:
        data = max(1, count // (fsdp * tensor))
    if data * fsdp * tensor != count:
        raise ValueError(
            f"mesh.data x mesh.fsdp x mesh.tensor must equal the number of devices, "
            f"got {data} x {fsdp} x {tensor} = {data * fsdp * tensor} for {count} devices; "
            f"set mesh.data=-1 to take what the other axes leave"
        )
    # jax also calls a host of GPUs a slice; there, any axis may cross hosts
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if data % slices:
        raise ValueError(
            f"mesh.data must be a multiple of the {slices} slices, got {data}; "
            f"fsdp and tensor stay inside a slice"
        )
    # an axis of 16 lies on two axes of an 8 x 8 x 4 torus
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh((data, fsdp, tensor), **options)
    else:
        within, across = (data // slices, fsdp, tensor), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, across, **options)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def use_virtual_devices(mesh: Mapping[str, int]) -> None:
    """Makes jax see as many CPU devices as a config's mesh needs; must run before it looks.

    Args:
        mesh: {"data": ..., "fsdp": ..., "tensor": ...}; a data axis of -1 counts as 1.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(1, mesh["data"]) * mesh["fsdp"] * mesh["tensor"])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every batch array: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_spec(
    path: str, shape: Sequence[int], mesh: Mesh, rules: Sequence[Rule] = ()
) -> PartitionSpec:
    """Returns how a parameter is split.

    `rules` (from the config) come first and are taken as they are; then TENSOR_RULES, to which the
    fsdp axis is added on the largest remaining axis that it divides. Tensors with fewer than
    FSDP_MIN_SIZE elements stay whole over fsdp.

    Args:
        path: "image/encoder/blocks/mlp/fc1/kernel".
        shape: of the tensor.
        mesh: axes data, fsdp, tensor.
        rules: (regular expression, axis names of the last axes) pairs.

    Raises:
        ValueError: if a rule asks to split an axis into parts that do not divide it.
    """
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            return _checked(path, shape, _align(spec, shape, path), mesh, pattern)
    pattern, spec = next(((p, s) for p, s in TENSOR_RULES if re.fullmatch(p, path)), ("", ()))
    axes = _align(spec, shape, path)
    if math.prod(shape) >= FSDP_MIN_SIZE:
        first = int(trees.is_scanned(path))  # never split the layer axis of the scan
        free = [i for i in range(first, len(shape)) if axes[i] is None]
        free = [i for i in free if shape[i] % mesh.shape["fsdp"] == 0]
        if free and mesh.shape["fsdp"] > 1:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return _checked(path, shape, axes, mesh, pattern)


def _align(spec: Sequence[str | None], shape: Sequence[int], path: str) -> list[str | None]:
    if len(spec) > len(shape):
        raise ValueError(f"sharding rule {tuple(spec)} has more axes than {path} {tuple(shape)}")
    return [None] * (len(shape) - len(spec)) + list(spec)


def _checked(
    path: str, shape: Sequence[int], axes: list[Any], mesh: Mesh, pattern: str
) -> PartitionSpec:
    for size, axis in zip(shape, axes, strict=True):
        names = (axis,) if isinstance(axis, str) else tuple(axis or ())
        unknown = [name for name in names if name not in mesh.shape]
        if unknown:
            raise ValueError(f"sharding rule {pattern!r} names {unknown}, axes are {AXES}")
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(
                f"sharding rule {pattern!r} must split an axis of {path} {tuple(shape)} evenly, "
                f"got {size} over {'x'.join(names)}={parts}; "
                f"change mesh.{names[-1]} or add a rule for this path to mesh.rules"
            )
    return PartitionSpec(*axes)


def parameter_shardings(params: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> Any:
    """Returns the tree of NamedShardings of a tree of parameters (arrays or shapes)."""
    return trees.map_with_path(
        lambda path, x: NamedSharding(mesh, parameter_spec(path, x.shape, mesh, rules)), params
    )


def follow_parameters(tree: Any, params: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> Any:
    """Returns shardings of a tree whose paths end in parameter paths (optimizer state, EMA,
    teacher).

    A leaf with the shape of its parameter is split like it; any other leaf (counts, factored
    moments) is replicated.
    """
    parameters = trees.named_leaves(params)

    def one(path: str, leaf: Any) -> NamedSharding:
        owner = trees.owner(path, leaf, parameters)
        if owner is None:
            return replicated(mesh)
        return NamedSharding(mesh, parameter_spec(owner, leaf.shape, mesh, rules))

    return trees.map_with_path(one, tree)


def data_shard(sharding: NamedSharding) -> tuple[int, int]:
    """Returns (index, count) of the slice of the global batch that this process must load.

    Derived from the devices, not from the process index: where a tensor axis spans processes,
        several of them load the
    same rows.

    Raises:
        ValueError: if the rows of this process's devices do not lie side by side.
    """
    total = 1 << 20
    rows = sharding.devices_indices_map((total,))
    mine = sorted({rows[d][0].indices(total)[:2] for d in sharding.addressable_devices})
    size = sum(stop - start for start, stop in mine)
    if mine[-1][1] - mine[0][0] != size:
        raise ValueError(f"a process must own contiguous rows of the batch, got {mine} of {total}")
    return mine[0][0] // size, total // size


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns the global batch from each process's own rows (see `data_shard`)."""
    _, count = data_shard(sharding)
    # this is the loop's one intended transfer; with several processes jax makes it in a way that
    # its own guard takes for an accident
    with jax.transfer_guard_host_to_device("allow"):
        return {
            key: jax.make_array_from_process_local_data(sharding, x, (len(x) * count, *x.shape[1:]))
            for key, x in batch.items()
        }


def describe_shardings(shapes: Any, shardings: Any, largest: int = 12) -> str:
    """Returns a table of the largest tensors: path, shape, spec, bytes per device."""
    specs = trees.named_leaves(shardings)
    rows = []
    for path, x in trees.named_leaves(shapes).items():
        local = specs[path].shard_shape(tuple(x.shape))
        size = math.prod(local) * np.dtype(x.dtype).itemsize
        rows.append((size, path, str(tuple(x.shape)), str(tuple(specs[path].spec))))
    rows.sort(reverse=True)
    lines = [f"{'bytes/device':>14}  {'shape':<22}{'split over':<32}tensor"]
    lines += [
        f"{size:>14,}  {shape:<22}{spec:<32}{path}" for size, path, shape, spec in rows[:largest]
    ]
    return "\n".join(lines)
