# SPDX-License-Identifier: Apache-2.0
"""Devices that need not be here: TPU topologies by name, and virtual CPU devices.

    "v5e:16x16"   256 chips of TPU v5e; needs libtpu (pip install '.[tpu]'), no TPU
    "cpu:8"       8 virtual CPU devices

Google's names count cores for v4 and v5p: "v5p-512" is v5p:8x8x4, 256 chips.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from flax_vlm.build import lookup

# GiB of memory per chip. Source: cloud.google.com/tpu/docs/system-architecture-tpu-vm. The
# compiler keeps some for itself (15.75 of 16 on v5e).
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}

# Asked for by libtpu when it is loaded on a machine that is no TPU host.
_NO_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it locks the machine's TPU, which is not there
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: "v5e:16x16" or "cpu:8".
        slices: copies of it, connected by the data-centre network.
        devices: one per chip.
        hbm_gib: memory per chip, None where there is no such limit.
    """

    name: str
    slices: int
    devices: tuple[jax.Device, ...]
    hbm_gib: float | None


def load_topology(name: str, slices: int = 1) -> Topology:
    """Returns the devices of a topology; must run before jax looks for devices.

    Args:
        name: "KIND:AxBxC" with a kind of HBM_GIB, or "cpu:N".
        slices: number of TPU slices.

    Raises:
        ValueError: for a name that is none, a shape that the kind cannot have, or without libtpu.
    """
    jax.config.update("jax_platforms", "cpu")
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None:
        raise ValueError(f"a topology is KIND:AxB or cpu:N, like v5e:16x16, got {name!r}")
    kind, shape = match.groups()
    if kind == "cpu":
        if slices != 1 or not shape.isdigit():
            raise ValueError(f"cpu:N is N devices in one slice, got {name!r} and {slices} slices")
        jax.config.update("jax_num_cpu_devices", int(shape))
        return Topology(name, 1, tuple(jax.devices()), None)
    hbm = lookup(HBM_GIB, kind, "TPU")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"{name} needs the TPU compiler, libtpu: pip install '.[tpu]'")
    for key, value in _NO_TPU_HOST.items():
        os.environ.setdefault(key, value)
    # what was compiled without a device cannot be read back from the cache
    jax.config.update("jax_enable_compilation_cache", False)
    # v4 has two cores on a chip, which work as one device
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if set(shape) <= set("1x"):  # one chip: less than a host has by default
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=slices, **options
        )
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(f"{name} is no shape of a TPU {kind}: {error}") from error
    return Topology(name, slices, tuple(description.devices), hbm)
