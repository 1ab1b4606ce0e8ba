# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification: the class whose prompts are nearest to the image.

CLIP (Radford et al. 2021), section 3.1; SigLIP measures the same way. Every prompt is embedded and
normalised, the mean over the templates of a class is normalised again, and the highest cosine wins.

Differs from CLIP and big_vision: a class that ties with the right one counts as wrong (there, the
first of them wins). That matters only where two classes have the same name, as two pairs of CLIP's
ImageNet names have.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vlm.build import lookup
from flax_vlm.evaluation import pictures, scores
from flax_vlm.evaluation.base import Predictor, embed_texts, predict_all
from flax_vlm.evaluation.classification import (
    class_metrics,
    draw_predictions,
    evenly_spaced,
    images_of,
    labelled,
)

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset


def _read(name: str) -> dict[str, Any]:
    """Returns a data file of this folder; it states its source and licence."""
    text = pathlib.Path(__file__).with_name(name).read_text(encoding="utf-8")
    return json.loads(text)


_PROMPTS = _read("prompt_templates.json")

# "imagenet": CLIP's 80 for ImageNet; "short": the seven of them that serve as well; "clip_best" as
# in big_vision: those and the bare name
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "imagenet": tuple(_PROMPTS["imagenet"]),
    "short": tuple(_PROMPTS["short"]),
    "clip_best": (*_PROMPTS["short"], "{}"),
}
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "imagenet": tuple(_read("imagenet_names.json")["names"]),
}

MAX_CLASSES_SHOWN = 10  # rows and columns of similarity.png


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Measures zero-shot accuracy from "image_embedding" and "text_embedding".

    Attributes:
        dataset: examples with a label; its tokenizer encodes the prompts.
        batch_size: global; changes no result.
        templates: prompts with one "{}" each, or a key of TEMPLATES.
        class_names: one per label, or a key of CLASS_NAMES; None takes those of the dataset's
            source. Of synonyms separated by commas the first is used.
        canonicalize: lower case without punctuation, as SigLIP was trained.
        num_pictures: test images in predictions.png.
    """

    dataset: Dataset
    batch_size: int = 256
    templates: str | Sequence[str] = "clip_best"
    class_names: str | Sequence[str] | None = None
    canonicalize: bool = False
    num_pictures: int = 24

    def __post_init__(self):
        bad = [t for t in self._templates() if t.count("{}") != 1]
        if bad or not self._templates():
            raise ValueError(f"templates need one '{{}}' each, got {bad or 'no template'}")
        if not self._names():
            raise ValueError(
                "zero_shot needs class names, the dataset has none; "
                "set class_names in the evaluation's config"
            )

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns what `class_metrics` reports; writes predictions.png and similarity.png."""
        prompts = self.prompts()
        texts = embed_texts(predictor, self.dataset.preprocess, sum(prompts, []), self.batch_size)
        classes = scores.class_embeddings(texts.reshape(len(prompts), -1, texts.shape[-1]))
        rows = predict_all(predictor, self.dataset, ["image_embedding"], self.batch_size)
        rows = labelled(rows, len(classes))
        similarity = scores.cosines(rows["image_embedding"], classes)  # [n, classes]
        rank = scores.label_ranks(similarity, rows["label"], scores.TIE)
        metrics = class_metrics(rank, rows["label"])
        if folder is not None:
            draw_predictions(
                folder,
                self.dataset,
                self._names(),
                rows,
                similarity.argmax(1),
                self.num_pictures,
                f"Zero-shot: {100 * metrics['accuracy']:.1f} % of {len(rank):,} test images",
            )
            self._draw_similarity(folder, rows, similarity)
        return metrics

    def _draw_similarity(
        self, folder: pathlib.Path, rows: dict[str, np.ndarray], similarity: np.ndarray
    ) -> None:
        """Writes the similarity of one image of each class with the prompts of each class."""
        classes, first = np.unique(rows["label"], return_index=True)
        chosen = evenly_spaced(MAX_CLASSES_SHOWN, len(classes))
        classes, first = classes[chosen], first[chosen]
        names = self._names()
        figure = pictures.similarity_matrix(
            images_of(self.dataset, rows["index"][first]),
            [names[c] for c in classes],
            similarity[np.ix_(first, classes)],
            title="Cosine similarity of one test image of each class and the prompts",
        )
        pictures.save_figure(figure, folder / "similarity.png")

    def prompts(self) -> list[list[str]]:
        """Returns the prompts of every class, one per template."""
        prompts = [[t.replace("{}", name) for t in self._templates()] for name in self._names()]
        if self.canonicalize:
            prompts = [[canonicalize(prompt) for prompt in row] for row in prompts]
        return prompts

    def _templates(self) -> tuple[str, ...]:
        if isinstance(self.templates, str):
            return lookup(TEMPLATES, self.templates, "set of templates")
        return tuple(self.templates)

    def _names(self) -> list[str]:
        names = self.class_names or self.dataset.source.class_names or ()
        if isinstance(names, str):
            names = lookup(CLASS_NAMES, names, "set of class names")
        return [name.split(",")[0] for name in names]


def canonicalize(text: str) -> str:
    """Returns the text in lower case, "_" as a space, without punctuation and double spaces.

    Source: big_vision `evaluators/proj/image_text/prompt_engineering.py`, canonicalize_text.
    """
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())
