# SPDX-License-Identifier: Apache-2.0
"""The prompt templates and class names that come as data files."""

import hashlib
import json
import pathlib

import pytest

from flax_vlm.evaluation import zero_shot
from flax_vlm.evaluation.zero_shot import CLASS_NAMES, TEMPLATES, ZeroShot
from tests.evaluation import fakes

FOLDER = pathlib.Path(zero_shot.__file__).parent


def test_there_are_clips_80_templates_and_its_short_set():
    assert len(set(TEMPLATES["imagenet"])) == len(TEMPLATES["imagenet"]) == 80
    assert len(set(TEMPLATES["short"])) == len(TEMPLATES["short"]) == 7
    assert set(TEMPLATES["short"]) <= set(TEMPLATES["imagenet"])
    for templates in TEMPLATES.values():
        assert all(template.count("{}") == 1 for template in templates)
    assert TEMPLATES["imagenet"][0] == "a bad photo of a {}."
    assert TEMPLATES["imagenet"][-1] == "a tattoo of the {}."


def test_there_are_imagenets_1000_names_in_the_order_of_its_labels():
    names = CLASS_NAMES["imagenet"]
    assert len(names) == 1000
    assert all(name == name.strip() and name and "," not in name for name in names)
    known = {
        0: "tench",
        1: "goldfish",
        207: "Golden Retriever",
        281: "tabby cat",
        999: "toilet paper",
    }
    assert {label: names[label] for label in known} == known
    twice = sorted({name for name in names if names.count(name) > 1})
    assert twice == ["missile", "sunglasses"]  # as CLIP has them


@pytest.mark.parametrize("name", ["prompt_templates.json", "imagenet_names.json"])
def test_a_data_file_states_its_source_and_licence(name):
    content = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert "github.com/openai/CLIP" in content["source"]
    assert content["licence"].startswith("MIT: Copyright")


def test_the_lists_are_those_that_were_read_from_their_source():
    found = {
        "imagenet": hashlib.sha256("\n".join(TEMPLATES["imagenet"]).encode()).hexdigest()[:16],
        "names": hashlib.sha256("\n".join(CLASS_NAMES["imagenet"]).encode()).hexdigest()[:16],
    }
    assert found == {"imagenet": "4f976686fb651bb5", "names": "571ae1c583b4be7d"}


def test_a_config_names_templates_and_class_names():
    evaluator = ZeroShot(fakes.make_dataset(), templates="imagenet", class_names="imagenet")
    prompts = evaluator.prompts()
    assert (len(prompts), len(prompts[0])) == (1000, 80)
    assert prompts[999][0] == "a bad photo of a toilet paper."
    with pytest.raises(ValueError, match="unknown set of class names 'cifar'.*imagenet"):
        ZeroShot(fakes.make_dataset(), class_names="cifar").prompts()
