# SPDX-License-Identifier: Apache-2.0
"""Which attention implementation each layer of a compiled program took, by reading its text.

nn.attention labels what it computes with the name of the implementation, flax labels it with the
names of the modules, and XLA keeps both in `op_name`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax_vlm import trees
from flax_vlm.nn.attention import IMPLEMENTATIONS, SCOPE


def attention_of(program_text: str, params: Mapping[str, Any]) -> dict[str, str]:
    """Returns {attention layer: implementation}, as the labels in a compiled program say.

    "not seen" where no operation of a layer kept its label.

    Args:
        program_text: `compiled.as_text()`; nn.attention labels its operations.
        params: whose paths name the layers; scanned ones share a path.
    """
    label = re.compile(rf"(?:^|/){SCOPE}({'|'.join(IMPLEMENTATIONS)})(?:/|$)")
    seen: dict[str, set[str]] = {
        path.removesuffix("/q/kernel"): set()
        for path in trees.named_leaves(params)
        if path.endswith("/q/kernel")
    }
    for names in set(re.findall(r'op_name="([^"]*)"', program_text)):
        for name in names.split(";"):
            match = label.search(name)
            if match:
                above = name[: match.start()].split("/")
                for layer in (layer for layer in seen if _is_inside(above, layer)):
                    seen[layer].add(match.group(1))
    return {layer: " and ".join(sorted(found)) or "not seen" for layer, found in seen.items()}


def _is_inside(scopes: Sequence[str], layer: str) -> bool:
    """Returns whether the parts of a layer's path stand among the scopes, in this order."""
    rest = iter(scopes)
    return all(part in rest for part in layer.split("/"))
