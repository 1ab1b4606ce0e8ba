# SPDX-License-Identifier: Apache-2.0
"""Evaluates the last checkpoint of a run: `python eval.py --workdir DIR`.

Runs every evaluator of the run's config, writes DIR/eval/<step>.json and the pictures, prints both.
The numbers do not depend on the devices that it runs on.
"""

import pathlib
import sys

from absl import app, flags, logging

flags.DEFINE_string("workdir", None, "The folder that train.py wrote.", required=True)
flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every save at length
    from flax_vlm import experiment, report
    from flax_vlm.training import compilation_cache
    from flax_vlm.training import workdir as layout

    compilation_cache.enable()

    folder = pathlib.Path(FLAGS.workdir).absolute()
    try:
        config = layout.load_config(folder)
        mesh = experiment.mesh_for_evaluation(config["mesh"])
        run = experiment.Experiment.from_config({**config, "mesh": mesh})
        run.evaluate_checkpoint(folder)
    except experiment.USER_ERRORS as error:
        if FLAGS.traceback:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(report.finished(folder))
    return 0


if __name__ == "__main__":
    app.run(main)
