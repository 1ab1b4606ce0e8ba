# SPDX-License-Identifier: Apache-2.0
"""Files of big_vision give the numbers that the same values give in transformers.

The files are written here, array by array, in the names and layouts of big_vision's modules: flax
kernels are [in, out], those of attention [D, N, K] and [N, K, D], of patches [h, w, C, D].
"""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers as hf

from flax_vlm import trees
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.loading import load_pretrained, read_spec
from flax_vlm.convert.resolution import with_image_size
from flax_vlm.convert.saving import save_pretrained
from tests.parity import test_siglip2, test_vit_clip_siglip
from tests.parity.reference import TOLERANCE, apply, build_changed, error, everything, pixels


def numpy_tensors(model):
    return {name: t.numpy().copy() for name, t in model.state_dict().items()}


def dense(found, ours, t, theirs):
    found[f"{ours}/kernel"] = t[f"{theirs}.weight"].T
    found[f"{ours}/bias"] = t[f"{theirs}.bias"]


def norm(found, ours, t, theirs):
    found[f"{ours}/scale"], found[f"{ours}/bias"] = t[f"{theirs}.weight"], t[f"{theirs}.bias"]


def attention(found, ours, weights, out, heads):
    for name, (weight, bias) in zip(("query", "key", "value"), weights, strict=True):
        width = weight.shape[1]
        found[f"{ours}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
        found[f"{ours}/{name}/bias"] = bias.reshape(heads, -1)
    weight, bias = out
    found[f"{ours}/out/kernel"] = weight.T.reshape(heads, -1, weight.shape[0])
    found[f"{ours}/out/bias"] = bias


def pair(t, name):
    return t[f"{name}.weight"], t[f"{name}.bias"]


def block(found, ours, t, theirs, heads):
    norm(found, f"{ours}/LayerNorm_0", t, f"{theirs}.layer_norm1")
    qkv = [pair(t, f"{theirs}.self_attn.{n}_proj") for n in "qkv"]
    out = pair(t, f"{theirs}.self_attn.out_proj")
    attention(found, f"{ours}/MultiHeadDotProductAttention_0", qkv, out, heads)
    norm(found, f"{ours}/LayerNorm_1", t, f"{theirs}.layer_norm2")
    dense(found, f"{ours}/MlpBlock_0/Dense_0", t, f"{theirs}.mlp.fc1")
    dense(found, f"{ours}/MlpBlock_0/Dense_1", t, f"{theirs}.mlp.fc2")


def siglip_arrays(model):
    """Returns the arrays of a SigLIP, also NaFlex, of transformers."""
    t, found = numpy_tensors(model), {}
    vision, text = model.config.vision_config, model.config.text_config
    v, x = "vision_model", "text_model"
    patches = t[f"{v}.embeddings.patch_embedding.weight"]
    positions = t[f"{v}.embeddings.position_embedding.weight"]
    if patches.ndim == 2:
        side = round(len(positions) ** 0.5)
        found["img/embedding/kernel"] = patches.T
        found["img/pos_embedding"] = positions.reshape(side, side, -1)
    else:
        found["img/embedding/kernel"] = patches.transpose(2, 3, 1, 0)
        found["img/pos_embedding"] = positions[None]
    found["img/embedding/bias"] = t[f"{v}.embeddings.patch_embedding.bias"]
    for i in range(vision.num_hidden_layers):
        name = f"img/Transformer/encoderblock_{i}"
        block(found, name, t, f"{v}.encoder.layers.{i}", vision.num_attention_heads)
    norm(found, "img/Transformer/encoder_norm", t, f"{v}.post_layernorm")
    found["img/MAPHead_0/probe"] = t[f"{v}.head.probe"]
    fused = (t[f"{v}.head.attention.in_proj_weight"], t[f"{v}.head.attention.in_proj_bias"])
    qkv = list(zip(*(np.split(part, 3) for part in fused), strict=True))
    attention(
        found,
        "img/MAPHead_0/MultiHeadDotProductAttention_0",
        qkv,
        pair(t, f"{v}.head.attention.out_proj"),
        vision.num_attention_heads,
    )
    norm(found, "img/MAPHead_0/LayerNorm_0", t, f"{v}.head.layernorm")
    dense(found, "img/MAPHead_0/MlpBlock_0/Dense_0", t, f"{v}.head.mlp.fc1")
    dense(found, "img/MAPHead_0/MlpBlock_0/Dense_1", t, f"{v}.head.mlp.fc2")
    found["txt/Embed_0/embedding"] = t[f"{x}.embeddings.token_embedding.weight"]
    found["txt/pos_embedding"] = t[f"{x}.embeddings.position_embedding.weight"][None]
    for i in range(text.num_hidden_layers):
        name = f"txt/Encoder_0/encoderblock_{i}"
        block(found, name, t, f"{x}.encoder.layers.{i}", text.num_attention_heads)
    norm(found, "txt/Encoder_0/encoder_norm", t, f"{x}.final_layer_norm")
    dense(found, "txt/head", t, f"{x}.head")
    return found | {"t": t["logit_scale"], "b": t["logit_bias"]}


def vit_arrays(model):
    """Returns the arrays of a ViT of transformers, with the position of the class token."""
    t, found = {n.removeprefix("vit."): x for n, x in numpy_tensors(model).items()}, {}
    found["embedding/kernel"] = t["embeddings.patch_embeddings.projection.weight"].transpose(
        2, 3, 1, 0
    )
    found["embedding/bias"] = t["embeddings.patch_embeddings.projection.bias"]
    found["cls"] = t["embeddings.cls_token"]
    found["pos_embedding"] = t["embeddings.position_embeddings"]
    old = {
        "layer_norm1": "layernorm_before",
        "layer_norm2": "layernorm_after",
        **{f"self_attn.{n}_proj": f"attention.{n}_proj" for n in "qkv"},
        "self_attn.out_proj": "attention.o_proj",
    }
    for i in range(model.config.num_hidden_layers):
        for new, name in old.items():
            for part in ("weight", "bias"):
                t[f"layers.{i}.{new}.{part}"] = t[f"layers.{i}.{name}.{part}"]
        heads = model.config.num_attention_heads
        block(found, f"Transformer/encoderblock_{i}", t, f"layers.{i}", heads)
    norm(found, "Transformer/encoder_norm", t, "layernorm")
    if "classifier.weight" in t:
        dense(found, "head", t, "classifier")
    else:
        dense(found, "pre_logits", t, "pooler.dense")
    return found


def scanned(arrays):
    """Returns the arrays of the same encoder under nn.scan."""
    found, layers = {}, {}
    for name, value in arrays.items():
        if m := re.fullmatch(r"(.*/encoderblock)_(\d+)(/.*)", name):
            layers.setdefault(m[1] + m[3], {})[int(m[2])] = value
        else:
            found[name] = value
    return found | {n: np.stack([x for _, x in sorted(v.items())]) for n, v in layers.items()}


FORMS = {
    "at the top": lambda a: a,
    "scanned": scanned,
    "below params, beside the optimizer's": lambda a: {
        **{f"params/{n}": x for n, x in a.items()},
        **{f"opt/0/mu/{n}": x for n, x in a.items()},
        "extra/step": np.int64(7),
    },
    "of an old optimizer": lambda a: {
        **{f"opt/target/{n}": x for n, x in a.items()},
        "opt/state/step": np.int64(7),
    },
}


def write(path, arrays, order="C"):
    np.savez(path, **{name: np.asarray(x, order=order) for name, x in arrays.items()})
    return path


@torch.no_grad()
def siglip_error(model, path, **changes):
    loaded = load_pretrained(path)
    image, tensor = pixels(2, 30, 30)
    ids = test_vit_clip_siglip.IDS
    reference = model(input_ids=torch.from_numpy(ids).long(), pixel_values=tensor)
    module = build_changed(loaded.spec, **changes)
    ours, tokens = apply(module, {"params": loaded.params}, image, ids, method=everything)
    logits = ours.logit_scale * ours.image_embedding @ ours.text_embedding.T + ours.logit_bias
    return max(
        error(ours.image_embedding, reference.image_embeds),
        error(ours.text_embedding, reference.text_embeds),
        error(tokens, reference.vision_model_output.last_hidden_state),
        error(logits, reference.logits_per_image),
    )


@pytest.mark.parametrize("form", list(FORMS))
def test_siglip_gives_the_numbers_of_transformers(form, tmp_path):
    model = test_vit_clip_siglip.siglip()
    path = write(tmp_path / "siglip.npz", FORMS[form](siglip_arrays(model)))
    assert siglip_error(model, path) <= TOLERANCE


@pytest.mark.parametrize(
    "change", [dict(image__activation="gelu_erf"), dict(text__is_causal=True)], ids=str
)
def test_every_wrong_choice_breaks_the_parity(change, tmp_path):
    model = test_vit_clip_siglip.siglip()
    path = write(tmp_path / "siglip.npz", siglip_arrays(model))
    assert siglip_error(model, path, **change) > 2 * TOLERANCE


@torch.no_grad()
def test_naflex_gives_the_numbers_of_transformers(tmp_path):
    model = test_siglip2.make(num_patches=9, patch_size=3)
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    path = write(tmp_path / "naflex.npz", siglip_arrays(model))
    expected, found = load_pretrained(folder), load_pretrained(path)
    assert found.spec["image"]["name"] == "naflex_vit"
    assert not trees.differences(found.params, expected.params)
    shapes = test_siglip2.SHAPES["one fills its row of patches"]
    assert test_siglip2.naflex_error(model, path, shapes) <= TOLERANCE


TANH = dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, num_attention_heads=2)


@pytest.mark.parametrize("kind", [hf.ViTModel, hf.ViTForImageClassification])
@pytest.mark.parametrize("layout", ["class token has a position", "added before", "in the encoder"])
@torch.no_grad()
def test_vit_gives_the_numbers_of_transformers(kind, layout, tmp_path):
    model = test_vit_clip_siglip.vit(kind, num_labels=7, **TANH)
    arrays = vit_arrays(model)
    positions = arrays["pos_embedding"]
    if layout == "added before":  # as big_vision does since 2022
        arrays["cls"] = arrays["cls"] + positions[:, :1]
        arrays["pos_embedding"] = positions[:, 1:]
    elif layout == "in the encoder":
        arrays["Transformer/pos_embedding"] = arrays.pop("pos_embedding")
    loaded = load_pretrained(write(tmp_path / "vit.npz", arrays))
    image, tensor = pixels(2, 30, 30)
    ours = apply(build_changed(loaded.spec), {"params": loaded.params}, image)
    reference = model(tensor)
    if kind is hf.ViTModel:
        assert error(ours.tokens, reference.last_hidden_state) <= TOLERANCE
        assert error(ours.pooled, reference.pooler_output) <= TOLERANCE
    else:
        assert error(ours, reference.logits) <= TOLERANCE


def test_a_file_of_big_vision_becomes_a_folder_of_transformers(tmp_path):
    model = test_vit_clip_siglip.siglip()
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "siglip.npz", siglip_arrays(model))
    (tmp_path / "in" / "README.md").write_text("as in a repository of the hub")
    loaded = load_pretrained(tmp_path / "in")
    assert loaded.model_type == "big_vision"
    assert save_pretrained(tmp_path / "out", loaded.spec, loaded.params) == "siglip"
    again, report = hf.SiglipModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match="big_vision are read, not written"):
        save_pretrained(tmp_path / "x", loaded.spec, loaded.params, model_type="big_vision")


def test_arrays_stored_column_by_column_are_the_same(tmp_path):
    arrays = siglip_arrays(test_vit_clip_siglip.siglip())
    expected = load_pretrained(write(tmp_path / "rows.npz", arrays))
    found = load_pretrained(write(tmp_path / "columns.npz", arrays, order="F"))
    assert not trees.differences(found.params, expected.params)


def test_bfloat16_arrays_are_read_as_numpy_stores_them(tmp_path):
    arrays = siglip_arrays(test_vit_clip_siglip.siglip())
    half = {name: np.asarray(x).astype(ml_dtypes.bfloat16) for name, x in arrays.items()}
    path = write(tmp_path / "siglip.npz", {n: x.view("V2") for n, x in half.items()})
    rounded = {name: x.astype(np.float32) for name, x in half.items()}
    expected = load_pretrained(write(tmp_path / "rounded.npz", rounded))
    assert not trees.differences(load_pretrained(path).params, expected.params)


def test_a_border_that_no_patch_sees_comes_back_with_the_image_size(tmp_path):
    model = test_vit_clip_siglip.siglip(vision=dict(image_size=32))
    path = write(tmp_path / "siglip.npz", siglip_arrays(model))
    loaded = load_pretrained(path)
    assert loaded.spec["image"]["image_size"] == (30, 30)
    larger = with_image_size(loaded, 32)
    assert not trees.differences(larger.params, loaded.params)
    image, tensor = pixels(2, 32, 32)
    with torch.no_grad():
        reference = model.get_image_features(tensor).pooler_output
    ours = apply(
        build_changed(larger.spec), {"params": larger.params}, image, method="encode_image"
    )
    assert error(ours, reference / reference.norm(dim=-1, keepdim=True)) <= TOLERANCE


def test_mean_pooling_is_read_where_there_is_no_other():
    arrays = vit_arrays(
        test_vit_clip_siglip.vit(hf.ViTForImageClassification, num_labels=7, **TANH)
    )
    arrays["pos_embedding"] = arrays["pos_embedding"][:, 1:]
    del arrays["cls"]
    shapes = {name: x.shape for name, x in arrays.items()}
    spec = FAMILIES["big_vision"].read({}, shapes)
    assert (spec["pool"], spec["class_token"], spec["num_classes"]) == ("gap", False, 7)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


BAD = {
    "cut": (lambda a: a, cut, "is no whole .npz file"),
    "not a zip": (lambda a: a, lambda p: p.write_bytes(b"x" * 99), "is no whole .npz file"),
    "a pickle inside": (
        lambda a: a | {"t": np.array([Bomb()], object)},
        None,
        "t.npy holds Python objects: loading them can run any code",
    ),
    "scanned, column by column": (
        lambda a: {n: np.asfortranarray(x) for n, x in scanned(a).items()},
        None,
        "is stored column by column; write it in C order",
    ),
    "an array more": (lambda a: a | {"img/more": np.ones(3)}, None, r"unexpected: img/more \[3\]"),
    "no bias of the logits": (
        lambda a: {n: x for n, x in a.items() if n != "b"},
        None,
        r"missing: b \[1\]",
    ),
    "another text tower": (
        lambda a: {n: x for n, x in a.items() if "Embed_0" not in n},
        None,
        "its own text transformer",
    ),
    "something else": (lambda a: {"x": np.ones(3)}, None, "must hold Transformer/encoderblock_0/"),
    "positions for no square": (
        lambda a: a | {"img/pos_embedding": np.ones((1, 8, 24), np.float32)},
        None,
        r"wrong shape: img/pos_embedding \[1, 8, 24\], needed \[1, 4, 24\]",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_are_refused(name, tmp_path):
    change, damage, message = BAD[name]
    path = write(tmp_path / "bad.npz", change(ARRAYS), order="K")
    if damage:
        damage(path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(path)


def test_a_compressed_file_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "siglip.npz", **ARRAYS)
    with pytest.raises(ValueError, match="is compressed; write the file with np.savez"):
        read_spec(tmp_path / "siglip.npz")


ARRAYS = siglip_arrays(test_vit_clip_siglip.siglip())
