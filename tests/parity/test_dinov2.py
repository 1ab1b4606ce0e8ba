# SPDX-License-Identifier: Apache-2.0
"""DINOv2 and DINOv2 with registers give the numbers of transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

from flax_vlm.convert.loading import load_pretrained
from flax_vlm.convert.resolution import with_image_size
from flax_vlm.convert.saving import save_pretrained
from tests.parity.reference import (
    TOLERANCE,
    apply,
    build_changed,
    error,
    pixels,
    randomise,
    relative_error,
    save,
    swapped,
)

SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2)
CONFIGS = {
    "plain": (hf.Dinov2Model, dict(image_size=30, patch_size=10)),
    "giant": (hf.Dinov2Model, dict(image_size=21, patch_size=3, use_swiglu_ffn=True)),
    "registers": (hf.Dinov2WithRegistersModel, dict(image_size=28, patch_size=14)),
    "giant whose width of 20 becomes 24": (
        hf.Dinov2Model,
        dict(image_size=30, patch_size=10, use_swiglu_ffn=True, hidden_size=15),
    ),
    "giant with three registers": (
        hf.Dinov2WithRegistersModel,
        dict(image_size=30, patch_size=10, use_swiglu_ffn=True, num_register_tokens=3),
    ),
}


def make(name):
    kind, kwargs = CONFIGS[name]
    config = {hf.Dinov2Model: hf.Dinov2Config}.get(kind, hf.Dinov2WithRegistersConfig)
    return randomise(kind(config(**{**SMALL, **kwargs})))


@torch.no_grad()
def dino_error(model, loaded, size, masked=None, **changes):
    image, tensor = pixels(2, *size)
    mask = None if masked is None else torch.from_numpy(masked)
    reference = model(tensor, bool_masked_pos=mask)
    module = build_changed(loaded.spec, **changes)
    ours = apply(module, {"params": loaded.params}, image, masked=masked)
    return max(
        error(ours.tokens, reference.last_hidden_state),
        error(ours.pooled, reference.pooler_output),
    )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_dinov2_gives_the_numbers_of_transformers(name, tmp_path):
    model = make(name)
    size = CONFIGS[name][1]["image_size"]
    assert dino_error(model, load_pretrained(save(model, tmp_path)), (size, size)) <= TOLERANCE


@pytest.mark.parametrize("name", ["plain", "registers"])
@pytest.mark.parametrize("rows, columns", [(4, 5), (1, 2)])
def test_another_image_size_resamples_the_positions_as_transformers_does(
    name, rows, columns, tmp_path
):
    model = make(name)
    patch = model.config.patch_size
    size = (rows * patch, columns * patch)
    loaded = with_image_size(load_pretrained(save(model, tmp_path)), size)
    assert dino_error(model, loaded, size) <= TOLERANCE


def test_masked_patches_become_the_mask_token(tmp_path):
    model = make("plain")
    loaded = load_pretrained(save(model, tmp_path))
    masked = np.array([[True] + [False] * 8, [False] * 5 + [True] * 4])
    assert dino_error(model, loaded, (30, 30), masked) <= TOLERANCE


@pytest.mark.parametrize("name", ["plain", "registers"])
@torch.no_grad()
def test_an_offset_of_300_on_the_positions_keeps_the_digits(name, tmp_path):
    model = make(name)
    model.embeddings.position_embeddings.add_(300.0)
    loaded = load_pretrained(save(model, tmp_path))
    size = CONFIGS[name][1]["image_size"]
    image, tensor = pixels(2, size, size)
    ours = apply(build_changed(loaded.spec), {"params": loaded.params}, image).tokens
    assert relative_error(ours, model(tensor).last_hidden_state) <= 1e-4


ORDERS = {
    "class token last": lambda p: p | {"positions": jnp.roll(p["positions"], -1, axis=0)},
    "columns before rows": lambda p: (
        p | {"positions": p["positions"][np.r_[0, 1 + np.arange(9).reshape(3, 3).T.ravel()]]}
    ),
    "registers from the last": lambda p: p | {"registers": p["registers"][::-1]},
    "registers have positions": lambda p: p | {"registers": p["registers"] + p["positions"][:1]},
}


@pytest.mark.parametrize("name", list(ORDERS))
def test_every_wrong_order_of_the_tokens_breaks_the_parity(name, tmp_path):
    which = "giant with three registers" if "registers" in name else "plain"
    model = make(which)
    loaded = load_pretrained(save(model, tmp_path))
    changed = dataclasses.replace(loaded, params=ORDERS[name](loaded.params))
    assert dino_error(model, changed, (30, 30)) > 1e-3


WRONG = {
    "tanh gelu": ("plain", dict(activation="gelu_tanh")),
    "epsilon": ("plain", dict(norm_eps=1e-3)),
    "mean pooling": ("plain", dict(pooling="gap")),
    "gelu in the gate": ("giant", dict(activation="gelu_erf")),
    "mean pooling beside registers": ("registers", dict(pooling="gap")),
    "epsilon of the giant": ("giant", dict(norm_eps=1e-3)),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_every_wrong_choice_breaks_the_parity(name, tmp_path):
    which, change = WRONG[name]
    model = make(which)
    size = CONFIGS[which][1]["image_size"]
    loaded = load_pretrained(save(model, tmp_path))
    assert dino_error(model, loaded, (size, size), **change) > 2 * TOLERANCE


@pytest.mark.parametrize(
    "pair", [("norm1", "norm2"), ("layer_scale1", "layer_scale2"), ("query", "key")]
)
def test_exchanged_tensors_break_the_parity(pair, tmp_path):
    model = make("registers")
    folder = save(model, tmp_path)
    swapped(folder, pair)
    assert dino_error(model, load_pretrained(folder), (28, 28)) > 1e-2


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("names", ["file", "memory"])
def test_there_and_back_gives_the_same_bits(name, names, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "in", save_original_format=names == "file")
    if names == "memory" and "giant" in name:  # there the two input matrices are apart
        with pytest.raises(ValueError, match="missing: .*mlp.weights_in.weight"):
            load_pretrained(tmp_path / "in")
        return
    loaded = load_pretrained(tmp_path / "in")
    assert save_pretrained(tmp_path / "out", loaded.spec, loaded.params) == loaded.model_type
    again, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
