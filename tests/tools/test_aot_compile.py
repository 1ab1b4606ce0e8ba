# SPDX-License-Identifier: Apache-2.0
"""Compiling for devices that are not here. What needs the TPU compiler is marked `libtpu`."""

import json
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT, TINY, overrides

SMALL = [*overrides(TINY), "--config.mesh.fsdp=2"]


def aot_compile(*flags, config="configs/siglip_digits.py"):
    command = [sys.executable, "-m", "flax_vlm.tools.aot_compile", "--config", config, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1] if done.stdout else "null"
    return done, json.loads(last) if done.returncode == 0 else None


def test_the_report_names_devices_memory_collectives_and_flops():
    done, report = aot_compile("--topology", "cpu:4", *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert report["topology"] == "cpu:4" and report["chips"] == 4
    assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert report["global_batch"] == 16 and report["batch_per_chip"] == 4
    assert report["fits"] is True and report["hbm_gib"] is None
    assert report["peak_gb"] >= report["argument_gb"] + report["temp_gb"] > 0
    assert report["collectives"]["all-gather"]["bytes"] > 0
    assert report["model_tflop_per_step"] == 4 * report["model_tflop_per_step_and_chip"] > 0
    assert report["remat"] == {"image": "none", "text": "none"}
    # two float32 moments beside every parameter, of which fsdp splits the large ones
    assert report["argument_gb"] * 1e9 > 3 * 4 * report["parameters"] / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e"], "a topology is KIND:AxB or cpu:N"),
        (["--topology", "v9:2x2"], "unknown TPU 'v9', choose one of"),
        (["--topology", "cpu:3"], "must equal the number of devices"),
        (["--topology", "cpu:4", "--config.batch_size=18"], "must be a multiple of mesh.data"),
    ],
)
def test_what_cannot_be_compiled_gets_one_clear_message(flags, message):
    done, _ = aot_compile(*SMALL, *flags)
    assert done.returncode == 1 and message in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.libtpu
def test_so400m_with_the_published_batch_fits_256_chips_of_v5e():
    done, report = aot_compile("--topology", "v5e:16x16", config="configs/siglip_so400m14.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert report["fits"] and report["chips"] == 256 and report["global_batch"] == 32768
    assert 2 < report["peak_gb"] < 16


@pytest.mark.libtpu
def test_a_step_that_does_not_fit_is_a_result_in_the_compilers_words():
    flags = ["--topology", "v5e:2x2", "--config.mesh.fsdp=1", "--config.batch_size=4096"]
    done, report = aot_compile(*flags, config="configs/siglip_l16.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert report["fits"] is False and "exceeds available" in report["out_of_memory"]


@pytest.mark.libtpu
def test_two_slices_are_connected_by_the_data_axis():
    flags = ["--topology", "v5e:2x2", "--slices=2", *SMALL]
    done, report = aot_compile(*flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert report["chips"] == 8 and report["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
