# SPDX-License-Identifier: Apache-2.0
"""ViT, CLIP and SigLIP give the numbers of transformers, from random checkpoints it wrote."""

import numpy as np
import pytest
import torch
import transformers as hf

from tests.parity.reference import (
    TOLERANCE,
    apply,
    error,
    load,
    pixels,
    randomise,
    save,
)

SMALL = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
TEXT = dict(hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=5)
IDS = np.array([[47, 5, 6, 48, 49, 1, 1, 1, 1], [47, 3, 9, 8, 7, 2, 48, 1, 49]], np.int32)


def vit(kind=hf.ViTModel, **kwargs):
    return randomise(kind(hf.ViTConfig(**{**SMALL, "image_size": 30, "patch_size": 10, **kwargs})))


def clip(vision=None, text=None):
    vision = {**SMALL, "image_size": 30, "patch_size": 10, **(vision or {})}
    text = {**TEXT, "vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": 48,
            "bos_token_id": 47, **(text or {})}
    config = hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=14)
    return randomise(hf.CLIPModel(config))


def siglip(vision=None, text=None):
    vision = {**SMALL, "image_size": 30, "patch_size": 10, **(vision or {})}
    text = {**TEXT, "vocab_size": 50, "max_position_embeddings": 9, "projection_size": 24,
            **(text or {})}
    return randomise(hf.SiglipModel(hf.SiglipConfig(vision_config=vision, text_config=text)))


@torch.no_grad()
def vit_error(model, folder, size, **changes):
    module, variables, _ = load(folder, **changes)
    image, tensor = pixels(2, *size)
    ours, reference = apply(module, variables, image), model(tensor)
    if hasattr(reference, "logits"):
        return error(ours, reference.logits)
    return max(
        error(ours.tokens, reference.last_hidden_state),
        error(ours.pooled, reference.pooler_output),
    )


@torch.no_grad()
def two_tower_error(model, folder, size, ids=IDS, parts=("image", "text", "tokens"), **changes):
    module, variables, _ = load(folder, **changes)
    image, tensor = pixels(2, *size)
    reference = model(input_ids=torch.from_numpy(ids).long(), pixel_values=tensor)
    ours = apply(module, variables, image, ids)
    tokens = reference.vision_model_output.last_hidden_state
    if isinstance(model, hf.CLIPModel):  # there it is the output before the final norm
        tokens = model.vision_model.post_layernorm(tokens)
    scale, bias = ours.logit_scale, 0.0 if ours.logit_bias is None else ours.logit_bias
    logits = scale * ours.image_embedding @ ours.text_embedding.T + bias
    errors = {
        "image": error(ours.image_embedding, reference.image_embeds),
        "text": error(ours.text_embedding, reference.text_embeds),
        "tokens": error(apply(module, variables, image, method="image_tokens"), tokens),
        "logits": error(logits, reference.logits_per_image),
    }
    return max(errors[part] for part in (*parts, "logits"))


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
