# SPDX-License-Identifier: Apache-2.0
"""train.py and eval.py as programs: what a stranger types, what a scheduler does to them."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.training import profiling
from flax_vlm.training.checkpoints import load_params
from flax_vlm.training.metrics import TIMING_KEYS, read_metrics
from tests.integration.conftest import CONFIG, ROOT, SGD_CONFIG, TINY, overrides, program, train


def rows(folder):
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in found]


def test_a_run_prints_its_result_its_pictures_and_how_to_load_it(finished):
    folder, printed = finished
    results = json.loads((folder / "eval" / "12.json").read_text())
    assert f"{'zero_shot/accuracy':<36}{results['zero_shot/accuracy']:.4f}" in printed
    for name in ("zero_shot/predictions.png", "zero_shot/similarity.png"):
        assert str(folder / "eval" / "12" / name) in printed
        assert (folder / "eval" / "12" / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "training_curve.png").exists() and f"flax_vlm.load('{folder}')" in printed
    assert [row["step"] for row in rows(folder)] == [*range(1, 13)]
    assert list((folder / "tensorboard").iterdir())


def test_starting_a_finished_run_again_says_so_and_changes_nothing(finished, data_dir):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    again = train(folder, data_dir)
    assert again.returncode == 0 and "has all 12 steps already" in again.stdout
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_eval_alone_gives_the_numbers_of_training(finished):
    folder, _ = finished
    file = folder / "eval" / "12.json"
    before = json.loads(file.read_text())
    file.unlink()
    done = program("eval.py", "--workdir", folder, env={"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(file.read_text()) == before


def test_a_run_can_start_from_the_parameters_of_another(finished, tmp_path, data_dir):
    still = {"optimizer.lr": 0.0, "steps": 1, "ema_decay": 0.0}
    done = train(tmp_path, data_dir, **still, init_from=finished[0])
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = finished[0] / "eval" / "12.json", tmp_path / "eval" / "1.json"
    assert json.loads(before.read_text()) == json.loads(after.read_text())
    (mine, _, _), (theirs, _, _) = (load_params(f / "checkpoints") for f in (tmp_path, finished[0]))
    assert not trees.differences(mine, theirs)


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "a dataset must have examples"), ("broken", "examples broken")],
)
def test_a_folder_without_readable_images_stops_the_run(tmp_path, data_dir, name, message):
    folder = tmp_path / name
    folder.mkdir()
    for i in range(20 if name == "broken" else 0):
        (folder / f"{i}.png").write_bytes(b"<html>")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    values = {"data.name": f"folder:{folder}", "evals.zero_shot.data.name": "digits", "steps": 40}
    done = train(tmp_path / "run", data_dir, **values)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_kill_minus_nine_and_the_same_command_again_equal_an_uninterrupted_run(
    finished, tmp_path, data_dir
):
    flags = overrides({**TINY, "data.dir": data_dir})
    command = [sys.executable, "train.py", "--config", CONFIG, "--workdir", str(tmp_path), *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while len(rows(tmp_path)) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was killed in the middle, not done before"
    killed = profiling.read_timings(tmp_path / "timings.jsonl")
    assert killed[-1]["stop"] in (5, 10), "the time up to the last save is on record"
    resumed = train(tmp_path, data_dir)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    time_spent = profiling.goodput(profiling.read_timings(tmp_path / "timings.jsonl"))
    assert time_spent["starts"] == 2 and 0 < time_spent["goodput"] < 1 and time_spent["away"] > 0
    assert f"goodput {time_spent['goodput']:.1%}" in resumed.stdout
    assert rows(tmp_path) == rows(finished[0])
    (mine, _, _), (theirs, _, _) = (load_params(f / "checkpoints") for f in (tmp_path, finished[0]))
    assert not trees.differences(mine, theirs)


@pytest.mark.parametrize("workers", [1, 2])
def test_data_workers_change_no_bit(finished, tmp_path, data_dir, workers):
    done = train(tmp_path, data_dir, **{"data.workers": workers})
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tmp_path) == rows(finished[0])


def test_another_mesh_gives_the_same_losses(tmp_path, data_dir):
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    meshes = {"one": [], "eight": overrides({"mesh.fsdp": 2, "mesh.tensor": 2})}
    for name, mesh in meshes.items():
        flags = ["--config", SGD_CONFIG, f"--config.data.dir={data_dir}", *mesh]
        folder = tmp_path / name
        done = program("train.py", "--workdir", folder, *flags, env=env if mesh else {})
        assert done.returncode == 0, done.stderr[-3000:]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in meshes]
    assert losses[0] != losses[1], "the meshes differ"
    np.testing.assert_allclose(*losses, rtol=2e-5)


def test_sigterm_saves_and_exits_with_the_documented_code(tmp_path, data_dir):
    flags = overrides({**TINY, "data.dir": data_dir, "steps": 4000})
    command = [sys.executable, "train.py", "--config", CONFIG, "--workdir", str(tmp_path), *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 240
    while len(rows(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "start again to resume" in printed
    last = rows(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / str(last)).is_dir(), "the last step is saved"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.stepz=3"],
            "unknown key --config.stepz, config has ['batch_size',",
        ),
        (["--config.mesh.tensr=3"], "--config.mesh.tensr, config.mesh has ['data', 'fsdp',"),
        (["--config.steps=many"], "--config.steps"),
        (["--config.optimizer.name=adam"], "unknown optimizer 'adam', choose one of"),
        (["--config.model.image.patch_size=5"], "patch_size 5 must divide the image, got 16 x 16"),
        (["--config.mesh.data=3"], "must equal the number of devices, got 3 x 1 x 1 = 3 for 1"),
        (["--config.data.name=digit"], "unknown dataset 'digit', choose one of"),
        (["--config.nonfinite=ignore"], "nonfinite must be 'stop' or 'skip', got 'ignore'"),
        (["--config.data.split=validation"], "validation"),
        (["--config.data.train_ops=()"], "must end with (16, 16, 3) uint8"),
    ],
)
def test_bad_settings_get_one_clear_message(tmp_path, data_dir, flags, message):
    done = train(tmp_path, data_dir, *flags)
    assert done.returncode != 0 and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr, done.stderr[-2000:]


def test_a_workdir_of_another_config_is_refused_with_the_differences(finished, data_dir):
    folder, _ = finished
    before = (folder / "config.json").read_bytes()
    done = train(folder, data_dir, **{"optimizer.lr": 0.5, "seed": 7})
    assert done.returncode == 1 and "written by another config" in done.stderr
    assert "optimizer.lr: 0.002 in the workdir, 0.5 now" in done.stderr
    assert "seed: 0 in the workdir, 7 now" in done.stderr
    assert (folder / "config.json").read_bytes() == before


def test_a_full_disk_stops_with_a_message_and_resumes_when_there_is_room(tmp_path, data_dir):
    # a limit on file sizes stands for the full disk: checkpoints fail, small files pass
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')"
    )
    flags = overrides({**TINY, "data.dir": data_dir})
    done = program("-c", code, "--config", CONFIG, "--workdir", tmp_path, *flags)
    assert done.returncode == 1 and "could not be written" in done.stderr, done.stderr[-2000:]
    assert "the last complete one is step None" in done.stderr
    assert "Free disk space and start the same command again" in done.stderr
    again = train(tmp_path, data_dir)
    assert again.returncode == 0 and [row["step"] for row in rows(tmp_path)] == [*range(1, 13)]


def test_a_dry_run_shows_the_plan_without_data_or_workdir(tmp_path):
    done = program("train.py", "--config", "configs/siglip_l16.py", "--dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    for line in (
        "652,150,786",
        "data 1, fsdp 16, tensor 1 (16 devices)",
        "== largest tensors ==",
        '"batch_size": 32768',
    ):
        assert line in done.stdout
    assert not os.listdir(tmp_path)
