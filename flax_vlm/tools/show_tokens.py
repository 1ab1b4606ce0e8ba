# SPDX-License-Identifier: Apache-2.0
"""Prints the tokens of a few training samples of a config, the supervised ones in colour.

    python -m flax_vlm.tools.show_tokens --config configs/llava_shapes_stage2.py [--samples 3]

What is green is learnt; runs of placeholders are written once with their number. Where the output
is not a terminal, supervised tokens stand in [brackets]. Captions of contrastive recipes have no
supervised tokens: their real tokens are printed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from flax_vlm.data.text import Tokenizer
from flax_vlm.experiment import USER_ERRORS, Experiment

FLAGS = flags.FLAGS

GREEN, PLAIN = "\033[32m", "\033[0m"


def pieces(
    tokenizer: Tokenizer, ids: Sequence[int], supervised: Sequence[bool]
) -> Iterator[tuple[str, bool]]:
    """Yields (a token as it is written, is it supervised?); equal neighbours come once, with their
    number.
    """
    for (index, learnt), run in itertools.groupby(zip(ids, supervised, strict=True)):
        count = len(list(run))
        written = tokenizer.token(int(index))
        yield written if count == 1 else f"{written}*{count}", bool(learnt)


def in_colour(tokens: Iterator[tuple[str, bool]], colour: bool) -> str:
    """Returns one line: supervised tokens green, or in brackets without colour."""
    before, after = (GREEN, PLAIN) if colour else ("[", "]")
    return " ".join(f"{before}{text}{after}" if learnt else text for text, learnt in tokens)


def show(run: Experiment, samples: int, colour: bool) -> Iterator[str]:
    """Yields one line per sample and one that counts its tokens."""
    dataset = run.train_data
    for number in range(min(samples, len(dataset.source))):
        row = dataset.preprocess(dataset.source[number], np.random.default_rng(0))
        real = row["text_mask"]
        learnt = row.get("loss_mask", np.zeros_like(real))
        yield in_colour(pieces(run.tokenizer, row["text"][real], learnt[real]), colour)
        yield f"  {real.sum()} tokens, {learnt.sum()} supervised, room for {len(real)}"


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if FLAGS.config is None:
        raise app.UsageError("--config is needed")
    try:
        for line in show(Experiment.from_config(FLAGS.config), FLAGS.samples, sys.stdout.isatty()):
            print(line)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # here, so that `show` can be imported beside the flags of another program
    config_flags.DEFINE_config_file("config", None, "A recipe: configs/NAME.py[:argument].")
    flags.DEFINE_integer("samples", 3, "How many samples to print.", lower_bound=1)
    app.run(main)
