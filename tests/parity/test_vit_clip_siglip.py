# SPDX-License-Identifier: Apache-2.0
"""ViT, CLIP and SigLIP give the numbers of transformers, from random checkpoints it wrote."""

import functools

import numpy as np
import pytest
import torch
import transformers as hf
from flax import linen as nn
from safetensors.torch import load_file, save_file

from flax_vlm.convert.loading import load_pretrained
from flax_vlm.convert.saving import save_pretrained
from flax_vlm.nn import transformer
from tests.parity.reference import (
    TOLERANCE,
    apply,
    error,
    everything,
    load,
    pixels,
    randomise,
    relative_error,
    save,
    swapped,
)

SMALL = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
TEXT = dict(hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=5)
IDS = np.array([[47, 5, 6, 48, 49, 1, 1, 1, 1], [47, 3, 9, 8, 7, 2, 48, 1, 49]], np.int32)


def vit(kind=hf.ViTModel, **kwargs):
    return randomise(kind(hf.ViTConfig(**{**SMALL, "image_size": 30, "patch_size": 10, **kwargs})))


def headless_vit():
    return randomise(hf.ViTModel(vit().config, add_pooling_layer=False))


def clip(vision=None, text=None):
    vision = {**SMALL, "image_size": 30, "patch_size": 10, **(vision or {})}
    text = {
        **TEXT,
        "vocab_size": 50,
        "max_position_embeddings": 9,
        "eos_token_id": 48,
        "bos_token_id": 47,
        **(text or {}),
    }
    config = hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=14)
    return randomise(hf.CLIPModel(config))


def siglip(vision=None, text=None):
    vision = {**SMALL, "image_size": 30, "patch_size": 10, **(vision or {})}
    text = {
        **TEXT,
        "vocab_size": 50,
        "max_position_embeddings": 9,
        "projection_size": 24,
        **(text or {}),
    }
    return randomise(hf.SiglipModel(hf.SiglipConfig(vision_config=vision, text_config=text)))


@torch.no_grad()
def vit_error(model, folder, size, measure=error, **changes):
    module, variables, _ = load(folder, **changes)
    image, tensor = pixels(2, *size)
    ours, reference = apply(module, variables, image), model(tensor)
    if hasattr(reference, "logits"):
        return measure(ours, reference.logits)
    tokens = measure(ours.tokens, reference.last_hidden_state)
    if reference.pooler_output is None:
        return tokens
    return max(tokens, measure(ours.pooled, reference.pooler_output))


@torch.no_grad()
def two_tower_error(model, folder, size, measure=error, **changes):
    module, variables, _ = load(folder, **changes)
    image, tensor = pixels(2, *size)
    reference = model(input_ids=torch.from_numpy(IDS).long(), pixel_values=tensor)
    ours, ours_tokens = apply(module, variables, image, IDS, method=everything)
    tokens = reference.vision_model_output.last_hidden_state
    if isinstance(model, hf.CLIPModel):  # there it is the output before the final norm
        tokens = model.vision_model.post_layernorm(tokens)
    scale, bias = ours.logit_scale, 0.0 if ours.logit_bias is None else ours.logit_bias
    logits = scale * ours.image_embedding @ ours.text_embedding.T + bias
    return max(
        measure(ours.image_embedding, reference.image_embeds),
        measure(ours.text_embedding, reference.text_embeds),
        measure(ours_tokens, tokens),
        measure(logits, reference.logits_per_image),
    )


@torch.no_grad()
def tower_error(model, folder, tower, order=None, **changes):
    """Returns the error of one tower's embedding: half the work of `two_tower_error`.

    `order` is a function of the tower's positions [T, D]."""
    module, variables, _ = load(folder, **changes)
    if order is not None:
        params = dict(variables["params"])
        params[tower] = params[tower] | {"positions": order(params[tower]["positions"])}
        variables = {"params": params}
    if tower == "image":
        image, tensor = pixels(2, 30, 30)
        ours = apply(module, variables, image, method="encode_image")
        reference = model.get_image_features(tensor).pooler_output
    else:
        ours = apply(module, variables, IDS, method="encode_text")
        reference = model.get_text_features(torch.from_numpy(IDS).long()).pooler_output
    return error(ours, reference / reference.norm(dim=-1, keepdim=True))


VIT_SHAPES = {
    "square": dict(),
    "wide": dict(image_size=(20, 40)),
    "odd grid, border dropped, rectangular patches": dict(image_size=(52, 23), patch_size=(10, 5)),
    "five heads, tanh gelu": dict(
        hidden_size=20, num_attention_heads=5, hidden_act="gelu_pytorch_tanh"
    ),
    "no bias": dict(qkv_bias=False, num_hidden_layers=1),
}


@pytest.mark.parametrize("shape", list(VIT_SHAPES))
@pytest.mark.parametrize("kind", [hf.ViTModel, hf.ViTForImageClassification])
def test_vit_gives_the_numbers_of_transformers(kind, shape, tmp_path):
    kwargs = {**VIT_SHAPES[shape]}
    if kind is hf.ViTForImageClassification:
        kwargs["num_labels"] = 7
    model = vit(kind, **kwargs)
    size = kwargs.get("image_size", 30)
    size = size if isinstance(size, tuple) else (size, size)
    assert vit_error(model, save(model, tmp_path), size) <= TOLERANCE


def test_vit_without_pooler_gives_tokens_alone(tmp_path):
    model = randomise(hf.ViTModel(vit().config, add_pooling_layer=False, use_mask_token=True))
    module, variables, _ = load(save(model, tmp_path))
    image, tensor = pixels(2, 30, 30)
    masked = np.array([[True] + [False] * 8, [False] * 5 + [True] * 4])
    reference = model(tensor, bool_masked_pos=torch.from_numpy(masked)).last_hidden_state
    ours = apply(module, variables, image, masked=masked).tokens
    assert error(ours, reference) <= TOLERANCE
    assert error(apply(module, variables, image).tokens, reference) > 1e-2


CLIP_SHAPES = {
    "square": (dict(), dict(), (30, 30)),
    "odd grid, other patch": (dict(image_size=21, patch_size=3), dict(), (21, 21)),
    "border dropped, six heads": (
        dict(image_size=32, num_attention_heads=6, hidden_size=18),
        dict(num_attention_heads=2),
        (32, 32),
    ),
    "exact gelu, largest id": (
        dict(hidden_act="gelu"),
        dict(hidden_act="gelu", eos_token_id=2),
        (30, 30),
    ),
}
SIGLIP_SHAPES = {
    "square": (dict(), dict(), (30, 30)),
    "odd grid": (dict(image_size=21, patch_size=3), dict(), (21, 21)),
    "border dropped, six heads": (
        dict(image_size=32, num_attention_heads=6),
        dict(num_attention_heads=2),
        (32, 32),
    ),
}


@pytest.mark.parametrize("shape", list(CLIP_SHAPES))
def test_clip_gives_the_numbers_of_transformers(shape, tmp_path):
    vision, text, size = CLIP_SHAPES[shape]
    model = clip(vision, text)
    assert two_tower_error(model, save(model, tmp_path), size) <= TOLERANCE


@pytest.mark.parametrize("shape", list(SIGLIP_SHAPES))
def test_siglip_gives_the_numbers_of_transformers(shape, tmp_path):
    vision, text, size = SIGLIP_SHAPES[shape]
    model = siglip(vision, text)
    assert two_tower_error(model, save(model, tmp_path), size) <= TOLERANCE


VIT_MUTATIONS = {
    "tanh gelu": dict(activation="gelu_tanh"),
    "epsilon of CLIP": dict(norm_eps=1e-3),
    "mean pooling": dict(pooling="gap"),
    "no tanh after the pooler": dict(head_tanh=False),
}
CLIP_MUTATIONS = {
    "image": {
        "no norm before the first block": dict(pre_norm=False),
        "exact gelu": dict(activation="gelu_erf"),
        "epsilon": dict(norm_eps=1e-4),
        "mean pooling": dict(pooling="gap"),
    },
    "text": {
        "exact gelu": dict(activation="gelu_erf"),
        "no causal mask": dict(is_causal=False),
        "last token": dict(pooling="last"),
        "largest id": dict(eos_id=None),
        "epsilon": dict(norm_eps=1e-3),
    },
}
SIGLIP_MUTATIONS = {
    "image": {
        "exact gelu": dict(activation="gelu_erf"),
        "epsilon": dict(norm_eps=1e-3),
        "mean pooling": dict(pool="gap"),
    },
    "text": {
        "exact gelu": dict(activation="gelu_erf"),
        "epsilon": dict(norm_eps=1e-3),
        "causal mask": dict(is_causal=True),
        "end of text": dict(pooling="eos", eos_id=48),
    },
}


def columns_first(positions):
    """Exchanges rows and columns of a 3 x 3 grid, behind whatever stands before it."""
    prefix, grid = positions[:-9], positions[-9:]
    return np.concatenate([prefix, grid.reshape(3, 3, -1).swapaxes(0, 1).reshape(9, -1)])


ORDERS = {
    ("clip", "image"): {
        "class token last": lambda positions: np.roll(positions, -1, axis=0),
        "columns before rows": columns_first,
    },
    ("clip", "text"): {"from the end": lambda positions: positions[::-1]},
    ("siglip", "image"): {"columns before rows": columns_first},
    ("siglip", "text"): {"from the end": lambda positions: positions[::-1]},
}
SWAPS = {
    "query and key": ("q_proj", "k_proj"),
    "norms": ("layer_norm1", "layer_norm2"),
}


def test_every_wrong_choice_breaks_the_parity_of_vit(tmp_path):
    model = vit(layer_norm_eps=1e-12)
    folder = save(model, tmp_path)
    for name, change in VIT_MUTATIONS.items():
        assert vit_error(model, folder, (30, 30), **change) > 2 * TOLERANCE, name
    swapped(folder, ("layernorm_before", "layernorm_after"))
    assert vit_error(model, folder, (30, 30)) > 1e-2


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_every_wrong_choice_breaks_the_parity_of_both_towers(family, tmp_path):
    model = {"clip": clip, "siglip": siglip}[family]()
    folder = save(model, tmp_path)
    for tower, mutations in {"clip": CLIP_MUTATIONS, "siglip": SIGLIP_MUTATIONS}[family].items():
        assert tower_error(model, folder, tower) <= TOLERANCE
        for name, change in mutations.items():
            change = {f"{tower}__{field}": value for field, value in change.items()}
            found = tower_error(model, folder, tower, **change)
            assert found > 2 * TOLERANCE, (tower, name, found)
        for name, order in ORDERS[family, tower].items():
            found = tower_error(model, folder, tower, order)
            assert found > 1e-3, (tower, name, found)
    for name, pair in SWAPS.items():
        swapped(folder, pair)
        found = tower_error(model, folder, "image")
        swapped(folder, pair)
        assert found > 1e-2, (name, found)


def test_the_order_of_the_patches_matters(tmp_path):
    model = vit(image_size=(20, 40))
    folder = save(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    positions = tensors["embeddings.position_embeddings"]
    grid = positions[:, 1:].reshape(1, 2, 4, -1).transpose(1, 2).reshape(1, 8, -1)
    tensors["embeddings.position_embeddings"] = torch.cat([positions[:, :1], grid], 1).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert vit_error(model, folder, (20, 40)) > 1e-2


def offset_error(make, folder):
    model = make()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "position_embedding" in name:
                p.add_(300.0)
    measure = vit_error if make is headless_vit else two_tower_error
    return measure(model, save(model, folder), (30, 30), measure=relative_error)


@pytest.mark.parametrize("make", [headless_vit, clip, siglip])
def test_an_offset_of_300_on_the_positions_keeps_the_digits(make, tmp_path):
    assert offset_error(make, tmp_path) <= 1e-4


def test_the_variance_as_a_difference_of_squares_would_lose_the_digits(tmp_path, monkeypatch):
    fast = functools.partial(nn.LayerNorm, use_fast_variance=True)
    monkeypatch.setattr(transformer, "LayerNorm", fast)
    assert offset_error(headless_vit, tmp_path) > 1e-3


ROUND_TRIPS = {
    "vit": vit,
    "vit without pooler": headless_vit,
    "classifier": lambda: vit(hf.ViTForImageClassification, num_labels=7),
    "clip": clip,
    "siglip": siglip,
}


@pytest.mark.parametrize("name", list(ROUND_TRIPS))
@pytest.mark.parametrize("names", ["file", "memory"])
def test_there_and_back_gives_the_same_bits(name, names, tmp_path):
    model = ROUND_TRIPS[name]()
    model.save_pretrained(tmp_path / "in", save_original_format=names == "file")
    loaded = load_pretrained(tmp_path / "in")
    save_pretrained(tmp_path / "out", loaded.spec, loaded.params, max_shard_bytes=20_000)
    kwargs = {"add_pooling_layer": False} if "without" in name else {}
    again, report = type(model).from_pretrained(
        tmp_path / "out", output_loading_info=True, **kwargs
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
