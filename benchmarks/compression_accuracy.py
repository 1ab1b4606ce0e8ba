# SPDX-License-Identifier: Apache-2.0
"""What fewer visual tokens cost in answers: a trained model of the shapes world, evaluated with
each compression that configs/llava_shapes_stage2.py knows.

    python benchmarks/compression_accuracy.py --workdir runs/llava_stage2

Nothing is trained: the tokens are merged or pruned when questions are asked. Runs trained with a
compression are evaluated by train.py itself. Prints one JSON object per compression, exact match
per kind of question, and the number of visual tokens that the last layer sees.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile

from configs.llava_shapes_stage2 import COMPRESSIONS
from flax_vlm.experiment import Experiment
from flax_vlm.models.fastv import FastV
from flax_vlm.training import workdir
from flax_vlm.training.checkpoints import load_params


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--split", default="test", help="an evaluator of the run's config")
    arguments = parser.parse_args()
    config = workdir.load_config(arguments.workdir)
    for name, change in COMPRESSIONS.items():
        experiment = Experiment.from_config({**config, "model": {**config["model"], **change}})
        checkpoints = arguments.workdir.absolute() / "checkpoints"
        params, extras, step = load_params(checkpoints, experiment.shardings.params)
        with tempfile.TemporaryDirectory() as folder:
            found = experiment.evaluate(
                params, extras, step, pathlib.Path(folder), [arguments.split]
            )
        model = experiment.objective.model
        decoder, tokens = model.language_model, model.tokens_per_image
        tokens -= decoder.prune_tokens if isinstance(decoder, FastV) else 0
        accuracy = {
            key.removeprefix(f"{arguments.split}/").removesuffix("/accuracy"): round(value, 4)
            for key, value in found.items()
            if key.endswith("accuracy")
        }
        print(json.dumps({"compression": name or "none", "visual_tokens": tokens, **accuracy}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
