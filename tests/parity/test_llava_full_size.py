# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and counts of full-size models that see; nothing is allocated on either side.

Configs typed from the known architectures, partial as the hub's are. Counts of the first four: the
published sizes, computed with transformers 5.23; the others are held against transformers alone.
"""

import math

import pytest
import torch
import transformers as hf

from flax_vlm.build import build
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.rules import canonical_names, check_tensors, expand
from flax_vlm.convert.saving import write_config
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.trees import named_leaves, num_parameters

VICUNA = dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064)
VICUNA_13B = VICUNA | dict(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
    head_dim=128,
)
MISTRAL = dict(
    model_type="mistral",
    vocab_size=32064,
    intermediate_size=14336,
    num_key_value_heads=8,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
    sliding_window=None,
)
QWEN_HALF = dict(
    model_type="qwen2",
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=152000,
    tie_word_embeddings=True,
    rope_theta=1e6,
)
QWEN_7B = dict(
    model_type="qwen2",
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    rope_theta=1e6,
)
SMOL_135M = dict(
    model_type="llama",
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49280,
)
SMOL_1B = dict(
    model_type="llama",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=64,
    vocab_size=49155,
)
CLIP_L = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
SIGLIP_BASE = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    image_size=512,
    patch_size=16,
)
SO400M = SIGLIP_BASE | dict(
    hidden_size=1152,
    num_hidden_layers=27,
    num_attention_heads=16,
    intermediate_size=4304,
    image_size=384,
    patch_size=14,
)

# hub id: (class of transformers, config.json, parameters or None, visual tokens of a tile)
HUB = {
    "llava-hf/llava-1.5-7b-hf": (
        "LlavaForConditionalGeneration",
        dict(model_type="llava", text_config=VICUNA, vision_config=CLIP_L),
        7_063_427_072,
        576,
    ),
    "llava-hf/llava-1.5-13b-hf": (
        "LlavaForConditionalGeneration",
        dict(model_type="llava", text_config=VICUNA_13B, vision_config=CLIP_L),
        None,
        576,
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        "LlavaNextForConditionalGeneration",
        dict(model_type="llava_next", text_config=MISTRAL, vision_config=CLIP_L),
        7_566_747_648,
        576,
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        "LlavaOnevisionForConditionalGeneration",
        dict(model_type="llava_onevision", text_config=QWEN_HALF, tie_word_embeddings=True),
        893_675_552,
        729,
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (
        "LlavaOnevisionForConditionalGeneration",
        dict(model_type="llava_onevision", text_config=QWEN_7B),
        None,
        729,
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        "Idefics3ForConditionalGeneration",
        dict(
            model_type="idefics3", text_config=SMOL_135M, vision_config=SIGLIP_BASE, scale_factor=4
        ),
        None,
        64,
    ),
    "HuggingFaceTB/SmolVLM-Instruct": (
        "Idefics3ForConditionalGeneration",
        dict(model_type="idefics3", text_config=SMOL_1B, vision_config=SO400M, scale_factor=3),
        None,
        81,
    ),
}


@pytest.mark.parametrize("hub_id", list(HUB))
def test_names_and_shapes_are_those_that_transformers_builds(hub_id):
    kind, config, count, visual_tokens = HUB[hub_id]
    kind = getattr(hf, kind)
    with torch.device("meta"):
        reference = kind(kind.config_class(**config))
    shapes = {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    family = FAMILIES[config["model_type"]]
    model = build(MODELS, family.read(config, shapes), "model")
    ours = parameter_shapes(model)
    leaves = {p: tuple(x.shape) for p, x in named_leaves(ours).items()}
    entries = expand(family.rules(model), leaves)
    found = canonical_names(shapes, entries, family.renames)
    in_file = {new: shapes[old] for new, old in found.items()}
    check_tensors(entries, in_file, family.ignored, hub_id)
    theirs = sum(p.numel() for p in reference.parameters())
    assert num_parameters(ours) == theirs == sum(map(math.prod, leaves.values()))
    assert count in (None, theirs)
    # the config that would be written, read back, gives the same model
    write_config(config["model_type"], family, model, leaves)
    assert model.tokens_per_image == visual_tokens
