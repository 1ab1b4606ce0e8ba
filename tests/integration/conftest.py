# SPDX-License-Identifier: Apache-2.0
"""A tiny run that several tests share: built once per session."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/siglip_digits.py"
SGD_CONFIG = "tests/integration/sgd_config.py"  # to compare runs that add in another order

# Small enough to train in seconds; still every part of a real run.
TINY = {
    "steps": 12,
    "batch_size": 16,
    "log_every": 1,
    "checkpoint.every": 5,
    "data.text.length": 8,
    "model.embed_dim": 16,
    **{f"model.{tower}.width": 16 for tower in ("image", "text")},
    **{f"model.{tower}.depth": 1 for tower in ("image", "text")},
    **{f"model.{tower}.mlp_dim": 32 for tower in ("image", "text")},
    **{f"model.{tower}.num_heads": 2 for tower in ("image", "text")},
    "model.text.length": 8,
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the embedded datasets are built, once for all tests of this process."""
    return str(tmp_path_factory.mktemp("datasets"))


def overrides(values):
    return [f"--config.{key}={value}" for key, value in values.items()]


def program(name, *arguments, timeout=300, env=None, **kwargs):
    """Runs train.py or eval.py as a person would."""
    return subprocess.run(
        [sys.executable, name, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}, **kwargs,
    )  # fmt: skip


def train(folder, data_dir, *extra, config=CONFIG, **values):
    flags = overrides({**TINY, "data.dir": data_dir, **values})
    return program("train.py", "--config", config, "--workdir", folder, *flags, *extra)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_dir):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    done = train(folder, data_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout
