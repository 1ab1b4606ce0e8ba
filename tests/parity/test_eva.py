# SPDX-License-Identifier: Apache-2.0
"""EVA-02-CLIP and EVA-01-g: stored numbers of timm and open_clip, and BLIP-2's tower of
transformers.

The goldens hold random weights in float16, so that what we read is exactly what the references
computed with; goldens/make_eva.py made them."""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

from flax_vlm.build import build
from flax_vlm.convert import FAMILIES, eva
from flax_vlm.convert.loading import load_pretrained
from flax_vlm.convert.rules import check_tensors, expand
from flax_vlm.convert.safetensors_files import list_tensors, read_tensor
from flax_vlm.convert.safetensors_writer import write_tensors
from flax_vlm.convert.saving import save_pretrained
from flax_vlm.models import MODELS, vit
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.nn.rotary import rotary2d
from flax_vlm.trees import named_leaves
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

FOLDER = pathlib.Path(__file__).parent / "goldens"
GOLDENS = FOLDER / "eva.npz"
SIZES = dict(embed_dim=24, depth=2, num_heads=3, patch_size=4, img_size=[20, 12])
CONFIGS = {
    "eva02": dict(architecture="eva02_base_patch16_clip_224", num_classes=6, model_args=SIZES),
    "eva01": dict(
        architecture="eva_giant_patch14_clip_224",
        num_classes=0,
        model_args={**SIZES, "mlp_ratio": 2.5},
    ),
}
OPEN_CLIP = dict(
    model_cfg=dict(
        embed_dim=10,
        vision_cfg=dict(image_size=12, timm_model_name="eva02_tiny_test", timm_pool="token"),
        text_cfg=dict(context_length=6, vocab_size=50, width=8, heads=2, layers=2),
        custom_text=True,
    )
)


def write_golden(key, folder, config, family):
    folder.mkdir(exist_ok=True)
    with np.load(GOLDENS) as z:
        arrays = {name: z[name] for name in z.files}
    shapes = json.loads(str(arrays[f"{key}/names"]))
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    pieces = np.split(arrays[f"{key}/values"], ends[:-1])
    tensors = dict(zip(shapes, pieces, strict=True))
    (folder / FAMILIES[family].config_file).write_text(json.dumps(config))
    write_tensors(
        folder,
        shapes,
        np.dtype(np.float16),
        tensors.__getitem__,
        10**9,
        FAMILIES[family].weights_file,
    )
    return {name: t for name, t in arrays.items() if "/" not in name}


def images(stored):
    return stored.astype(np.float32).transpose(0, 2, 3, 1)


def tower_error(key, folder, **changes):
    arrays = write_golden(key, folder, CONFIGS[key], "timm")
    loaded = load_pretrained(folder)
    module = build_changed(loaded.spec, **changes)
    ours = apply(module, {"params": loaded.params}, images(arrays["image"]))
    return max(
        error(ours.tokens, arrays[f"{key}:tokens"]), error(ours.pooled, arrays[f"{key}:pooled"])
    )


def test_the_goldens_are_small():
    assert all(path.stat().st_size < 100_000 for path in FOLDER.iterdir())


@pytest.mark.parametrize("key", list(CONFIGS))
def test_eva_gives_the_numbers_of_timm(key, tmp_path):
    assert tower_error(key, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("key", list(CONFIGS))
def test_an_offset_of_300_on_the_positions_keeps_the_digits(key, tmp_path):
    arrays = write_golden(key, tmp_path, CONFIGS[key], "timm")
    loaded = load_pretrained(tmp_path)
    params = {**loaded.params, "positions": loaded.params["positions"] + 300.0}
    image = images(arrays["image"])
    ours = apply(build_changed(loaded.spec), {"params": params}, image).tokens
    reference = arrays[f"{key}:offset"]
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


WRONG = {
    "no rotary positions": ("eva02", dict(rotary_grid=None)),
    "rotary positions of this grid": ("eva02", dict(rotary_grid=(5, 3))),
    "fewer reference columns": ("eva02", dict(rotary_grid=(16, 8))),
    "gelu in the gate": ("eva02", dict(activation="gelu_erf")),
    "epsilon of EVA-02": ("eva02", dict(norm_eps=1e-3)),
    "mean pooling": ("eva02", dict(pooling="gap")),
    "tanh gelu": ("eva01", dict(activation="gelu_tanh")),
    "epsilon of EVA-01": ("eva01", dict(norm_eps=1e-3)),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_every_wrong_choice_breaks_the_parity(name, tmp_path):
    key, change = WRONG[name]
    assert tower_error(key, tmp_path, **change) > 2 * TOLERANCE


ORDERS = {
    "columns before rows": lambda angles: jnp.roll(angles, angles.shape[1] // 2, axis=1),
    "pairs are halves": lambda a: jnp.concatenate([a[:, ::2], a[:, 1::2]], axis=1),
    "class token turned": lambda angles: jnp.roll(angles, 1, axis=0),
}


@pytest.mark.parametrize("name", list(ORDERS))
def test_every_wrong_order_of_the_angles_breaks_the_parity(name, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        return jax.tree.map(ORDERS[name], rotary2d(*args, **kwargs))

    monkeypatch.setattr(vit, "rotary2d", wrong)
    assert tower_error("eva02", tmp_path) > 1e-2


@pytest.mark.parametrize(
    "key, pair", [("eva02", ("fc1_g", "fc1_x")), ("eva01", ("norm1", "norm2"))]
)
def test_exchanged_tensors_break_the_parity(key, pair, tmp_path, monkeypatch):
    load = load_pretrained
    monkeypatch.setitem(globals(), "load_pretrained", lambda f: (swapped(f, pair), load(f))[1])
    assert tower_error(key, tmp_path) > 1e-2


@pytest.fixture
def tiny_architecture(monkeypatch):
    fields = {**eva.EVA02, **eva._size(8, 2, 2, 4, 12)}
    monkeypatch.setitem(eva.ARCHITECTURES, "eva02_tiny_test", fields)


def test_eva02_clip_gives_the_numbers_of_open_clip(tiny_architecture, tmp_path):
    arrays = write_golden("open_clip", tmp_path, OPEN_CLIP, "open_clip")
    loaded = load_pretrained(tmp_path)
    module = build_changed(loaded.spec)
    variables = {"params": loaded.params}
    image = images(arrays["square"])
    ours = apply(module, variables, image, arrays["text"])
    assert error(ours.image_embedding, arrays["open_clip:image"]) <= TOLERANCE
    assert error(ours.text_embedding, arrays["open_clip:text"]) <= TOLERANCE
    assert error(ours.logit_scale, arrays["open_clip:scale"]) <= TOLERANCE
    wrong = build_changed(loaded.spec, text__activation="quick_gelu")
    ours = apply(wrong, variables, arrays["text"], method="encode_text")
    assert error(ours, arrays["open_clip:text"]) > 2 * TOLERANCE


@pytest.mark.parametrize("key", [*CONFIGS, "open_clip"])
def test_there_and_back_gives_the_same_bits(key, tiny_architecture, tmp_path):
    family = "open_clip" if key == "open_clip" else "timm"
    config = OPEN_CLIP if key == "open_clip" else CONFIGS[key]
    write_golden(key, tmp_path / "in", config, family)
    loaded = load_pretrained(tmp_path / "in")
    save_pretrained(tmp_path / "out", loaded.spec, loaded.params, dtype="float16")
    before, after = (
        {name: read_tensor(t) for name, t in list_tensors(tmp_path / x).items()}
        for x in ("in", "out")
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert load_pretrained(tmp_path / "out").model_type == family


def test_another_architecture_is_refused(tmp_path):
    config = dict(CONFIGS["eva02"], architecture="vit_base_patch16_224")
    write_golden("eva02", tmp_path, config, "timm")
    with pytest.raises(ValueError, match="unknown architecture .*eva02_large_patch14_clip_336"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    other = dict(model_cfg=dict(embed_dim=8, vision_cfg=dict(layers=12), text_cfg={}))
    write_golden("open_clip", tmp_path, other, "open_clip")
    with pytest.raises(ValueError, match="those with an EVA tower of timm are supported"):
        load_pretrained(tmp_path)


FULL_SIZE = json.loads((FOLDER / "eva_shapes.json").read_text())
# model cards and open_clip's table of models, in millions
PUBLISHED = {
    "EVA02-B-16": 149.69,
    "EVA02-L-14": 427.76,
    "EVA02-L-14-336": 428.08,
    "eva_giant_patch14_clip_224": 1012.59,
}


@pytest.mark.parametrize("name", list(FULL_SIZE))
def test_full_size_names_shapes_and_counts_are_those_of_timm_and_open_clip(name):
    stored = FULL_SIZE[name]
    family = FAMILIES["timm" if "architecture" in stored["config"] else "open_clip"]
    model = build(MODELS, family.read(stored["config"], {}), "model")
    leaves = {p: tuple(x.shape) for p, x in named_leaves(parameter_shapes(model)).items()}
    entries = expand(family.rules(model), leaves)
    count = sum(math.prod(shape) for shape in leaves.values())
    assert (count, len(entries)) == (stored["parameters"], stored["tensors"])
    assert round(count / 1e6, 2) == PUBLISHED[name]
    layer = re.compile(r"blocks\.\d+\.")
    ours = {layer.sub("blocks.{layer}.", e.tensor): list(e.shape) for e in entries}
    assert ours == stored["shapes"]


BLIP2 = {
    "square": dict(hidden_size=24, num_attention_heads=3, image_size=30, patch_size=10),
    "border dropped": dict(hidden_size=20, num_attention_heads=5, image_size=23, patch_size=4),
    "no bias": dict(
        hidden_size=24, num_attention_heads=2, image_size=21, patch_size=7, qkv_bias=False
    ),
}


def blip2(name):
    config = dict(intermediate_size=40, num_hidden_layers=2, **BLIP2[name])
    return randomise(hf.Blip2VisionModel(hf.Blip2VisionConfig(**config)))


@torch.no_grad()
def blip2_error(model, folder, **changes):
    loaded = load_pretrained(folder)
    size = model.config.image_size
    image, tensor = pixels(2, size, size)
    ours = apply(build_changed(loaded.spec, **changes), {"params": loaded.params}, image)
    return error(ours.tokens, model(tensor).last_hidden_state)


@pytest.mark.parametrize("name", list(BLIP2))
def test_the_vision_tower_of_blip2_gives_the_numbers_of_transformers(name, tmp_path):
    model = blip2(name)
    assert blip2_error(model, save(model, tmp_path / "in")) <= TOLERANCE
    loaded = load_pretrained(tmp_path / "in")
    save_pretrained(tmp_path / "out", loaded.spec, loaded.params, model_type=loaded.model_type)
    again, report = hf.Blip2VisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_wrong_choice_breaks_the_parity_of_blip2(tmp_path):
    model = blip2("square")
    folder = save(model, tmp_path)
    for change in (dict(activation="gelu_tanh"), dict(norm_eps=1e-3)):
        assert blip2_error(model, folder, **change) > 2 * TOLERANCE
    swapped(folder, ("layer_norm1", "layer_norm2"))
    assert blip2_error(model, folder) > 1e-2


@torch.no_grad()
def test_an_offset_of_300_on_the_positions_of_blip2_keeps_the_digits(tmp_path):
    model = blip2("square")
    model.embeddings.position_embedding.add_(300.0)
    loaded = load_pretrained(save(model, tmp_path))
    image, tensor = pixels(2, 30, 30)
    ours = apply(build_changed(loaded.spec), {"params": loaded.params}, image).tokens
    # in float64: transformers' own float32 is 5e-5 away from it
    reference = model.double()(tensor.double()).last_hidden_state
    assert relative_error(ours, reference) <= 1e-4


def test_the_full_size_of_blip2_is_that_of_transformers():
    with torch.device("meta"):
        reference = hf.Blip2VisionModel(hf.Blip2VisionConfig())
    shapes = {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    family = FAMILIES["blip_2_vision_model"]
    model = build(MODELS, family.read({}, shapes), "model")
    leaves = {p: tuple(x.shape) for p, x in named_leaves(parameter_shapes(model)).items()}
    check_tensors(expand(family.rules(model), leaves), shapes, (), "blip2")
    assert sum(math.prod(shape) for shape in leaves.values()) == 985_952_256
