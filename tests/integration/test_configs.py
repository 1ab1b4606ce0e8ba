# SPDX-License-Identifier: Apache-2.0
"""Every recipe builds at full size; the ones that fit a laptop take a step."""

import importlib

import jax
import numpy as np
import pytest

from configs import shapes_negatives
from flax_vlm import trees
from flax_vlm.program import Program, example_batch
from flax_vlm.training import sharding
from tests.integration.conftest import ROOT

NEEDS_THE_HUB = {
    "siglip_finetune",
    "llava_finetune",
}  # tests/hub/test_finetune.py: from folders
NAMES = sorted(
    {p.stem for p in (ROOT / "configs").glob("*.py") if "def get_config(" in p.read_text()}
    - NEEDS_THE_HUB
)
SMALL = [
    "llava_shapes_stage1",
    "llava_shapes_stage1:blind",
    "llava_shapes_stage2:resampler",
    "llava_shapes_stage2:mlp,,fastv",
    "shapes_negatives:mixed",
    "siglip_digits",
    "siglip_shapes",
    "vit_digits",
]


def build(name, **changes):
    name, *argument = name.split(":")
    config = importlib.import_module(f"configs.{name}").get_config(*argument)
    config.update(changes)
    # a pod's fsdp is more than we have here
    config.mesh.fsdp = min(config.mesh.fsdp, jax.device_count())
    return Program.from_config(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_and_states_its_result(name):
    run = build(name)
    assert trees.num_parameters(run.shapes.params) > 10_000
    assert run.flops_per_example() > 1e6
    text = importlib.import_module(f"configs.{name}").__doc__
    assert "python train.py --config" in text and ("Result" in text or "Not trained" in text)
    assert "MEASURED" not in text, "the result is still to be measured"


@pytest.mark.parametrize("name", SMALL)
def test_a_small_config_takes_one_step(name):
    run = build(name, init_from="")
    batch = example_batch(run.config, size=8)
    rng = np.random.default_rng(0)
    for key in batch.keys() & {"image", "images"}:
        batch[key] = rng.integers(0, 256, batch[key].shape, dtype=np.uint8)
    if "text_id" in batch:
        batch["text_id"] = np.arange(8, dtype=np.int32)
    if "loss_mask" in batch:
        batch["text"] += rng.integers(3, 100, batch["text"].shape, dtype=np.int32)
        batch["text_mask"][:], batch["loss_mask"][:, 9:] = True, True
    state = run.init_state()
    before = jax.device_get(state.params)
    state, metrics = run.train_step()(state, sharding.put_batch(batch, run.batch_sharding))
    assert np.isfinite(metrics["loss"].value()) and int(state.step) == 1
    assert not any(jax.device_get(metrics["nonfinite"]).values())
    assert float(metrics["grad_norm"]) > 0 and trees.num_parameters(before) > 0


def test_every_micro_batch_must_span_all_devices():
    config = importlib.import_module("configs.siglip_digits").get_config()
    config.batch_size, config.micro_batches = 128, 16
    assert Program.from_config(config).batch_size == 128
    config.micro_batches = 32
    with pytest.raises(ValueError, match="x micro_batches, got 128 and 256"):
        assert Program.from_config(config).batch_size


def test_the_arms_of_shapes_negatives_differ_in_the_negatives_alone():
    configs = {arm: build(f"shapes_negatives:{arm}").config for arm in shapes_negatives.ARMS}
    losses = {arm: config["objective"].pop("pair_loss") for arm, config in configs.items()}
    assert all(config == configs["all"] for config in configs.values())
    kept = [losses[arm].pop("hard_negatives") for arm in ("random", "mixed", "hard")]
    shares = [losses[arm].pop("random_share") for arm in ("random", "mixed", "hard")]
    assert kept == [8, 8, 8] and shares == [1.0, 0.5, 0.0]
    assert all(loss == {"name": "sigmoid"} for loss in losses.values())
    with pytest.raises(ValueError, match="arm must be one of .*, got 'easy'"):
        shapes_negatives.get_config("easy")
