# SPDX-License-Identifier: Apache-2.0
"""`flax_vlm.save_pretrained(vlm, folder)`: a folder that transformers loads.

config.json, safetensors, preprocessor_config.json, tokenizer files, what chat_files.py makes of a
model that speaks, and a model card. Nothing is written outside the folder, and a folder that holds
something else is refused. An earlier export, known by its model card, is replaced: every file is
written beside the old one and renamed onto it (never through a link), and what the new export does
not have is removed last.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flax_vlm.build import build
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.safetensors_writer import write_json, write_text
from flax_vlm.convert.saving import find_format
from flax_vlm.convert.saving import save_pretrained as save_weights
from flax_vlm.data.anyres import AnyRes
from flax_vlm.data.hf_images import FILE as IMAGE_FILE
from flax_vlm.data.hf_tokenizers import CONFIG, SPECIAL
from flax_vlm.data.hf_tokenizers import FILE as TOKENIZER_FILE
from flax_vlm.hub import chat_files
from flax_vlm.hub.loaded_model import LoadedModel
from flax_vlm.hub.model_card import CARD, is_export, model_card
from flax_vlm.models import MODELS

_TOKENIZER_FILES = (TOKENIZER_FILE, CONFIG, SPECIAL)
_FORMAT_FILES = {name for f in FAMILIES.values() for name in (f.config_file, f.weights_file)}


def save_pretrained(
    vlm: LoadedModel,
    folder: str | os.PathLike,
    *,
    model_type: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    license: str | None = None,
) -> str:
    """Writes a folder that transformers and `flax_vlm.load` load, and returns its model_type.

    Args:
        vlm: a loaded model; adapters are merged already.
        folder: is made if it is not there; must be empty or an earlier export.
        model_type: "siglip", "clip" ...; None keeps that of the checkpoint the model was loaded
            from, or finds the one that holds it.
        dtype: of the stored values.
        max_shard_bytes: larger checkpoints are cut into shards with an index.
        license: for the model card, an identifier of the hub; None keeps that of the checkpoint.

    Raises:
        ValueError: if the folder holds something else, no format holds the model, or transformers
            cannot do its image operations; nothing is written then.
    """
    folder = pathlib.Path(folder)
    check_target(folder)
    spec = vlm.config["model"].to_dict()
    model = build(MODELS, spec, "model")
    model_type, config = find_format(model, model_type or vlm.origin.model_type)
    recipe = vlm.processor.image_recipe
    images = None if recipe is None else recipe.to_config()
    files = chat_files.chat_files(vlm, model_type, config)
    folder.mkdir(parents=True, exist_ok=True)
    # first, so that an export that was interrupted is known as one
    write_text(folder / CARD, model_card(vlm, model_type, license))
    save_weights(
        folder,
        spec,
        vlm.params,
        model_type=model_type,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        extra_config=_labels(vlm) | _token_ids(vlm, config) | _tiles(vlm),
    )
    for name, text in files.items():
        write_text(folder / name, text)
    surplus = _FORMAT_FILES - {FAMILIES[model_type].config_file, FAMILIES[model_type].weights_file}
    surplus |= set(chat_files.NAMES) - set(files)
    if images is None:
        surplus |= {IMAGE_FILE}
    else:
        write_json(folder / IMAGE_FILE, images)
    if vlm.processor.text_recipe is None:
        surplus |= set(_TOKENIZER_FILES)
    else:
        vlm.processor.text_recipe.save(folder)
    for name in surplus:
        (folder / name).unlink(missing_ok=True)
    return model_type


def check_target(folder: pathlib.Path) -> None:
    """Raises ValueError if a folder holds something that is no earlier export."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"an export needs a folder, {folder} is a file")
    held = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    card = folder / CARD
    if not held or (card.is_file() and is_export(card.read_text("utf-8", "replace"))):
        return
    raise ValueError(
        f"an export needs an empty folder or an earlier export, {folder} holds {held[:5]}; choose "
        f"another one"
    )


def _labels(vlm: LoadedModel) -> dict[str, Any]:
    """Returns the keys of config.json for class names, where a checkpoint had them."""
    names = vlm.origin.class_names
    if names is None or "num_classes" not in vlm.config["model"]:
        return {}
    numbers = {str(i): name for i, name in enumerate(names)}
    return {"id2label": numbers, "label2id": {name: i for i, name in enumerate(names)}}


def _tiles(vlm: LoadedModel) -> dict[str, Any]:
    """Returns the keys of config.json for how pictures are cut into tiles."""
    recipe = vlm.processor.image_recipe
    return recipe.model_config() if isinstance(recipe, AnyRes) else {}


def _token_ids(vlm: LoadedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the text_config with the tokenizer's ids, where the format leaves them open.

    Nothing is computed from them, but transformers warns of those of its class, which a small
    vocabulary does not have. CLIP pools where its eos_token_id is: that one is the model's.
    """
    text, recipe = config.get("text_config"), vlm.processor.text_recipe
    if text is None or recipe is None:
        return {}
    inner = recipe.tokenizer
    ids = {"pad": inner.pad_id, "bos": inner.bos_id, "eos": inner.eos_id}
    return {"text_config": {**{f"{k}_token_id": i for k, i in ids.items()}, **text}}
