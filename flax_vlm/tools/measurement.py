# SPDX-License-Identifier: Apache-2.0
"""What tools/bench reports: speed, FLOP/s, memory and how the train step of a config computes.

Alternatives are changes to the config; all are timed in one process, in turns. What is timed is
told in step_timing.py, what counts as a FLOP in scaling/flops.py.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from flax_vlm import trees
from flax_vlm.build import build
from flax_vlm.losses import LOSSES
from flax_vlm.program import Program, plain
from flax_vlm.tools.attention_labels import attention_of
from flax_vlm.tools.overrides import parse_changes, with_changes
from flax_vlm.tools.step_timing import Contender, spread, time_in_turns
from flax_vlm.training import profiling

GIVEN = "as given"
RUNTIME = "runtime: the fullest device's memory_stats, initialisation and alternatives included"
COMPILER = "compiler: arguments, results and temporaries of the step (no memory_stats here)"
CONVENTIONS = {
    "timed": "seconds between the ends of consecutive steps, the next one already queued; forward, "
    "backward and update; the batch lies on the devices",
    "spread": "median, 10th and 90th percentile",
    "flops": "model FLOPs in closed form: a multiply-add is 2; matmuls alone; backward twice the "
    "forward, frozen towers forward alone; attention in full, causal or not; no rematerialisation, "
    "no loss, no softmax, no norms",
    "mfu": "model FLOPs / (step time x peak of all devices); mfu against the published dense "
    "bfloat16 peak, mfu_of_matmul against the products measured in this run",
}


def measure(
    config: Mapping[str, Any], alternatives: Sequence[str] = (), *, steps: int = 20, warmup: int = 3
) -> dict[str, Any]:
    """Returns what was measured, as JSON values.

    Every alternative holds a state and a batch of its own beside those of the config as given.

    Args:
        config: nested mapping; `init_from` is not looked at.
        alternatives: changes to it, see overrides.parse_changes.
        steps: timed, of each.
        warmup: steps before them.

    Raises:
        ValueError: what with_changes and Program.from_config raise; a key that is none is found
            before anything is compiled.
    """
    given = {**plain(config), "init_from": ""}
    configs = {GIVEN: given}
    configs |= {text: with_changes(given, parse_changes(text)) for text in alternatives}
    programs = {name: Program.from_config(config) for name, config in configs.items()}
    contenders = {}
    for name, program in programs.items():
        contenders[name] = Contender.build(program)
        contenders[name].warm_up(warmup)
    times = dict(zip(configs, time_in_turns(list(contenders.values()), steps), strict=True))
    memory = _peak_memory(_compiled_bytes(contenders[GIVEN]))  # before the matmul adds to it
    reports = {name: _report(contenders[name], times[name]) for name in configs}
    versus = {
        name: {**reports[name], **_ratios(contenders, times, name)} for name in list(configs)[1:]
    }
    return _machine() | reports[GIVEN] | memory | {"vs": versus, "conventions": CONVENTIONS}


def _report(contender: Contender, times: np.ndarray) -> dict[str, Any]:
    program, seconds = contender.program, spread(times)
    return {
        "batch_size": program.batch_size,
        "micro_batches": program.config["micro_batches"],
        "mesh": dict(program.mesh.shape),
        "objective": program.config["objective"]["name"],
        "loss": _loss(program),
        "towers": _towers(program),
        "attention": attention_of(contender.compiled.as_text(), program.shapes.params),
        "parameters": trees.num_parameters(program.shapes.params),
        "steps": times.size,
        "step_seconds": seconds,
        "examples_per_second": program.batch_size / seconds["median"],
        **_flops(program, seconds["median"]),
        "compiled_bytes_per_device": _compiled_bytes(contender),
        "lower_seconds": contender.lower_seconds,
        "compile_seconds": contender.compile_seconds,
        "first_loss": contender.first_loss,
    }


def _compiled_bytes(contender: Contender) -> int:
    sizes = contender.compiled.memory_analysis()
    new_output = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + new_output


def _flops(program: Program, seconds: float) -> dict[str, Any]:
    per_example = program.flops_per_example()
    rate = per_example * program.batch_size / seconds
    per_device = rate / program.mesh.size
    peak = profiling.published_peak(jax.devices()[0].device_kind)
    dtype = next(iter(_towers(program).values()))["dtype"]
    matmul = profiling.measured_matmul_flops(dtype)
    return {
        "flops_per_example": per_example,
        "model_tflops": rate / 1e12,
        "model_tflops_per_device": per_device / 1e12,
        "peak_tflops_per_device": peak and peak / 1e12,
        "mfu": peak and per_device / peak,
        "matmul": {
            "dtype": dtype,
            "size": profiling.matmul_size(),
            "tflops_per_device": matmul / 1e12,
        },
        "mfu_of_matmul": per_device / matmul,
    }


def _ratios(
    contenders: Mapping[str, Contender], times: Mapping[str, np.ndarray], name: str
) -> dict[str, Any]:
    """Returns the alternative's step time and speed as multiples of the given config's."""
    slower = times[name].sum(1) / times[GIVEN].sum(1)  # [rounds]
    work = contenders[name].program.batch_size / contenders[GIVEN].program.batch_size
    return {
        "rounds": len(slower),
        "step_seconds_ratio": spread(slower),
        "examples_per_second_ratio": spread(work / slower),
    }


def _loss(program: Program) -> dict[str, str] | None:
    spec = getattr(program.objective, "pair_loss", None)
    return spec and {"name": spec["name"], "form": build(LOSSES, spec, "pair_loss").form}


def _towers(program: Program) -> dict[str, dict[str, Any]]:
    """Returns {tower: how it computes}: of the modules that the model is made of, or the model."""
    model = program.objective.model
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    parts = {
        name: part
        for name, part in fields.items()
        if isinstance(part, nn.Module) and name != "parent"
    }
    keys = ("dtype", "remat", "unroll")  # a connector has no layers, and so the first alone
    return {
        name: {key: getattr(part, key) for key in keys if hasattr(part, key)}
        for name, part in (parts or {"model": model}).items()
    }


def _peak_memory(compiled_bytes: int) -> dict[str, Any]:
    """Returns the peak so far of the fullest local device, and of this process on the host.

    Args:
        compiled_bytes: of the step, where the runtime does not count.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_bytes_per_device": max(peaks, default=compiled_bytes),
        "peak_bytes_source": RUNTIME if peaks else COMPILER,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def _machine() -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "platform": jax.default_backend(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
