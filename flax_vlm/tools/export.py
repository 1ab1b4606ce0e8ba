# SPDX-License-Identifier: Apache-2.0
"""Writes the last checkpoint of a run as a folder that transformers loads.

    python -m flax_vlm.tools.export --workdir runs/siglip_digits --out exports/siglip_digits

The folder also loads with `flax_vlm.load`. The moving average is exported where the run kept one,
LoRA adapters are merged, and the model card holds the run's data, recipe and last evaluation. The
last line is one JSON object: the folder, its format, and how many parameters it holds.
"""

from __future__ import annotations

import json
import sys

from absl import app, flags, logging

from flax_vlm import trees
from flax_vlm.hub import load
from flax_vlm.training.checkpoints import CheckpointError

flags.DEFINE_string("workdir", None, "The folder that train.py wrote.", required=True)
flags.DEFINE_string("out", None, "Where to: an empty folder or an earlier export.", required=True)
flags.DEFINE_alias("output", "out")
flags.DEFINE_string("format", "auto", 'A model_type such as "siglip"; "auto" finds it.')
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of stored values.")
flags.DEFINE_float("max_shard_gb", 5.0, "Larger checkpoints are cut into shards.")
flags.DEFINE_string("license", None, 'For the model card: an identifier such as "apache-2.0".')
FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    """Returns the exit code: 1 where something must be mended, which the message says."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every restore at length
    try:
        vlm = load(FLAGS.workdir)
        model_type = vlm.save_pretrained(
            FLAGS.out,
            model_type=None if FLAGS.format == "auto" else FLAGS.format,
            dtype=FLAGS.dtype,
            max_shard_bytes=round(FLAGS.max_shard_gb * 1e9),
            license=FLAGS.license,
        )
    except (ValueError, OSError, CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    report = {
        "out": FLAGS.out,
        "format": model_type,
        "dtype": FLAGS.dtype,
        "parameters": trees.num_parameters(vlm.params),
        "step": vlm.step,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    app.run(main)
