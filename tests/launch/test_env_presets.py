# SPDX-License-Identifier: Apache-2.0
"""The environment files of launch/env: jax starts under each, and libtpu knows every flag.

Unknown names abort a process, and they change with jax: this is what notices.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PRESETS = sorted((ROOT / "launch" / "env").glob("*.env"))
PRODUCT = """
import jax, jax.numpy as jnp
print("product", jax.jit(lambda x: x @ x)(jnp.full((4, 4), 2.0)).sum())
"""
# a program for four chips that are not here, by the compiler of the TPU
TPU_PRODUCT = """
import sys, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from flax_vlm.tools.topologies import load_topology
chips = load_topology(sys.argv[1]).devices
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=chips)
x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
jax.jit(lambda a, b: (a @ b).sum()).lower(x, x).compile()
print("compiled")
"""
TPUS = {"tpu_v5e": "v5e:2x2", "tpu_v5p": "v5p:2x2x1", "tpu_v6e": "v6e:2x2"}


def variables(preset):
    """Returns what `set -a; . PRESET` adds to an environment."""
    clean = {"PATH": os.environ["PATH"]}
    command = ["bash", "-ec", f"set -a; . {preset}; env -0"]
    found = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    pairs = dict(item.split("=", 1) for item in found.stdout.split("\0") if item)
    return {key: pairs[key] for key in pairs.keys() - clean.keys() - {"PWD", "SHLVL", "_"}}


def program(code, *arguments, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_jax_starts_under_every_preset(preset):
    found = program(PRODUCT, **variables(preset))
    assert "product 256.0" in found.stdout, found.stderr[-2000:]


def test_a_flag_that_jax_does_not_know_would_be_noticed():
    # still in many guides for GPUs, gone from jax
    found = program(PRODUCT, XLA_FLAGS="--xla_gpu_enable_async_all_gather=true")
    assert found.returncode != 0 and "Unknown flag" in found.stderr


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_a_preset_sets_what_is_of_its_chip(preset):
    names = set(variables(preset))
    if preset.stem.startswith("tpu"):
        assert names == {"LIBTPU_INIT_ARGS"}, "xla_tpu_* in XLA_FLAGS aborts without a TPU"
    else:
        assert names and not names & {"LIBTPU_INIT_ARGS", "XLA_FLAGS"}


def test_the_hopper_preset_holds_all_of_the_general_one():
    folder = ROOT / "launch" / "env"
    general, hopper = variables(folder / "gpu.env"), variables(folder / "gpu_hopper.env")
    assert general.items() < hopper.items()


def test_a_tpu_preset_adds_to_flags_that_are_set_already():
    command = f"LIBTPU_INIT_ARGS=--mine; . {ROOT}/launch/env/tpu_v6e.env; echo $LIBTPU_INIT_ARGS"
    found = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, check=True)
    assert found.stdout.split()[0] == "--mine" and len(found.stdout.split()) > 2


@pytest.mark.parametrize("preset", TPUS)
def test_the_tpu_compiler_takes_the_flags_of_every_preset(preset):
    pytest.importorskip("libtpu", reason="needs pip install '.[tpu]', no TPU")
    flags = variables(ROOT / "launch" / "env" / f"{preset}.env")
    together = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # another process may be compiling too
    found = program(TPU_PRODUCT, TPUS[preset], **flags, **together)
    assert "compiled" in found.stdout, found.stderr[-2000:]
