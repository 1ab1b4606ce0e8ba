# SPDX-License-Identifier: Apache-2.0
"""Trains what a config describes: `python train.py --config configs/NAME.py --workdir DIR`.

Starting the same command again resumes. `--config.key=value` changes a value, `--dry-run` shows
what would run, on as many virtual devices as the config's mesh needs. Exit codes: 0 done; 75 told
to stop (SIGTERM), state saved, start again to go on; 69 another process of the run was lost, start
all again to go on; 1 an error that the message explains or wrong flags.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from flax_vlm.training import compilation_cache, distributed, sharding
from flax_vlm.training.peers import EXIT_PREEMPTED

config_flags.DEFINE_config_file("config", None, "A recipe: configs/NAME.py[:argument].")
flags.DEFINE_string("workdir", None, "Where everything is written; the same one resumes.")
flags.DEFINE_bool("dry_run", False, "Print config, parameters, mesh and shardings, then stop.")
flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
flags.DEFINE_enum("distributed", "off", ["off", "auto", "explicit"], "Several processes.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, for --distributed=explicit.")
flags.DEFINE_integer("num_processes", None, "For --distributed=explicit.")
flags.DEFINE_integer("process_id", None, "For --distributed=explicit.")
flags.DEFINE_integer("start_timeout", 1800, "Seconds in which all processes must have come.")
flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which one is lost.")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every save at length
    if FLAGS.config is None or (FLAGS.workdir is None and not FLAGS.dry_run):
        raise app.UsageError("--config and --workdir are needed (or --config and --dry-run)")
    if FLAGS.dry_run:
        sharding.use_virtual_devices(FLAGS.config.mesh)
    compilation_cache.enable()
    try:
        peers = distributed.start_processes(
            FLAGS.distributed,
            FLAGS.coordinator,
            FLAGS.num_processes,
            FLAGS.process_id,
            timeout=FLAGS.start_timeout,
            silence=FLAGS.heartbeat_timeout,
        )
    except (ValueError, OSError) as error:
        return report_error(error)
    with peers:
        code = guarded()
        peers.leave(code)
    return code


def guarded() -> int:
    """Does what the flags ask for; an error that a person can mend becomes one line."""
    from flax_vlm import experiment  # after the processes have met: this starts jax

    try:
        return start(experiment.Experiment.from_config(FLAGS.config))
    except experiment.USER_ERRORS as error:
        return report_error(error)


def report_error(error: Exception) -> int:
    """Prints what a person can mend and returns the exit code."""
    if FLAGS.traceback:
        raise error
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return 1


def start(run) -> int:
    """Shows or trains an experiment and returns the exit code."""
    from flax_vlm import report

    if FLAGS.dry_run:
        print(report.dry_run(run))
        return 0
    workdir = pathlib.Path(FLAGS.workdir).absolute()
    state, done = run.train(workdir)
    if not done:
        print(f"stopped at step {int(state.step)} of {run.config['steps']}; start again to resume")
        return EXIT_PREEMPTED
    print(report.finished(workdir))
    return 0


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a wrong config key ends the program with the keys that there are."""
    # absl spells it --dry_run, people --dry-run
    argv = [arg.replace("--dry-run", "--dry_run") for arg in argv]
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        from flax_vlm import report

        print(report.wrong_key(argv, error), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
