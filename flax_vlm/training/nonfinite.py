# SPDX-License-Identifier: Apache-2.0
"""What happens when a loss or gradient is not finite: stop and say where, or skip and go on.

The step itself keeps the state as it was in either case (training/step.py); this is the host's
half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


class NonFiniteError(RuntimeError):
    """Training met a NaN or infinity; the message names the step and the parameter groups."""


@dataclasses.dataclass
class NonFiniteGuard:
    """Reads the `nonfinite` flags of each step.

    Attributes:
        policy: "stop" raises at the first bad step; "skip" goes on, the state being untouched.
        max_consecutive: with "skip", how many bad steps in a row still are an accident.
        skipped: number of bad steps so far.
    """

    policy: str = "stop"
    max_consecutive: int = 10
    skipped: int = 0
    _consecutive: int = 0

    def __post_init__(self) -> None:
        if self.policy not in ("stop", "skip"):
            raise ValueError(f"nonfinite must be 'stop' or 'skip', got {self.policy!r}")

    def check(self, step: int, flags: Mapping[str, Any]) -> None:
        """Counts a bad step.

        Args:
            step: number of the step that the flags are of.
            flags: parameter group -> bool.

        Raises:
            NonFiniteError: by policy.
        """
        bad = sorted(group for group, flag in flags.items() if flag)
        if not bad:
            self._consecutive = 0
            return
        self.skipped += 1
        self._consecutive += 1
        where = (
            "the loss" if bad == ["loss"] else f"the gradients of {[b for b in bad if b != 'loss']}"
        )
        if "loss" in bad and len(bad) > 1:
            where = f"the loss and {where}"
        if self.policy == "stop":
            raise NonFiniteError(
                f"step {step}: {where} are not finite; the parameters are those of step "
                f"{step - 1}. Lower the learning rate, clip gradients (optimizer.grad_clip), or "
                f"set nonfinite='skip' to leave such steps out"
            )
        if self._consecutive > self.max_consecutive:
            raise NonFiniteError(
                f"step {step}: {self._consecutive} steps in a row were not finite, more than the "
                f"{self.max_consecutive} that nonfinite='skip' tolerates; last: {where}"
            )
