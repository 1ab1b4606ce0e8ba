# SPDX-License-Identifier: Apache-2.0
"""On what a rung of a published ladder runs: a v5e slice, or nodes of 8 GPUs."""

from __future__ import annotations

from typing import Any

# chips of a v5e slice: its sides
SLICES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def slice_for(batch: int, per_chip: int) -> dict[str, Any]:
    """Returns the smallest slice that holds a batch, or the largest there is.

    For Slurm, a node of 8 GPUs of 80 GB stands for 32 of its chips of 16 GB.

    Args:
        batch: examples in a step.
        per_chip: of them on one chip.
    """
    chips = next((n for n in SLICES if batch <= per_chip * n), max(SLICES))
    return {
        "topology": f"v5e:{SLICES[chips]}",
        "accelerator": f"v5litepod-{chips}",
        "nodes": max(1, chips // 32),
    }
