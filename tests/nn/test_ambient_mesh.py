# SPDX-License-Identifier: Apache-2.0
"""Rows of activations stay split over the batch axes, whatever the parameters are split over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_vlm.models.text_encoder import TextEncoder
from flax_vlm.nn.ambient_mesh import keep_rows, num_devices, target_platform
from flax_vlm.training.sharding import make_mesh, parameter_shardings

WIDTH, ROWS, TOKENS = 128, 64, 16


def temporary_bytes(mesh):
    """Memory of the gradient of a text encoder on a mesh, besides arguments and results."""
    encoder = TextEncoder(
        width=WIDTH, depth=2, num_heads=4, mlp_dim=4 * WIDTH, vocab_size=512, length=TOKENS
    )
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    text = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32, sharding=rows)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), text)
    shardings = parameter_shardings(shapes, mesh)
    params = jax.tree.map(
        lambda s, on: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on), shapes, shardings
    )

    def loss(params, text):
        return jnp.square(encoder.apply(params, text).pooled).sum()

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, text)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (2, 4)])
def test_splitting_parameters_does_not_gather_the_batch(data, fsdp):
    # XLA's own choice is to split the width and gather the rows: 3 to 6 times the memory here
    replicated, split = temporary_bytes(make_mesh(8)), temporary_bytes(make_mesh(data, fsdp))
    assert split < 1.1 * replicated, (split, replicated)


def test_keep_rows_changes_no_value_and_no_gradient():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3, 5)), jnp.float32)

    def f(x):
        return jnp.sum(jnp.sin(keep_rows(x)) * jnp.arange(5.0)[None, None])

    expected = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(x) * jnp.arange(5.0)[None, None]))(x)
    with jax.set_mesh(make_mesh(2, 4)):
        found = jax.jit(jax.value_and_grad(f))(x)
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=2e-5)


def test_rows_that_do_not_divide_are_left_alone():
    with jax.set_mesh(make_mesh(2, 4)):
        assert jax.jit(keep_rows)(jnp.ones((3, 2))).shape == (3, 2)


def test_a_device_that_is_mapped_by_hand_is_left_alone():
    mesh = make_mesh(2, 4)
    on_rows = jax.shard_map(
        keep_rows, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp"))
    )
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(on_rows)(jnp.arange(64.0)), jnp.arange(64.0))


def test_the_platform_and_devices_are_those_of_the_mesh():
    assert (target_platform(), num_devices()) == ("cpu", 8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = jax.eval_shape(lambda: jnp.zeros((num_devices(), len(target_platform()))))
    assert found.shape == (2, 3)
