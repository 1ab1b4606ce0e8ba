# SPDX-License-Identifier: Apache-2.0
"""LLaVA, LLaVA-NeXT, LLaVA-OneVision, Idefics3 and SmolVLM in the Hugging Face format.

The rules speak the names that files of the hub have. Three more dialects of LLaVA are renamed to
them: the original repository's (model.mm_projector ...), the one in transformers' memory since
4.52, and what transformers 5 writes for a model made from a config (no "vision_model."). Layers of
the encoder behind the feature layer and its last norm are read and written although nothing uses
them: what was loaded can be handed back whole.

The original repository's config (mm_vision_tower ...) is read, too. It names its encoder instead of
describing it, and its weights often lie in that other checkpoint: then they are reported missing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.build import lookup
from flax_vlm.convert import clip, siglip
from flax_vlm.convert.family import (
    POSITION_IDS,
    Config,
    Family,
    check_value,
    fill,
    read_activation,
    write_activation,
)
from flax_vlm.convert.language_model import DEFAULTS, IGNORED, decoder_rules
from flax_vlm.convert.language_model import read_fields as read_text
from flax_vlm.convert.language_model import write_fields as write_text
from flax_vlm.convert.layers import conv, dense
from flax_vlm.convert.rules import Ignored, Rule, Shape, rule
from flax_vlm.models.clip import IMAGE_DEFAULTS
from flax_vlm.models.llava import Llava
from flax_vlm.nn.connectors import MlpConnector

RENAMES = (
    # the original repository
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.mm_projector\.(weight|bias)$", r"multi_modal_projector.linear_1.\1"),
    (r"^model\.(layers|embed_tokens|norm)\.", r"language_model.model.\1."),
    # in memory since transformers 4.52
    (r"^model\.(vision_tower|multi_modal_projector|language_model|image_newline)", r"\1"),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    # written by transformers 5 for a model that was made from a config
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
# what mm_vision_tower names. Source: the config.json of these repositories
_L14 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
VISION_TOWERS = {
    "openai/clip-vit-large-patch14": dict(**_L14, patch_size=14, image_size=224),
    "openai/clip-vit-large-patch14-336": dict(**_L14, patch_size=14, image_size=336),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tells the model types apart that share LLaVA's shape.

    Attributes:
        architecture: the class in transformers.
        vision: defaults of the vision_config, "model_type" among them; of its class where it is
            another one.
        text: model_type of the text_config if it names none.
        feature_layer: default of vision_feature_layer.
        strategy: default of vision_feature_select_strategy.
        image_token: default of image_token_index.
        newline: there is the tensor image_newline.
    """

    architecture: str
    vision: Mapping[str, Any]
    text: str = "llama"
    feature_layer: int = -2
    strategy: str = "default"
    image_token: int = 32000
    newline: bool = False


# Source: transformers 5.24, the Config class of each model_type
_CLIP = dict(model_type="clip_vision_model", patch_size=14, image_size=336, **_L14)
_SIGLIP = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    intermediate_size=4304,
    patch_size=14,
    image_size=384,
    num_hidden_layers=26,
    num_attention_heads=16,
    vision_use_head=False,
)
KINDS = {
    "llava": Kind("LlavaForConditionalGeneration", _CLIP),
    "llava_next": Kind("LlavaNextForConditionalGeneration", _CLIP, newline=True),
    "llava_onevision": Kind(
        "LlavaOnevisionForConditionalGeneration",
        _SIGLIP,
        text="qwen2",
        feature_layer=-1,
        strategy="full",
        image_token=151646,
        newline=True,
    ),
}


def _read_clip(c: Config) -> dict[str, Any]:
    return {**IMAGE_DEFAULTS, **clip.vision_fields(fill(c, clip.VISION_DEFAULTS))}


def _read_siglip(c: Config) -> dict[str, Any]:
    pool = "map" if c.get("vision_use_head", True) else "gap"
    return {**siglip.vision_fields(fill(c, siglip.VISION_DEFAULTS)), "pool": pool}


# model_type of a vision_config: its reader
VISION: dict[str, Callable[[Config], dict[str, Any]]] = {
    "clip_vision_model": _read_clip,
    "siglip_vision_model": _read_siglip,
}


def read_decoder(config: Config, default: str, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the fields of the language model of a composite config.

    Args:
        config: with "text_config".
        default: its model_type if it names none.
        tensors: of the file. Versions of transformers differ in which of the two configs ties the
            output to the embedding; a file with an output of its own has the last word.

    Raises:
        ValueError: if there is no such language model here.
    """
    text = config.get("text_config") or {}
    model_type = text.get("model_type", default)
    lookup(DEFAULTS, model_type, "model_type of the text_config")
    fields = read_text(model_type, text)
    has_head = any(name.endswith("lm_head.weight") for name in tensors)
    tied = bool(config.get("tie_word_embeddings", False)) or (fields["tied"] and not has_head)
    return {**fields, "tied": tied}


def read(model_type: str, config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    if "mm_vision_tower" in config:
        config = from_original(config)
    kind = KINDS[model_type]
    given = config.get("vision_config") or {}
    same_class = given.get("model_type", kind.vision["model_type"]) == kind.vision["model_type"]
    # a vision_config that names no class is completed by the model's own defaults
    vision = {**kind.vision, **given} if same_class and "model_type" not in given else given
    check_value(vision, "num_channels", 3)
    check_value(config, "multimodal_projector_bias", True)
    image = lookup(VISION, vision["model_type"], "model_type of the vision_config")(vision)
    keep_prefix = _keeps_prefix(config.get("vision_feature_select_strategy", kind.strategy), image)
    keys = ("image_token_index", "image_token_id")
    return dict(
        name="llava",
        image=image,
        connector=_connector(config),
        language_model=read_decoder(config, kind.text, tensors),
        image_token_id=next((config[k] for k in keys if k in config), kind.image_token),
        feature_layer=_layer(config.get("vision_feature_layer", kind.feature_layer), image),
        keep_prefix=keep_prefix,
        newline=kind.newline,
    )


def _keeps_prefix(strategy: str, image: Mapping[str, Any]) -> bool:
    has_class = image.get("class_token", image.get("pool", "cls") == "cls")
    if strategy not in ("default", "full"):
        raise ValueError(f'vision_feature_select_strategy is "default" or "full", got {strategy!r}')
    if strategy == "default" and not has_class:
        raise ValueError(
            'vision_feature_select_strategy "default" leaves the class token out, and this encoder '
            'has none: the first patch would be lost; set "full"'
        )
    return strategy == "full" and has_class


def _connector(config: Config) -> dict[str, Any]:
    if config.get("projector_is_linear", False):
        return dict(name="linear")
    activation = read_activation(config.get("projector_hidden_act", "gelu"))
    return dict(name="mlp", activation=activation)


def _layer(layer: Any, image: Mapping[str, Any]) -> int:
    """Returns how many blocks are run for transformers' hidden_states[layer]."""
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one number here, got {layer!r}")
    count = layer if layer >= 0 else image["depth"] + 1 + layer
    if not 0 <= count <= image["depth"]:
        raise ValueError(
            f"vision_feature_layer must be one of {image['depth']} layers, got {layer}"
        )
    return count


def from_original(config: Config) -> dict[str, Any]:
    """Returns the config of LLaVA's own repository as transformers writes it.

    Raises:
        ValueError: for an encoder or projector that is not known here.
    """
    projectors = {"linear": True, "mlp2x_gelu": False}
    tower = lookup(VISION_TOWERS, config["mm_vision_tower"], "mm_vision_tower")
    projector = config.get("mm_projector_type", "linear")
    strategies = {"patch": "default", "cls_patch": "full"}
    select = config.get("mm_vision_select_feature", "patch")
    return dict(
        vision_config={"model_type": "clip_vision_model", **tower},
        text_config={**config, "model_type": "llama"},
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=lookup(strategies, select, "mm_vision_select_feature"),
        projector_is_linear=lookup(projectors, projector, "mm_projector_type"),
        # it has no row of the vocabulary: any id that no text has will do
        image_token_index=config.get("vocab_size", 32000),
    )


def write(model_type: str, model: nn.Module) -> dict[str, Any]:
    """Returns config.json.

    Raises:
        ValueError: for what transformers has not: another connector than a projector of two layers,
            fewer visual tokens, features behind the encoder's final norm.
    """
    kind, decoder = KINDS[model_type], model.language_model
    depth = model.image.depth
    if not isinstance(model.connector, MlpConnector):
        raise ValueError(f"the connector must be mlp, got {type(model.connector).__name__}")
    if model.compression is not None:
        found = type(model.compression).__name__
        raise ValueError(f"every patch must be a visual token, got the compression {found}")
    if model.feature_layer is None:
        raise ValueError(
            f"features must be taken in front of the encoder's final norm, got feature_layer None, "
            f"which takes them behind it; train with feature_layer={depth}"
        )
    text = {**write_text(kind_of_text(decoder), decoder), "model_type": kind_of_text(decoder)}
    full = model.keep_prefix or not model.image.class_token
    return dict(
        architectures=[kind.architecture],
        vision_config=write_vision(model.image),
        text_config=text,
        image_token_index=model.image_token_id,
        image_seq_length=model.tokens_per_image,
        projector_hidden_act=write_activation(model.connector.activation),
        vision_feature_layer=model.feature_layer - depth - 1,
        vision_feature_select_strategy="full" if full else "default",
        tie_word_embeddings=decoder.tied,
    )


def write_vision(tower: nn.Module) -> dict[str, Any]:
    """Returns the vision_config of a tower of CLIP or SigLIP."""
    config = clip.vision_config(tower)
    if tower.class_token:
        return {**config, "model_type": "clip_vision_model"}
    has_head = tower.pooling == "map"
    return {**config, "model_type": "siglip_vision_model", "vision_use_head": has_head}


def kind_of_text(decoder: nn.Module) -> str:
    """Returns the model_type whose class has a decoder's fields."""
    if decoder.norm_plus_one:
        return "gemma2" if decoder.post_norms else "gemma"
    if decoder.qk_norm:
        return "qwen3"
    if decoder.qkv_bias and not decoder.o_bias:
        return "qwen2"
    return "mistral" if decoder.window is not None else "llama"


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of LLaVA and its kin."""
    tensor = "vision_tower.vision_model"
    if model.image.class_token:
        tower = clip.vision_rules(tensor)
    else:
        patches = conv(f"{tensor}.embeddings.patch_embedding", "image/patches")
        tower = [*patches, *siglip.vision_rules(tensor)]
    return [
        *tower,
        *dense("multi_modal_projector.linear_1", "connector/fc1"),
        *dense("multi_modal_projector.linear_2", "connector/fc2"),
        rule("image_newline", "newline"),
        *decoder_rules(
            model.language_model, "language_model.model.", "language_model.", "language_model/"
        ),
    ]


TIED = Ignored(
    "language_model.lm_head.weight",
    "the output is tied to the embedding",
    same_as="language_model.model.embed_tokens.weight",
)

FAMILIES: dict[str, Family] = {
    model_type: Family(
        (Llava,),
        functools.partial(read, model_type),
        functools.partial(write, model_type),
        rules,
        renames=RENAMES,
        ignored=(POSITION_IDS, IGNORED[0], TIED),
    )
    for model_type in KINDS
}
