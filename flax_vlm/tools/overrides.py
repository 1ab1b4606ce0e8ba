# SPDX-License-Identifier: Apache-2.0
"""Changes to a config by dotted path: `objective.pair_loss.form=dense,model.text.unroll=12`."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

from flax_vlm.losses.contrastive_form import FORMS

# Nodes that hold the arguments of something by name: a key that is not there yet may be added, and
# what is built from the node refuses an unknown one. Everywhere else the config has every key.
OPEN_NODES = ("model", "objective", "optimizer")

# A word that stands for a change.
SHORT = {form: f"objective.pair_loss.form={form}" for form in FORMS}

_NEXT_CHANGE = re.compile(r",(?=[\w.]+=)")


def parse_changes(text: str) -> dict[str, Any]:
    """Returns {dotted path: value} of "a.b=1,c.d=dense", or of a key of SHORT.

    Values are JSON where they parse as JSON, else strings.

    Raises:
        ValueError: if there is no "=".
    """
    changes = {}
    for part in _NEXT_CHANGE.split(SHORT.get(text, text)):
        path, separator, value = part.partition("=")
        if not separator:
            raise ValueError(
                f"a change is PATH=VALUE, like model.text.unroll=12, or one of {sorted(SHORT)}, "
                f"got {part!r}"
            )
        try:
            changes[path] = json.loads(value)
        except json.JSONDecodeError:
            changes[path] = value
    return changes


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a config of plain dicts with some values changed.

    Args:
        config: nested dicts of JSON values.
        changes: {dotted path: value}.

    Raises:
        ValueError: for a key that the config lacks (lists the keys), or a value of another type. A
            new key inside OPEN_NODES is left to Program.from_config to judge.
    """
    changed = copy.deepcopy(dict(config))
    for path, value in changes.items():
        *parents, key = path.split(".")
        is_open = bool(parents) and parents[0] in OPEN_NODES
        node, walked = changed, "config"
        for parent in parents:
            _check_key(node, walked, parent, is_open and node is not changed)
            node, walked = node.setdefault(parent, {}), f"{walked}.{parent}"
            if not isinstance(node, dict):
                raise ValueError(f"{walked} is a value, not a node: it has no key {key!r}")
        _check_key(node, walked, key, is_open)
        _check_type(node, f"{walked}.{key}", key, value)
        node[key] = value
    return changed


def _check_key(node: Mapping[str, Any], walked: str, key: str, is_open: bool) -> None:
    if key not in node and not is_open:
        raise ValueError(f"unknown key {key!r}, {walked} has {sorted(node)}")


def _check_type(node: Mapping[str, Any], path: str, key: str, value: Any) -> None:
    before = node.get(key)
    fits = type(value) is type(before) or (type(before), type(value)) == (float, int)
    if before is not None and not fits:
        raise ValueError(
            f"{path} must stay of type {type(before).__name__}, like {before!r}, got {value!r}"
        )
