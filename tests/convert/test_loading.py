# SPDX-License-Identifier: Apache-2.0
"""Folders in and out: what is loaded, onto what, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.build import build
from flax_vlm.convert import FAMILIES, loading
from flax_vlm.convert.family import Family
from flax_vlm.convert.loading import check_tied, load_pretrained, read_spec
from flax_vlm.convert.resolution import with_image_size
from flax_vlm.convert.rules import Ignored
from flax_vlm.convert.safetensors_files import list_tensors, read_tensor
from flax_vlm.convert.safetensors_writer import write_tensors
from flax_vlm.convert.saving import find_format, save_pretrained
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.training.sharding import make_mesh, parameter_shardings

TOWER = dict(width=16, depth=2, mlp_dim=24, num_heads=2)
SIGLIP = dict(
    name="siglip",
    image=dict(**TOWER, image_size=(8, 12), patch_size=4),
    text=dict(**TOWER, vocab_size=40, length=6),
)
VIT = dict(name="vit", **TOWER, image_size=8, patch_size=4, num_classes=3)


def random_params(spec, seed=0):
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(build(MODELS, spec, "model"))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "siglip", SIGLIP, random_params(SIGLIP))
    return tmp_path / "siglip"


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_tensors(folder, change):
    tensors = {name: read_tensor(t) for name, t in list_tensors(folder).items()}
    change(tensors)
    shapes = {name: t.shape for name, t in tensors.items()}
    write_tensors(folder, shapes, np.dtype(np.float32), tensors.__getitem__, 10**9)


@pytest.mark.parametrize("limit", [10**9, 5_000])
def test_a_model_from_scratch_comes_back_with_the_same_bits(limit, tmp_path):
    params = random_params(SIGLIP)
    assert save_pretrained(tmp_path, SIGLIP, params, max_shard_bytes=limit) == "siglip"
    loaded = load_pretrained(tmp_path)
    assert not trees.differences(loaded.params, params)
    image = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, 12, 3)), jnp.float32)
    outputs = [
        build(MODELS, spec, "model").apply({"params": params}, image, method="encode_image")
        for spec in (SIGLIP, loaded.spec)
    ]
    assert np.array_equal(*outputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_become_float32_parameters(dtype, tmp_path):
    params = random_params(VIT)
    save_pretrained(tmp_path, VIT, params, dtype=dtype)
    assert {str(t.dtype) for t in list_tensors(tmp_path).values()} == {dtype}
    loaded = load_pretrained(tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float32), params)
    assert not trees.differences(loaded.params, rounded)
    half = load_pretrained(tmp_path, dtype=dtype).params
    assert {str(x.dtype) for x in jax.tree.leaves(half)} == {dtype}


def test_parameters_arrive_on_their_shardings(folder):
    mesh = make_mesh(2, 2, 2)
    rules = [(r".*/blocks/.*/kernel", ("fsdp", None))]
    loaded = load_pretrained(
        folder, shardings=lambda shapes: parameter_shardings(shapes, mesh, rules)
    )
    assert not trees.differences(loaded.params, load_pretrained(folder).params)
    q = loaded.params["image"]["encoder"]["blocks"]["mlp"]["fc2"]["kernel"]
    assert q.sharding.shard_shape(q.shape) == (2, 12, 16)


def test_nothing_larger_than_a_leaf_is_made_and_each_leaf_once(folder, monkeypatch):
    leaves, buffers = [], []
    empty, np_empty = loading.empty, np.empty
    monkeypatch.setattr(loading, "empty", lambda *a: leaves.append(empty(*a)) or leaves[-1])
    monkeypatch.setattr(
        np, "empty", lambda *a, **k: buffers.append(np_empty(*a, **k)) or buffers[-1]
    )
    loaded = trees.named_leaves(load_pretrained(folder).params)
    assert sorted(x.nbytes for x in leaves) == sorted(x.nbytes for x in loaded.values())
    # what is transposed passes through a block of rows
    assert buffers and all(x.shape[0] <= loading.BLOCK for x in buffers if x.ndim)


def test_a_leaf_is_handed_over_without_a_copy(folder, monkeypatch):
    made = []
    monkeypatch.setattr(
        loading, "empty", lambda *args, right=loading.empty: made.append(right(*args)) or made[-1]
    )
    leaves = jax.tree.leaves(load_pretrained(folder).params)
    assert len(made) == len(leaves)
    assert all(
        leaf.unsafe_buffer_pointer() == value.ctypes.data
        for leaf, value in zip(leaves, made, strict=True)
    )


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_tensors_are_read_in_blocks_of_rows(rows, folder, monkeypatch):
    expected = load_pretrained(folder).params
    monkeypatch.setattr(loading, "BLOCK", rows)
    assert not trees.differences(load_pretrained(folder).params, expected)


def test_both_generations_of_configs_are_read(folder):
    expected = read_spec(folder)

    def older(config):
        config["torch_dtype"] = config.pop("dtype")
        config["text_config"] |= {"top_k": 50, "num_beams": 1, "torch_dtype": None}

    change_config(folder, older)
    assert read_spec(folder) == expected


def test_a_partial_config_is_filled_from_the_defaults_of_its_class():
    spec = FAMILIES["clip"].read(dict(vision_config=dict(patch_size=16)), {})
    assert spec["image"]["patch_size"] == 16 and spec["image"]["width"] == 768
    assert spec["text"]["vocab_size"] == 49408 and spec["text"]["norm_eps"] == 1e-5
    assert spec["image"]["activation"] == "quick_gelu" and spec["embed_dim"] == 512


def test_the_oldest_clip_configs_say_the_truth_in_text_config_dict():
    config = dict(text_config=dict(hidden_size=99), text_config_dict=dict(hidden_size=768))
    assert FAMILIES["clip"].read(config, {})["text"]["width"] == 768


def test_the_eos_id_2_of_old_clip_configs_means_the_largest_id():
    read = FAMILIES["clip"].read
    assert read(dict(text_config=dict(eos_token_id=2)), {})["text"]["eos_id"] is None
    assert read({}, {})["text"]["eos_id"] == 49407


def test_legacy_position_ids_are_ignored(folder):
    expected = load_pretrained(folder).params
    ids = {f"{t}.embeddings.position_ids": np.arange(6.0)[None] for t in ("text_model", "x.y")}
    change_tensors(folder, lambda tensors: tensors.update(ids))
    assert not trees.differences(load_pretrained(folder).params, expected)


def test_tied_tensors_must_be_equal(tmp_path):
    ignored = [Ignored("head", "tied to the embedding", same_as="embedding")]
    tensors = {name: np.arange(6.0, dtype=np.float32) for name in ("embedding", "head")}

    def write():
        shapes = {name: t.shape for name, t in tensors.items()}
        write_tensors(tmp_path, shapes, np.dtype(np.float32), tensors.__getitem__, 10**9)
        return list_tensors(tmp_path)

    check_tied(write(), ignored)
    tensors["head"][2] = 7.0
    with pytest.raises(ValueError, match="head must equal embedding"):
        check_tied(write(), ignored)


def test_another_image_size_keeps_everything_but_the_positions(folder):
    loaded = load_pretrained(folder)
    larger = with_image_size(loaded, (16, 20))
    assert larger.params["image"]["positions"].shape == (20, 16)
    assert larger.spec["image"]["image_size"] == (16, 20)
    lines = trees.differences(larger.params, loaded.params)
    assert len(lines) == 1 and lines[0].startswith("image/positions")
    image = jnp.zeros((1, 16, 20, 3))
    model = build(MODELS, larger.spec, "model")
    model.apply({"params": larger.params}, image, method="encode_image")


REFUSED = {
    "another family": (lambda c: c.update(model_type="bert"), "family 'bert', supported are"),
    "no family": (lambda c: c.pop("model_type"), "family None, supported are .*siglip"),
    "activation": (
        lambda c: c["vision_config"].update(hidden_act="relu6"),
        "unknown activation .*'relu6', choose one of .*gelu_pytorch_tanh",
    ),
    "no pooling head": (
        lambda c: c["vision_config"].update(vision_use_head=False),
        "vision_use_head of config.json must be True",
    ),
    "channels": (lambda c: c["vision_config"].update(num_channels=4), "num_channels .* must be 3"),
    "a wrong width": (
        lambda c: c["text_config"].update(intermediate_size=28),
        r"wrong shape: text_model.encoder.layers.0.mlp.fc1.weight \[24, 16\], needed \[28, 16\]",
    ),
    "a layer more": (
        lambda c: c["text_config"].update(num_hidden_layers=3),
        r"missing: text_model.encoder.layers.2.layer_norm1.weight \[16\]",
    ),
    "a layer less": (
        lambda c: c["text_config"].update(num_hidden_layers=1),
        r"unexpected: text_model.encoder.layers.1.layer_norm1.weight \[16\]",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_config_that_does_not_fit_is_refused(name, folder):
    change, message = REFUSED[name]
    change_config(folder, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_a_folder_or_config_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a checkpoint is a folder"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="must hold config.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must be JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_pretrained(tmp_path)


DECODER = {"vocab_size": 20, "width": 8, "depth": 1, "mlp_dim": 16, "num_heads": 2}
TALKER = {
    "name": "llava",
    "image": dict(name="vit", **TOWER, image_size=8, patch_size=4, pool="gap"),
    "connector": {"name": "mlp"},
    "language_model": {**DECODER, "num_kv_heads": 1},
    "image_token_id": 2,
    "feature_layer": 2,
}
UNWRITABLE = {
    "mean pooling": (dict(VIT, pool="gap", class_token=True), "pooling: 'gap', 'cls'"),
    "rotary": (dict(VIT, rotary_grid=(2, 2)), r"rotary_grid: \(2, 2\), None"),
    "masked padding": (
        {**SIGLIP, "text": dict(SIGLIP["text"], mask_padding=True)},
        "text.mask_padding: True, False",
    ),
    "a resampler": (
        {**TALKER, "connector": {"name": "resampler", "resampler": {"num_latents": 2}}},
        "llava: the connector must be mlp, got ResamplerConnector",
    ),
    "fewer visual tokens": (
        {**TALKER, "compression": {"name": "average_pool"}},
        "llava: every patch must be a visual token, got the compression AveragePool",
    ),
    "features behind the norm": (
        {**TALKER, "feature_layer": None},
        "llava: features .*feature_layer None.*train with feature_layer=2",
    ),
    "a projection of the image": ({**SIGLIP, "embed_dim": 10}, "none for .*image/head"),
}


@pytest.mark.parametrize("name", list(UNWRITABLE))
def test_a_model_that_no_format_holds_is_refused(name, tmp_path):
    spec, message = UNWRITABLE[name]
    with pytest.raises(ValueError, match=f"(?s)no supported format holds this.*{message}"):
        save_pretrained(tmp_path, spec, random_params(spec))
    assert not list(tmp_path.iterdir())


def test_only_the_formats_of_such_a_model_give_their_reasons():
    spec = {**TALKER, "feature_layer": None}
    with pytest.raises(ValueError) as error:
        find_format(build(MODELS, spec, "model"), None)
    reasons = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert "llava" in reasons and "siglip" not in reasons and "llama" not in reasons


def test_parameters_of_another_model_are_not_written(tmp_path):
    params = random_params({**VIT, "mlp_dim": 20})
    with pytest.raises(ValueError, match=r"mlp/fc1/bias: \(2, 20\), the model has \(2, 24\)"):
        save_pretrained(tmp_path, VIT, params)


def test_extra_keys_of_the_config_are_kept(tmp_path):
    labels = {"0": "cat", "1": "dog", "2": "owl"}
    save_pretrained(tmp_path, VIT, random_params(VIT), extra_config={"id2label": labels})
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == labels


def test_every_family_is_one():
    assert all(isinstance(family, Family) for family in FAMILIES.values())
