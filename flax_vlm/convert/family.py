# SPDX-License-Identifier: Apache-2.0
"""What a family of checkpoints is: how its config.json and its tensor names map to our models."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from flax_vlm.build import lookup
from flax_vlm.convert.rules import Ignored, Rule, Shape
from flax_vlm.convert.safetensors_files import StoredTensor, list_tensors
from flax_vlm.nn.patches import as_pair

Config = Mapping[str, Any]

# Hugging Face's names of activations: ours.
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the same function, written differently
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
_HF_NAMES = {ours: name for name, ours in reversed(ACTIVATIONS.items())}

# Buffers that transformers 4.30 and older wrote among the parameters.
POSITION_IDS = Ignored(
    r"(.*\.)?embeddings\.position_ids", "a buffer of old files: 0, 1, 2, ..., always the same"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
        models: classes of the models whose parameters the format holds.
        read: (config.json, {tensor name: shape}) -> config of a model of MODELS. Names tell what
            the config does not, such as whether there is a head.
        write: model -> config.json without "model_type" and "dtype", or what comes nearest to it.
        rules: model -> the rules of its tensors.
        renames: (regular expression, replacement) pairs that turn other names of the same tensors
            into those of the rules.
        ignored: tensors that files may hold besides.
        config_file: name of the file that `read` is given.
        weights_file: name of the weights where they are one file.
        resize: how positions are resampled to another grid, a key of positions.RESIZE_METHODS.
        tensors: folder or file -> {tensor name: where it lies}.
    """

    models: tuple[type[nn.Module], ...]
    read: Callable[[Config, Mapping[str, Shape]], dict[str, Any]]
    write: Callable[[nn.Module], dict[str, Any]]
    rules: Callable[[nn.Module], list[Rule]]
    renames: Sequence[tuple[str, str]] = ()
    ignored: Sequence[Ignored] = (POSITION_IDS,)
    config_file: str = "config.json"
    weights_file: str = "model.safetensors"
    resize: str = "bicubic_torch"
    tensors: Callable[[pathlib.Path], dict[str, StoredTensor]] = list_tensors


def fill(config: Config | None, defaults: Config) -> dict[str, Any]:
    """Returns the defaults, replaced by what the config says; its other keys are left out.

    Config files of composite models hold only what differs from the defaults of their class.

    Raises:
        ValueError: if a value is not of the kind of its default.
    """
    if not isinstance(config, Mapping | None):
        raise ValueError(f"a part of a config must be a JSON object, got {config!r}")
    given = config or {}
    filled = {key: given.get(key, default) for key, default in defaults.items()}
    for key, value in filled.items():
        check_kind(key, value, defaults[key])
    return filled


MAY_BE_ZERO = ("eos_token_id", "num_register_tokens", "num_classes")
# null turns these off
MAY_BE_NULL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
MAY_BE_PAIRS = ("image_size", "patch_size", "img_size")


def check_kind(key: str, value: Any, default: Any) -> None:
    """Raises ValueError if a value of a config is not of the kind of its default.

    Numbers must be positive; where the default is None, a positive int or nothing is meant.
    """
    if value is None and key in MAY_BE_NULL:
        return
    if isinstance(default, bool | str):
        fits, kind = type(value) is type(default), type(default).__name__
    elif isinstance(default, float):
        fits, kind = type(value) in (int, float) and value > 0, "positive number"
    else:
        sizes = value if isinstance(value, list | tuple) and key in MAY_BE_PAIRS else [value]
        least = 0 if key in MAY_BE_ZERO else 1
        fits = len(sizes) in (1, 2) and all(type(size) is int and size >= least for size in sizes)
        fits, kind = fits or (value is None and default is None), f"int >= {least}"
    if not fits:
        raise ValueError(f"{key} of the config must be of the kind {kind}, got {value!r}")


def read_activation(name: str) -> str:
    """Returns our name of an activation of a config.json.

    Raises:
        ValueError: if it is unknown; lists those that are known.
    """
    return lookup(ACTIVATIONS, name, "activation (hidden_act of config.json)")


def write_activation(name: str) -> str:
    """Returns the name that a config.json has for one of our activations."""
    return lookup(_HF_NAMES, name, "activation of a config.json")


def read_size(size: Any) -> int | tuple[int, int]:
    """Returns a number for a square, else (height, width)."""
    pair = as_pair(size)
    return pair[0] if pair[0] == pair[1] else pair


def write_size(size: Any) -> int | list[int]:
    """Returns a number for a square, else [height, width], as JSON has it."""
    value = read_size(size)
    return value if isinstance(value, int) else list(value)


def drops_remainder(image_size: Any, patch_size: Any) -> bool:
    """Returns whether the patches leave a border: convolutions there are silent about it."""
    return any(i % p for i, p in zip(as_pair(image_size), as_pair(patch_size), strict=True))


def check_value(config: Config | None, key: str, allowed: Any) -> None:
    """Raises ValueError if a key of config.json has a value that no field here stands for."""
    value = (config or {}).get(key, allowed)
    if value != allowed:
        raise ValueError(f"{key} of config.json must be {allowed!r} here, got {value!r}")
