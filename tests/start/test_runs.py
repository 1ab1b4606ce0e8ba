# SPDX-License-Identifier: Apache-2.0
"""A program that starts from the checkpoint of another: parameters, meshes, adapters, resuming."""

import dataclasses

import jax
import numpy as np
import pytest

import flax_vlm
from configs.defaults import defaults
from flax_vlm import report, trees
from flax_vlm.data.recipe import build_tokenizer
from flax_vlm.experiment import Experiment
from flax_vlm.objectives.lora import merge
from flax_vlm.program import Program, example_batch
from flax_vlm.start.sources import open_source
from flax_vlm.training import sharding, workdir
from flax_vlm.training.checkpoints import Checkpoints
from flax_vlm.training.state import abstract_state

TOWER = {"width": 16, "depth": 2, "mlp_dim": 16, "num_heads": 2}
VIT = {"name": "vit", "patch_size": 4, "pool": "map", **TOWER}
LORA = {"rules": (("encoder/.*/(q|v)/kernel", 2),), "alpha": 4.0, "train": ("head/.*",)}
IMAGE = {"subtrees": (("image", ""),), "fresh": ("head/.*",)}


def base_config(**values):
    config = defaults()
    config.steps, config.batch_size, config.ema_decay = 4, 8, 0.9
    config.data.image_size = config.data.text.length = 8
    config.data.text.tokenizer = "byte"
    config.optimizer = {"name": "sgd", "lr": 0.5}
    config.update(values)
    return config


def siglip(**values):
    text = {"name": "text_encoder", "vocab_size": 32, "length": 8, **TOWER}
    model = {"name": "siglip", "image": {**VIT, "image_size": 8}, "text": text}
    pair_loss = {"name": "sigmoid", "same_text": "positive"}
    objective = {"name": "contrastive", "pair_loss": pair_loss}
    return base_config(model=model, objective=objective, **values)


def classifier(image_size=8, **values):
    config = base_config(objective={"name": "classification"}, **values)
    config.model = {**VIT, "image_size": image_size, "num_classes": 10}
    config.data.image_size = image_size
    return config


def rows(run, step):
    batch = example_batch(run.config, size=8)
    rng = np.random.default_rng(step)
    batch["image"] = rng.integers(0, 256, batch["image"].shape, dtype=np.uint8)
    batch["text"] = rng.integers(0, 32, batch["text"].shape).astype(np.int32)
    batch["label"] = batch["text_id"] = np.arange(8, dtype=np.int32)
    return sharding.put_batch(batch, run.batch_sharding)


def take_steps(run, step, state, count):
    for _ in range(count):
        state, _ = step(state, rows(run, int(state.step)))
    return state


def save(run, state, folder):
    workdir.save_json(folder / "config.json", run.config)
    checkpoints = Checkpoints(folder / "checkpoints", every=1)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    checkpoints.close()
    return str(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A SigLIP after two steps, without a moving average, and its folder."""
    run = Program.from_config(siglip(ema_decay=0.0))
    state = take_steps(run, run.train_step(), run.init_state(), 2)
    params = jax.device_get(state.params)
    return params, save(run, state, tmp_path_factory.mktemp("first"))


def test_a_vision_tower_becomes_a_classifier_on_another_mesh(first):
    theirs, folder = first
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    run = Program.from_config(classifier(init_from=folder, init=IMAGE, mesh=mesh))
    state = run.init_state()
    mine = dict(state.params)
    head = mine.pop("head")
    assert not trees.differences(mine, theirs["image"]) and head["kernel"].shape == (16, 10)
    assert not trees.differences(state.ema, state.params), "the average starts there too"
    kernel = mine["encoder"]["blocks"]["attention"]["q"]["kernel"]
    assert kernel.sharding.spec[2] == "tensor"
    _, metrics = run.train_step()(state, rows(run, 0))
    assert np.isfinite(metrics["loss"].value())


def test_lora_starts_from_the_loaded_base_is_merged_by_load_and_resumes_exactly(first, tmp_path):
    theirs, folder = first
    config = classifier(16, init_from=folder, init=IMAGE, lora=LORA, ema_decay=0.0)
    config.init.resize_positions = "bicubic_torch"
    config.optimizer = {"name": "adamw", "lr": 0.01}
    run = Program.from_config(config)
    state = run.init_state()
    start = jax.device_get(state.params)
    assert start["positions"].shape == (16, 16), "resized"
    assert not trees.differences(start["encoder"], theirs["image"]["encoder"])
    step = run.train_step()
    half = take_steps(run, step, state, 3)
    folder = save(run, half, tmp_path)
    text = config.data.text
    build_tokenizer(text, None).save(tmp_path / "tokenizer.json")
    batch = {"image": np.asarray(rows(run, 9)["image"])}
    expected = run.objective.predictions["logits"](half.params, {}, batch)
    loaded = flax_vlm.load(folder)
    assert "adapters" not in loaded.params
    np.testing.assert_allclose(loaded.predict("logits", batch), expected, atol=2e-6)
    whole = take_steps(run, step, half, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1)
    resumed = checkpoints.restore(abstract_state(run.shapes, run.shardings))
    checkpoints.close()
    resumed = take_steps(run, step, resumed, 2)
    assert not trees.differences(vars(resumed), vars(whole))
    assert not trees.differences(resumed.params["encoder"], start["encoder"]), "frozen"
    assert trees.differences(resumed.params["adapters"], start["adapters"])


def test_adapters_of_a_source_are_merged(first, tmp_path):
    _, folder = first
    config = classifier(init_from=folder, init=IMAGE, lora=LORA)
    run = Program.from_config(config)
    state = run.init_state()
    rng = np.random.default_rng(2)
    drawn = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype("f"), state.params)
    state = dataclasses.replace(state, params=drawn, ema={})
    params, folder = jax.device_get(drawn), save(run, state, tmp_path)
    source = open_source(folder)
    assert not [path for path in source.shapes if "adapters" in path]
    again = Program.from_config(classifier(init_from=folder, lora=LORA, ema_decay=0.0))
    mine = dict(again.init_state().params)
    fresh = mine.pop("adapters")
    assert not trees.differences(fresh, state_of(again, "adapters"))
    found, expected = trees.named_leaves(mine), trees.named_leaves(merge(params, 4.0))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, atol=1e-5, err_msg=path)
    kernel = "encoder/blocks/attention/q/kernel"
    assert np.abs(expected[kernel] - trees.named_leaves(params)[kernel]).max() > 0.1


def state_of(run, branch):
    random = Program.from_config({**run.config, "init_from": ""})
    return random.init_state().params[branch]


def test_a_dry_run_counts_what_is_trained(monkeypatch):
    monkeypatch.setattr(report, "published_table", str)  # slow, and of no interest here
    config = classifier(lora=LORA, ema_decay=0.0)
    config.optimizer = {"name": "adamw", "lr": 0.1}
    run = Experiment.from_config(config)
    adapters = 2 * 2 * (16 * 2 + 2 * 16)  # layers, (q, v), A and B
    head = 16 * 10 + 10
    printed = report.dry_run(run)
    assert f"trained: {adapters + head:>14,}" in printed
    whole = trees.num_parameters(run.shapes.params)
    assert f"frozen: {whole - adapters - head:>14,}" in printed
    assert trees.num_parameters(run.shapes.opt_state) < 2 * (adapters + head) + 10


def test_frozen_encoders_cost_a_forward_pass():
    config = siglip()
    whole = Program.from_config(config).flops_per_example()
    config.optimizer.freeze = ("image/.*",)
    text_only = Program.from_config(config).flops_per_example()
    config.optimizer.freeze = ()
    config.lora = {"rules": (("image/.*/q/kernel", 2),), "alpha": 1.0}
    image_only = Program.from_config(config).flops_per_example()
    # 3 i + 3 t, i + 3 t, 3 i + t
    np.testing.assert_allclose(text_only + image_only, whole * 4 / 3)
    assert text_only != image_only
    probe = classifier()
    probe.optimizer.freeze = ("(?!head/).*",)
    probed, trained = (Program.from_config(c).flops_per_example() for c in (probe, classifier()))
    assert trained == 3 * probed


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold config.json, found none"):
        Program.from_config(siglip(init_from=str(tmp_path))).init_state()
