# SPDX-License-Identifier: Apache-2.0
"""Goodput over several starts, from rows as a run leaves them behind."""

import json

import pytest

from flax_vlm.training.profiling import Stopwatch, goodput, read_timings


def row(began, start, stop, wall, **seconds):
    return {"began": began, "start": start, "stop": stop, "wall": wall, "seconds": seconds}


# 1000: trains to step 10 (saved), on to 20 (saved), is killed some time after.
# 1200: goes on from 20, is told to stop at 30.
# 1500: goes on from 30 to 40.
KILLED = [
    row(1000.0, 0, 10, 50.0, init=5.0, first_step=10.0, step=30.0, data=3.0),
    row(1000.0, 0, 20, 90.0, init=5.0, first_step=10.0, step=62.0, data=6.0),
]
STOPPED = [row(1200.0, 20, 30, 45.0, restore=4.0, first_step=2.0, step=33.0, checkpoint=1.5)]
LAST = [row(1500.0, 30, 40, 60.0, restore=4.0, first_step=2.0, step=31.0, evaluation=9.0)]


def test_goodput_counts_the_time_between_starts_and_adds_up_to_the_wall_time():
    found = goodput(KILLED + STOPPED + LAST)
    wall = 1560.0 - 1000.0
    assert found["wall"] == pytest.approx(wall) and found["starts"] == 3
    assert found["productive"] == pytest.approx(62.0 + 33.0 + 31.0) and found["repeated"] == 0
    assert found["goodput"] == pytest.approx((62.0 + 33.0 + 31.0) / wall)
    assert found["away"] == pytest.approx((1200 - 1090) + (1500 - 1245))
    assert (found["restore"], found["first_step"], found["data"]) == (8.0, 14.0, 6.0)
    parts = {k: v for k, v in found.items() if k not in ("goodput", "starts", "wall")}
    assert sum(parts.values()) == pytest.approx(wall)


def test_steps_that_a_later_start_repeats_are_lost():
    # the save of step 20 was not complete when the process died: 10 is where it goes on
    again = [row(1200.0, 10, 30, 80.0, restore=4.0, first_step=2.0, step=61.0)]
    found = goodput(KILLED + again)
    assert found["productive"] == pytest.approx(30.0 + 61.0)
    assert found["repeated"] == pytest.approx(62.0 - 30.0)


def test_a_step_back_behind_an_earlier_start_loses_that_start_whole():
    # both later checkpoints were deleted by hand: the third start goes on from 10
    again = [row(1500.0, 10, 40, 120.0, step=99.0)]
    found = goodput(KILLED + STOPPED + again)
    assert found["productive"] == pytest.approx(30.0 + 99.0)
    assert found["repeated"] == pytest.approx((62.0 - 30.0) + 33.0)


def test_starting_a_finished_run_again_costs_it_nothing():
    idle = [row(9000.0, 40, 40, 3.0, restore=3.0)]
    assert goodput(KILLED + STOPPED + LAST + idle) == goodput(KILLED + STOPPED + LAST)
    assert goodput(idle) == {} == goodput([])
    assert goodput([row(1.0, 0, 1, 0.0)])["goodput"] == 0.0, "shorter than the clock can tell"


def test_a_start_that_died_before_its_first_save_is_time_away():
    found = goodput(KILLED + [row(1150.0, 20, 20, 10.0, restore=10.0)] + STOPPED)
    assert found["starts"] == 3 and found["productive"] == pytest.approx(62.0 + 33.0)
    assert found["away"] == pytest.approx((1150 - 1090) + (1200 - 1160))


def test_a_stopwatch_leaves_one_row_per_record_and_reading_survives_a_cut_line(tmp_path):
    file = tmp_path / "timings.jsonl"
    assert read_timings(file) == []
    watch = Stopwatch(file)
    with watch.measure("step"):
        pass
    watch.record(3, 5)
    with watch.measure("checkpoint"):
        pass
    watch.record(3, 8)
    with file.open("a") as cut:
        cut.write('{"began": 17, "sta')
    Stopwatch(file).record(8, 9)  # lands on the cut line; what follows is whole again
    Stopwatch(file).record(8, 10)
    first, second, third = read_timings(file)
    assert (first["start"], first["stop"], second["stop"], third["stop"]) == (3, 5, 8, 10)
    assert first["began"] == second["began"] and second["wall"] >= first["wall"] >= 0
    assert first["seconds"].keys() == {"step"} and "checkpoint" in second["seconds"]


def test_processes_other_than_the_first_record_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Stopwatch(None).record(0, 1)
    assert not list(tmp_path.iterdir())


def test_rows_are_plain_json(tmp_path):
    Stopwatch(tmp_path / "timings.jsonl").record(0, 1)
    (line,) = (tmp_path / "timings.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"began", "start", "stop", "wall", "seconds"}
