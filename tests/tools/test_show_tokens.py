# SPDX-License-Identifier: Apache-2.0
"""The tokens of samples, the supervised ones marked."""

import pytest

from configs import llava_shapes_stage1, siglip_shapes
from flax_vlm.experiment import Experiment
from flax_vlm.tools.show_tokens import in_colour, show


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    def of(config):
        config.data.dir = str(tmp_path_factory.mktemp("data"))
        return list(show(Experiment.from_config(config), 2, colour=False))

    return of


def test_answers_and_their_ends_are_marked_and_placeholders_counted(lines):
    config = llava_shapes_stage1.get_config().unlock()
    options = {"kinds": ("description",), "train_size": 50, "turns": 1}
    config.data.text.options = config.data.options = options
    found = lines(config)
    patches = (config.model.image.image_size // config.model.image.patch_size) ** 2
    assert len(found) == 4 and f"<image>*{patches} " in found[0] and "[<eos>]" in found[0]
    before, _, after = found[0].partition(" A : ")
    assert "[" not in before and all(token.startswith("[") for token in after.split())
    assert found[1].strip().endswith(f"room for {config.data.text.length}")
    assert f"{after.count('[')} supervised" in found[1]


def test_captions_are_shown_too(lines):
    config = siglip_shapes.get_config().unlock()
    config.data.options = {"train_size": 20, "test_size": 5}
    found = lines(config)
    assert "<eos>" in found[0] and "[" not in found[0] and " 0 supervised" in found[1]


def test_a_terminal_gets_colour():
    assert in_colour(iter([("a", False), ("b", True)]), True) == "a \033[32mb\033[0m"
