# SPDX-License-Identifier: Apache-2.0
"""A model with its parameters and processor: what `flax_vlm.load` returns, ready for a notebook."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from flax_vlm.build import lookup
from flax_vlm.data.jinja_templates import JinjaTemplate
from flax_vlm.data.recipe import chat_template
from flax_vlm.evaluation import scores
from flax_vlm.evaluation.base import Predictor
from flax_vlm.evaluation.zero_shot import TEMPLATES
from flax_vlm.hub import answering
from flax_vlm.hub.processor import Processor
from flax_vlm.models.attention_maps import pooling_attention
from flax_vlm.models.vit import ViTClassifier
from flax_vlm.objectives.base import Objective, Params, PredictFn
from flax_vlm.objectives.encoder import Encoder
from flax_vlm.objectives.inputs import image_input
from flax_vlm.objectives.next_token import NextToken
from flax_vlm.training.sharding import batch_sharding, data_shard

# For checkpoints, which say nothing of their prompts (CLIP, section 3.1.4).
DEFAULT_TEMPLATES = ("a photo of a {}.",)
_ATTENTION_ROWS = 8  # images at once: the weights of all layers are [depth, B, N, T, T]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model comes from, for its model card and its next export.

    Attributes:
        name: the workdir, folder or hub id.
        model_type: family of the checkpoint folder; None for a workdir.
        license: that the checkpoint's own model card states; None where there is none.
        class_names: of a classifier's checkpoint, in the order of its logits.
        results: {"<evaluator>/<metric>": value} of the run's last evaluation.
    """

    name: str
    model_type: str | None = None
    license: str | None = None
    class_names: tuple[str, ...] | None = None
    results: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model.

    Attributes:
        objective: `objective.predictions` is what it can compute.
        params: plain nested dict.
        extras: what gradients did not train.
        config: of the run; of a checkpoint, the nodes `model`, `objective`, `data` and `evals` that
            a run with it would have.
        processor: images and texts -> batch.
        origin: where it comes from.
        step: of the run's checkpoint; None for a checkpoint folder.
        batch_size: rows that are computed at once.
        mesh: that the parameters are on and the rows are split over; None is one device.
    """

    objective: Objective | Encoder
    params: Params
    extras: dict[str, Any]
    config: ConfigDict
    processor: Processor
    origin: Origin
    step: int | None = None
    batch_size: int = 64
    mesh: jax.sharding.Mesh | None = None
    _generators: dict[int, Predictor] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def model(self) -> nn.Module:
        """The linen module: `vlm.model.apply({"params": vlm.params}, ...)`."""
        return self.objective.model

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of a classifier, by number where it has none.

        Raises:
            ValueError: if the model has no classes of its own.
        """
        if not isinstance(self.model, ViTClassifier):
            raise ValueError(f"a {type(self.model).__name__} has no classes of its own")
        numbered = tuple(f"LABEL_{i}" for i in range(self.model.num_classes))
        return self.origin.class_names or numbered

    @functools.cached_property
    def _predictor(self) -> Predictor:
        predictions = dict(self.objective.predictions)
        if "image_embedding" in predictions:
            predictions["attention"] = self._attention()
        if self.mesh is None:
            return Predictor(predictions, self.params, self.extras)
        rows = batch_sharding(self.mesh)
        return Predictor(predictions, self.params, self.extras, rows, data_shard(rows))

    def _attention(self) -> PredictFn:
        recipe = self.processor.image_recipe
        return lambda params, extras, batch: pooling_attention(
            self.model, params, image_input(batch, recipe.mean, recipe.std)
        )

    def predict(self, name: str, batch: Mapping[str, Any]) -> np.ndarray:
        """Returns one of the objective's predictions for a batch.

        Args:
            name: "image_embedding", "text_embedding", "image_tokens", "logits" ...
            batch: arrays of the batch contract (flax_vlm/batch.py); `image` is uint8, or float32
                that is normalised already.

        Raises:
            ValueError: if there is no such prediction; lists those that exist.
        """
        batch = {key: np.asarray(value) for key, value in batch.items()}
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self._predictor(name, batch)

    def _in_batches(
        self, name: str, batch: Mapping[str, np.ndarray], size: int | None = None
    ) -> np.ndarray:
        count, size = len(next(iter(batch.values()))), size or self.batch_size
        cut = ({k: x[i : i + size] for k, x in batch.items()} for i in range(0, count, size))
        return np.concatenate([self.predict(name, rows) for rows in cut])

    def embed_image(self, images: Sequence[Any]) -> np.ndarray:
        """Returns [n, E] float32 of unit norm for PIL images, arrays, bytes or paths.

        For an encoder without a text tower it is the pooled vector: the class token of DINOv2, the
        pooler of a ViT that has one, what the head of a classifier sees.
        """
        return self._in_batches("image_embedding", self.processor.image_batch(images))

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Returns [n, E] float32 of unit norm."""
        return self._in_batches("text_embedding", self.processor.texts(texts))

    def image_tokens(self, images: Sequence[Any]) -> np.ndarray:
        """Returns [n, T, D]: the encoder's output after its final norm, in the checkpoint's order
        (class token, registers, patches in row-major order, for NaFlex padding).
        """
        return self._in_batches("image_tokens", self.processor.image_batch(images))

    def patch_tokens(self, images: Sequence[Any]) -> list[np.ndarray]:
        """Returns the tokens of the patches where they lie in the image, one [rows, columns, D]
        each.
        """
        batch = self.processor.image_batch(images)
        tokens = self._in_batches("image_tokens", batch)[:, self._tower.num_prefix :]
        return self._on_grids(batch, tokens)

    def attention(self, images: Sequence[Any]) -> list[np.ndarray]:
        """Returns what the pooled vector looks at, one [N, rows, columns] float32 per image.

        Weights of a softmax over all tokens, per head: those of the pooling head's probe (SigLIP),
        or those of the class token in the last block (ViT, CLIP, DINOv2).

        Raises:
            ValueError: if the encoder pools by a mean.
        """
        batch = self.processor.image_batch(images)
        weights = self._in_batches("attention", batch, _ATTENTION_ROWS)  # [n, N, P]
        maps = self._on_grids(batch, weights.transpose(0, 2, 1))
        return [m.transpose(2, 0, 1) for m in maps]

    @property
    def _tower(self) -> nn.Module:
        return getattr(self.model, "image", self.model)

    def _on_grids(self, batch: Mapping[str, np.ndarray], rows: np.ndarray) -> list[np.ndarray]:
        """Returns one [rows, columns, ...] for each of the [n, P, ...]."""
        grids = self.processor.grids(batch, self._tower.grid)
        return [
            x[: h * w].reshape(h, w, *x.shape[1:]) for x, (h, w) in zip(rows, grids, strict=True)
        ]

    def classify(
        self,
        images: Sequence[Any],
        class_names: Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
    ) -> np.ndarray:
        """Returns probabilities, [n, classes] float32, rows summing to 1.

        With a text tower zero-shot: softmax over classes of logit_scale <image, class>; a class is
        the normalised mean of its prompts' embeddings. With a classifier, the softmax of its own
        logits.

        Args:
            images: PIL images, arrays, bytes or paths.
            class_names: one per class. For a classifier some of its own `class_names`, among which
                it then chooses; None takes all.
            templates: prompts with one "{}", or a key of evaluation.zero_shot.TEMPLATES such as
                "imagenet"; None takes those of the run's zero-shot evaluation, or, for a
                checkpoint, "a photo of a {}.".

        Raises:
            ValueError: if a classifier has no such class, or a text tower is given none.
        """
        if isinstance(self.model, ViTClassifier):
            logits = self._in_batches("logits", self.processor.image_batch(images))
            return np.asarray(jax.nn.softmax(logits[:, self._columns(class_names)], axis=-1))
        if not class_names:
            raise ValueError("zero-shot classification needs class_names, got none")
        templates = self._templates() if templates is None else templates
        if isinstance(templates, str):
            templates = lookup(TEMPLATES, templates, "set of templates")
        prompts = [t.replace("{}", name) for name in class_names for t in templates]
        embedded = self.embed_text(prompts).reshape(len(class_names), len(templates), -1)
        classes = scores.class_embeddings(embedded)  # [classes, E]
        scale = np.exp(np.asarray(self.params["logit_scale"], np.float32))
        logits = self.embed_image(images) @ classes.T * scale
        return np.asarray(jax.nn.softmax(logits, axis=-1))

    def _columns(self, class_names: Sequence[str] | None) -> list[int]:
        known = self.class_names
        unknown = sorted(set(class_names or ()) - set(known))
        if unknown:
            raise ValueError(f"this classifier knows {list(known)[:20]} ..., got {unknown}")
        return [known.index(name) for name in (class_names or known)]

    def _templates(self) -> str | Sequence[str]:
        if self.step is None:
            return DEFAULT_TEMPLATES
        evals = self.config["evals"].values()
        return next((e["templates"] for e in evals if e.get("templates")), TEMPLATES["name"])

    def generate(
        self,
        images: Sequence[Any] | None,
        prompts: Sequence[answering.Prompt],
        max_new_tokens: int = 64,
        *,
        template: str | None = None,
    ) -> list[str]:
        """Returns the most probable answer to every prompt.

        Args:
            images: one entry per prompt: an image (PIL, array, bytes or path), a list of them, or
                None; None for text alone.
            prompts: questions, or conversations so far, [{"role": "user", "content": ...}, ...].
                "<image>" says where an image goes; without it images stand in front.
            max_new_tokens: at most so many tokens are generated.
            template: how conversations are written, a key of data.chat_templates.TEMPLATES; None
                takes the run's, or the checkpoint's own, or the one of its language model.

        Raises:
            ValueError: if the model has no language model, images and markers do not fit together,
                an image cannot be read, or the text outgrows the model's context.
        """
        if not isinstance(self.objective, NextToken):
            found = type(self.model).__name__
            raise ValueError(f"generate needs a language model, this is a {found}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(prompts) == 0:
            return []
        batch = answering.prompt_batch(
            self.processor,
            images,
            prompts,
            template=template or self.chat_template,
            tokens_per_image=getattr(self.model, "tokens_per_image", 0),
        )
        decoder = getattr(self.model, "language_model", self.model)
        longest = int(batch["text_mask"].sum(axis=1).max()) + max_new_tokens
        if longest > decoder.length:
            raise ValueError(
                f"prompt and answer must fit into the model's context of {decoder.length} tokens, "
                f"got up to {longest}; ask for fewer tokens or shorten the prompt"
            )
        stops = answering.stop_ids(self.processor)
        predict = self._generator(max_new_tokens, stops)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            size = self.batch_size
            cut = [
                {key: x[i : i + size] for key, x in batch.items()}
                for i in range(0, len(prompts), size)
            ]
            tokens = np.concatenate([predict("generate", rows) for rows in cut])
        return [answering.text_of(self.processor, row, stops) for row in tokens]

    def word_attention(
        self,
        image: Any,
        prompt: answering.Prompt,
        answer: str | None = None,
        *,
        template: str | None = None,
    ) -> list[tuple[str, np.ndarray]]:
        """Returns (word, map) for every word of an answer: how much the model looked at each part
        of the image when it wrote that word, [rows, columns] float32.

        The weights are those of `attention_maps.text_attention` in the row of the token before,
        which is where the next one is chosen; the mean over a word's tokens.

        Args:
            image: PIL, array, bytes or path.
            prompt: see `generate`.
            answer: whose words; None takes the model's own.
            template: see `generate`.

        Raises:
            ValueError: if the visual tokens have no places in the image, as those of a resampler,
                or the image is cut into tiles; see `generate`.
        """
        grid = getattr(self.model, "token_grid", None)
        if grid is None:
            raise ValueError(
                "word_attention needs a model whose visual tokens have places in the image: a "
                "LLaVA with a linear, mlp or pixel-shuffle connector that merges no tokens"
            )
        if answer is None:
            answer = self.generate([image], [prompt], template=template)[0]
        batch, places = answering.answered_batch(
            self.processor,
            image,
            prompt,
            answer,
            template=template or self.chat_template,
            tokens_per_image=self.model.tokens_per_image,
        )
        text, stops = batch["text"][0], answering.stop_ids(self.processor)
        placed = text == self.model.image_token_id  # [L]
        if placed.sum() != grid[0] * grid[1]:
            raise ValueError(
                f"word_attention needs an image of one tile, {grid[0]} x {grid[1]} visual tokens, "
                f"got {placed.sum()}: this checkpoint cuts images into tiles"
            )
        weights = self.predict("text_attention", batch)[0]  # [L, L]
        tokenizer, words = self.processor.tokenizer, []
        for n in (n for n in places if text[n] not in stops):
            if not words or tokenizer.starts_word(int(text[n])):
                words.append([])
            words[-1].append(n)
        visual = weights[:, placed]  # [L, P]
        return [
            (tokenizer.decode(text[word]).strip(), visual[np.array(word) - 1].mean(0).reshape(grid))
            for word in words
        ]

    @property
    def chat_template(self) -> str | JinjaTemplate:
        """How conversations are written: a key of data.chat_templates.TEMPLATES, or the
        checkpoint's own.
        """
        data = self.config["data"]
        return chat_template(data["chat"]["template"], data.get("text", {}))

    def _generator(self, max_new_tokens: int, stops: tuple[int, ...]) -> Predictor:
        """Returns what generates so many tokens; made once, so that it is compiled once."""
        made = self._generators
        if max_new_tokens not in made:
            objective = dataclasses.replace(
                self.objective, max_new_tokens=max_new_tokens, stop_ids=stops
            )
            made[max_new_tokens] = dataclasses.replace(
                self._predictor, predictions=objective.predictions, _programs={}, _sizes={}
            )
        return made[max_new_tokens]

    def save_pretrained(self, folder: str | os.PathLike, **options: Any) -> str:
        """Writes a folder that transformers loads; see `flax_vlm.save_pretrained`."""
        from flax_vlm.hub.export import save_pretrained

        return save_pretrained(self, folder, **options)
