# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules from optax, composed by parameter-path rules.

Order: clip by global norm; the optimizer's own scaling; decoupled weight decay on what `decay`
matches; learning-rate multipliers by rule; the schedule; clamps. Weight decay is AdamW's, i.e.
multiplied by the learning rate (big_vision multiplies by the schedule alone: its wd 1e-4 at lr 1e-3
is 0.1 here).

Frozen parameters are split off before the gradient is taken: they have neither gradients nor
optimizer slots.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from flax_vlm import trees
from flax_vlm.build import build, lookup

Schedule = Callable[[jax.Array], jax.Array]


def warmup_cosine(lr: float, steps: int, warmup: float = 0.1, end: float = 0.0) -> Schedule:
    """Returns a linear warmup to `lr`, then a half cosine down to `end` x lr at `steps`.

    Args:
        lr: peak learning rate.
        steps: length of the whole run.
        warmup: steps, or a share of the run where below 1.
        end: final learning rate as a share of the peak.
    """
    return optax.warmup_cosine_decay_schedule(0.0, lr, _count(warmup, steps), steps, lr * end)


def rsqrt(
    lr: float, steps: int, warmup: float = 0.1, timescale: int = 10_000, cooldown: float = 0.0
) -> Schedule:
    """Returns warmup x lr / sqrt(1 + (step - warmup) / timescale), with a linear cooldown to 0 at
    the end.

    Source: Zhai et al., Scaling Vision Transformers, 2022, arXiv:2106.04560, section 3.5 and
        appendix D.
    """
    rise, fall = _count(warmup, steps), _count(cooldown, steps)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        value = lr / jnp.sqrt(1.0 + jnp.maximum(step - rise, 0.0) / timescale)
        value = value * jnp.minimum(1.0, step / max(rise, 1))
        return value * jnp.clip((steps - step) / fall, 0.0, 1.0) if fall else value

    return schedule


def constant(lr: float, steps: int, warmup: float = 0.0) -> Schedule:
    """Returns `lr` after a linear warmup."""
    rise = _count(warmup, steps)
    return optax.linear_schedule(0.0, lr, rise) if rise else optax.constant_schedule(lr)


def _count(value: float, steps: int) -> int:
    return round(value * steps) if value < 1 else int(value)


SCHEDULES = {"warmup_cosine": warmup_cosine, "rsqrt": rsqrt, "constant": constant}


def adamw(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str | None = None
) -> optax.GradientTransformation:
    """Returns Adam's scaling; `mu_dtype` "bfloat16" halves the first moment's memory.

    Source: Loshchilov & Hutter, 2019, arXiv:1711.05101. SigLIP uses b2 = 0.95 for stability.
    """
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)


def lion(
    b1: float = 0.9, b2: float = 0.99, mu_dtype: str | None = None
) -> optax.GradientTransformation:
    """Returns Lion's scaling. Source: Chen et al., 2023, arXiv:2302.06675."""
    return optax.scale_by_lion(b1, b2, mu_dtype=mu_dtype)


def adafactor(
    momentum: float = 0.9, decay: float = 0.8, momentum_dtype: str = "bfloat16"
) -> optax.GradientTransformation:
    """Returns the memory-lean Adafactor of ViT training: factored second moments, bfloat16
    momentum.

    No update clipping and no parameter scaling, as in Zhai et al., 2022, arXiv:2106.04560, section
    3.4.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay, min_dim_size_to_factor=32),
        optax.ema(momentum, debias=False, accumulator_dtype=jnp.dtype(momentum_dtype)),
    )


def sgd(momentum: float = 0.0) -> optax.GradientTransformation:
    """Returns plain or momentum SGD: the choice for tests in which two runs must agree."""
    return optax.trace(momentum) if momentum else optax.identity()


def muon(
    momentum: float = 0.95, rms: float = 0.2, b1: float = 0.9, b2: float = 0.95
) -> optax.GradientTransformation:
    """Returns Muon's scaling for the kernels of scanned blocks, Adam's for all else.

    The momentum of a kernel, as a matrix from what it reads to what it writes, becomes its nearest
    orthogonal matrix (five steps of Newton and Schulz); `rms` is the root mean square that the
    update then has, so that one learning rate fits both.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale is Liu et al. 2025,
        arXiv:2502.16982, section 2.2.
    """

    def label(path: str, _: Any) -> str:
        return "muon" if trees.is_scanned(path) and path.endswith("/kernel") else "adam"

    def matrix(path: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers:
        axes = tuple(range(1, len(leaf.shape)))  # without the layers
        cut = -1 if path.endswith("/o/kernel") else 1  # heads come in, or go out
        return optax.contrib.MuonDimensionNumbers(axes[:cut], axes[cut:])

    def scaled(path: str, update: jax.Array) -> jax.Array:
        sides = [math.prod(update.shape[a] for a in axes) for axes in matrix(path, update)]
        return update * (rms * max(sides) ** 0.5)  # an orthogonal matrix has 1 / sqrt(larger side)

    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            beta=momentum,
            weight_dimension_numbers=lambda params: trees.map_with_path(matrix, params),
        ),
        optax.stateless(lambda updates, params: trees.map_with_path(scaled, updates)),
    )
    parts = {"muon": matrices, "adam": optax.scale_by_adam(b1, b2)}
    return optax.partition(parts, lambda params: trees.map_with_path(label, params))


OPTIMIZERS = {"adamw": adamw, "lion": lion, "adafactor": adafactor, "muon": muon, "sgd": sgd}

# What an encoder applies before its blocks: models/vit.py, models/text_encoder.py.
BEFORE_BLOCKS = ("patches", "cls", "registers", "mask", "positions", "ln_pre", "embedding")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation with the rules that decide what it acts on.

    Attributes:
        transform: acts on the trained parameters alone.
        schedule: step -> learning rate before multipliers, for the log.
        freeze: regular expressions of parameter paths that are not trained.
    """

    transform: optax.GradientTransformation
    schedule: Schedule
    freeze: tuple[str, ...] = ()

    def split(self, params: Mapping) -> tuple[dict, dict]:
        """Returns (trained, frozen) parameters as nested dicts."""
        return trees.split(params, lambda path: not trees.matches(self.freeze, path))

    def join(self, trained: Mapping, frozen: Mapping) -> dict:
        """Returns the whole parameter tree again."""
        return trees.join(trained, frozen)


def build_optimizer(
    spec: Mapping[str, Any], steps: int, paths: Sequence[str] | None = None
) -> Optimizer:
    """Returns the optimizer of a config.

    Args:
        spec: name and lr; optionally schedule {name, ...}, weight_decay, decay (regexes of what is
            decayed), lr_multipliers ((regex, factor), ...; first match wins), layer_decay (see
            `layer_factors`; 1 = off), freeze (regexes), clamp ((regex, low, high), ...), grad_clip
            (global norm; 0 = off). Every other key is an argument of the optimizer itself.
        steps: length of the run, for the schedule.
        paths: all parameter paths; where given, a rule that matches none of them is an error.

    Raises:
        ValueError: for an unknown name or key, or a rule that matches no parameter.
    """
    spec = dict(spec)
    lr = spec.pop("lr")
    schedule = build(
        SCHEDULES, spec.pop("schedule", {"name": "constant"}), "schedule", lr=lr, steps=steps
    )
    weight_decay, decay = spec.pop("weight_decay", 0.0), tuple(spec.pop("decay", (".*/kernel",)))
    multipliers = tuple(tuple(rule) for rule in spec.pop("lr_multipliers", ()))
    clamps = tuple(tuple(rule) for rule in spec.pop("clamp", ()))
    layer_decay = spec.pop("layer_decay", 1.0)
    freeze, grad_clip = tuple(spec.pop("freeze", ())), spec.pop("grad_clip", 0.0)
    if paths is not None:
        trees.check_patterns(freeze, paths, "optimizer.freeze")
        trees.check_patterns([m[0] for m in multipliers], paths, "optimizer.lr_multipliers")
        trees.check_patterns([c[0] for c in clamps], paths, "optimizer.clamp")
        if all(trees.matches(freeze, path) for path in paths):
            raise ValueError(f"optimizer.freeze must leave something to train, got {freeze}")
    lookup(OPTIMIZERS, spec.get("name"), "optimizer")
    parts = [optax.clip_by_global_norm(grad_clip)] if grad_clip else []
    parts.append(build(OPTIMIZERS, spec, "optimizer"))
    if weight_decay:
        mask = lambda params: trees.map_with_path(lambda p, _: trees.matches(decay, p), params)  # noqa: E731
        parts.append(optax.add_decayed_weights(weight_decay, mask=mask))
    if multipliers:
        parts.append(_multiply_by_rule(multipliers))
    if layer_decay != 1.0:
        parts.append(_multiply_by_layer(layer_decay))
    parts.append(optax.scale_by_learning_rate(schedule))
    if clamps:
        parts.append(_clamp_by_rule(clamps))
    return Optimizer(optax.chain(*parts), schedule, freeze)


def _multiply_by_rule(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    def factor(path: str) -> float:
        return next((f for pattern, f in rules if re.fullmatch(pattern, path)), 1.0)

    return optax.stateless(
        lambda updates, params: trees.map_with_path(lambda p, u: u * factor(p), updates)
    )


def layer_factors(params: Mapping, decay: float) -> dict[str, jax.Array]:
    """Returns {path: factor of the learning rate, broadcastable to the parameter}.

        block l of depth, l = 0 ..         decay^(depth - l)
        what comes before the blocks       decay^(depth + 1)
        what comes after, and the rest     1

    Every encoder counts for itself. A factor of scanned blocks is [depth, 1, ...].

    Args:
        params: the trained parameters, arrays or shapes.
        decay: 0.65 ... 0.9 is usual; smaller means that early layers stay nearer to their start.

    Source: BEiT, Bao et al. 2021, arXiv:2106.08254, and the fine-tuning of MAE, arXiv:2111.06377.
    """
    leaves = trees.named_leaves(params)
    depths = {p.split("encoder/")[0]: x.shape[0] for p, x in leaves.items() if trees.is_scanned(p)}

    def factor(path: str, leaf: Any) -> jax.Array:
        if trees.is_scanned(path):
            exponents = leaf.shape[0] - jnp.arange(leaf.shape[0], dtype=jnp.float32)
            return decay ** exponents.reshape(-1, *(1,) * (len(leaf.shape) - 1))
        owner = max(filter(path.startswith, depths), key=len, default=None)
        early = owner is not None and path[len(owner) :].split("/")[0] in BEFORE_BLOCKS
        return jnp.float32(decay ** (depths[owner] + 1) if early else 1.0)

    return {path: factor(path, leaf) for path, leaf in leaves.items()}


def _multiply_by_layer(decay: float) -> optax.GradientTransformation:
    def update(updates: Mapping, params: Mapping) -> Mapping:
        factors = layer_factors(updates, decay)
        return trees.map_with_path(lambda path, u: u * factors[path], updates)

    return optax.stateless(update)


def _clamp_by_rule(rules: Sequence[tuple[str, float, float]]) -> optax.GradientTransformation:
    """Shortens an update so that the parameter lands inside [low, high], as CLIP does with its
    logit scale.
    """

    def one(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        bounds = next((b for pattern, *b in rules if re.fullmatch(pattern, path)), None)
        return update if bounds is None else jnp.clip(param + update, *bounds) - param

    return optax.stateless(lambda updates, params: trees.map_with_path(one, updates, params))
