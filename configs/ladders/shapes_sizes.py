# SPDX-License-Identifier: Apache-2.0
"""The shapes recipe in other sizes: what the small ladders turn."""

from __future__ import annotations

from typing import Any


def sized(width: int, steps: int) -> dict[str, Any]:
    """Returns the changes for two towers of depth 3 and that width, evaluated at the end alone."""
    sizes = {"width": width, "depth": 3, "mlp_dim": 4 * width}
    return {
        **{f"model.{t}.{key}": value for t in ("image", "text") for key, value in sizes.items()},
        "model.embed_dim": width,
        "steps": steps,
        "checkpoint.every": steps,
        "evals.retrieval.every": 0,
        "evals.swapped.every": 0,
    }
