# SPDX-License-Identifier: Apache-2.0
"""LoRA: any objective, with low-rank adapters beside frozen parameters. Hu et al., 2021,
arXiv:2106.09685, section 4.

    W' = W + alpha / r * A B        A [*in, r] random, B [r, *out] zero: the start is the base model

The adapters are a branch "adapters" of the parameter tree, which mirrors the paths of what they
adapt; `LoRA` merges them into plain parameters before the objective sees them, so that no model, no
loss and no evaluator knows of them. All layers of scanned blocks are adapted at once, each with its
own A and B (a leading layer axis).

Cost: a merged copy of the adapted kernels lives through each step, and their gradient dL/dW' of the
same size is formed before it is projected onto A and B. What is saved is the optimizer state, the
moving average and the gradients of everything that is frozen; the compute is that of full training.

Differs from the paper: A's variance, which the paper leaves open, is 1 / (size of in), so that x A
has the scale of x (the authors' library draws uniformly with a third of that). No dropout in front
of A, and heads are adapted together: a kernel [D, N, K] counts as a matrix [D, N K].
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_vlm import trees
from flax_vlm.build import build
from flax_vlm.meters import Mean
from flax_vlm.objectives.base import Aux, Batch, Extras, Objective, Params, PredictFn

ADAPTERS = "adapters"
RuleSeq = Sequence[tuple[str, int]]

_ADAPTABLE = r"(.*/)?(kernel|embedding)"
_TWO_OUTPUT_AXES = r"(.*/)?(q|k|v)/kernel"  # [D, N, K]; all others have one


def init_adapters(rng: jax.Array, params: Params, rules: RuleSeq) -> Params:
    """Returns {path: {"a": [*layers, *in, r], "b": [*layers, r, *out]}} as nested dicts.

    Args:
        rng: of A; B is zero.
        params: the base.
        rules: (regular expression of paths, rank) pairs; first match wins.

    Raises:
        ValueError: if a rule matches no path, what it matches is no kernel, or the rank is not
            between 1 and the smaller side of the matrix.
    """
    leaves = trees.named_leaves(params)
    trees.check_patterns([pattern for pattern, _ in rules], list(leaves), "lora.rules")
    adapters = {}
    for i, (path, leaf) in enumerate(leaves.items()):
        rank = next((rank for pattern, rank in rules if re.fullmatch(pattern, path)), None)
        if rank is not None:
            a, b = _init_pair(jax.random.fold_in(rng, i), path, leaf.shape, rank)
            adapters |= {f"{path}/a": a, f"{path}/b": b}
    return trees.unflatten(adapters)


def _init_pair(rng: jax.Array, path: str, shape: Sequence[int], rank: int) -> tuple[jax.Array, ...]:
    if not re.fullmatch(_ADAPTABLE, path):
        raise ValueError(f"lora.rules must match kernels or embeddings, got {path} {tuple(shape)}")
    first = int(trees.is_scanned(path))
    last = len(shape) - (2 if re.fullmatch(_TWO_OUTPUT_AXES, path) else 1)
    layers, inputs, outputs = shape[:first], shape[first:last], shape[last:]
    largest = min(math.prod(inputs), math.prod(outputs))
    if not 1 <= rank <= largest:
        raise ValueError(f"the LoRA rank of {path} must lie in 1 ... {largest}, got {rank}")
    a = jax.random.normal(rng, (*layers, *inputs, rank), jnp.float32) * math.prod(inputs) ** -0.5
    return a, jnp.zeros((*layers, rank, *outputs), jnp.float32)


def merge(params: Params, alpha: float) -> Params:
    """Returns plain parameters: W + alpha / r * A B where there are adapters, W elsewhere.

    Args:
        params: with or without the branch "adapters".
        alpha: as in training.
    """
    base, adapters = split_adapters(params)
    pairs = trees.named_leaves(adapters)

    def one(path: str, leaf: jax.Array) -> jax.Array:
        if f"{path}/a" not in pairs:
            return leaf
        a, b = pairs[f"{path}/a"], pairs[f"{path}/b"]
        return leaf + alpha / a.shape[-1] * _product(a, b, leaf.ndim)

    return trees.map_with_path(one, base)


def _product(a: jax.Array, b: jax.Array, ndim: int) -> jax.Array:
    """Returns A B, [*layers, *in, *out] with `ndim` axes."""
    layers = tuple(range(a.ndim + b.ndim - 2 - ndim))  # r is in both, and so are the layers
    contract = ((a.ndim - 1,), (len(layers),))
    return jax.lax.dot_general(a, b, (contract, (layers, layers)), precision="highest")


def split_adapters(params: Params) -> tuple[Params, Params]:
    """Returns (base, adapters); the adapters' paths are those of the base with "/a" and "/b"."""
    base = {key: value for key, value in params.items() if key != ADAPTERS}
    return base, params.get(ADAPTERS, {})


def frozen_patterns(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the regular expressions of what a config's `lora` freezes: all but the adapters and
    what `train` matches; () where there is no LoRA.
    """
    if not spec:
        return ()
    trained = "|".join(f"(?:{pattern})" for pattern in (f"{ADAPTERS}/.*", *spec.get("train", ())))
    return (rf"(?!(?:{trained})$).*",)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """An objective whose kernels are adapted.

    Attributes:
        objective: what is trained, on merged parameters.
        rules: (regular expression of parameter paths, rank) pairs; first match wins.
        alpha: the update is alpha / rank * A B.
        train: regular expressions of base parameters that are trained too, such as a new head; see
            `frozen_patterns`.
    """

    objective: Objective
    rules: RuleSeq
    alpha: float
    train: Sequence[str] = ()

    @property
    def model(self) -> nn.Module:
        """The model of the objective."""
        return self.objective.model

    @property
    def additive(self) -> bool:
        """As the objective's."""
        return self.objective.additive

    @property
    def predictions(self) -> Mapping[str, PredictFn]:
        """The objective's, of merged parameters."""

        def merged(predict: PredictFn) -> PredictFn:
            return lambda params, extras, batch: predict(merge(params, self.alpha), extras, batch)

        return {name: merged(predict) for name, predict in self.objective.predictions.items()}

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        """Returns the objective's own random parameters with adapters beside, and its extras."""
        params, extras = self.objective.init(rng, batch)
        trees.check_patterns(self.train, list(trees.named_leaves(params)), "lora.train")
        # a key of its own: the base is what it would be without adapters
        adapters = init_adapters(jax.random.fold_in(rng, 1), params, self.rules)
        return {**params, ADAPTERS: adapters}, extras

    def loss(
        self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[Mean, Aux]:
        """Returns the objective's loss of merged parameters."""
        return self.objective.loss(merge(params, self.alpha), extras, batch, rng, train=train)

    def after_update(
        self, params: Params, extras: Extras, stats: dict[str, Any], step: jax.Array
    ) -> Extras:
        """Returns the objective's new extras; a teacher follows the merged parameters."""
        return self.objective.after_update(merge(params, self.alpha), extras, stats, step)


def with_lora(objective: Objective, spec: Mapping[str, Any]) -> Objective:
    """Returns the objective of a config's `lora`: as it is where that is empty.

    Args:
        objective: of the base model.
        spec: {} or {"rules": ..., "alpha": ..., "train": ...}, fields of LoRA.

    Raises:
        ValueError: if rules or alpha are missing, or a key is unknown.
    """
    if not spec:
        return objective
    if not spec.get("rules") or "alpha" not in spec:
        raise ValueError(f"lora needs rules and alpha, got {dict(spec)}")
    return build({"lora": LoRA}, {"name": "lora", **spec}, "objective", objective=objective)
