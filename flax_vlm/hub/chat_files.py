# SPDX-License-Identifier: Apache-2.0
"""What an exported language model needs besides weights and tokenizer, for transformers to talk to
it: chat_template.jinja, generation_config.json, and processor_config.json of LLaVA and LLaVA-NeXT.
The processors of other formats have arguments that are not known here: transformers then takes the
defaults of their class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flax_vlm.data.chat_templates import IMAGE_MARKER
from flax_vlm.data.jinja_writer import jinja_source
from flax_vlm.hub import answering
from flax_vlm.hub.loaded_model import LoadedModel
from flax_vlm.nn.patches import as_pair
from flax_vlm.objectives.next_token import NextToken

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
PROCESSOR = "processor_config.json"
NAMES = (TEMPLATE, GENERATION, PROCESSOR)
# model_type: its processor in transformers
_PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}


def chat_files(vlm: LoadedModel, model_type: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns {name: text} of the files; none for a model that does not speak.

    Args:
        vlm: the model.
        model_type: the format that it is written in.
        config: its config.json.

    Raises:
        ValueError: if patches are not square.
    """
    if not isinstance(vlm.objective, NextToken):
        return {}
    tokenizer = vlm.processor.tokenizer
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id}
    generation = {f"{k}_token_id": i for k, i in ids.items() if i is not None}
    generation["eos_token_id"] = list(answering.stop_ids(vlm.processor))
    files = {TEMPLATE: jinja_source(vlm.chat_template), GENERATION: _json(generation)}
    if model_type in _PROCESSORS:
        files[PROCESSOR] = _json(_processor(vlm, model_type, config))
    return files


def _processor(vlm: LoadedModel, model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    tower = vlm.model.image
    height, width = as_pair(tower.patch_size)
    if height != width:
        raise ValueError(f"{_PROCESSORS[model_type]} needs square patches, got {height} x {width}")
    return {
        "processor_class": _PROCESSORS[model_type],
        "patch_size": height,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "num_additional_image_tokens": tower.num_prefix,
        "image_token": IMAGE_MARKER,
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2)
