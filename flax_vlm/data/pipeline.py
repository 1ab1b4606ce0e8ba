# SPDX-License-Identifier: Apache-2.0
"""Examples to batches; which examples and how they are augmented is a function of the step alone.

grain's `MapDataset` maps the numbers 0, 1, 2 ... of all examples ever drawn to rows: shuffled anew
in every epoch, read, decoded and augmented, all keyed by that number. Only then is it cut: global
batch `step` holds the numbers step * B .. (step + 1) * B - 1, and shard k of n its k-th n-th part.
So a batch does not depend on shards, worker processes or where the run was resumed, and there is
no iterator state to save. What it costs: no filtering (an example that cannot be read becomes a
masked row) and no greedy packing.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from flax_vlm.data.images import REASONS, BrokenImage, ImageOp, read_image
from flax_vlm.data.sources import Source
from flax_vlm.data.text import Tokenizer, text_id

Row = dict[str, np.ndarray]

# Per process, batches in flight. Only decoding and resampling leave Python's lock: four threads
# spent twice the CPU time of two on small images. More speed comes from workers.
_THREADS = 2
_PREFETCH = 4
_LOGGED_PER_REASON = 5


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The one place where an example becomes a row of a batch.

    Attributes:
        image_ops: called in order on [H, W, 3] uint8; the result must have `image_size`.
        image_size: (height, width) of the rows.
        tokenizer: of the captions.
        text_length: L.
        background: RGB in 0..255, seen through transparent pixels.
    """

    image_ops: Sequence[ImageOp]
    image_size: tuple[int, int]
    tokenizer: Tokenizer
    text_length: int
    background: tuple[int, int, int] = (255, 255, 255)

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> Row:
        """Returns the row of an example.

        Args:
            example: see `flax_vlm.data.sources.Example`.
            rng: all randomness of the image operations.

        Returns:
            "image" [H, W, 3] uint8; "text" [L] int32; "text_mask" [L] bool; "text_id" [] int32;
            "label" [] int32, -1 if there is none; "example_mask" [] bool, False if the image is
            broken (it is black then); "broken" [] int8, a position in REASONS; "text_truncated" []
            bool.

        Raises:
            ValueError: if the image operations end with another size than `image_size`.
        """
        try:
            image, reason = read_image(example["image"], background=tuple(self.background))
        except BrokenImage as error:
            _log(error, example)
            return self.row(None, example, error.reason)
        for op in self.image_ops:
            image = op(image, rng)
        if image.shape != (*self.image_size, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"the image operations must end with {(*self.image_size, 3)} uint8, "
                f"got {image.shape} {image.dtype}; end them with a resize or a crop to image_size"
            )
        return self.row(image, example, reason)

    def padding(self) -> Row:
        """Returns a row that is no example: black, no caption, masked."""
        return self.row(None, {"caption": ""}, "ok")

    def row(self, image: np.ndarray | None, example: Mapping[str, Any], reason: str) -> Row:
        """Returns the row of an image that is read already, or None for a masked one."""
        # a masked row has its end token all the same: attention over nothing would be NaN
        text, text_mask, truncated = self.tokenizer.encode([example["caption"]], self.text_length)
        return {
            "image": np.zeros((*self.image_size, 3), np.uint8) if image is None else image,
            "text": text[0],
            "text_mask": text_mask[0],
            "text_id": text_id(example["caption"]),
            "label": np.int32(example.get("label", -1)),
            "example_mask": np.bool_(image is not None),
            "broken": np.int8(REASONS.index(reason)),
            "text_truncated": truncated[0],
        }


_logged: collections.Counter[str] = collections.Counter()


def _log(error: BrokenImage, example: Mapping[str, Any]) -> None:
    """Logs the first few broken images of every kind; the others are only counted."""
    _logged[error.reason] += 1
    if _logged[error.reason] <= _LOGGED_PER_REASON:
        image = example["image"]
        which = image if isinstance(image, pathlib.Path) else repr(example["caption"])
        logging.getLogger(__name__).warning("skipped a broken image, %s: %s", which, error)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A source, how its examples become rows, and the order in which they come.

    Attributes:
        source: random access to examples.
        preprocess: example -> row.
        seed: of the order and of all augmentation.
        workers: processes that read and decode; 0 uses threads of this process. Changes no batch.
    """

    source: Source
    preprocess: Preprocess
    seed: int = 0
    workers: int = 0

    def __post_init__(self):
        if len(self.source) == 0:
            raise ValueError(f"a dataset must have examples, got an empty source {self.source!r}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")

    def batches(
        self,
        step: int,
        *,
        batch_size: int,
        shard: int = 0,
        num_shards: int = 1,
        shuffle: bool = True,
    ) -> BatchIterator:
        """Returns the batches of `step`, `step + 1` ... without end.

        Args:
            step: optimizer steps done so far.
            batch_size: B, of the global batch.
            shard: which part of every global batch to read.
            num_shards: number of equal parts.
            shuffle: a new order in every epoch; False keeps the source's.

        Returns:
            An iterator of dicts of arrays [B / num_shards, ...]; close it after use.

        Raises:
            ValueError: if the batch cannot be split.
        """
        rows = _rows_per_shard(batch_size, shard, num_shards)
        numbers = grain.MapDataset.range(len(self.source)).seed(self.seed)
        numbers = (numbers.shuffle() if shuffle else numbers).repeat()
        examples = numbers.random_map(_Read(self.source, self.preprocess))
        chunks = examples.batch(rows, drop_remainder=True, batch_fn=_stack)
        return self._read(chunks[step * num_shards + shard :: num_shards])

    def ordered(self, *, batch_size: int, shard: int = 0, num_shards: int = 1) -> BatchIterator:
        """Returns every example once, in the source's order, for evaluation.

        Args:
            batch_size: B, of the global batch.
            shard: which part of every global batch to read.
            num_shards: number of equal parts.

        Returns:
            An iterator of dicts of arrays [B / num_shards, ...], as many batches for every shard;
            the last batch is filled up with rows whose example_mask is False. Close it after use.

        Raises:
            ValueError: if the batch cannot be split.
        """
        rows = _rows_per_shard(batch_size, shard, num_shards)
        padded = -(-len(self.source) // batch_size) * batch_size
        numbers = grain.MapDataset.range(padded).seed(self.seed)
        examples = numbers.random_map(_Read(self.source, self.preprocess))
        return self._read(examples.batch(rows, batch_fn=_stack)[shard::num_shards])

    def _read(self, batches: grain.MapDataset) -> BatchIterator:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
        iterable = batches.to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, notebooks have none
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self.workers)
            iterable = iterable.mp_prefetch(workers, worker_init_fn=_init_worker)
        return BatchIterator(iterable)


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """Batches of one reading; `close` ends its threads and worker processes, as `with` does."""

    def __init__(self, batches: grain.IterDataset):
        self._iterator = iter(batches)

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def close(self) -> None:
        """Stops reading ahead and waits for worker processes to end; may be called again."""
        self._iterator.close()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _Read:
    """Number in the source -> row; numbers behind its end are padding."""

    source: Source
    preprocess: Preprocess

    def __call__(self, index: int, rng: np.random.Generator) -> Row:
        if index >= len(self.source):
            return self.preprocess.padding()
        return self.preprocess(self.source[index], rng)


def _stack(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _rows_per_shard(batch_size: int, shard: int, num_shards: int) -> int:
    if batch_size < 1 or batch_size % num_shards:
        raise ValueError(
            f"batch_size must be a multiple of the {num_shards} shards, got {batch_size}; "
            f"change batch_size or the number of processes"
        )
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard must be in 0..{num_shards - 1}, got {shard}")
    return batch_size // num_shards


def _init_worker(index: int, count: int) -> None:
    """Leaves signals to the main process, and ends with it even when it is killed."""
    # schedulers and Ctrl-C signal all processes, but the main one still needs batches to finish
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
