# SPDX-License-Identifier: Apache-2.0
"""One-dimensional rotary embedding, its scalings, and the cache of keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.nn import kv_cache, rope_scaling
from flax_vlm.nn.decoder import positions_of, visible_in_cache
from flax_vlm.nn.rotary import rotary1d, rotate
from tests.nn import oracle

RNG = np.random.default_rng(0)


def test_pairs_are_half_a_head_apart_and_turn_by_position_times_frequency():
    x = RNG.standard_normal((2, 3, 4, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2], [5, 3, 9]], np.int32)
    frequencies = rope_scaling.RopeScaling().frequencies(50.0, 6)
    out = np.asarray(rotate(x, rotary1d(positions, frequencies, factor=1.5)))
    for b, t, n, i in np.ndindex(2, 3, 4, 3):
        angle = positions[b, t] * 50.0 ** (-2 * i / 6)
        a, c = x[b, t, n, i], x[b, t, n, i + 3]
        expected = np.array(
            [a * np.cos(angle) - c * np.sin(angle), c * np.cos(angle) + a * np.sin(angle)]
        )
        oracle.assert_close(out[b, t, n, [i, i + 3]], 1.5 * expected)


def test_scalings_keep_fast_dimensions_and_stretch_slow_ones():
    plain = rope_scaling.rope_frequencies(1e4, 32)
    for scaling in (
        rope_scaling.Llama3(8.0, 1.0, 4.0, 256),
        rope_scaling.Yarn(8.0, 256),
    ):
        ratio = plain / np.asarray(scaling.frequencies(1e4, 32), np.float64)
        np.testing.assert_allclose(ratio[[0, -1]], [1, 8], rtol=1e-6)
        assert (np.diff(ratio) > -1e-5).all() and ((ratio > 1.1) & (ratio < 7.9)).any()
    linear = rope_scaling.Linear(4.0).frequencies(1e4, 32)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    dynamic = rope_scaling.Dynamic(2.0, 100)
    np.testing.assert_allclose(dynamic.frequencies(1e4, 32, jnp.int32(100)), plain, rtol=2e-6)
    assert dynamic.frequencies(1e4, 32, jnp.int32(300))[-1] < 0.3 * plain[-1]


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="even head width, got 5"):
        rope_scaling.RopeScaling().frequencies(1e4, 5)


def test_positions_count_real_tokens_and_what_may_be_seen_follows_from_them():
    mask = np.array([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]], bool)
    positions = positions_of(mask, np.array([0, 7]))
    np.testing.assert_array_equal(positions, [[-1, 0, 1, -1, 2], [7, 8, -1, -1, -1]])
    seen = np.asarray(visible_in_cache(positions, positions))[:, 0]
    for b, s, t in np.ndindex(2, 5, 5):
        assert seen[b, s, t] == (mask[b, s] and mask[b, t] and t <= s)


def filled(dtype, layers=2, batch=3, heads=2, head_dim=8):
    cache = kv_cache.init_cache(layers, batch, 5, heads, head_dim, dtype)
    pieces = []
    for size in (3, 1):
        cache = cache.claim(jnp.full((batch, size), size, jnp.int32))
        piece = RNG.standard_normal((2, layers, batch, size, heads, head_dim)).astype(np.float32)
        for layer in range(layers):
            cache = cache.write(jnp.asarray(layer), piece[0, layer], piece[1, layer])
        pieces.append(piece)
    return cache, np.concatenate(pieces, axis=3)


def test_what_is_written_is_read_in_the_order_of_the_slots():
    cache, (k, v) = filled("float32")
    assert int(cache.length) == 4 and cache.capacity == 5
    np.testing.assert_array_equal(cache.positions, [[3, 3, 3, 1, -1]] * 3)
    for layer in range(2):
        read = cache.read(jnp.asarray(layer), "float32")
        for ours, expected in zip(read, (k[layer], v[layer]), strict=True):
            np.testing.assert_array_equal(ours[:, :4], expected)


def test_an_int8_cache_is_off_by_half_a_step_of_each_vector():
    cache, (k, _) = filled("int8")
    read, _ = cache.read(jnp.asarray(1), "float32")
    steps = np.abs(k[1]).max(-1, keepdims=True) / 127
    off = np.abs(np.asarray(read)[:, :4] - k[1]) / steps
    assert 0.3 < off.max() <= 0.5001
    assert cache.k.dtype == jnp.int8 and cache.k_scale.shape == (2, 3, 5, 2)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_are_taken_and_slots_are_added_without_touching_what_is_there(dtype):
    cache, _ = filled(dtype)
    other = cache.take(jnp.array([2, 0, 2, 1])).grow(7)
    assert other.capacity == 7 and int(other.length) == 4
    np.testing.assert_array_equal(other.positions[0], [3, 3, 3, 1, -1, -1, -1])
    for mine, theirs in zip(
        other.read(jnp.asarray(1), "float32"), cache.read(jnp.asarray(1), "float32"), strict=True
    ):
        np.testing.assert_array_equal(mine[:, :4], np.asarray(theirs)[[2, 0, 2, 1], :4])


def test_the_cache_is_split_over_the_mesh_where_its_axes_divide():
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    with jax.set_mesh(mesh):
        whole, odd = (
            jax.jit(lambda n=n, m=m: kv_cache.init_cache(3, n, 6, m, 5, "int8"))()
            for n, m in ((4, 2), (3, 1))
        )
    assert whole.k.sharding.shard_shape(whole.k.shape) == (3, 1, 6, 1, 5)
    assert whole.k_scale.sharding.shard_shape(whole.k_scale.shape) == (3, 1, 6, 1)
    assert odd.k.sharding.shard_shape(odd.k.shape) == (3, 3, 6, 1, 5)
