# SPDX-License-Identifier: Apache-2.0
"""Published point sets that have no licence and are not in the repository.

They lie in shared/data/scaling beside the repository, or where FLAX_VLM_SHARED points.
"""

import os
import pathlib

import numpy as np
import pytest

from flax_vlm.scaling.tables import read_columns

ROOT = pathlib.Path(__file__).parents[2]
SHARED = pathlib.Path(os.environ.get("FLAX_VLM_SHARED", ROOT.parent / "shared"))

# labels of Nezhurina et al. are rounded
SAMPLES = {
    "1.28M": 1.28e6, "3M": 3.07e6, "6.4M": 6.4e6, "12.8M": 1.28e7, "30M": 3.07e7, "64M": 6.4e7,
    "128M": 1.28e8, "300M": 3.07e8, "640M": 6.4e8, "1.28B": 1.28e9, "3B": 3.07e9,
}  # fmt: skip


def points(name):
    """Returns the columns of a CSV; skips the test where the file is absent."""
    path = SHARED / "data" / "scaling" / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"no {path}: set FLAX_VLM_SHARED to the folder that holds data/scaling")
    return read_columns(path)


def grid(name, family):
    """Returns (GFLOP, error) of a grid of Nezhurina et al., one point per cell that was run."""
    table = points(name)
    rows = table["family"] == family
    cells = [
        (gflop * samples, 1 - accuracy)
        for label, samples in SAMPLES.items()
        for gflop, accuracy in zip(
            table["gflops_per_sample"][rows], table[label][rows], strict=True
        )
        if np.isfinite(accuracy)
    ]
    return np.array(cells).T
