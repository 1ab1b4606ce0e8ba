# SPDX-License-Identifier: Apache-2.0
"""A ladder: one recipe, and the dials that are turned from rung to rung.

A file of configs/ladders/ holds one, as the value of its `get_ladder()`:

    Ladder(
        config="configs/siglip_digits.py",
        dials={"loss": ("sigmoid", "softmax"), "batch": (16, 64, 256)},
        changes=lambda loss, batch: {
            "objective.pair_loss.name": loss, "batch_size": batch, "steps": 38_400 // batch
        },
        seeds=(0, 1, 2),
        metrics=("zero_shot/accuracy",),
    )

A rung is one value of every dial and one seed: a run of train.py with the changes as flags, in a
workdir of its own, so that every rung is resumable by itself and can be started by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Dials = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rung:
    """One run of a ladder.

    Attributes:
        dials: {dial: its value}.
        seed: config.seed.
        config: configs/NAME.py[:argument].
        changes: {dotted path of the config: value}, the seed among them.
    """

    dials: Dials
    seed: int
    config: str
    changes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """A relative path: "loss_sigmoid.batch_16/seed_0"."""
        words = [f"{dial}_{value}" for dial, value in self.dials.items()]
        return "/".join([re.sub(r"[^\w.+-]+", "-", ".".join(words)), f"seed_{self.seed}"])

    def flags(self) -> list[str]:
        """Returns the flags of train.py, without the workdir."""
        changed = [f"--config.{path}={_flag(value)}" for path, value in self.changes.items()]
        return [f"--config={self.config}", *changed]


def _flag(value: Any) -> str:
    """Returns a value as ml_collections reads it from a command line."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(repr, value))},)"
    return value if isinstance(value, str) else json.dumps(value)


@dataclasses.dataclass(frozen=True)
class Ladder:
    """An experiment over the values of some dials.

    Attributes:
        config: configs/NAME.py[:argument], which all rungs start from; {dial} is its value.
        dials: {dial: its values}; every combination is tried.
        changes: dial values as keywords -> {dotted path of the config: value}.
        metrics: what is collected, "EVALUATOR/NAME" as in a workdir's eval/<step>.json, or
            "train/NAME", the mean over the last tenth of the logged steps.
        seeds: of every combination.
        skip: combinations that are left out: true for dial values that are.
        held_out: combinations that no law is fitted to, but that it has to predict.
        x: what the plot's horizontal axis is: a dial, or "compute", "parameters", "examples".
        curves: dial whose values are curves of their own, "" for one curve.
        machine: for a cluster: dial values -> {"topology": "v5e:16x16", "nodes": 32}.
    """

    config: str
    dials: Mapping[str, Sequence[Any]]
    metrics: Sequence[str]
    changes: Callable[..., Mapping[str, Any]] = lambda **dials: {}
    seeds: Sequence[int] = (0,)
    skip: Callable[..., bool] = lambda **dials: False
    held_out: Callable[..., bool] = lambda **dials: False
    x: str = "compute"
    curves: str = ""
    machine: Callable[..., Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for what, values in {**self.dials, "seeds": self.seeds, "metrics": self.metrics}.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"a ladder needs different values of {what}, got {list(values)}")
        known = ("compute", "parameters", "examples", *self.dials)
        if self.x not in known or self.curves not in ("", *self.dials):
            raise ValueError(
                f"x and curves must be among {known}, got {self.x!r} and {self.curves!r}"
            )

    def rungs(self) -> list[Rung]:
        """Returns all runs, the seeds being the outer loop: what is there early has all dials."""
        return [
            Rung(
                dials,
                seed,
                self.config.format(**dials),
                {**self.changes(**dials), "seed": seed},
            )
            for seed in self.seeds
            for dials in self.combinations()
        ]

    def combinations(self) -> list[Dials]:
        """Returns the dial values that are tried, the last dial varying fastest."""
        every = itertools.product(*self.dials.values())
        named = [dict(zip(self.dials, values, strict=True)) for values in every]
        return [dials for dials in named if not self.skip(**dials)]
