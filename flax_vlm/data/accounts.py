# SPDX-License-Identifier: Apache-2.0
"""Counts what the pipeline could not use, and stops a run whose data are mostly broken."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np

from flax_vlm.batch import HOST_KEYS
from flax_vlm.data.decode import REASONS, USABLE


class DataError(RuntimeError):
    """Too many examples cannot be read."""


@dataclasses.dataclass
class Accounts:
    """Running counts over the batches that one process has seen; padding rows are not examples.

    Attributes:
        max_broken_share: a greater share of broken examples raises DataError, 0..1.
        min_examples: from which number of examples on it may.
        seen: examples so far, broken ones included.
        truncated: captions that were cut.
        reasons: reason -> number of examples, for every reason but "ok".
    """

    max_broken_share: float = 0.1
    min_examples: int = 256
    seen: int = 0
    truncated: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def broken(self) -> int:
        """Returns the number of examples that were lost."""
        return sum(count for reason, count in self.reasons.items() if reason not in USABLE)

    def take(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the batch without its host keys, having counted them.

        Args:
            batch: with "broken" [B] int8, "text_truncated" [B] bool and "example_mask" [B] bool.

        Raises:
            DataError: if the share of broken examples is too great.
        """
        codes, kept = batch["broken"], batch["example_mask"]
        self.seen += int(np.count_nonzero(kept | (codes > 0)))
        self.truncated += int(np.count_nonzero(batch["text_truncated"] & kept))
        for code in codes[codes > 0]:
            self.reasons[REASONS[code]] += 1
        if self.seen >= self.min_examples and self.broken > self.max_broken_share * self.seen:
            raise DataError(
                f"at most {self.max_broken_share:.0%} of the examples may be broken, "
                f"got {self.summary()}; mend the data, or raise the share if this is expected"
            )
        return {key: array for key, array in batch.items() if key not in HOST_KEYS}

    def counts(self) -> dict[str, int]:
        """Returns "seen", "broken", "text_truncated" and "broken/<reason>" for every reason met.

        The reason "animated" is listed, too, although those examples are used (their first frame).
        """
        reasons = {f"broken/{reason}": self.reasons[reason] for reason in sorted(self.reasons)}
        totals = {"seen": self.seen, "broken": self.broken, "text_truncated": self.truncated}
        return totals | reasons

    def summary(self) -> str:
        """Returns one line: "3 of 500 examples broken (2 damaged, 1 empty), 4 captions cut"."""
        reasons = [f"{count} {reason}" for reason, count in self.reasons.most_common()]
        listed = f" ({', '.join(reasons)})" if reasons else ""
        cut = f", {self.truncated:,} captions cut" if self.truncated else ""
        return f"{self.broken:,} of {self.seen:,} examples broken{listed}{cut}"
