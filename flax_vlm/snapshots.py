# SPDX-License-Identifier: Apache-2.0
"""The local folder of a checkpoint: a folder that is here, or a snapshot of the Hugging Face hub.

From the hub come the weights as safetensors, JSON, vocabularies and the model card, and nothing
else: no pickle and no code is ever downloaded. huggingface_hub decides where they are kept
(HF_HOME, HF_HUB_CACHE) and whether it may go online (HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import os
import pathlib
import re

# The text files come first: they say which weights are wanted, where a repository has several.
TEXT_FILES = ["*.json", "*.txt", "*.model", "README.md"]
WEIGHT_FILES = ["model.safetensors", "model-*-of-*.safetensors"]
OPEN_CLIP_WEIGHTS = ["open_clip_model.safetensors"]
_SUBFOLDERS = ["*/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str | os.PathLike) -> bool:
    """Returns whether a name is "org/name", with or without "@revision", and no folder here."""
    name = str(source).partition("@")[0]
    return bool(_HUB_ID.fullmatch(name)) and not pathlib.Path(source).is_dir()


def find_folder(source: str | os.PathLike, revision: str | None = None) -> pathlib.Path:
    """Returns the folder of a checkpoint, downloaded if it is the hub's and not in the cache.

    Args:
        source: a folder, or a hub id "org/name", which may end in "@revision".
        revision: branch, tag or commit of the hub; None takes the newest of the main branch.

    Raises:
        ValueError: if it is neither; the hub cannot be reached and the cache does not have it; or
            its weights are no safetensors.
    """
    folder = pathlib.Path(source)
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise ValueError(
            f'a checkpoint is a folder or a hub id "org/name", {str(source)!r} is no folder here'
        )
    name, _, stated = str(source).partition("@")
    return _download(name, revision or stated or None)


def _download(name: str, revision: str | None) -> pathlib.Path:
    import huggingface_hub  # a second to import, and only needed here

    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=TEXT_FILES, ignore_patterns=_SUBFOLDERS
        )
        folder = pathlib.Path(found)
        weights = WEIGHT_FILES if (folder / "config.json").is_file() else OPEN_CLIP_WEIGHTS
        huggingface_hub.snapshot_download(
            name, revision=folder.name, allow_patterns=weights, ignore_patterns=_SUBFOLDERS
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no folder here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); connect, or give a folder, "
            f"or copy a filled cache here and set HF_HOME to it"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{name!r} has no safetensors at revision {revision or 'main'}; flax_vlm downloads no "
            f"pickles, because loading one can run any code. Many repositories have a converted "
            f"copy: look for a pull request of the safetensors bot and give its revision, "
            f'"{name}@refs/pr/1"'
        )
    return folder
