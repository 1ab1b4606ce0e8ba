# SPDX-License-Identifier: Apache-2.0
"""Folders that a stranger may hand us: refused with the reason, run nothing, touch nothing."""

import json
import os
import pathlib
import pickle
import sys

import numpy as np
import pytest

from flax_vlm.convert import FAMILIES
from flax_vlm.convert.loading import load_pretrained
from flax_vlm.convert.safetensors_files import INDEX
from flax_vlm.convert.safetensors_writer import write_tensors
from flax_vlm.convert.saving import save_pretrained
from tests.convert.test_loading import (
    SIGLIP,
    VIT,
    change_config,
    change_tensors,
    random_params,
)


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "siglip", SIGLIP, random_params(SIGLIP))
    return tmp_path / "siglip"


def contents(root):
    return {
        path.relative_to(root): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder)
    return str(caught.value)


def test_another_family_is_refused_with_the_list_of_those_supported(folder):
    change_config(folder, lambda config: config.update(model_type="blip-2"))
    message = refusal(folder)
    assert "family 'blip-2'" in message and str(folder) in message
    assert all(repr(name) in message for name in FAMILIES)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_beside_its_config_is_refused_and_not_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = refusal(folder)
    assert "only as pickles, ['pytorch_model.bin']" in message and "can run any code" in message
    assert f"from_pretrained('{folder}').save_pretrained('{folder}-safetensors')" in message
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_checkpoint_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os; os.mkdir('exploded')\nclass M:\n    pass\n"
    for name in ("modeling_siglip.py", "configuration_siglip.py", "__init__.py"):
        (folder / name).write_text(code)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    def point_to_it(config):
        config["auto_map"] = {"AutoModel": "modeling_siglip.M", "AutoConfig": "configuration.M"}
        config["trust_remote_code"] = True

    change_config(folder, point_to_it)
    before = set(sys.modules)
    load_pretrained(folder)
    assert not (tmp_path / "exploded").exists()
    assert not {name for name in set(sys.modules) - before if "modeling" in name}


def test_loading_writes_nothing(folder, tmp_path):
    before = contents(tmp_path)
    load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(
        before[pathlib.Path("siglip/model.safetensors")][:-8]
    )
    refusal(folder)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == [
        pathlib.Path("siglip/model.safetensors")
    ]


@pytest.mark.parametrize("limit", [10**9, 5_000])
def test_saving_writes_into_its_folder_alone_and_through_no_link(limit, tmp_path):
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    for name in ("model.safetensors", "config.json", INDEX):  # as in a cache of the hub
        (outside / name).write_text("mine")
        (target / name).symlink_to(outside / name)
    before = contents(outside)
    save_pretrained(target, SIGLIP, random_params(SIGLIP), max_shard_bytes=limit)
    assert contents(outside) == before
    assert not any(path.is_symlink() for path in target.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"target", "outside"}


def test_a_cut_file_is_refused_by_its_name(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is no whole safetensors file: it should have" in refusal(folder)


def test_an_index_must_not_lead_out_of_the_folder(folder, tmp_path):
    other = tmp_path / "sharded"
    save_pretrained(other, SIGLIP, random_params(SIGLIP), max_shard_bytes=5_000)
    load_pretrained(other)
    index = json.loads((other / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    (other / first).rename(tmp_path / "x.safetensors")
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors")):
        where = {t: name if s == first else s for t, s in index["weight_map"].items()}
        (other / INDEX).write_text(json.dumps({"weight_map": where}))
        assert "must name files of its own folder" in refusal(other)
    (other / INDEX).write_text(json.dumps(index))
    assert f"names shards that are not there: ['{first}']" in refusal(other)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder):
    name = "vision_model.head.probe"
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros((1, 2, 16))}))
    message = refusal(folder)
    assert f"wrong shape: {name} [1, 2, 16], needed [1, 1, 16]" in message
    assert "got 1 differences" in message


def test_a_transposed_matrix_is_refused_though_it_has_as_many_numbers(folder):
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T}))
    assert f"wrong shape: {name} [16, 24], needed [24, 16]" in refusal(folder)


def test_an_unknown_activation_is_refused_with_the_list_of_those_known(folder):
    change_config(folder, lambda config: config["text_config"].update(hidden_act="swish2"))
    message = refusal(folder)
    assert "'swish2'" in message and "gelu_pytorch_tanh" in message and "quick_gelu" in message


def test_weights_that_are_integers_are_refused(tmp_path):
    save_pretrained(tmp_path, VIT, random_params(VIT))
    tensors = {}
    change_tensors(tmp_path, tensors.update)
    shapes = {name: t.shape for name, t in tensors.items()}
    write_tensors(
        tmp_path,
        shapes,
        np.dtype(np.uint8),
        lambda name: tensors[name].astype(np.uint8),
        10**9,
    )
    message = refusal(tmp_path)
    assert "must be floats" in message and "'classifier.weight': 'uint8'" in message


KINDS = {
    "a word for a number": (("vision_config", "hidden_size"), "x", "int >= 1, got 'x'"),
    "null": (("vision_config", "num_attention_heads"), None, "int >= 1, got None"),
    "zero": (("text_config", "hidden_size"), 0, "int >= 1, got 0"),
    "negative": (("text_config", "num_hidden_layers"), -1, "int >= 1, got -1"),
    "a fraction": (("vision_config", "intermediate_size"), 1.5, "int >= 1, got 1.5"),
    "true": (("vision_config", "patch_size"), True, "int >= 1, got True"),
    "three sizes": (("vision_config", "image_size"), [8, 8, 8], "got \\[8, 8, 8\\]"),
    "a list for a name": (("vision_config", "hidden_act"), ["gelu"], "kind str, got"),
    "no epsilon": (("text_config", "layer_norm_eps"), 0, "positive number, got 0"),
    "a list for a part": (("vision_config",), [1], "a part of a config must be a JSON object"),
    "heads that do not divide": (("text_config", "num_attention_heads"), 3, "16.*3|3.*16"),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_a_value_of_another_kind_is_refused_by_its_key(name, folder):
    path, value, message = KINDS[name]

    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    change_config(folder, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


OPEN_CLIP = dict(
    embed_dim=8,
    vision_cfg=dict(image_size=16, timm_model_name="eva02_base_patch16_clip_224"),
    text_cfg=dict(context_length=5, vocab_size=9, width=8, heads=2, layers=1),
)
FOREIGN = {
    "timm: a list of arguments": (
        "timm",
        dict(architecture="eva02_base_patch16_clip_224", model_args=[1]),
        "must be a JSON object",
    ),
    "timm: a word for a width": (
        "timm",
        dict(architecture="eva02_base_patch16_clip_224", model_args=dict(embed_dim="x")),
        "embed_dim of the config must be of the kind int >= 1, got 'x'",
    ),
    "timm: an unknown argument": (
        "timm",
        dict(architecture="eva02_base_patch16_clip_224", model_args=dict(swiglu_mlp=True)),
        "unknown key of model_args .*'swiglu_mlp'",
    ),
    "open_clip: no text": (
        "open_clip",
        dict(model_cfg={**OPEN_CLIP, "text_cfg": "none"}),
        "must be a JSON object, got 'none'",
    ),
    "open_clip: no numbers": (
        "open_clip",
        dict(model_cfg={**OPEN_CLIP, "embed_dim": []}),
        "embed_dim of the config must be of the kind",
    ),
    "open_clip: nothing": ("open_clip", dict(model_cfg=None), "those with an EVA tower of timm"),
    "vit: classes as a number": (
        "vit",
        dict(id2label=5),
        "must be a JSON object, got 5",
    ),
}


@pytest.mark.parametrize("name", list(FOREIGN))
def test_configs_of_every_family_are_checked(name):
    family, config, message = FOREIGN[name]
    with pytest.raises(ValueError, match=message):
        FAMILIES[family].read(config, {"classifier.weight": (2, 2)})


@pytest.mark.parametrize("where", ["config", "header"])
def test_nesting_without_end_is_refused(where, folder):
    deep = "[" * 100_000
    if where == "config":
        (folder / "config.json").write_text(deep)
        assert "must be JSON" in refusal(folder)
    else:
        raw = deep.encode()
        (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
        assert "its header is not JSON" in refusal(folder)
