# SPDX-License-Identifier: Apache-2.0
"""Compiles the train step of a config for a TPU pod that is not here, and says whether it fits.

    python -m flax_vlm.tools.aot_compile --config configs/siglip_l16.py --topology v5e:16x16
    ... --search    the largest batch per chip that fits, for each rematerialisation policy

The real TPU compiler runs (libtpu, `pip install '.[tpu]'`), on shapes alone: no TPU, no data, no
parameters. `cpu:N` compiles for virtual CPU devices. The last line is one JSON object; a program
that does not fit is a result, `"fits": false` with the compiler's words, not an error.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from flax_vlm import trees
from flax_vlm.program import Program, plain
from flax_vlm.tools.batch_search import largest_batch
from flax_vlm.tools.collectives import count_collectives
from flax_vlm.tools.topologies import Topology, load_topology

config_flags.DEFINE_config_file("config", None, "A recipe: configs/NAME.py[:argument].")
flags.DEFINE_string("topology", None, "v5e:16x16, v5p:8x8x4, ..., or cpu:N.")
flags.DEFINE_integer("slices", 1, "TPU slices, each of that topology.")
flags.DEFINE_bool("search", False, "Find the largest batch per chip that fits, for each remat.")
flags.DEFINE_list("search_remat", ["none", "dots_no_batch", "full"], "Policies to search.")
FLAGS = flags.FLAGS

GB = 1e9
START_FACTOR = 8  # of the config's batch: a size that is refused is cheap
# the parts of a model that have a policy each; any other model has one itself
TOWERS = {
    "clip": ("image", "text"),
    "siglip": ("image", "text"),
    "llava": ("image", "language_model"),
}
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
# "total memory required (17.31G) exceeds available HBM (15.75G)", "Used 16.74G of 15.75G"
NEEDED_OF_AVAILABLE = re.compile(r"(?:\(|Used )([\d.]+)G\)?[a-zA-Z ]+\(?([\d.]+)G")


def compile_report(config: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """Returns what the compiler says of the train step of a config, as JSON values.

    Sizes are GB (1e9 bytes) per chip: `argument` is the state and the batch, `temp` what the step
    needs besides, `peak` their sum with what the results need anew. Whether the step fits is the
    compiler's verdict and not arithmetic on these.

    Args:
        config: nested mapping.
        topology: devices to compile for.

    Raises:
        ValueError: what Program.from_config raises.
        jax.errors.JaxRuntimeError: if compilation fails for another reason than memory.
    """
    program = Program.from_config(config, devices=topology.devices)
    report = _plan(program, topology)
    start = time.perf_counter()
    lowered = program.lower_train_step()
    report["lower_seconds"] = round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        report |= {"fits": False} | _refusal(str(error).partition("\n")[0])
    else:
        report |= {"fits": True} | _memory(compiled)
        report["collectives"] = count_collectives(compiled.as_text())
    report["compile_seconds"] = round(time.perf_counter() - start, 1)
    return report


def _plan(program: Program, topology: Topology) -> dict[str, Any]:
    chips = len(topology.devices)
    flops = program.flops_per_example() * program.batch_size
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": chips,
        "chip": topology.devices[0].device_kind,
        "hbm_gib": topology.hbm_gib,
        "mesh": dict(program.mesh.shape),
        "global_batch": program.batch_size,
        "batch_per_chip": program.batch_size / chips,
        "micro_batches": program.config["micro_batches"],
        "remat": remat_policies(program.config),
        "parameters": trees.num_parameters(program.shapes.params),
        "model_tflop_per_step": flops / 1e12,
        "model_tflop_per_step_and_chip": flops / 1e12 / chips,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "libtpu" if topology.hbm_gib else "jaxlib")
        },
    }


def _memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    sizes = compiled.memory_analysis()
    new_output = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    peak = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + new_output
    return {
        "argument_gb": sizes.argument_size_in_bytes / GB,
        "temp_gb": sizes.temp_size_in_bytes / GB,
        "peak_gb": peak / GB,
    }


def _refusal(message: str) -> dict[str, Any]:
    """Returns the compiler's words and the two sizes in them."""
    sizes = NEEDED_OF_AVAILABLE.search(message)
    needed, available = (float(gib) for gib in sizes.groups()) if sizes else (None, None)
    return {"out_of_memory": message, "needed_gib": needed, "available_gib": available}


def remat_policies(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns {tower: rematerialisation policy} of a config's model."""
    model = config["model"]
    towers = {name: model.get(name, {}) for name in TOWERS.get(model["name"], ())}
    return {name: spec.get("remat", "none") for name, spec in (towers or {"model": model}).items()}


def with_remat(config: Mapping[str, Any], policy: str) -> dict[str, Any]:
    """Returns a config whose encoders all rematerialise by one policy."""
    model = dict(config["model"])
    towers = TOWERS.get(model["name"], ())
    for tower in towers:
        model[tower] = {**model.get(tower, {}), "remat": policy}
    return {**config, "model": model if towers else {**model, "remat": policy}}


def search(config: Mapping[str, Any], topology: Topology, policies: list[str]) -> dict[str, Any]:
    """Returns {"search": every attempt, "largest": {policy: the largest that fits}}."""
    chips = len(topology.devices)
    attempts: list[dict[str, Any]] = []

    def attempt(policy: str, batch_per_chip: int) -> dict[str, Any]:
        changed = with_remat(config, policy) | {"batch_size": batch_per_chip * chips}
        report = compile_report(changed, topology)
        attempts.append(report)
        verdict = "fits" if report["fits"] else report["out_of_memory"]
        print(f"remat {policy}, {batch_per_chip} per chip: {verdict}", file=sys.stderr, flush=True)
        return report

    start = max(1, START_FACTOR * config["batch_size"] // chips)
    largest = {
        policy: largest_batch(lambda size, policy=policy: attempt(policy, size), start)
        for policy in policies
    }
    return {"largest": largest, "search": attempts}


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 whether it fits or not, 1 for a wrong config or topology."""
    if FLAGS.config is None or FLAGS.topology is None:
        raise app.UsageError("--config and --topology are needed")
    try:
        topology = load_topology(FLAGS.topology, FLAGS.slices)
        config = plain(FLAGS.config)
        if FLAGS.search:
            report = search(config, topology, FLAGS.search_remat)
        else:
            report = compile_report(config, topology)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    app.run(main)
