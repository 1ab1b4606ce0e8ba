# SPDX-License-Identifier: Apache-2.0
"""The tool as a program: a ladder of two batches and two seeds, killed on its way and resumed."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flax_vlm.tools.runs import Programs
from tests.integration.conftest import ROOT, TINY

LADDER = """
from flax_vlm.scaling.ladder import Ladder

def get_ladder(steps="200"):
    small = {small!r}
    return Ladder(
        config="configs/siglip_digits.py",
        dials={{"batch": (8, 16)}},
        changes=lambda batch: {{**small, "batch_size": batch, "steps": int(steps)}},
        seeds=(0, 1),
        held_out=lambda batch: batch == 16,
        metrics=("zero_shot/accuracy", "train/loss"),
        x="batch",
    )
"""


def command(verb, folder, *more):
    ladder = f"{folder}/ladder.py"
    return [sys.executable, "-m", "flax_vlm.tools.ladder", verb, ladder, "--out",
            f"{folder}/out", *more]  # fmt: skip


def metrics(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def tool(verb, folder, *more):
    return subprocess.run(
        command(verb, folder, *more), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A ladder that was told to stop in its second rung, and was then started again."""
    folder = tmp_path_factory.mktemp("ladder")
    small = {
        **TINY,
        "data.dir": str(folder / "data"),
        "checkpoint.every": 200,
        "evals.zero_shot.every": 0,
    }
    (folder / "ladder.py").write_text(LADDER.format(small=small))
    first = subprocess.Popen(command("run", folder), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    second = folder / "out/batch_16/seed_0"
    while first.poll() is None and not metrics(second):
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    stopped = first.wait(timeout=120), first.stderr.read()
    before = tool("status", folder).stdout
    stamp = os.stat(folder / "out/batch_8/seed_0/eval/200.json").st_mtime_ns
    done = tool("run", folder, "--jobs", "2")
    return {"folder": folder, "stopped": stopped, "before": before, "stamp": stamp, "done": done}


def test_it_stops_with_its_rungs_saved_and_says_how_far_they_are(ladder):
    code, words = ladder["stopped"]
    assert code == 75 and "batch_16/seed_0 was told to stop" in words
    lines = ladder["before"].splitlines()
    assert lines[0] == "batch_8/seed_0: done"
    assert lines[1].startswith("batch_16/seed_0: step ") and lines[1].endswith(" of 200")
    assert lines[2:] == ["batch_8/seed_1: not started", "batch_16/seed_1: not started"]


def test_started_again_it_does_what_is_missing_and_nothing_twice(ladder):
    done, folder = ladder["done"], ladder["folder"]
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("1 of 4 rungs are done")
    assert os.stat(folder / "out/batch_8/seed_0/eval/200.json").st_mtime_ns == ladder["stamp"]
    assert tool("status", folder).stdout.count(": done\n") == 4
    resumed = (folder / "out/batch_16/seed_0/timings.jsonl").read_text().splitlines()
    assert len({json.loads(line)["began"] for line in resumed}) == 2


def test_the_table_has_a_row_per_rung_with_costs_and_metrics(ladder):
    out = ladder["folder"] / "out"
    rows = json.loads((out / "table.json").read_text())
    assert [(r["batch"], r["seed"], r["held_out"]) for r in rows] == [
        (8, 0, False), (16, 0, True), (8, 1, False), (16, 1, True)
    ]  # fmt: skip
    for row in rows:
        name = f"batch_{row['batch']}/seed_{row['seed']}"
        assert row["examples"] == 200 * row["batch"] and row["seconds"] > 0
        measured = json.loads((out / name / "eval/200.json").read_text())
        assert row["zero_shot/accuracy"] == measured["zero_shot/accuracy"]
        tail = [json.loads(line)["loss"] for line in metrics(out / name)[-20:]]
        assert row["train/loss"] == pytest.approx(sum(tail) / 20, rel=1e-12)
    assert rows[1]["compute"] == 2 * rows[0]["compute"] > 1e6
    with (out / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == read


def test_a_rung_that_fails_ends_the_tool_with_its_words_and_code(ladder):
    failed = tool("run", ladder["folder"], "--jobs", "2")
    assert failed.returncode == 0 and failed.stdout.startswith("4 of 4 rungs are done")
    path = f"{ladder['folder']}/ladder.py:201"  # other steps: another run than the workdir's
    failed = subprocess.run(
        [*command("run", ladder["folder"])[:4], path, "--out", f"{ladder['folder']}/out"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "steps: 200 in the workdir, 201 now" in failed.stderr


def test_a_second_signal_while_the_first_is_handled_does_not_hang():
    programs, told = Programs(), []

    class Program:
        def terminate(self):
            told.append(self)
            if len(told) == 1:
                programs.stop()  # what the handler does when another SIGTERM comes just here

    programs._running.add(Program())
    thread = threading.Thread(target=programs.stop, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and len(told) == 2 and programs.stopping


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no get_ladder()"),
        (None, "a ladder is a file"),
    ],
)
def test_what_is_no_ladder_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "ladder.py").write_text(text)
    refused = tool("status", tmp_path)
    assert refused.returncode == 1 and message in refused.stderr
