# SPDX-License-Identifier: Apache-2.0
"""Turns {"name": ..., **kwargs} into an object by looking the name up in a plain table."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """Returns table[name].

    Raises:
        ValueError: if the name is unknown; the message lists the choices and the nearest one.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}, choose one of {sorted(table)}{hint}")


def build(
    table: Mapping[str, Callable[..., Any]], spec: Mapping[str, Any], what: str, **given: Any
) -> Any:
    """Returns table[spec["name"]](**rest of spec, **given).

    Args:
        table: names to classes or functions with keyword arguments.
        spec: a config node with a key "name"; its other keys are arguments.
        what: what the table holds ("model", "objective" ...), for messages.
        **given: arguments that the caller supplies rather than the config.

    Raises:
        ValueError: if there is no name, the name is unknown, a key is not an argument (lists the
            choices), or an argument without a default is missing.
    """
    arguments = dict(spec)
    if "name" not in arguments:
        raise ValueError(
            f"{what} needs a key 'name', got {sorted(arguments)}; choose one of {sorted(table)}"
        )
    name = arguments.pop("name")
    constructor = lookup(table, name, what)
    parameters = inspect.signature(constructor).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    allowed = [n for n in parameters if n not in given and n not in ("parent", "name")]
    unknown = [key for key in arguments if key not in allowed]
    if unknown and not takes_any:
        raise ValueError(
            f"unknown key {unknown} for {what} {name!r}, its keys are {sorted(allowed)}"
        )
    wanted = [n for n, p in parameters.items() if p.default is p.empty and p.kind in _NAMED]
    missing = [n for n in wanted if n not in arguments and n not in given]
    if missing:
        raise ValueError(f"missing key {missing} for {what} {name!r}, it has no default")
    return constructor(**arguments, **given)
