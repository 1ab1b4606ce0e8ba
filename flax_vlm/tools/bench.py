# SPDX-License-Identifier: Apache-2.0
"""Measures the train step of a config on the devices that are here, on synthetic data.

    python -m flax_vlm.tools.bench --config configs/siglip_l16.py --config.batch_size=64
    ... --vs dense                                          the same with the dense loss
    ... --vs model.image.unroll=24,model.text.unroll=24     two changes at once
    ... --vs batch_size=128 --vs model.image.remat=full     two alternatives

Alternatives are timed in turns with the config as given, in one process, and compared round by
round. The last line is one JSON object, see measurement.py. Neither grain nor a dataset library is
imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from flax_vlm.tools.measurement import GIVEN, measure
from flax_vlm.training import distributed

config_flags.DEFINE_config_file("config", None, "A recipe: configs/NAME.py[:argument].")
flags.DEFINE_integer("steps", 20, "Steps to time, of each alternative.", lower_bound=1)
flags.DEFINE_integer("warmup", 3, "Steps before them.", lower_bound=1)
flags.DEFINE_multi_string("vs", [], "PATH=VALUE[,PATH=VALUE ...] or a form of the pair loss.")
flags.DEFINE_enum("distributed", "off", ["off", "auto"], "Several processes, found by jax.")
FLAGS = flags.FLAGS


def summary(report: Mapping[str, Any]) -> str:
    """Returns the few lines that a person reads first."""
    lines = []
    for name, found in {GIVEN: report, **report["vs"]}.items():
        seconds, ratio = found["step_seconds"], found.get("step_seconds_ratio")
        lines.append(
            f"{name}: {found['examples_per_second']:,.1f} examples/s, step {_numbers(seconds)} s, "
            f"{found['model_tflops']:.3g} model TFLOP/s, {found['mfu_of_matmul']:.1%} of matmul"
            + (f", step time x {_numbers(ratio)}" if ratio else "")
        )
    return "\n".join(lines)


def _numbers(values: Mapping[str, float]) -> str:
    return f"{values['median']:.4g} ({values['p10']:.4g} to {values['p90']:.4g})"


def main(argv: list[str]) -> int:
    """Returns the exit code: 1 for a wrong config or alternative."""
    if FLAGS.config is None:
        raise app.UsageError("--config is needed")
    distributed.start_processes(FLAGS.distributed)
    # compile_seconds is a compilation's, and labels in a cached program may be another version's
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        report = measure(FLAGS.config, FLAGS.vs, steps=FLAGS.steps, warmup=FLAGS.warmup)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 1
    if jax.process_index() == 0:
        print(summary(report))
        print(json.dumps({"config": FLAGS["config"].config_filename, **report}))
    return 0


if __name__ == "__main__":
    app.run(main)
