# SPDX-License-Identifier: Apache-2.0
"""The search for the largest batch that fits, against chips with a known answer."""

import pytest

from flax_vlm.tools.batch_search import STEP, largest_batch


class Chip:
    """Memory that grows as base + slope x batch, and a little faster above `bend`."""

    def __init__(self, base, slope, hbm=16.0, bend=10**9, tells=True):
        self.base, self.slope, self.hbm, self.bend = base, slope, hbm, bend
        self.tells, self.tried, self.fitted = tells, [], 0

    def peak(self, batch):
        return self.base + self.slope * batch + 0.5 * self.slope * max(0, batch - self.bend)

    def __call__(self, batch):
        self.tried.append(batch)
        fits = self.peak(batch) <= self.hbm
        self.fitted += fits
        needed = {"needed_gib": self.peak(batch), "available_gib": self.hbm} if self.tells else {}
        unknown = {"needed_gib": None, "available_gib": None}
        return {"fits": fits, "batch": batch, **({} if fits else unknown | needed)}

    def answer(self):
        return max((b for b in range(2**16) if self.peak(b) <= self.hbm), default=0)


@pytest.mark.parametrize("start", [1, 7, 64, 128, 5000])
@pytest.mark.parametrize("bend", [10**9, 40])
@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(("base", "slope"), [(0.7, 0.05), (9.0, 0.011), (2.0, 0.4), (12.0, 2.0)])
def test_the_answer_fits_and_an_eighth_more_does_not(base, slope, tells, bend, start):
    chip = Chip(base, slope, bend=bend, tells=tells)
    found = largest_batch(chip, start)["batch"]
    truth = chip.answer()
    assert found <= truth < found + max(STEP, found // 8) + 1
    assert len(chip.tried) == len(set(chip.tried)) <= 18


@pytest.mark.parametrize(("base", "slope"), [(0.7, 0.05), (9.0, 0.011), (2.0, 0.4)])
def test_two_refusals_predict_the_one_size_that_is_compiled_whole(base, slope):
    chip = Chip(base, slope)
    largest_batch(chip, 4096)
    assert chip.fitted == 1 and len(chip.tried) == 4


def test_below_eight_the_answer_is_a_power_of_two():
    assert largest_batch(Chip(1.0, 3.0), 128)["batch"] == 4  # 5 would fit


def test_a_model_that_does_not_fit_at_all_has_no_answer():
    chip = Chip(100.0, 1.0)
    assert largest_batch(chip, 64) is None and chip.tried[-1] == 1


def test_no_batch_above_the_limit_is_tried_where_memory_has_no_limit():
    chip = Chip(0.0, 1e-9)
    assert largest_batch(chip, 3000, limit=4096)["batch"] == 4096
    assert max(chip.tried) == 4096
