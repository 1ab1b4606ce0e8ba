# SPDX-License-Identifier: Apache-2.0
"""Datasets of TensorFlow Datasets, read through `tfds.data_source` without TensorFlow.

They must have been written as array_record, which allows random access. Images are not decoded:
their encoded bytes come through.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import filelock
import tensorflow_datasets as tfds
from absl import logging

from flax_vlm.data.sources import CAPTION_COLUMNS, Example

SECONDS_TO_WAIT = 600  # for another process that prepares the same dataset
# sys.stdout is of the whole process: two threads that put it aside at once lose it for good
_ONE_AT_A_TIME = threading.Lock()


def default_data_dir(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns where datasets are kept: the argument, $FLAX_VLM_DATA_DIR or the user's cache."""
    chosen = data_dir or os.environ.get("FLAX_VLM_DATA_DIR") or "~/.cache/flax_vlm/datasets"
    return pathlib.Path(chosen).expanduser()


def prepare(
    builder_class: type[tfds.core.DatasetBuilder],
    data_dir: str | os.PathLike | None = None,
    **options: Any,
) -> pathlib.Path:
    """Returns the folder of a dataset, having written it if it was not there.

    Processes that start at the same time wait for the one that writes. Nothing is printed.

    Args:
        builder_class: writes the dataset; needs no network.
        data_dir: see `default_data_dir`.
        **options: of the builder, such as its config.

    Raises:
        TimeoutError: if another process holds the lock for too long (filelock.Timeout).
    """
    with _ONE_AT_A_TIME, _quiet():
        builder = builder_class(
            data_dir=default_data_dir(data_dir), file_format="array_record", **options
        )
        folder = pathlib.Path(builder.data_path)
        if not folder.exists():  # tfds renames a finished folder into place
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.parent / ".lock", timeout=SECONDS_TO_WAIT):
                builder.download_and_prepare()
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # not tfds.disable_progress_bar(): nobody could switch a user's bars on again
    nowhere, verbosity = io.StringIO(), logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.set_verbosity(verbosity)


class TfdsSource:
    """A split of a prepared dataset.

    Attributes:
        class_names: names of the label feature, if it has names.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str = "train",
        *,
        image: str | None = None,
        caption: str | None = None,
        label: str | None = None,
    ):
        """Opens a folder `<data_dir>/<name>/[<config>/]<version>`.

        Args:
            folder: as `prepare` returns it.
            split: of the dataset, slices such as "train[:10%]" included.
            image: feature that holds the image; None takes the only image feature.
            caption: feature that holds the caption, a "/" leads into a sequence of dicts
                ("captions/text"). Of several captions, example i gives the i-th, modulo their
                number. None takes "caption", "text", "title" or the only text feature, or the
                class names if there is none.
            label: feature that holds the label; None takes the only ClassLabel feature, if any.

        Raises:
            ValueError: if a feature or the split is missing; the message lists what there is.
        """
        builder = tfds.builder_from_directory(folder)
        self._name = builder.info.full_name
        self._features = dict(builder.info.features)
        images = [k for k, f in self._features.items() if isinstance(f, tfds.features.Image)]
        self._image = self._one(image, images, "image")
        self._label = self._find_label(label)
        self._caption = self._find_caption(caption)
        names = getattr(self._features.get(self._label), "names", None)
        self.class_names = tuple(n.replace("_", " ") for n in names) if names else None
        if self._caption is None and self.class_names is None:
            raise ValueError(
                f"{self._name} must have captions or class names, its features are "
                f"{sorted(self._features)}; name the text feature by caption="
            )
        self._data = self._open(builder, split, images)

    def _open(self, builder: Any, split: str, images: list[str]) -> Any:
        if builder.info.file_format.value != "array_record":
            raise ValueError(
                f"{self._name} must be written as array_record for random access, "
                f"got {builder.info.file_format.value}; prepare it again with "
                f"file_format='array_record'"
            )
        if builder.info.splits[split].num_examples == 0:
            raise ValueError(f"a dataset must have examples, got none in {self._name} {split}")
        decoders = {key: tfds.decode.SkipDecoding() for key in images}
        return builder.as_data_source(split, decoders=decoders)

    def _one(self, wanted: str | None, found: list[str], what: str) -> str:
        if wanted is not None and wanted in self._features:
            return wanted
        if wanted is None and len(found) == 1:
            return found[0]
        problem = f"found {sorted(found)}" if wanted is None else f"there is no {wanted!r}"
        raise ValueError(
            f"{self._name} must have one feature for the {what}, {problem}; "
            f"name one of {sorted(self._features)} by {what}="
        )

    def _find_label(self, wanted: str | None) -> str | None:
        kind = tfds.features.ClassLabel
        found = [k for k, f in self._features.items() if isinstance(f, kind)]
        if wanted is None and len(found) != 1:
            return None
        return self._one(wanted, found, "label")

    def _find_caption(self, wanted: str | None) -> str | None:
        if wanted is not None:
            self._one(wanted.partition("/")[0], [], "caption")
            return wanted
        kind = tfds.features.Text
        found = [k for k, f in self._features.items() if isinstance(f, kind)]
        usual = [name for name in CAPTION_COLUMNS if name in found]
        return usual[0] if usual else found[0] if len(found) == 1 else None

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self!r} has no example {index}")
        record = self._data[index]
        example = Example(image=record[self._image], caption="")
        if self._label is not None:
            example["label"] = int(record[self._label])
        if self._caption is not None:
            example["caption"] = _text(record, self._caption, index)
        elif example["label"] >= 0:
            example["caption"] = self.class_names[example["label"]]
        else:
            raise ValueError(
                f"captions are class names here, but example {index} of {self._name} has no label; "
                f"take a split that has labels, or name a text feature by caption="
            )
        used = {self._image, self._label, (self._caption or "").partition("/")[0]}
        meta = {k: self._plain(k, v) for k, v in record.items() if k not in used}
        if meta:
            example["meta"] = meta
        return example

    def _plain(self, key: str, value: Any) -> Any:
        is_text = isinstance(self._features[key], tfds.features.Text)
        return value.decode("utf-8", "replace") if is_text and isinstance(value, bytes) else value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name}, {len(self)} examples)"


def _text(record: Any, path: str, index: int) -> str:
    for key in path.split("/"):
        if not isinstance(record, dict):  # a sequence of dicts may come as a list of them
            record = _turn(record, index)
        record = record[key]
    if not isinstance(record, bytes | str):
        record = _turn(record, index)
    return record.decode("utf-8", "replace") if isinstance(record, bytes) else str(record)


def _turn(several: Sequence[Any], index: int) -> Any:
    if len(several) == 0:
        raise ValueError(f"every example must have a caption, example {index} has none")
    return several[index % len(several)]


def load_tfds(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> TfdsSource:
    """Returns a split of a dataset that was prepared before; nothing is downloaded.

    Args:
        name: NAME or NAME/CONFIG, as tfds calls it, with or without a version at the end.
        split: see `TfdsSource`.
        data_dir: where it was prepared; see `default_data_dir`.
        image: see `TfdsSource`.
        caption: see `TfdsSource`.
        label: see `TfdsSource`.

    Raises:
        ValueError: if it is not there, saying how to prepare it; as `TfdsSource` does.
    """
    root = default_data_dir(data_dir)
    found = sorted(root.glob(f"{name}/**/dataset_info.json"), key=_version)
    if not found:
        raise ValueError(
            f"the tfds dataset {name!r} is not in {root}; prepare it with: python -c "
            f"\"import tensorflow_datasets as t; t.builder('{name}', data_dir='{root}', "
            f"file_format='array_record').download_and_prepare()\""
        )
    folders = {path.parent.parent for path in found}
    if len(folders) > 1:
        configs = sorted(folder.name for folder in folders)
        raise ValueError(f"the tfds dataset {name!r} has several configs, add one of {configs}")
    return TfdsSource(found[-1].parent, split, image=image, caption=caption, label=label)


def _version(path: pathlib.Path) -> tuple[int, ...]:
    numbers = path.parent.name.split(".")
    return tuple(int(n) for n in numbers) if all(n.isdecimal() for n in numbers) else ()
