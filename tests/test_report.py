# SPDX-License-Identifier: Apache-2.0
from flax_vlm.report import results_table


def test_results_of_kinds_are_a_table_and_others_are_lines():
    results = {"test/accuracy": 0.5, "test/color/accuracy": 0.25, "test/color/majority": 0.125}
    lines = results_table({**results, "test/a/b/accuracy": 1.0})
    assert [line.split() for line in lines] == [
        ["test/accuracy", "0.5000"],
        ["test", "accuracy", "majority"],
        ["color", "0.25", "0.125"],
        ["a/b", "1"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1, "cells are below each other"
