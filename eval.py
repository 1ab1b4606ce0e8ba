# SPDX-License-Identifier: Apache-2.0
"""Evaluates the last checkpoint of a run: `python eval.py --workdir DIR`.

Runs every evaluator of the run's config, writes DIR/eval/<step>.json and the pictures, prints both.
The numbers do not depend on the devices that it runs on. `--checkpoint` measures a Hugging Face
folder or hub id instead, with data and evaluators of a recipe, and writes DIR/eval/0.json:

    python eval.py --checkpoint google/siglip-base-patch16-224 --config configs/siglip_digits.py \
        --workdir DIR
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

config_flags.DEFINE_config_file("config", None, "The recipe of --checkpoint's evaluators.")
flags.DEFINE_string("workdir", None, "The folder that train.py wrote.", required=True)
flags.DEFINE_string("checkpoint", None, "A Hugging Face folder or hub id, instead of the run's.")
flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if bool(FLAGS.checkpoint) != (FLAGS.config is not None):
        raise app.UsageError("--checkpoint and --config belong together")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every save at length
    from flax_vlm import experiment, report
    from flax_vlm.training import compilation_cache

    compilation_cache.enable()

    folder = pathlib.Path(FLAGS.workdir).absolute()
    try:
        if FLAGS.checkpoint:
            experiment.evaluate_pretrained(FLAGS.config, FLAGS.checkpoint, folder)
        else:
            experiment.evaluate_run(folder)
    except experiment.USER_ERRORS as error:
        if FLAGS.traceback:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(report.finished(folder, FLAGS.checkpoint))
    return 0


if __name__ == "__main__":
    app.run(main)
