# SPDX-License-Identifier: Apache-2.0
"""Ladders on paper: which rungs there are, what they change; laws and plots of made-up tables."""

import json
import pathlib
import re

import numpy as np
import pytest

from configs.ladders import (
    batch_size,
    clip_scaling,
    compute,
    resampler_tokens,
    temperature,
    token_length,
)
from flax_vlm.scaling.ladder import Ladder
from flax_vlm.scaling.plots import batch_size_figure
from flax_vlm.tools import ladder as tool
from flax_vlm.training import workdir

ROOT = pathlib.Path(__file__).parents[2]
DIALS = {"loss": ("sigmoid", "softmax"), "batch": (8, 16, 32)}


def make(**fields):
    changes = {"objective.pair_loss.name": "loss", "batch_size": "batch"}
    given = {
        "config": "configs/c.py:{loss}",
        "dials": DIALS,
        "metrics": ("a/b",),
        "seeds": (3, 5),
        "changes": lambda **dials: {path: dials[dial] for path, dial in changes.items()},
    }
    return Ladder(**given | fields)


def test_every_combination_is_a_rung_and_seeds_are_the_outer_loop():
    rungs = make(skip=lambda loss, batch: (loss, batch) == ("softmax", 16)).rungs()
    kept = [(a, b) for a in DIALS["loss"] for b in DIALS["batch"] if (a, b) != ("softmax", 16)]
    found = [(rung.seed, rung.dials["loss"], rung.dials["batch"]) for rung in rungs]
    assert found == [(seed, *pair) for seed in (3, 5) for pair in kept]
    assert len({rung.name for rung in rungs}) == len(rungs)


def test_a_rung_says_its_dials_seed_and_changes_in_its_flags_and_its_name():
    rung = make().rungs()[-1]
    assert rung.name == "loss_softmax.batch_32/seed_5"
    assert rung.flags() == [
        "--config=configs/c.py:softmax",
        "--config.objective.pair_loss.name=softmax",
        "--config.batch_size=32",
        "--config.seed=5",
    ]


def test_a_value_that_is_no_path_is_made_one():
    rung = make(dials={"x": ("a/b c", 0.5)}, changes=lambda x: {}, config="c.py").rungs()[0]
    assert rung.name == "x_a-b-c/seed_3"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": ()}, r"different values of seeds, got \[\]"),
        ({"dials": {"batch": (8, 8)}}, r"different values of batch, got \[8, 8\]"),
        ({"x": "width"}, "x and curves must be among .*got 'width'"),
        ({"curves": "batch_size"}, "x and curves must be among"),
    ],
)
def test_a_ladder_without_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


LADDERS = {
    batch_size: ("digits", "published"),
    clip_scaling: ("shapes", "published"),
    resampler_tokens: ("shapes", "siglip"),
    temperature: ("digits", "clip"),
    token_length: ("shapes", "clipa"),
}
EVERY = [module.get_ladder(size) for module, sizes in LADDERS.items() for size in sizes]


@pytest.mark.parametrize("ladder", [*EVERY, compute.get_ladder()], ids=lambda x: x.config)
def test_every_change_of_the_ladders_here_is_a_key_of_their_recipe(ladder, monkeypatch):
    monkeypatch.chdir(ROOT)
    for rung in ladder.rungs():
        config = workdir.flatten(tool.read_config(rung))
        for path, value in rung.changes.items():
            assert json.dumps(config[path]) == json.dumps(value), rung.name


def test_a_sweep_over_batches_sees_equally_many_examples():
    for ladder, examples in (
        (batch_size.get_ladder(), {25_600}),
        (batch_size.get_ladder("published"), {3e9, 9e9}),
    ):
        for rung in ladder.rungs():
            seen = rung.changes["batch_size"] * rung.changes["steps"]
            assert min(abs(seen / e - 1) for e in examples) < 1e-4


def test_the_published_sweep_has_the_cells_of_table_5():
    cells = {}
    for dials in batch_size.get_ladder("published").combinations():
        if dials["loss"] == "softmax":
            cells.setdefault(dials["billions"], []).append(dials["batch"])
    # Zhai et al., 2023, arXiv:2303.15343, table 5
    assert cells == {
        3: [512, 1024, 2048, 4096, 8192, 32_768, 98_304],
        9: [4096, 8192, 16_384, 32_768, 98_304, 307_200],
    }


def test_the_compute_ladder_spans_two_decades_below_a_larger_rung(monkeypatch):
    monkeypatch.chdir(ROOT)
    ladder = compute.get_ladder()
    costs = {r.dials["width"]: tool.training_costs(tool.read_config(r)) for r in ladder.rungs()}
    fitted = [c["compute"] for w, c in costs.items() if not ladder.held_out(width=w)]
    held_out = [c["compute"] for w, c in costs.items() if ladder.held_out(width=w)]
    assert len(fitted) >= 8 and max(fitted) / min(fitted) >= 100
    assert min(held_out) > 2 * max(fitted)
    assert max(c["examples"] for c in costs.values()) <= 80_000  # every scene once


def test_a_cluster_gets_one_whole_command_per_rung():
    ladder, out = batch_size.get_ladder("published"), pathlib.Path("/shared/sweep")
    slurm, tpu, aot = (tool.commands(ladder, out, on) for on in ("slurm", "tpu", "aot"))
    assert len(slurm) == len(tpu) == len(aot) == len(set(slurm)) == len(ladder.rungs())
    data = "configs/siglip_b16.py:folder:/shared/pairs+folder:/shared/imagenet_val"
    changes = (
        "--config.objective.pair_loss.name=softmax --config.batch_size=307200 "
        "--config.steps=29297 --config.seed=0"
    )
    name, folder = "billions-9-loss-softmax-batch-307200-seed-0", ladder.rungs()[-1].name
    assert slurm[-1] == (
        f"sbatch --nodes=8 --job-name={name} launch/slurm.sh {data} "
        f"/shared/sweep/{folder} {changes}"
    )
    start = "ACCELERATOR=v5litepod-256 launch/tpu_vm.sh"
    assert tpu[-1] == (
        f"{start} create {name} && {start} install {name} && "
        f"{start} train {name} {data} /shared/sweep/{folder} {changes} && {start} delete {name}"
    )
    assert all(re.fullmatch("[a-z][a-z0-9-]{0,62}", line.split()[3]) for line in tpu)
    assert aot[-1] == (
        f"python -m flax_vlm.tools.aot_compile --topology=v5e:16x16 --config={data} {changes}"
    )
    with pytest.raises(ValueError, match="no `machine` for a cluster"):
        tool.commands(batch_size.get_ladder(), out, "slurm")


def write_table(out, held_out=1.0, law=lambda c: 0.2 + 40 * c**-0.2):
    """A table of eight sizes, two seeds, and one that is held out."""
    rng, rows = np.random.default_rng(0), []
    for flops in [*np.geomspace(1e10, 1e12, 8), 4e12]:
        for seed in (0, 1):
            apart = bool(flops > 1e12)
            loss = law(flops) * np.exp(0.005 * rng.normal()) * (held_out if apart else 1.0)
            row = {"width": round(flops / 1e9), "seed": seed, "compute": flops}
            rows.append(row | {"held_out": apart, "train/loss": loss, "a/b": 1 - loss / 10})
    (out / "table.json").write_text(json.dumps(rows))
    return rows


def sized(metric, **fields):
    return make(dials={"width": (1, 2)}, changes=lambda width: {}, metrics=(metric,), **fields)


@pytest.mark.parametrize(("metric", "scale"), [("train/loss", 1.0), ("a/b", 0.1)])
def test_a_law_is_fitted_to_what_was_not_held_out_and_judged_by_what_was(metric, scale, tmp_path):
    write_table(tmp_path)
    report = tool.fit_law(sized(metric), tmp_path, "power_floor")
    assert report == json.loads((tmp_path / "law.json").read_text())
    assert report["points"] == 16 and report["range"]["C"] == [1e10, 1e12]
    floor = report["parameters"]["c"]
    assert floor["low"] < 0.2 * scale < floor["high"]
    assert [row["compute"] for row in report["held_out"]] == [4e12, 4e12]
    assert all(row["inside"] and row["missed_by"] == 0 for row in report["held_out"])
    assert (tmp_path / "law.png").exists() and (tmp_path / "law.svg").exists()


def test_a_held_out_rung_that_the_law_misses_is_said_to_be_missed(tmp_path):
    write_table(tmp_path, held_out=1.5)
    report = tool.fit_law(sized("train/loss"), tmp_path, "power_floor")
    for row in report["held_out"]:
        assert not row["inside"]
        assert row["missed_by"] == pytest.approx((row["measured"] - row["high"]) / row["predicted"])
        assert row["missed_by"] > 0.3


def test_the_plot_has_a_curve_per_value_and_words_for_what_is_no_number(tmp_path, monkeypatch):
    rows = [
        {"loss": loss, "t": t, "seed": seed, "a/b": value + 0.25 * seed}
        for loss, t, value in [("x", 1, 0.1), ("x", 2, 0.4), ("y", 1, 0.3), ("y", 2, 0.2)]
        for seed in (0, 1)
    ]
    rows += [{"loss": "x", "t": "learned", "seed": seed, "a/b": 0.5 + seed} for seed in (0, 1)]
    (tmp_path / "table.json").write_text(json.dumps(rows))
    drawn = {}

    def figure(curves, **words):
        drawn.update(words, curves=curves)
        return batch_size_figure(curves, **words)

    monkeypatch.setattr(tool, "batch_size_figure", figure)
    ladder = make(dials={"loss": ("x", "y"), "t": (1, 2)}, x="t", curves="loss", metrics=("a/b",))
    tool.plot(ladder, tmp_path)
    assert drawn["curves"] == {
        "x": {1: [0.1, 0.35], 2: [0.4, 0.65]},
        "y": {1: [0.3, 0.55], 2: [0.2, 0.45]},
    }
    assert drawn["x_label"] == "t" and drawn["y_label"] == "a/b"
    assert "learned: 1.000 [" in drawn["note"]
    assert (tmp_path / "plot.png").exists() and (tmp_path / "plot.svg").exists()


def test_without_a_table_there_is_nothing_to_fit_or_plot(tmp_path):
    for verb in (tool.plot, lambda *given: tool.fit_law(*given, "power")):
        with pytest.raises(ValueError, match=r"no table.json; start `run` or `collect` first"):
            verb(make(), tmp_path)
