# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a checkpoint folder in the Hugging Face format, as far as data needs them."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def read_json(folder: str | os.PathLike, name: str) -> dict[str, Any]:
    """Returns the object in folder/name; {} if there is no such file.

    Raises:
        ValueError: if the file holds no JSON object.
    """
    path = pathlib.Path(folder) / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} must hold a JSON object, but it cannot be read: {error}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(found).__name__}")
    return found


def model_type(folder: str | os.PathLike) -> str | None:
    """Returns the family that config.json names, "clip" of "clip_vision_model", or None."""
    name = read_json(folder, "config.json").get("model_type")
    return None if name is None else name.removesuffix("_vision_model").removesuffix("_text_model")
