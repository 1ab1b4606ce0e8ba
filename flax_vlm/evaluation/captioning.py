# SPDX-License-Identifier: Apache-2.0
"""Captions against reference captions: CIDEr-D and BLEU-4 by pycocoevalcap, BLEU by sacrebleu.

The libraries come with the extra "eval". Differs from the published protocol in the tokens: the PTB
tokenizer is a Java program, here `caption_tokens` takes lower-case words without punctuation. For
plain captions they are the same words; still, state it beside figures.

CIDEr's weights come from the references that are given: a subset has another score.
Papers: CIDEr, Vedantam et al. 2015, arXiv:1411.5726; BLEU, Papineni et al. 2002.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from flax_vlm.evaluation.answered import answer_all, write_answers
from flax_vlm.evaluation.base import Predictor

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset


def caption_tokens(text: str) -> str:
    """Returns a caption as words with single spaces: lower case, no punctuation."""
    return " ".join(re.findall(r"\w+(?:['-]\w+)*", text.lower()))


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns "cider" (CIDEr-D, 1.0 is printed as 100), "bleu4" in 0..1 and "sacrebleu" in 0..100.

    Args:
        captions: what the model wrote, at least one.
        references: the captions that people wrote of the same images, at least one each.

    Raises:
        ValueError: if the libraries are not installed.
    """
    cider = _library("pycocoevalcap.cider.cider").Cider()
    bleu = _library("pycocoevalcap.bleu.bleu").Bleu(4)
    found = {n: [caption_tokens(caption)] for n, caption in enumerate(captions)}
    true = {n: [caption_tokens(one) for one in several] for n, several in enumerate(references)}
    most = max(map(len, references))
    # sacrebleu wants one list per reference, None where a caption has fewer
    columns = [[r[k] if k < len(r) else None for r in references] for k in range(most)]
    return {
        "cider": float(cider.compute_score(true, found)[0]),
        "bleu4": float(bleu.compute_score(true, found, verbose=0)[0][3]),
        "sacrebleu": float(
            _library("sacrebleu").corpus_bleu(list(captions), columns, lowercase=True).score
        ),
    }


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f'caption scores need {name}, which is not installed: pip install "flax_vlm[eval]"'
        ) from error


@dataclasses.dataclass(frozen=True)
class Captioning:
    """Measures the prediction "generate" against reference captions.

    Attributes:
        dataset: instructions that ask for a caption; meta["answers"] holds the references.
        batch_size: global; changes no result.
        num_pictures: captions in answers.png.
    """

    dataset: Dataset
    batch_size: int = 64
    num_pictures: int = 12

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns `caption_scores` and "examples"; writes answers.jsonl and answers.png.

        In the files "correct" says whether a caption is one of the references, word by word.
        """
        answered = answer_all(predictor, self.dataset, self.batch_size)
        metrics = caption_scores(
            [one.prediction for one in answered], [one.accepted for one in answered]
        )
        if folder is not None:
            same = [
                caption_tokens(one.prediction) in map(caption_tokens, one.accepted)
                for one in answered
            ]
            title = f"CIDEr {metrics['cider']:.3f}"
            write_answers(folder, self.dataset, answered, same, self.num_pictures, title)
        return {**metrics, "examples": len(answered)}
