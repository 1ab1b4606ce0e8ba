# SPDX-License-Identifier: Apache-2.0
"""The batch contract: every key that may be in a batch, its shape and its dtype.

Letters, one meaning each in the whole repository: B batch, F frames, H W C image, P patches (visual
tokens), Q latent queries, L text tokens, S joint sequence, D width, N heads, K width per head, M
MLP width, E shared embedding width, V vocabulary, Z codebook size. (I: images per example, in
`images` alone.)

Masks are True = keep. Images travel to the device as uint8 and are normalised there
(`normalize_image`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# key: (axes, "|" between forms; dtypes). What goes to the device.
KEYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "image": ("B H W C", ("uint8", "float32")),
    "images": ("B I H W C", ("uint8", "float32")),
    "video": ("B F H W C", ("uint8", "float32")),
    "patches": ("B P hwC", ("uint8", "float32")),  # packed images of any aspect ratio, NaFlex
    "spatial_shape": ("B 2", ("int32",)),  # their rows and columns of patches; the rest is padding
    "text": ("B L", ("int32",)),
    "text_mask": ("B L", ("bool",)),  # True = real token
    "loss_mask": ("B L", ("bool",)),  # True = supervised
    # which visual token a placeholder in `text` stands for, or which J, summed with weights
    "visual_index": ("B L | B L J", ("int32",)),
    "visual_weight": ("B L J", ("float32",)),
    "segments": ("B L", ("int32",)),  # number of the text that a token belongs to, where packed
    "positions": ("B L", ("int32",)),  # of the tokens in their own texts, where packed
    "text_id": ("B", ("int32",)),  # equal for equal captions: such pairs must not be pushed apart
    "label": ("B", ("int32",)),
    "example_mask": ("B", ("bool",)),  # False = padding row, or an example that could not be read
}

# key: dtype. Per-example accounts that the data pipeline counts and removes before the device sees
# the batch.
HOST_KEYS: dict[str, str] = {
    "broken": "int8",  # index into data.images.REASONS, 0 = read without error
    "text_truncated": "bool",  # the caption was longer than the context
}


def check_batch(batch: Mapping[str, Any]) -> int:
    """Returns B, having checked every key, shape and dtype of a batch.

    Raises:
        ValueError: naming the key, what was found and what the contract asks for.
    """
    sizes: dict[str, int] = {}
    for key, array in batch.items():
        if key not in KEYS:
            raise ValueError(
                f"unknown batch key {key!r}, the contract (flax_vlm/batch.py) has {sorted(KEYS)}"
            )
        axes, dtypes = KEYS[key]
        forms = [form.split() for form in axes.split("|")]
        names = next((form for form in forms if len(form) == len(array.shape)), forms[0])
        fits = len(names) == len(array.shape) and str(array.dtype) in dtypes
        fits = fits and all(
            sizes.setdefault(n, s) == s for n, s in zip(names, array.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"batch[{key!r}] must be [{axes}] {' or '.join(dtypes)} with sizes {sizes}, "
                f"got {tuple(array.shape)} {array.dtype}"
            )
    if "B" not in sizes:
        raise ValueError("a batch must hold at least one key, got none")
    return sizes["B"]


def split_micro_batches(batch: Any, count: int) -> Any:
    """Returns the batch cut into micro-batches: arrays [B, ...] become [count, B / count, ...].

    Micro-batch k holds the rows k, k + count, k + 2 count ... Each then spans all devices, and no
    row moves from one to another, as long as count divides the rows of every device.

    Args:
        batch: tree of arrays [B, ...].
        count: number of micro-batches A.

    Raises:
        ValueError: if count does not divide B.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % count:
        raise ValueError(f"micro_batches must divide batch_size, got {count} and {size}")
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch
    )  # [A, B/A, ...]


def join_micro_batches(batch: Any) -> Any:
    """Returns arrays [count, B / count, ...] as [B, ...]: the inverse of `split_micro_batches`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), batch)


def normalize_image(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns the image as the model wants it: float32, (x / 255 - mean) / std.

    Args:
        image: [..., H, W, C] uint8 in 0..255; float32 is taken as normalised already and returned
            as it is.
        mean: per channel, in units of x / 255.
        std: per channel, in units of x / 255.
    """
    if image.dtype != jnp.uint8:
        return image
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    # one multiply and one add, folded on the host
    scale, shift = 1.0 / (255.0 * std), -mean / std
    lead = (1,) * (image.ndim - 1)  # ranks made equal: rank promotion is an error in the tests
    return image.astype(jnp.float32) * scale.reshape(*lead, -1) + shift.reshape(*lead, -1)
