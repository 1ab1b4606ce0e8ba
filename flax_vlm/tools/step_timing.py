# SPDX-License-Identifier: Apache-2.0
"""Times the train step of a program on synthetic data, alone or in turns with another.

What is timed: the seconds between the ends of consecutive steps while the next step is already
queued, as in training. The batch lies on the devices, so neither loading nor copying it counts.
Every step's end is seen by waiting for its metrics; nothing else waits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np

from flax_vlm import trees
from flax_vlm.program import Program, example_batch
from flax_vlm.training import sharding

# of text towers, language models and LLaVAs
TOKEN_EMBEDDINGS = (
    "text/embedding/embedding",
    "embedding/embedding",
    "language_model/embedding/embedding",
)


def synthetic_batch(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns this process's rows of a random batch: noise images, texts of random lengths.

    A text is random ids, then the largest id (CLIP's end of text), then padding with 0; every
    text_id is another one, so that no pair is masked. Of a conversation all tokens are supervised,
    and its first are visual tokens, one image's or as many as fit.

    Args:
        program: whose shapes, vocabulary and classes the batch has.
        seed: of the noise; each process adds the index of its rows.
    """
    index, count = sharding.data_shard(program.batch_sharding)
    rows = program.batch_size // count
    batch = example_batch(program.config, rows)
    rng = np.random.default_rng((seed, index))
    length = batch["text"].shape[1]
    model, tables = program.objective.model, trees.named_leaves(program.shapes.params)
    table = next((tables[path] for path in TOKEN_EMBEDDINGS if path in tables), None)
    end = 1 if table is None else table.shape[0] - 1
    ends_at = rng.integers(length // 2, length, (rows, 1))  # [B, 1]
    position = np.arange(length)[None, :]
    ids = rng.integers(1, max(end, 2), (rows, length))  # [B, L]
    ids = np.where(position == ends_at, end, np.where(position < ends_at, ids, 0))
    if hasattr(model, "image_token_id"):
        ids[:, : model.tokens_per_image] = model.image_token_id
    classes = getattr(model, "num_classes", None) or 1
    made = {
        "text": ids.astype(np.int32),
        "text_mask": position <= ends_at,
        "loss_mask": position <= ends_at,
        "text_id": np.arange(index * rows, (index + 1) * rows, dtype=np.int32),
        "label": rng.integers(0, classes, rows).astype(np.int32),
    }
    for key in ("image", "images"):
        if key in batch:
            made[key] = rng.integers(0, 256, batch[key].shape, np.uint8)
    return {key: made.get(key, value) for key, value in batch.items()}


@dataclasses.dataclass
class Contender:
    """A compiled train step with a state and a batch of its own.

    Attributes:
        program: what was compiled.
        compiled: the step.
        lower_seconds: tracing and lowering.
        compile_seconds: XLA's part.
        state: of the next step; donated to it.
        batch: on the devices.
        first_loss: before any update, for comparing two programs that should compute the same.
    """

    program: Program
    compiled: jax.stages.Compiled
    lower_seconds: float
    compile_seconds: float
    state: Any
    batch: dict[str, jax.Array]
    first_loss: float = float("nan")

    @classmethod
    def build(cls, program: Program) -> Self:
        """Returns the compiled step of a program with a random state and batch."""
        start = time.perf_counter()
        lowered = program.lower_train_step()
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        batch = sharding.put_batch(synthetic_batch(program), program.batch_sharding)
        return cls(program, compiled, middle - start, end - middle, program.init_state(), batch)

    def warm_up(self, steps: int) -> None:
        """Runs steps that are not timed; keeps the loss of the first."""
        self.first_loss = float(self._start_step()["loss"].value())
        for _ in range(steps - 1):
            jax.block_until_ready(self._start_step())

    def time_steps(self, count: int) -> list[float]:
        """Returns the seconds of `count` steps, having run one more before them."""
        ends = []
        running = self._start_step()
        for _ in range(count):
            following = self._start_step()
            jax.block_until_ready(running)
            ends.append(time.perf_counter())
            running = following
        jax.block_until_ready(running)
        ends.append(time.perf_counter())
        return np.diff(ends).tolist()

    def _start_step(self) -> dict[str, Any]:
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics


def time_in_turns(
    contenders: Sequence[Contender], steps: int, steps_per_turn: int = 2
) -> list[np.ndarray]:
    """Returns the step times of each contender, [rounds, steps of a turn] in seconds.

    A single one runs all its steps in one turn. Several take turns, so that what else the machine
    does hits all of them: the order turns round after every round (A B, B A, A B ...), and each
    turn starts with a step that is not timed.

    Args:
        contenders: warmed up.
        steps: to be timed of each, rounded up to whole turns.
        steps_per_turn: of each in a round, where there are several.
    """
    turn = steps if len(contenders) == 1 else min(steps, steps_per_turn)
    rounds = -(-steps // turn)
    times = [np.empty((rounds, turn)) for _ in contenders]
    for i in range(rounds):
        order = range(len(contenders))
        for j in order if i % 2 == 0 else reversed(order):
            times[j][i] = contenders[j].time_steps(turn)
    return times


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns the median and the 10th and 90th percentile."""
    low, middle, high = np.percentile(values, (10, 50, 90)).tolist()
    return {"median": middle, "p10": low, "p90": high}
