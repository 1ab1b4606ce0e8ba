# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder as the config of a run: which model it is, how it wants images and texts.

From here on a folder of transformers and a workdir of train.py are the same thing: nodes `model`,
`objective`, `data` and `evals` of a config. `flax_vlm.load` builds a model from them, and a recipe
that fine-tunes a checkpoint starts from them (configs/siglip_finetune.py).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flax_vlm.build import build
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.family import drops_remainder
from flax_vlm.convert.loading import read_config, read_spec
from flax_vlm.data.anyres import AnyRes
from flax_vlm.data.hf_images import FILE as IMAGE_FILE
from flax_vlm.data.hf_images import ImageRecipe, image_recipe, load_image_recipe
from flax_vlm.data.hf_tokenizers import TextRecipe, load_chat_tokenizer, load_tokenizer
from flax_vlm.data.jinja_templates import load_template
from flax_vlm.data.naflex import NaflexRecipe
from flax_vlm.data.tile_rows import TileRows
from flax_vlm.hub.answering import stop_ids
from flax_vlm.hub.processor import Processor
from flax_vlm.models import MODELS
from flax_vlm.models.naflex import NaFlexVisionTransformer
from flax_vlm.nn.patches import as_pair
from flax_vlm.snapshots import find_folder

# model.name: the objective it was published with
OBJECTIVES: dict[str, dict[str, Any]] = {
    "siglip": {"name": "contrastive", "pair_loss": {"name": "sigmoid"}},
    "clip": {"name": "contrastive", "pair_loss": {"name": "softmax"}},
    "llava": {"name": "next_token"},
    "language_model": {"name": "next_token"},
}
# model_type of the language model: how conversations are written where a folder has no template
CHATS = {
    "llama": "vicuna_v1",
    "mistral": "llama2",
    "qwen2": "chatml",
    "qwen3": "chatml",
    "gemma": "gemma",
    "gemma2": "gemma",
}
ENCODER = {"name": "encoder"}  # objectives/encoder.py: predictions without a loss
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
_IMAGE_FILES = (IMAGE_FILE, "processor_config.json")


def checkpoint_config(source: str | os.PathLike) -> dict[str, Any]:
    """Returns the nodes `model`, `objective`, `data` and `evals` of a checkpoint folder.

    Args:
        source: a folder in the Hugging Face format or a hub id.

    Raises:
        ValueError: if the folder is none of a supported family.
    """
    folder = find_folder(source)
    _, spec = read_spec(folder)
    processor = load_processor(folder, spec)
    recipe, text = processor.image_recipe, processor.text_recipe
    objective = {"name": "classification"} if "num_classes" in spec else ENCODER
    objective = OBJECTIVES.get(spec["name"], objective)
    data: dict[str, Any] = {}
    if isinstance(recipe, ImageRecipe):
        data = {"image_size": recipe.image_size, "eval_ops": recipe.ops}
    if text is not None:
        data["text"] = {"tokenizer": "pretrained", "path": str(source), "length": text.length}
    if objective["name"] == "next_token":
        data |= {"rows": "conversations", "chat": {"template": _chat_template(folder)}}
        if text is not None:
            data["text"]["tokenizer"] = "chat"
            ends = {"stop_ids": stop_ids(processor), "pad_id": text.tokenizer.pad_id}
            objective = {**objective, **ends}
    if recipe is not None:
        objective = {**objective, "image_mean": recipe.mean, "image_std": recipe.std}
    return {"model": spec, "objective": objective, "data": data, "evals": {}}


def _chat_template(folder: pathlib.Path) -> str:
    """Returns "checkpoint" where a folder has a template of its own, else see CHATS."""
    if load_template(folder) is not None:
        return "checkpoint"
    model_type, config = read_config(folder)
    text = config.get("text_config") or {}
    return CHATS[model_type if model_type in CHATS else text.get("model_type", "llama")]


def evaluation_config(recipe: Mapping[str, Any], source: str | os.PathLike) -> dict[str, Any]:
    """Returns a recipe with a checkpoint in the place of its model: what its evaluators then
    measure.

    Data and evaluators are the recipe's; model, tokenizer, mean, standard deviation and how images
    are prepared are the checkpoint's. NaFlex sees squares of its own size.

    Args:
        recipe: the config of a run.
        source: a folder in the Hugging Face format or a hub id.

    Raises:
        ValueError: if the checkpoint has neither a text tower nor classes.
    """
    found = checkpoint_config(source)
    if found["objective"]["name"] == ENCODER["name"]:
        raise ValueError(
            f"an evaluation needs a text tower or classes, {source} is an image encoder; train a "
            f"head on it (config.init_from), or use flax_vlm.load"
        )
    spec, data = found["model"], found["data"]
    tower = spec.get("image", spec)
    size = data.get("image_size", tower["image_size"])
    ops = data.get("eval_ops", ({"name": "resize", "size": size},))
    drop = drops_remainder(size, tower["patch_size"])
    sized = {**tower, "image_size": size, "drop_remainder": drop}
    text = {**recipe["data"]["text"], **data.get("text", {})}
    family = FAMILIES[read_spec(find_folder(source))[0]]
    return {
        **recipe,
        "model": {**spec, "image": sized} if "image" in spec else sized,
        "objective": found["objective"],
        "data": {**recipe["data"], "image_size": size, "eval_ops": ops, "text": text},
        "init_from": str(source),
        "init": {"resize_positions": family.resize},
        "optimizer": {"name": "sgd", "lr": 0.0},  # nothing is trained: no memory for its state
        "lora": {},
        "ema_decay": 0.0,
    }


def load_processor(folder: pathlib.Path, spec: dict[str, Any]) -> Processor:
    """Returns the processor of a checkpoint folder.

    Args:
        folder: in the Hugging Face format. Without files for images they are prepared as the
            family's class does, at the model's size.
        spec: config of its model.

    Raises:
        ValueError: if its files ask for what flax_vlm does not do.
    """
    text = None
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if "text" in spec and has_tokenizer:
        text = _fitted(load_tokenizer(folder), spec["text"]["length"])
    if spec["name"] in ("llava", "language_model") and has_tokenizer:
        text = load_chat_tokenizer(folder)
    recipe = None if spec["name"] == "language_model" else _image_recipe(folder, spec)
    return Processor(recipe, text)


def _fitted(text: TextRecipe, length: int) -> TextRecipe:
    return dataclasses.replace(text, length=min(text.length, length))


def _image_recipe(
    folder: pathlib.Path, spec: dict[str, Any]
) -> ImageRecipe | NaflexRecipe | AnyRes | TileRows:
    has_files = any((folder / name).is_file() for name in _IMAGE_FILES)
    model_type, config = read_config(folder)
    model = build(MODELS, spec, "model")
    tower = getattr(model, "image", model)
    size = as_pair(tower.image_size)
    if model_type in _OTHER_LIBRARIES and not has_files:
        given = _OTHER_LIBRARIES[model_type](config)
        return image_recipe({**given, "size": {"height": size[0], "width": size[1]}})
    found = load_image_recipe(folder)
    if isinstance(found, AnyRes | TileRows):
        found = found if has_files else found.at_size(size[0], config)
        return _fitted_layout(found, folder, model)
    if has_files:
        return found
    if isinstance(tower, NaFlexVisionTransformer):
        return dataclasses.replace(
            found,
            patch_size=as_pair(tower.patch_size)[0],
            max_num_patches=tower.grid[0] * tower.grid[1],
        )
    return _at_size(found, size)


def _fitted_layout(
    layout: AnyRes | TileRows, folder: pathlib.Path, model: Any
) -> AnyRes | TileRows:
    """Returns the layout with what the model's config says: its grid, and how much is shrunk."""
    size, config = as_pair(model.image.image_size), read_config(folder)[1]
    if model.token_grid is None or layout.image_size != size:
        raise ValueError(
            f"{folder} cuts images into tiles of {layout.image_size} pixels and needs a model that "
            f"sees just those, one visual token after the other, got {size}; change the size in "
            f"its {IMAGE_FILE}"
        )
    layout = dataclasses.replace(layout, grid=model.token_grid)
    ratio = config.get("vision_aspect_ratio", "anyres_max_9")
    if layout.processor != "LlavaOnevisionImageProcessor":
        return layout
    if not str(ratio).startswith("anyres_max_"):
        raise ValueError(f'vision_aspect_ratio must be "anyres_max_" and a number, got {ratio!r}')
    return dataclasses.replace(layout, max_tiles=int(ratio.removeprefix("anyres_max_")))


def _at_size(recipe: ImageRecipe, size: tuple[int, int]) -> ImageRecipe:
    """Returns the recipe with another final size: of the resize, or of the edge and the crop."""
    ops = []
    for op in recipe.ops:
        is_edge = op["name"] == "resize_small"
        ops.append({**op, "size": max(size) if is_edge else size})
    return dataclasses.replace(recipe, ops=tuple(ops), image_size=size)


def _from_timm(config: dict[str, Any]) -> dict[str, Any]:
    given = config.get("pretrained_cfg", {})
    return _squared(given.get("mean"), given.get("std"))


def _from_open_clip(config: dict[str, Any]) -> dict[str, Any]:
    given = config.get("preprocess_cfg", {})
    return _squared(given.get("mean"), given.get("std"))


def _squared(mean: Any, std: Any) -> dict[str, Any]:
    """Returns keys of a preprocessor_config.json; without mean and std they are CLIP's."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": False,
        "image_mean": mean,
        "image_std": std,
    }


# model_type of folders of other libraries, which have the mean and the std in their config
_OTHER_LIBRARIES = {"timm": _from_timm, "open_clip": _from_open_clip}
