# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal

import jax
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.training import sharding
from flax_vlm.training.checkpoints import CheckpointError, Checkpoints, load_params
from flax_vlm.training.loop import Evaluation, Loop
from flax_vlm.training.metrics import TIMING_KEYS, JsonlWriter, Writers, read_metrics
from flax_vlm.training.nonfinite import NonFiniteError, NonFiniteGuard
from flax_vlm.training.optimizers import build_optimizer
from flax_vlm.training.profiling import Stopwatch, goodput, read_timings
from flax_vlm.training.state import abstract_state, make_init, state_shardings
from flax_vlm.training.step import make_train_step
from tests.training.toy import ToyRegression, toy_batch


class Run:
    """A toy run in a folder; `go` starts or resumes it."""

    def __init__(self, folder, mesh=(-1, 1, 1), poison=(), ema=0.0):
        self.folder, self.poison, self.ema = folder, poison, ema
        self.mesh = sharding.make_mesh(*mesh)
        self.objective = ToyRegression(width=16, dropout=0.3)
        self.optimizer = build_optimizer({"name": "adamw", "lr": 0.01}, steps=20)

    def batches(self, step):
        while True:
            batch = toy_batch(step)
            if step + 1 in self.poison:
                batch["label"] = np.full(8, np.nan, np.float32)
            else:
                batch["label"] = batch["label"].astype(np.float32)
            yield batch
            step += 1

    def go(self, steps, evaluations=(), policy="stop", every=5, stopwatch=None):
        init = make_init(self.objective, self.optimizer, ema=self.ema > 0)
        shapes = jax.eval_shape(init, jax.random.key(0), toy_batch(0))
        shardings = state_shardings(shapes, self.mesh)
        rows = sharding.batch_sharding(self.mesh)
        checkpoints = Checkpoints(self.folder / "checkpoints", every=every, keep=2)
        start = checkpoints.latest_step() or 0
        if start:
            state = checkpoints.restore(abstract_state(shapes, shardings))
        else:
            state = jax.jit(init, out_shardings=shardings)(jax.random.key(0), toy_batch(0))
        step = make_train_step(self.objective, self.optimizer, seed=0, ema_decay=self.ema)
        step = jax.jit(
            step, in_shardings=(shardings, rows), out_shardings=(shardings, None), donate_argnums=0
        )
        writer = JsonlWriter(self.folder / "metrics.jsonl", after_step=start)
        loop = Loop(
            train_step=step, batches=self.batches, put=lambda b: sharding.put_batch(b, rows),
            account=lambda b: b, steps=steps, batch_size=8, log_every=1, flops_per_example=1.0,
            peak_flops=1.0, checkpoints=checkpoints, writers=Writers([writer]),
            evaluations=evaluations, nonfinite=NonFiniteGuard(policy, 3), show_progress=False,
            stopwatch=stopwatch or Stopwatch(self.folder / "timings.jsonl"),
        )  # fmt: skip
        try:
            return loop.run(state, start)
        finally:
            checkpoints.close()
            writer.close()

    def rows(self):
        rows = read_metrics(self.folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in rows]


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole, parts = Run(tmp_path / "a", ema=0.9), Run(tmp_path / "b", ema=0.9)
    expected, _ = whole.go(12)
    parts.go(7)
    # what a crash leaves behind: rows after the last checkpoint, the last one cut short
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "loss": -1.0}) + "\n" + '{"step": 9, "lo')
    resumed, done = parts.go(12)
    assert done and not trees.differences(vars(expected), vars(resumed))
    assert parts.rows() == whole.rows() and [r["step"] for r in parts.rows()] == [*range(1, 13)]


def test_a_run_resumes_on_another_mesh(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    Run(tmp_path / "a").go(8)
    Run(tmp_path / "b", mesh=(8, 1, 1)).go(4)
    Run(tmp_path / "b", mesh=(1, 2, 4)).go(8)
    losses = [[row["loss"] for row in Run(tmp_path / name).rows()] for name in "ab"]
    assert len(losses[1]) == 8
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


def test_sigterm_saves_the_step_and_stops(tmp_path):
    run = Run(tmp_path)
    stop = Evaluation(lambda state, step: step == 3 and os.kill(os.getpid(), signal.SIGTERM), 3)
    state, done = run.go(12, [stop])
    assert not done and state.step == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handler is given back"
    state, done = run.go(12)
    assert done and [row["step"] for row in run.rows()] == [*range(1, 13)]


def test_a_nonfinite_step_stops_and_names_the_step_and_the_groups(tmp_path):
    run = Run(tmp_path, poison=(7,))
    with pytest.raises(
        NonFiniteError, match=r"step 7: the loss and the gradients of .*encoder/fc1"
    ):
        run.go(12)
    assert Checkpoints(tmp_path / "checkpoints", every=5).latest_step() == 5


def test_a_bad_step_is_never_saved(tmp_path):
    with pytest.raises(NonFiniteError, match="step 5"):
        Run(tmp_path, poison=(5,)).go(12)
    assert Checkpoints(tmp_path / "checkpoints", every=5).latest_step() is None


def test_skipping_counts_bad_steps_and_goes_on(tmp_path):
    run = Run(tmp_path, poison=(3, 4))
    _, done = run.go(6, policy="skip")
    assert done and [row["skipped_steps"] for row in run.rows()] == [0, 0, 1, 2, 2, 2]


def test_too_many_bad_steps_in_a_row_stop_even_when_skipping(tmp_path):
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        Run(tmp_path, poison=range(3, 20)).go(12, policy="skip")


def test_evaluations_run_when_due_and_after_the_last_step(tmp_path):
    seen = []
    run = Run(tmp_path)
    often = Evaluation(lambda state, step: seen.append(("often", step)), every=3)
    run.go(7, [often, Evaluation(lambda state, step: seen.append(("end", step)))])
    assert seen == [("often", 3), ("often", 6), ("often", 7), ("end", 7)]


def test_time_is_recorded_at_every_checkpoint_and_at_the_end_of_every_start(tmp_path):
    run = Run(tmp_path)
    run.go(7)
    run.go(12)
    rows = read_timings(tmp_path / "timings.jsonl")
    # the last step is saved, waited for, and recorded once more
    assert [(r["start"], r["stop"]) for r in rows] == [
        *((0, 5), (0, 7), (0, 7)),
        *((7, 10), (7, 12), (7, 12)),
    ]
    assert len({r["began"] for r in rows}) == 2
    assert {"data", "first_step", "step", "checkpoint"} <= rows[-1]["seconds"].keys()
    found = goodput(rows)
    assert found["starts"] == 2 and 0 < found["goodput"] < 1 and found["repeated"] == 0


def test_only_the_step_that_compiles_is_not_productive(tmp_path):
    class Names(Stopwatch):
        seen = []

        def measure(self, activity):
            self.seen.append(activity)
            return super().measure(activity)

    run, watch = Run(tmp_path), Names()
    run.go(9, [Evaluation(lambda state, step: None, every=2)], every=3, stopwatch=watch)
    assert watch.seen.count("first_step") == 1 and watch.seen.index("first_step") == 1
    # 8 further steps, and the results that are read before each save and evaluation and at the end
    assert watch.seen.count("step") == 8 + len({2, 3, 4, 6, 8, 9}) + 1


def test_old_checkpoints_are_removed_and_the_rest_can_be_kept_by_period(tmp_path):
    run = Run(tmp_path)
    run.go(12, every=2)
    kept = Checkpoints(tmp_path / "checkpoints", every=2)
    assert sorted(kept._manager.all_steps()) == [10, 12]


def test_parameters_load_without_the_optimizer_and_prefer_the_moving_average(tmp_path):
    state, _ = Run(tmp_path, ema=0.5).go(5)
    params, extras, step = load_params(tmp_path / "checkpoints")
    assert (
        step == 5
        and extras["seen"] == 30
        and not trees.differences(params, jax.device_get(state.ema))
    )
    raw, _, _ = load_params(tmp_path / "checkpoints", prefer_ema=False)
    assert not trees.differences(raw, jax.device_get(state.params))


def test_loading_from_an_empty_folder_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="must hold a complete checkpoint, found none"):
        load_params(tmp_path)


def test_a_damaged_checkpoint_is_reported_with_the_steps_at_hand(tmp_path):
    run = Run(tmp_path)
    run.go(10)
    for file in (tmp_path / "checkpoints" / "10").rglob("*"):
        if file.is_file() and file.stat().st_size > 200 and "d" in file.parts[-2:][0]:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"10 could not be restored.*steps at hand: \[5, 10\]"
    ):
        run.go(12)
