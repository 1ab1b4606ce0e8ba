# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: metrics.jsonl, TensorBoard (without TensorFlow), Weights & Biases.

One row per logged step. A resumed run first drops the rows after the checkpoint it starts from, so
that every step is there exactly once.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

# Keys of a row that depend on the machine's speed, not on the mathematics.
TIMING_KEYS = ("examples_per_second", "mfu", "seconds", "data_wait")


class Writer(Protocol):
    """Takes scalars and pictures; only process 0 has one."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records one row."""

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Records the results of an evaluation, which eval/<step>.json holds already."""

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """Records a PNG file."""

    def flush(self) -> None:
        """Makes what was recorded survive a crash."""

    def close(self) -> None:
        """Flushes and frees."""


class JsonlWriter:
    """metrics.jsonl: one JSON object per logged step."""

    def __init__(self, path: pathlib.Path, after_step: int):
        """Opens the file and drops rows later than `after_step`, where training resumes."""
        rows = [row for row in read_metrics(path) if row["step"] <= after_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)  # atomic: a crash here loses nothing
        self._file = path.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends {"step": step, **values}; floats are written with all their digits."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing: a second row of the same step would not be a row per step."""

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """Does nothing: the picture is in the workdir already."""

    def flush(self) -> None:
        """Makes the rows survive a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


class TensorBoardWriter:
    """TensorBoard event files through tensorboardX."""

    def __init__(self, folder: pathlib.Path, after_step: int):
        """Opens a new event file; events of an earlier run after `after_step` are hidden."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars."""
        for key, value in values.items():
            # TensorBoard allows no "@" in names
            self._writer.add_scalar(key.replace("@", "_"), value, step)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars."""
        self.scalars(step, values)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """Records a PNG file."""
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandbWriter:
    """Weights & Biases; resumes the run of the same workdir. `pip install wandb` first."""

    def __init__(
        self, workdir: pathlib.Path, config: Mapping[str, Any], options: Mapping[str, Any]
    ):
        """Starts or resumes a run.

        Args:
            workdir: where the id of the run is kept.
            config: the resolved config, uploaded as it is: it holds no secrets.
            options: arguments of `wandb.init` (project, entity, mode ...).
        """
        import wandb

        file = workdir / "wandb_id.txt"
        if not file.exists():
            file.write_text(wandb.util.generate_id())
        self._wandb = wandb
        self._run = wandb.init(
            id=file.read_text(), resume="allow", dir=str(workdir), config=dict(config), **options
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars."""
        self._run.log(dict(values), step=step)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars."""
        self.scalars(step, values)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """Records a PNG file."""
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def flush(self) -> None:
        """Does nothing: wandb uploads by itself."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Writers:
    """Sends everything to several writers."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records one row everywhere."""
        for writer in self._writers:
            writer.scalars(step, values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Records the results of an evaluation everywhere."""
        for writer in self._writers:
            writer.evaluation(step, values)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """Records a PNG file everywhere."""
        for writer in self._writers:
            writer.picture(step, name, path)

    def flush(self) -> None:
        """Flushes all."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes all."""
        for writer in self._writers:
            writer.close()
