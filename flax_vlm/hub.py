# SPDX-License-Identifier: Apache-2.0
"""`flax_vlm.load(workdir)`: a model with its parameters and processor, ready for a notebook."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from flax_vlm.data.images import REASONS
from flax_vlm.data.pipeline import Preprocess
from flax_vlm.data.recipe import build_preprocess
from flax_vlm.data.text import Tokenizer
from flax_vlm.evaluation import scores
from flax_vlm.evaluation.base import Predictor
from flax_vlm.objectives import build_objective
from flax_vlm.objectives.base import Objective, Params
from flax_vlm.objectives.lora import merge
from flax_vlm.training import workdir
from flax_vlm.training.checkpoints import load_params


def load(source: str | os.PathLike, batch_size: int = 64) -> LoadedModel:
    """Returns the model of a workdir of train.py, with the parameters of its last checkpoint;
    LoRA adapters are merged.

    Args:
        source: the workdir.
        batch_size: images or texts that are computed at once.

    Raises:
        ValueError: if the folder is not a workdir.
        CheckpointError: if it has no complete checkpoint.
    """
    folder = pathlib.Path(source)
    if not folder.is_dir():
        raise ValueError(
            f"flax_vlm.load needs the workdir of a run of train.py, {folder} is no folder"
        )
    config = workdir.load_config(folder)
    params, extras, step = load_params(folder / "checkpoints")
    if config.get("lora"):
        params = merge(params, config["lora"]["alpha"])
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return LoadedModel(
        objective=build_objective(config["model"], config["objective"]),
        params=params,
        extras=extras,
        config=ConfigDict(config).lock(),
        processor=Processor(build_preprocess(config["data"], tokenizer, train=False)),
        step=step,
        batch_size=batch_size,
    )


@dataclasses.dataclass(frozen=True)
class Processor:
    """Images and texts -> batch, as the model was evaluated in training.

    Attributes:
        preprocess: image operations and tokenizer.
    """

    preprocess: Preprocess

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return self.preprocess.tokenizer

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """Returns [n, H, W, 3] uint8.

        Args:
            images: PIL images, [h, w, 3] or [h, w] uint8 arrays, encoded bytes or paths (mixed
                sizes are fine).

        Raises:
            ValueError: if one of them cannot be read, with its position and the reason.
        """
        rng = np.random.default_rng(0)  # operations of evaluation draw nothing from it
        rows = []
        for i, image in enumerate(images):
            image = pathlib.Path(image) if isinstance(image, str) else image
            row = self.preprocess({"image": image, "caption": ""}, rng)
            if not row["example_mask"]:
                raise ValueError(f"image {i} could not be read: {REASONS[row['broken']]}")
            rows.append(row["image"])
        return np.stack(rows)

    def texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns {"text": [n, L] int32, "text_mask": [n, L] bool}; longer texts are cut."""
        ids, mask, _ = self.tokenizer.encode(list(texts), self.preprocess.text_length)
        return {"text": ids, "text_mask": mask}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model.

    Attributes:
        objective: what it was trained for; `objective.predictions` is what it can compute.
        params: plain nested dict.
        extras: what gradients did not train.
        config: of the run.
        processor: images and texts -> batch.
        step: of the checkpoint.
        batch_size: rows that are computed at once.
    """

    objective: Objective
    params: Params
    extras: dict[str, Any]
    config: ConfigDict
    processor: Processor
    step: int
    batch_size: int = 64

    @property
    def model(self) -> nn.Module:
        """The linen module: `vlm.model.apply({"params": vlm.params}, ...)`."""
        return self.objective.model

    @functools.cached_property
    def _predictor(self) -> Predictor:
        return Predictor(self.objective.predictions, self.params, self.extras)

    def predict(self, name: str, batch: Mapping[str, Any]) -> np.ndarray:
        """Returns one of the objective's predictions for a batch.

        Args:
            name: "image_embedding", "text_embedding", "image_tokens", "logits" ...
            batch: arrays of the batch contract (flax_vlm/batch.py); `image` is uint8, or float32
                that is normalised already.

        Raises:
            ValueError: if there is no such prediction; lists those that exist.
        """
        return self._predictor(name, {key: np.asarray(value) for key, value in batch.items()})

    def _in_batches(self, name: str, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        count = len(next(iter(batch.values())))
        starts = range(0, count, self.batch_size)
        cut = ({k: x[i : i + self.batch_size] for k, x in batch.items()} for i in starts)
        return np.concatenate([self.predict(name, rows) for rows in cut])

    def embed_image(self, images: Sequence[Any]) -> np.ndarray:
        """Returns [n, E] float32 of unit norm for PIL images, arrays, bytes or paths."""
        return self._in_batches("image_embedding", {"image": self.processor.images(images)})

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Returns [n, E] float32 of unit norm."""
        return self._in_batches("text_embedding", self.processor.texts(texts))

    def classify(
        self,
        images: Sequence[Any],
        class_names: Sequence[str],
        templates: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Returns zero-shot probabilities, [n, classes] float32, rows summing to 1.

        softmax over classes of logit_scale <image, class>; a class is the normalised mean of its
        prompts' embeddings.

        Args:
            images: PIL images, arrays, bytes or paths.
            class_names: one per class.
            templates: prompts with one "{}"; None takes those of the run's zero-shot evaluation,
                or the bare names.
        """
        if templates is None:
            evals = self.config["evals"].values()
            named = [e["templates"] for e in evals if e.get("templates")]
            templates = tuple(named[0]) if named else ("{}",)
        prompts = [t.replace("{}", name) for name in class_names for t in templates]
        embedded = self.embed_text(prompts).reshape(len(class_names), len(templates), -1)
        classes = scores.class_embeddings(embedded)  # [classes, E]
        scale, _ = self.model.apply({"params": self.params}, method="logit_parameters")
        logits = self.embed_image(images) @ classes.T * np.asarray(scale)
        return np.asarray(jax.nn.softmax(logits, axis=-1))
