# SPDX-License-Identifier: Apache-2.0
"""Idefics3 and SmolVLM in the Hugging Face format: a SigLIP encoder, pixel shuffle, LLaMA.

Features are taken behind the encoder's last norm. Full tiles alone: where an image fills a tile in
part, transformers hides its padding from the encoder, which this encoder does not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.convert import clip, siglip
from flax_vlm.convert.family import POSITION_IDS, Config, Family, check_value, fill
from flax_vlm.convert.language_model import IGNORED, decoder_rules
from flax_vlm.convert.language_model import write_fields as write_text
from flax_vlm.convert.layers import conv, dense
from flax_vlm.convert.llava import kind_of_text, read_decoder
from flax_vlm.convert.rules import Ignored, Rule, Shape
from flax_vlm.models.llava import Llava
from flax_vlm.nn.connectors import PixelShuffleConnector

ARCHITECTURES = {
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
# Source: transformers 5.24, Idefics3VisionConfig and SmolVLMVisionConfig
VISION_DEFAULTS = siglip.VISION_DEFAULTS | dict(
    hidden_size=1152, num_attention_heads=16, patch_size=32
)
IMAGE_TOKEN = 128257


def read(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    given = config.get("vision_config")
    check_value(given, "num_channels", 3)
    numbers = fill(config, dict(scale_factor=2, image_token_id=IMAGE_TOKEN))
    return dict(
        name="llava",
        image={**siglip.vision_fields(fill(given, VISION_DEFAULTS)), "pool": "gap"},
        connector=dict(name="pixel_shuffle", scale=numbers["scale_factor"]),
        language_model=read_decoder(config, "llama", tensors),
        image_token_id=numbers["image_token_id"],
    )


def write(model_type: str, model: nn.Module) -> dict[str, Any]:
    """Returns config.json."""
    if not isinstance(model.connector, PixelShuffleConnector):
        found = type(model.connector).__name__
        raise ValueError(f"the connector must be pixel_shuffle, got {found}")
    decoder = model.language_model
    text = {**write_text(kind_of_text(decoder), decoder), "model_type": kind_of_text(decoder)}
    vision = {**clip.vision_config(model.image), "model_type": f"{model_type}_vision"}
    return dict(
        architectures=[ARCHITECTURES[model_type]],
        vision_config=vision,
        text_config=text,
        scale_factor=model.connector.scale,
        image_token_id=model.image_token_id,
        tie_word_embeddings=decoder.tied,
    )


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of Idefics3."""
    tower = "model.vision_model"
    return [
        *conv(f"{tower}.embeddings.patch_embedding", "image/patches"),
        *siglip.vision_rules(tower),
        *dense("model.connector.modality_projection.proj", "connector/fc1"),
        *decoder_rules(model.language_model, "model.text_model.", "", "language_model/"),
    ]


TIED = Ignored(
    "lm_head.weight",
    "the output is tied to the embedding",
    same_as="model.text_model.embed_tokens.weight",
)

FAMILIES: dict[str, Family] = {
    model_type: Family(
        (Llava,),
        read,
        functools.partial(write, model_type),
        rules,
        ignored=(POSITION_IDS, IGNORED[0], TIED),
    )
    for model_type in ARCHITECTURES
}
