# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2 NaFlex gives the numbers of transformers for images of several shapes in one batch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

from flax_vlm.convert.loading import load_pretrained
from flax_vlm.convert.saving import save_pretrained
from flax_vlm.models import naflex
from flax_vlm.models.naflex import PackedPatches
from flax_vlm.nn import masks
from tests.parity.reference import (
    TOLERANCE,
    apply,
    build_changed,
    error,
    everything,
    randomise,
    relative_error,
    save,
    swapped,
)

IDS = np.array([[47, 5, 6, 48, 9], [7, 3, 9, 8, 2], [4, 4, 1, 1, 1]], np.int32)
SHAPES = {
    "smaller and larger than the grid": [(2, 3), (6, 1), (1, 7)],
    "one fills its row of patches": [(2, 4), (4, 2), (3, 2)],
}


def make(**vision):
    vision = (
        dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            patch_size=2,
            num_patches=16,
        )
        | vision
    )
    text = dict(
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=5,
        vocab_size=50,
        max_position_embeddings=5,
        projection_size=24,
    )
    return randomise(hf.Siglip2Model(hf.Siglip2Config(vision_config=vision, text_config=text)))


@torch.no_grad()
def naflex_error(model, folder, shapes, length=8, measure=error, **changes):
    loaded = load_pretrained(folder)
    module = build_changed(loaded.spec, **changes)
    rng = np.random.default_rng(3)
    channels = 3 * model.config.vision_config.patch_size**2
    pixels = rng.standard_normal((len(shapes), length, channels)).astype(np.float32)
    packed = PackedPatches(jnp.asarray(pixels), jnp.asarray(shapes, jnp.int32))
    mask = np.array(packed.mask)
    assert not mask.all()
    reference = model(
        input_ids=torch.from_numpy(IDS).long(),
        pixel_values=torch.from_numpy(pixels),
        pixel_attention_mask=torch.from_numpy(mask.astype(np.int64)),
        spatial_shapes=torch.tensor(shapes),
    )
    ours, tokens = apply(module, {"params": loaded.params}, packed, IDS, method=everything)
    logits = ours.logit_scale * ours.image_embedding @ ours.text_embedding.T + ours.logit_bias
    kept = reference.vision_model_output.last_hidden_state[torch.from_numpy(mask)]
    return max(
        measure(ours.image_embedding, reference.image_embeds),
        measure(ours.text_embedding, reference.text_embeds),
        measure(tokens[mask], kept),
        measure(logits, reference.logits_per_image),
    )


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("vision", [{}, dict(num_attention_heads=6, num_patches=9, patch_size=3)])
def test_naflex_gives_the_numbers_of_transformers(name, vision, tmp_path):
    model = make(**vision)
    assert naflex_error(model, save(model, tmp_path), SHAPES[name]) <= TOLERANCE


def test_an_offset_of_300_on_the_positions_keeps_the_digits(tmp_path):
    model = make()
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.add_(300.0)
    folder = save(model, tmp_path)
    assert naflex_error(model, folder, [(2, 3), (6, 1), (1, 7)], measure=relative_error) <= 1e-4


WRONG = {
    "exact gelu": dict(image__activation="gelu_erf"),
    "epsilon": dict(image__norm_eps=1e-3),
    "causal text": dict(text__is_causal=True),
    "epsilon of the text": dict(text__norm_eps=1e-3),
    "end of text": dict(text__pooling="eos", text__eos_id=48),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_every_wrong_choice_breaks_the_parity(name, tmp_path):
    model = make()
    folder = save(model, tmp_path)
    assert naflex_error(model, folder, SHAPES["one fills its row of patches"], **WRONG[name]) > 4e-5


PACKINGS = {
    "padding is seen": (
        "padding_mask",
        lambda keep: masks.padding_mask(jnp.ones_like(keep)),
    ),
    "columns before rows": (
        "packed_positions",
        lambda table, shapes, length: POSITIONS(table, shapes[:, ::-1], length),
    ),
}
POSITIONS = naflex.packed_positions


@pytest.mark.parametrize("name", list(PACKINGS))
def test_every_wrong_packing_breaks_the_parity(name, tmp_path, monkeypatch):
    model = make()
    folder = save(model, tmp_path)
    monkeypatch.setattr(naflex, *PACKINGS[name])
    assert naflex_error(model, folder, SHAPES["one fills its row of patches"]) > 1e-3


def test_rows_and_columns_are_not_the_same(tmp_path):
    model = make()
    folder = save(model, tmp_path)
    loaded = load_pretrained(folder)
    module = build_changed(loaded.spec)
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 12)), jnp.float32)
    tokens = apply(
        module,
        {"params": loaded.params},
        PackedPatches(pixels[:1].repeat(2, 0), jnp.array([[2, 3], [3, 2]])),
        method="image_tokens",
    )
    assert error(tokens[0], tokens[1]) > 1e-2


def test_what_is_padded_changes_nothing(tmp_path):
    loaded = load_pretrained(save(make(), tmp_path))
    module = build_changed(loaded.spec)
    pixels = np.random.default_rng(0).standard_normal((1, 8, 12)).astype(np.float32)
    other = pixels.copy()
    other[:, 6:] += 5.0
    shapes = jnp.array([[2, 3]])
    a, b, cut = (
        apply(module, {"params": loaded.params}, PackedPatches(x, shapes), method="encode_image")
        for x in (pixels, other, pixels[:, :6])
    )
    assert error(a, b) == 0.0
    assert error(a, cut) <= TOLERANCE


def test_an_image_is_packed_as_its_patches(tmp_path):
    loaded = load_pretrained(save(make(), tmp_path))
    module = build_changed(loaded.spec)
    image = np.random.default_rng(0).standard_normal((1, 4, 6, 3)).astype(np.float32)
    patches = image.reshape(1, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1, 6, 12)
    variables = {"params": loaded.params}
    a = apply(module, variables, image, method="encode_image")
    packed = PackedPatches(patches, jnp.array([[2, 3]]))
    assert error(a, apply(module, variables, packed, method="encode_image")) <= TOLERANCE


def test_there_and_back_gives_the_same_bits(tmp_path):
    model = make()
    loaded = load_pretrained(save(model, tmp_path / "in"))
    assert save_pretrained(tmp_path / "out", loaded.spec, loaded.params) == "siglip2"
    again, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    swapped(tmp_path / "out", ("vision_model.head.layernorm", "vision_model.post_layernorm"))
    assert naflex_error(model, tmp_path / "out", SHAPES["one fills its row of patches"]) > 1e-2
