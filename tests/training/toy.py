# SPDX-License-Identifier: Apache-2.0
"""A tiny objective for tests of the training layer: two linear layers, extras that count, no
linen."""

import dataclasses

import jax
import jax.numpy as jnp

from flax_vlm.meters import Mean
from flax_vlm.objectives.base import Aux


@dataclasses.dataclass(frozen=True)
class ToyRegression:
    """Mean squared error of image @ first @ second against a label, masked by example."""

    width: int = 16
    additive: bool = True
    dropout: float = 0.0

    @property
    def predictions(self):
        return {"value": lambda params, extras, batch: self._value(params, batch, None)}

    def init(self, rng, batch):
        size = batch["image"].shape[1] * batch["image"].shape[2] * batch["image"].shape[3]
        a, b = jax.random.split(rng)
        params = {
            "encoder": {"fc1": {"kernel": jax.random.normal(a, (size, self.width)) * 0.1}},
            "head": {"kernel": jax.random.normal(b, (self.width, 1)) * 0.1, "bias": jnp.zeros(1)},
        }
        return params, {"seen": jnp.zeros(())}

    def _value(self, params, batch, rng):
        x = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) / 255.0
        hidden = jnp.tanh(x @ params["encoder"]["fc1"]["kernel"])
        if rng is not None and self.dropout:
            hidden = hidden * jax.random.bernoulli(rng, 1 - self.dropout, hidden.shape)
        bias = params["head"]["bias"].reshape(1, 1)
        return (hidden @ params["head"]["kernel"] + bias)[:, 0]

    def loss(self, params, extras, batch, rng, *, train):
        error = self._value(params, batch, rng if train else None) - batch["label"]
        mask = batch["example_mask"]
        stats = {"seen": mask.sum(dtype=jnp.float32)}
        return Mean.of(error**2, mask), Aux({"absolute": Mean.of(jnp.abs(error), mask)}, stats)

    def after_update(self, params, extras, stats, step):
        return {"seen": extras["seen"] + stats["seen"]}


def toy_batch(seed, size=8):
    """A batch whose last third is partly masked, so that weights are not the batch size."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 4, 4, 2), dtype=np.uint8),
        "label": rng.integers(-2, 3, size).astype(np.int32),
        "example_mask": np.arange(size) % 3 != 2,
    }
