# SPDX-License-Identifier: Apache-2.0
"""EVA-02-CLIP and EVA-01-g: stored numbers of timm and open_clip, and BLIP-2's tower of
transformers.

The goldens hold random weights in float16, so that what we read is exactly what the references
computed with; goldens/make_eva.py made them."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch
import transformers as hf

from flax_vlm.build import build
from flax_vlm.convert import FAMILIES, eva
from flax_vlm.convert.loading import load_pretrained
from flax_vlm.convert.rules import expand
from flax_vlm.convert.safetensors_files import list_tensors, read_tensor
from flax_vlm.convert.safetensors_writer import write_tensors
from flax_vlm.convert.saving import save_pretrained
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.trees import named_leaves
from tests.parity.reference import (
    TOLERANCE,
    apply,
    build_changed,
    error,
    pixels,
    randomise,
    save,
)

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "eva.npz"
SIZES = dict(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=[24, 16])
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
    tensors = {n.split("/", 1)[1]: t for n, t in arrays.items() if n.startswith(f"{key}/")}
    (folder / FAMILIES[family].config_file).write_text(json.dumps(config))
    write_tensors(
        folder,
        {n: t.shape for n, t in tensors.items()},
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
    assert GOLDENS.stat().st_size < 100_000


@pytest.mark.parametrize("key", list(CONFIGS))
def test_eva_gives_the_numbers_of_timm(key, tmp_path):
    assert tower_error(key, tmp_path) <= TOLERANCE


WRONG = {
    "no rotary positions": ("eva02", dict(rotary_grid=None)),
    "another reference grid": ("eva02", dict(rotary_grid=(6, 4))),
    "rows and columns exchanged": ("eva02", dict(rotary_grid=(16, 8))),
    "gelu in the gate": ("eva02", dict(activation="gelu_erf")),
    "epsilon": ("eva02", dict(norm_eps=1e-3)),
    "mean pooling": ("eva02", dict(pooling="gap")),
    "tanh gelu": ("eva01", dict(activation="gelu_tanh")),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_every_wrong_choice_breaks_the_parity(name, tmp_path):
    key, change = WRONG[name]
    assert tower_error(key, tmp_path, **change) > 2 * TOLERANCE


@pytest.fixture
def tiny_architecture(monkeypatch):
    fields = {**eva.EVA02, **eva._size(8, 2, 21, 2, 4, 12)}
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


# parameters and tensors, with 1000 classes: timm 1.0.31 on torch's meta device
FULL_SIZE = {
    "eva02_base_patch16_clip_224": (86_263_040 + 769_000, 260),
    "eva02_large_patch14_clip_224": (304_105_152 + 1_025_000, 512),
    "eva02_large_patch14_clip_336": (304_432_832 + 1_025_000, 512),
    "eva_giant_patch14_clip_224": (1_012_588_928 + 1_409_000, 528),
}


@pytest.mark.parametrize("name", list(FULL_SIZE))
def test_full_size_counts_are_those_of_timm(name):
    config = dict(architecture=name, num_classes=1000)
    model = build(MODELS, FAMILIES["timm"].read(config, {}), "model")
    leaves = {p: tuple(x.shape) for p, x in named_leaves(parameter_shapes(model)).items()}
    count = sum(math.prod(shape) for shape in leaves.values())
    assert (count, len(expand(FAMILIES["timm"].rules(model), leaves))) == FULL_SIZE[name]


@torch.no_grad()
def test_the_vision_tower_of_blip2_gives_the_numbers_of_transformers(tmp_path):
    config = hf.Blip2VisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=30,
        patch_size=10,
    )
    model = randomise(hf.Blip2VisionModel(config))
    loaded = load_pretrained(save(model, tmp_path / "in"))
    image, tensor = pixels(2, 30, 30)
    ours = apply(build_changed(loaded.spec), {"params": loaded.params}, image)
    assert error(ours.tokens, model(tensor).last_hidden_state) <= TOLERANCE
    save_pretrained(tmp_path / "out", loaded.spec, loaded.params, model_type=loaded.model_type)
    again, report = hf.Blip2VisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
