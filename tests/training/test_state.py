# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp

from flax_vlm import trees
from flax_vlm.training.optimizers import build_optimizer
from flax_vlm.training.state import make_init, with_params
from tests.training.toy import ToyRegression, toy_batch


class WithTeacher(ToyRegression):
    def init(self, rng, batch):
        params, extras = super().init(rng, batch)
        other = {"head": {"bias": jnp.ones(3)}}
        return params, extras | {"teacher": jax.tree.map(jnp.copy, params), "other": other}


def test_what_starts_as_a_copy_of_the_parameters_starts_as_a_copy_of_the_loaded_ones():
    optimizer = build_optimizer({"name": "adamw", "lr": 0.1}, steps=2)
    init = make_init(WithTeacher(), optimizer, ema=True)
    state, other = (init(jax.random.key(seed), toy_batch(0)) for seed in (1, 2))
    started = jax.jit(with_params)(state, other.params)
    for copy in (started.params, started.ema, started.extras["teacher"]):
        assert not trees.differences(copy, other.params)
    # of another shape than the parameter head/bias, and no parameter at all
    rest = {"other": {"head": {"bias": jnp.ones(3)}}, "seen": jnp.zeros(())}
    assert not trees.differences({k: started.extras[k] for k in rest}, rest)
    unchanged = dataclasses.replace(started, params=state.params, ema=state.ema, extras={})
    assert not trees.differences(vars(unchanged), vars(dataclasses.replace(state, extras={})))
