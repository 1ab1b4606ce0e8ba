# SPDX-License-Identifier: Apache-2.0
"""Compression of visual tokens against NumPy, masks, and how many tokens are left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.nn.compression import build_compression

B, P, D = 3, 16, 6
SPECS = [
    {"name": "average_pool", "scale": 2},
    {"name": "average_pool", "scale": 4},
    {"name": "pixel_shuffle", "scale": 2},
    *({"name": "token_merging", "tokens": n} for n in (15, 8, 5, 1)),
]


def tokens(*shape, seed=1):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def merged(x, wanted):
    """Returns what token merging leaves of one row [P, D], as a list of (place, size, mean)."""
    left = [(n, 1, np.float64(row)) for n, row in enumerate(x)]
    while len(left) > wanted:
        first, second = left[::2], left[1::2]
        pairs = []
        for a, (_, _, v) in enumerate(first):
            cosines = [v @ w / np.linalg.norm(v) / np.linalg.norm(w) for _, _, w in second]
            pairs.append((max(cosines), a, int(np.argmax(cosines))))
        pairs.sort(reverse=True)
        chosen = pairs[: min(len(left) - wanted, len(left) // 2)]
        groups = {b: [second[b]] for b in range(len(second))}
        for _, a, b in chosen:
            groups[b].append(first[a])
        gone = {a for _, a, _ in chosen}
        left = [one for a, one in enumerate(first) if a not in gone]
        for members in groups.values():
            size = sum(s for _, s, _ in members)
            mean = sum(s * v for _, s, v in members) / size
            left.append((members[0][0], size, mean))
    return sorted(left, key=lambda one: one[0])


def oracle(spec, x):
    if spec["name"] == "token_merging":
        return np.stack([[v for _, _, v in merged(row, spec["tokens"])] for row in x])
    scale = spec["scale"]
    grid = x.reshape(B, 4 // scale, scale, 4 // scale, scale, D).transpose(0, 1, 3, 2, 4, 5)
    cells = grid.reshape(B, -1, scale * scale, D)
    return cells.mean(2) if spec["name"] == "average_pool" else cells.reshape(B, -1, scale**2 * D)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_compression_is_its_formula_and_says_how_many_tokens_are_left(spec):
    compression = build_compression(spec)
    x = tokens(B, P, D)
    found, mask = jax.jit(compression)(x)
    expected = oracle(spec, x)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, abs(expected).max()))
    assert found.shape[1] == compression.num_tokens(P) and mask is None


def test_merging_nothing_is_the_identity():
    x = tokens(B, P, D)
    for count in (P, P + 5):
        compression = build_compression({"name": "token_merging", "tokens": count})
        np.testing.assert_array_equal(compression(x)[0], x)
        assert compression.num_tokens(P) == P


def test_equal_neighbours_become_one_and_nothing_else_changes():
    half = tokens(B, P // 2, D)
    x = np.repeat(half, 2, axis=1)  # a b a' b' pair up
    found, _ = build_compression({"name": "token_merging", "tokens": P // 2})(x)
    np.testing.assert_allclose(found, half, atol=1e-6)


@pytest.mark.parametrize(
    "spec", [SPECS[0], *({"name": "token_merging", "tokens": n} for n in (5, 12))]
)
def test_what_masked_tokens_hold_changes_no_real_token(spec):
    compression = jax.jit(build_compression(spec))
    x = tokens(B, P, D)
    mask = np.random.default_rng(2).random((B, P)) < np.array([[0.9], [0.5], [0.2]])
    reference, kept = compression(x, mask)
    for other in (tokens(B, P, D, seed=7), np.full((B, P, D), np.nan, np.float32)):
        found, kept_too = compression(np.where(mask[:, :, None], x, other), mask)
        np.testing.assert_array_equal(kept, kept_too)
        np.testing.assert_array_equal(found[kept], reference[kept])


def test_every_real_token_is_counted_once_however_many_are_masked():
    mask = np.arange(P)[None] < np.array([3, 16, 9])[:, None]
    # a constant first feature: the weighted mean of the merged tokens says whether sizes are right
    x = tokens(B, P, D)
    compression = build_compression({"name": "token_merging", "tokens": 1})
    found, kept = compression(x, mask)
    assert kept.all()
    expected = np.stack([row[m].mean(0) for row, m in zip(x, mask, strict=True)])
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)


def test_a_row_with_fewer_real_tokens_than_are_left_says_so_in_its_mask():
    mask = np.arange(P)[None] < np.array([3, 16, 9])[:, None]
    _, kept = build_compression({"name": "token_merging", "tokens": 8})(tokens(B, P, D), mask)
    assert kept.sum(1).tolist()[0] <= 3 and kept.sum(1).tolist()[1] == 8
    _, kept = build_compression({"name": "average_pool"})(tokens(B, P, D), mask)
    np.testing.assert_array_equal(kept.sum(1), [2, 4, 3])


def test_gradients_of_a_merged_token_are_shared_by_its_parts():
    x = jnp.asarray(tokens(1, 4, D))
    compression = build_compression({"name": "token_merging", "tokens": 1})
    gradient = jax.grad(lambda x: compression(x)[0].sum())(x)
    np.testing.assert_allclose(gradient, np.full((1, 4, D), 0.25), atol=1e-6)


def test_impossible_compressions_are_refused():
    with pytest.raises(ValueError, match="at least one token, got 0"):
        build_compression({"name": "token_merging", "tokens": 0})(tokens(B, P, D))
    with pytest.raises(ValueError, match="square grid whose side 3 divides, got 16 patches"):
        build_compression({"name": "average_pool", "scale": 3})(tokens(B, P, D))
    with pytest.raises(ValueError, match="takes no mask"):
        build_compression({"name": "pixel_shuffle"})(tokens(B, P, D), np.ones((B, P), bool))
    with pytest.raises(ValueError, match="unknown compression 'tome'.*token_merging"):
        build_compression({"name": "tome"})
