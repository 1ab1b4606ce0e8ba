# SPDX-License-Identifier: Apache-2.0
"""What patches have in common, seen as colours: their first three principal components as RGB.

Amir et al. 2021, arXiv:2112.05814; the pictures of DINOv2 (Oquab et al. 2023, arXiv:2304.07193,
figure 1). Differs from DINOv2: the background is not removed by a threshold on the first component.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def patch_components(patches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the first three principal components of all patches of all images, as colours.

    Args:
        patches: one [rows, columns, D] per image, `LoadedModel.patch_tokens`.

    Returns:
        One [rows, columns, 3] float in 0..1 per image. The same colour means the same in all of
        them; every component is cut at its 1st and 99th percentile.

    Raises:
        ValueError: if there are fewer than three dimensions or patches.
    """
    rows = np.concatenate([p.reshape(-1, p.shape[-1]) for p in patches]).astype(np.float64)
    if min(rows.shape) < 3:
        raise ValueError(f"three components need three patches of width 3, got {rows.shape}")
    centred = rows - rows.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    values = centred @ directions[:3].T  # [n, 3]
    # the sign of a component is arbitrary: the longer tail is made bright
    values *= np.where(np.median(values, axis=0) <= 0, 1, -1)
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    values = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    ends = np.cumsum([p.shape[0] * p.shape[1] for p in patches])[:-1]
    parts = np.split(values, ends)
    return [x.reshape(*p.shape[:2], 3) for x, p in zip(parts, patches, strict=True)]


def draw_components(images: Sequence[np.ndarray], colors: Sequence[np.ndarray]) -> Figure:
    """Returns the images above their patches in colours.

    Args:
        images: [H, W, 3] uint8, as the model saw them.
        colors: of `patch_components`.
    """
    count = len(images)
    figure = Figure(figsize=(2.4 * count, 4.9), facecolor="white", layout="constrained")
    panels = figure.subplots(2, count, squeeze=False)
    for column, (image, color) in enumerate(zip(images, colors, strict=True)):
        height, width = image.shape[:2]
        large = Image.fromarray((255 * color).astype(np.uint8)).resize((width, height), 0)
        for panel, picture in zip(panels[:, column], (image, np.asarray(large)), strict=True):
            panel.imshow(picture)
            panel.set_axis_off()
    return figure
