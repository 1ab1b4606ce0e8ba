# SPDX-License-Identifier: Apache-2.0
"""Ladders on paper: which rungs there are, what they change, where they lie."""

import pathlib

import pytest

from configs.ladders import batch_size, compute, temperature
from flax_vlm.scaling.ladder import Ladder
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


@pytest.mark.parametrize(
    "ladder",
    [
        batch_size.get_ladder(),
        batch_size.get_ladder("published"),
        temperature.get_ladder(),
        compute.get_ladder(),
    ],
    ids=["batch size", "batch size, published", "temperature", "compute"],
)
def test_every_change_of_the_ladders_here_is_a_key_of_their_recipe(ladder, monkeypatch):
    monkeypatch.chdir(ROOT)
    for rung in ladder.rungs():
        config = workdir.flatten(tool.read_config(rung))
        for path, value in rung.changes.items():
            assert config[path] == value, rung.name


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
    name, folder = "billions-9.loss-softmax.batch-307200.seed-0", ladder.rungs()[-1].name
    assert slurm[-1] == (
        f"sbatch --nodes=8 --job-name={name} launch/slurm.sh {data} "
        f"/shared/sweep/{folder} {changes}"
    )
    assert tpu[-1] == (
        f"ACCELERATOR=v5litepod-256 launch/tpu_vm.sh train {name} {data} "
        f"/shared/sweep/{folder} {changes}"
    )
    assert aot[-1] == (
        f"python -m flax_vlm.tools.aot_compile --topology=v5e:16x16 --config={data} {changes}"
    )
    with pytest.raises(ValueError, match="no `machine` for a cluster"):
        tool.commands(batch_size.get_ladder(), out, "slurm")
