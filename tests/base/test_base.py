# SPDX-License-Identifier: Apache-2.0
"""meters, trees, build, shapes, batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.batch import check_batch, normalize_image
from flax_vlm.build import build
from flax_vlm.meters import Mean
from flax_vlm.shapes import check_shapes

TREE = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "b": jnp.float32(2.0)}


def test_means_of_parts_add_up_to_the_mean_of_the_whole():
    values, mask = np.array([1.0, 5.0, 9.0, 2.0]), np.array([True, False, True, True])
    whole = Mean.of(values, mask)
    parts = Mean.of(values[:1], mask[:1]) + Mean.of(values[1:], mask[1:])
    assert whole.value() == parts.value() == 4.0


def test_a_nan_in_a_masked_row_does_not_reach_the_mean():
    assert Mean.of(jnp.array([jnp.nan, 3.0]), jnp.array([False, True])).value() == 3.0


def test_the_mean_of_nothing_is_zero():
    assert Mean.of(jnp.ones(3), jnp.zeros(3, bool)).value() == 0.0


def test_splitting_and_joining_a_tree_gives_it_back():
    kept, rest = trees.split(TREE, lambda path: path.endswith("kernel"))
    assert list(trees.named_leaves(kept)) == ["a/kernel"]
    assert sorted(trees.named_leaves(rest)) == ["a/bias", "b"]
    assert not trees.differences(trees.join(kept, rest), TREE)


def test_differences_name_what_differs():
    other = {"a": {"kernel": TREE["a"]["kernel"].at[0, 0].add(0.5), "bias": jnp.zeros(4)}, "c": 1.0}
    lines = trees.differences(TREE, other)
    assert lines == [
        "a/bias: float32(3,) and float32(4,)",
        "a/kernel: differs by up to 0.5",
        "b: only in the first",
        "c: only in the second",
    ]


def test_negative_zero_is_not_bit_identical_to_zero():
    assert trees.differences({"x": jnp.float32(0.0)}, {"x": jnp.float32(-0.0)})


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="rules must match a parameter path.*'c/.*'"):
        trees.check_patterns(["a/.*", "c/.*"], ["a/kernel", "b"], "rules")


def test_parameters_are_counted():
    assert trees.num_parameters(TREE) == 10 and trees.num_bytes(TREE) == 40


def make_thing(size, *, color="red", given=None):
    return size, color, given


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "think", "size": 1}, "unknown thing 'think', choose .*; did you mean"),
        ({"name": "thing", "size": 1, "colour": 2}, "unknown key .'colour'. for thing 'thing'"),
        ({"size": 1}, "needs a key 'name'"),
        ({"name": "thing", "color": "blue"}, "missing key .'size'. for thing 'thing'"),
    ],
)  # fmt: skip
def test_building_by_name_lists_the_choices(spec, message):
    with pytest.raises(ValueError, match=message):
        build({"thing": make_thing}, spec, "thing", given=3)
    assert build({"thing": make_thing}, {"name": "thing", "size": 1}, "thing", given=3) == (
        1,
        "red",
        3,
    )


def test_shapes_are_checked_across_arrays():
    x, y = np.zeros((2, 3)), np.zeros((2, 4))
    assert check_shapes("B E; B M", x, y) == {"B": 2, "E": 3, "M": 4}
    check_shapes("... E; _ 4; ", x, y, np.float32(1))
    with pytest.raises(ValueError, match=r"shapes must be 'B E; B E', got \[\(2, 3\), \(2, 4\)\]"):
        check_shapes("B E; B E", x, y)
    with pytest.raises(ValueError, match="must be 'B; '"):
        check_shapes("B; ", np.zeros(2), np.zeros(1))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixels": np.zeros(2)}, "unknown batch key 'pixels'"),
        ({"text": np.zeros((2, 3))}, r"batch\['text'\] must be \[B L\] int32"),
        ({"label": np.zeros(2, np.int32), "text": np.zeros((3, 4), np.int32)}, "sizes {'B': 2"),
        ({}, "at least one key"),
    ],
)
def test_the_batch_contract_names_what_is_wrong(batch, message):
    with pytest.raises(ValueError, match=message):
        check_batch(batch)


def test_images_are_normalised_on_the_device_once():
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    out = normalize_image(jnp.asarray(image), mean, std)
    expected = (image / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert normalize_image(out, mean, std) is out and out.dtype == jnp.float32
    assert jax.eval_shape(lambda x: normalize_image(x, mean, std), image).shape == image.shape
