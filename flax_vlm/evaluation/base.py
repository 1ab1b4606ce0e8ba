# SPDX-License-Identifier: Apache-2.0
"""What every evaluator stands on: the Predictor, and one exact pass over a dataset.

    for batch in dataset.ordered(...):              a fixed size, padded with example_mask False
        rows = predictor("image_embedding", batch)  jitted once per name, for all parameters
    masked rows are dropped on the host, scores.* are pure numpy

Every process takes part in every call and ends with the same rows in the same order, so the batch
size, the number of devices and the number of processes change no metric.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_vlm import batch as contract
from flax_vlm.build import lookup

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset, Preprocess
    from flax_vlm.objectives.base import Extras, Params, PredictFn

IMAGE_KEYS = ("image", "images", "video", "patches", "spatial_shape")
# The batch keys that a prediction reads; a name that is not listed here gets all keys. It saves the
# transfer, and lets a batch of prompts and a batch of examples share one compiled text encoder.
INPUTS: dict[str, tuple[str, ...]] = {
    "image_embedding": IMAGE_KEYS,
    "image_tokens": IMAGE_KEYS,
    "attention": IMAGE_KEYS,
    "text_embedding": ("text", "text_mask"),
}

# Host columns that `predict_all` returns beside the predictions.
COLUMNS = ("label", "text_id")


class Evaluator(Protocol):
    """Something that is measured, inside training and alone by eval.py."""

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns the metrics and writes the pictures.

        Must be called by all processes; each of them returns the same numbers.

        Args:
            predictor: the predictions of an objective with the parameters to measure.
            folder: where to write pictures; None writes none. Give it to one process only.
        """


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Calls `predictor(name, batch)`: numpy rows in, numpy rows out, compiled once per name.

    Moves data to and from the devices explicitly, so that it runs under
    `jax.transfer_guard("disallow")`.

    Attributes:
        predictions: `objective.predictions`: name -> function of (params, extras, batch).
        params: parameters, as they are sharded.
        extras: what gradients do not train.
        batch_sharding: of the rows of a batch over a mesh; None leaves the placement to jax (one
            process).
        shard: (index, count) of the slice of every global batch that this process feeds:
            `training.sharding.data_shard(batch_sharding)`.
    """

    predictions: Mapping[str, PredictFn]
    params: Params
    extras: Extras
    batch_sharding: NamedSharding | None = None
    shard: tuple[int, int] = (0, 1)
    # shared by all copies that `with_params` makes, so that a second evaluation does not compile
    _programs: dict[str, Callable] = dataclasses.field(default_factory=dict, repr=False)
    _sizes: dict[Any, set[int]] = dataclasses.field(default_factory=dict, repr=False)

    def with_params(self, params: Params, extras: Extras) -> Predictor:
        """Returns the same predictor for other parameters; nothing is compiled again."""
        return dataclasses.replace(self, params=params, extras=extras)

    def __call__(self, name: str, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns one prediction for every row.

        The batch is padded to the smallest size that was compiled before and holds it, so only a
        larger batch compiles again; any number of rows works on any number of devices.

        Args:
            name: a key of `predictions`.
            batch: arrays [b, ...] of the batch contract, this process's slice of the global batch;
                the same b in every process. Other keys are ignored.

        Returns:
            [b * count, ...], the rows of the global batch: those of slice 0, then of slice 1 ...
            The same in every process; with one process simply the rows of `batch`.

        Raises:
            ValueError: if there is no such prediction, listing those that exist; if the batch has
                no rows.
        """
        function = lookup(self.predictions, name, "prediction")
        keys = INPUTS.get(name, contract.KEYS)
        return self._run(name, function, {key: batch[key] for key in keys if key in batch})

    def gather(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the rows of the global batch, in the order of `__call__`, of arrays [b, ...]."""
        if self.shard[1] == 1:
            return dict(batch)
        return {
            key: self._run("(gather)", lambda params, extras, b: b["rows"], {"rows": rows})
            for key, rows in batch.items()
        }

    def _run(self, name: str, function: PredictFn, batch: dict[str, np.ndarray]) -> np.ndarray:
        rows = len(next(iter(batch.values()), ()))
        if rows == 0:
            raise ValueError(f"prediction {name!r} needs a batch with rows, got {sorted(batch)}")
        size = self._size(name, batch, rows)
        padded = {key: _pad(np.asarray(array), size) for key, array in batch.items()}
        if name not in self._programs:
            self._programs[name] = jax.jit(function, out_shardings=self._replicated())
        result = self._programs[name](self.params, self.extras, self._put(padded))
        result = np.asarray(jax.device_get(result))
        # every slice was padded at its own end: [count * size, ...] -> [count * rows, ...]
        slices = result.reshape(self.shard[1], size, *result.shape[1:])
        return slices[:, :rows].reshape(-1, *result.shape[1:])

    def _size(self, name: str, batch: dict[str, np.ndarray], rows: int) -> int:
        kind = (name, tuple((k, x.shape[1:], str(x.dtype)) for k, x in sorted(batch.items())))
        sizes = self._sizes.setdefault(kind, set())
        enough = [size for size in sizes if size >= rows]
        if not enough:
            enough = [-(-rows // self._multiple()) * self._multiple()]
            sizes.update(enough)
        return min(enough)

    def _multiple(self) -> int:
        """Returns into how many parts the devices of one slice split its rows."""
        if self.batch_sharding is None:
            return 1
        devices = self.batch_sharding.num_devices
        parts = devices // self.batch_sharding.shard_shape((devices,))[0]
        return parts // self.shard[1]

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        if self.batch_sharding is None:
            return jax.device_put(batch)
        count = self.shard[1]
        # with several processes jax takes this explicit transfer for an implicit one
        with jax.transfer_guard_host_to_device("allow"):
            return {
                key: jax.make_array_from_process_local_data(
                    self.batch_sharding, x, (len(x) * count, *x.shape[1:])
                )
                for key, x in batch.items()
            }

    def _replicated(self) -> NamedSharding | None:
        if self.batch_sharding is None:
            return None
        return NamedSharding(self.batch_sharding.mesh, PartitionSpec())


def predict_all(
    predictor: Predictor, dataset: Dataset, names: Sequence[str], batch_size: int
) -> dict[str, np.ndarray]:
    """Returns predictions for every readable example of a dataset, in the dataset's order.

    Args:
        predictor: shared by all processes.
        dataset: read once, also for several names.
        names: predictions to compute.
        batch_size: of the global batch; a multiple of the number of slices. Changes no result.

    Returns:
        {name: [n, ...]} for every name; "index" [n] int64, the positions in `dataset.source`;
        "label" and "text_id" [n] int32 where the batches have them. Padding and unreadable examples
        are left out.

    Raises:
        ValueError: if no example can be read.
    """
    index, count = predictor.shard
    parts: dict[str, list[np.ndarray]] = {}
    batches = dataset.ordered(batch_size=batch_size, shard=index, num_shards=count)
    with contextlib.closing(batches):
        for batch in batches:
            rows = {name: predictor(name, batch) for name in names}
            columns = [key for key in (*COLUMNS, "example_mask") if key in batch]
            rows |= predictor.gather({key: batch[key] for key in columns})
            for key, array in rows.items():
                parts.setdefault(key, []).append(array)
    result = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    keep = result.pop("example_mask", np.zeros(0, bool))
    if not keep.any():
        raise ValueError(
            f"an evaluation needs at least one readable example, "
            f"got none of {len(dataset.source)}; check the data of this evaluation"
        )
    result["index"] = np.arange(len(keep))
    return {key: array[keep] for key, array in result.items()}


def embed_texts(
    predictor: Predictor, preprocess: Preprocess, texts: Sequence[str], batch_size: int
) -> np.ndarray:
    """Returns the embeddings [n, E] float32 of texts that every process holds; see `predict_all`.

    Warns if a text is longer than the context and was cut.
    """
    ids, mask, truncated = preprocess.tokenizer.encode(list(texts), preprocess.text_length)
    if truncated.any():
        longest = max((texts[i] for i in np.flatnonzero(truncated)), key=len)
        warnings.warn(
            f"{truncated.sum()} of {len(texts)} texts are longer than the context of "
            f"{preprocess.text_length} tokens and were cut, the longest is {longest!r}; "
            f"raise the text length or shorten the templates",
            stacklevel=2,
        )
    index, count = predictor.shard
    parts = []
    for start in range(0, len(texts), batch_size):
        chunk = {
            "text": ids[start : start + batch_size],
            "text_mask": mask[start : start + batch_size],
        }
        rows = len(chunk["text"])
        each = -(-rows // count)
        mine = slice(index * each, (index + 1) * each)
        local = {key: _pad(x, each * count)[mine] for key, x in chunk.items()}
        parts.append(predictor("text_embedding", local)[:rows])
    return np.concatenate(parts)


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """Returns [size, ...]: the last row repeated, because a made-up row could give NaN."""
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
