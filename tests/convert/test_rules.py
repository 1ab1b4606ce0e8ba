# SPDX-License-Identifier: Apache-2.0
"""Rules in both directions, and the one error that lists all that is wrong."""

import numpy as np
import pytest

from flax_vlm.convert import rules
from flax_vlm.convert.rules import Ignored, Rule, canonical_names, check_tensors, expand, rule

RNG = np.random.default_rng(0)
LAYOUTS = {
    "DENSE": ((3, 5), (5, 3)),
    "HEADS": ((5, 2, 3), (6, 5)),
    "HEADS_BIAS": ((2, 3), (6,)),
    "MERGE_HEADS": ((2, 3, 5), (5, 6)),
    "CONV": ((2, 4, 3, 5), (5, 3, 2, 4)),
    "CONV_LINEAR": ((2, 4, 3, 5), (5, 24)),
    "VECTOR": ((1, 5), (5,)),
    "TOKENS": ((4, 5), (1, 4, 5)),
    "SCALAR": ((), (1,)),
    "SAME": ((3, 5), (3, 5)),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_layout_and_its_inverse_are_exact(name):
    layout, (leaf_shape, tensor_shape) = getattr(rules, name), LAYOUTS[name]
    leaf = RNG.standard_normal(leaf_shape).astype(np.float32)
    tensor = layout.to_tensor(leaf)
    assert layout.tensor_shape(leaf_shape) == tensor.shape == tensor_shape
    assert np.array_equal(layout.to_leaf(tensor, leaf_shape), leaf)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_leaf_is_the_sum_of_its_blocks(name, rows):
    layout, (leaf_shape, _) = getattr(rules, name), LAYOUTS[name]
    leaf = RNG.standard_normal(leaf_shape).astype(np.float32)
    tensor = layout.to_tensor(leaf)
    found = np.zeros_like(leaf)
    for index, part in layout.row_blocks(leaf_shape, rows):
        block = tensor if part is None else tensor[slice(*part)]
        found[index] += layout.to_leaf(block, found[index].shape)
    assert np.array_equal(found, leaf)


def test_blocks_have_as_many_rows_as_asked_for_and_whole_heads():
    def rows(layout, leaf, count):
        return [part for _, part in layout.row_blocks(leaf, count)]

    assert rows(rules.DENSE, (3, 5), 2) == [(0, 2), (2, 4), (4, 5)]
    assert rows(rules.HEADS, (5, 4, 3), 7) == [(0, 6), (6, 12)]
    assert rows(rules.TOKENS, (4, 5), 2) == [None]


def test_layouts_are_those_of_torch():
    x = RNG.standard_normal((7, 5))
    kernel = RNG.standard_normal((5, 2, 3))
    per_head = np.einsum("td,dnk->tnk", x, kernel)
    np.testing.assert_allclose(x @ rules.HEADS.to_tensor(kernel).T, per_head.reshape(7, 6))
    out = RNG.standard_normal((2, 3, 5))
    merged = per_head.reshape(7, 6) @ rules.MERGE_HEADS.to_tensor(out).T
    np.testing.assert_allclose(merged, np.einsum("tnk,nkd->td", per_head, out))


LEAVES = {"a/kernel": (3, 4, 5), "q": (6, 2), "k": (4, 2), "n": (2,)}
TABLE = [
    rule("layers.{layer}.weight", "a/kernel", rules.DENSE),
    Rule("qk", ("q", "k"), rules.DENSE),
    rule("norm", "n"),
    rule("absent.bias", "b"),
]


def test_layers_become_rows_of_one_leaf_and_fused_tensors_parts():
    entries = {e.tensor: e for e in expand(TABLE, {**LEAVES, "q": (2, 6), "k": (2, 4)})}
    assert list(entries) == [*(f"layers.{i}.weight" for i in range(3)), "qk", "norm"]
    assert entries["layers.1.weight"].shape == (5, 4)
    assert entries["layers.1.weight"].parts[0].layer == 1
    assert entries["qk"].shape == (10, 2)
    assert [part.rows for part in entries["qk"].parts] == [(0, 6), (6, 10)]


def test_a_parameter_needs_exactly_one_rule():
    with pytest.raises(ValueError, match="none for \\['z'\\], two for \\['n'\\]"):
        expand([*TABLE, rule("again", "n")], {**LEAVES, "z": (1,)})


def test_one_error_lists_all_that_is_wrong():
    entries = expand(TABLE, {**LEAVES, "q": (2, 6), "k": (2, 4)})
    tensors = {e.tensor: e.shape for e in entries}
    check_tensors(entries, tensors, [], "x")
    del tensors["layers.1.weight"]
    tensors |= {"norm": (3,), "surprise": (1,), "old.buffer": (4,)}
    with pytest.raises(ValueError) as caught:
        check_tensors(entries, tensors, [Ignored(r"old\..*", "a buffer")], "the folder")
    text = str(caught.value)
    assert "3 differences" in text and "the folder" in text and "old.buffer" not in text
    assert "missing: layers.1.weight [5, 4]" in text
    assert "unexpected: surprise [1]" in text
    assert "wrong shape: norm [3], needed [2]" in text


def test_other_names_are_translated_unless_the_rules_know_them():
    entries = expand([rule("a.new", "n")], {"n": (2,)})
    renames = [(r"^old\.", "a."), (r"\.fresh$", ".new")]
    assert canonical_names(["old.fresh", "b"], entries, renames) == {"a.new": "old.fresh", "b": "b"}
    with pytest.raises(ValueError, match="one tensor must have one name, got a.new and old.fresh"):
        canonical_names(["a.new", "old.fresh"], entries, renames)
