# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings in config.json: rope_theta with rope_scaling, or rope_parameters.

Names of the kind are "rope_type", in the oldest files "type". Source: transformers 5.24,
modeling_rope_utils.py, and 4.46.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax_vlm.build import lookup
from flax_vlm.convert.family import Config, check_value
from flax_vlm.nn.rope_scaling import ROPE_SCALINGS, RopeScaling

THETA = 10_000.0
# kind in config.json: (our name, {our field: key})
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("none", {}),
    "linear": ("linear", {"factor": "factor"}),
    "dynamic": ("dynamic", {"factor": "factor"}),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "context": "original_max_position_embeddings",
        },
    ),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            "context": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "truncate": "truncate",
            "attention_factor": "attention_factor",
        },
    ),
}


def read_rope(config: Config, length: int) -> dict[str, Any]:
    """Returns the fields rope_theta and rope_scaling of a LanguageModel.

    Args:
        config: config.json.
        length: its max_position_embeddings, which stands for a context that is not named.

    Raises:
        ValueError: for a kind that is not here, or one per kind of layer.
    """
    given = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(
            f"rotary embeddings that differ between layers are not supported, got {given}"
        )
    check_value({**config, **given}, "partial_rotary_factor", 1.0)
    theta = given.get("rope_theta", config.get("rope_theta", THETA))
    kind = given.get("rope_type", given.get("type", "default"))
    name, keys = lookup(KINDS, kind, "rope_type of config.json")
    scaling = {"name": name}
    scaling |= {ours: given[key] for ours, key in keys.items() if given.get(key) is not None}
    if name == "dynamic":
        scaling["context"] = length
    elif "context" in keys:
        scaling.setdefault("context", config.get("original_max_position_embeddings") or length)
    if name == "yarn":
        scaling.setdefault("factor", length / scaling["context"])
        scaling.setdefault("attention_factor", _yarn_attention_factor(scaling["factor"], given))
    return dict(rope_theta=float(theta), rope_scaling=scaling)


def _yarn_attention_factor(factor: float, given: Config) -> float:
    def at(slope: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0

    numerator, denominator = given.get("mscale"), given.get("mscale_all_dim")
    if numerator and denominator:
        return at(numerator) / at(denominator)
    return at(1.0)


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """Returns the keys of config.json, for transformers 4 and 5."""
    (name,) = (name for name, kind in ROPE_SCALINGS.items() if kind is type(scaling))
    (kind,) = (kind for kind, (ours, _) in KINDS.items() if ours == name)
    fields = {f.name: getattr(scaling, f.name) for f in dataclasses.fields(scaling)}
    keys = KINDS[kind][1]
    given = {"rope_type": kind, **{key: fields[ours] for ours, key in keys.items()}}
    return dict(
        rope_theta=theta,
        rope_scaling=None if name == "none" else given,
        rope_parameters={**given, "rope_theta": theta},
    )
