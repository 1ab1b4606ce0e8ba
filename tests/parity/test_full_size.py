# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and counts of full-size checkpoints; nothing is allocated on either side."""

import math

import pytest
import torch
import transformers as hf

from flax_vlm.build import build
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.rules import canonical_names, check_tensors, expand
from flax_vlm.convert.saving import find_family
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.trees import named_leaves
from tests.parity.hub_configs import HUB


@pytest.mark.parametrize("hub_id", list(HUB))
def test_names_and_shapes_are_those_that_transformers_builds(hub_id):
    kind, config, count, tensors = HUB[hub_id]
    kind = getattr(hf, kind)
    with torch.device("meta"):
        reference = kind(kind.config_class(**config))
    shapes = {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    family = FAMILIES[config["model_type"]]
    model = build(MODELS, family.read(config, shapes), "model")
    leaves = {p: tuple(x.shape) for p, x in named_leaves(parameter_shapes(model)).items()}
    entries = expand(family.rules(model), leaves)
    assert sum(math.prod(shape) for shape in leaves.values()) == count
    assert sum(p.numel() for p in reference.parameters()) == count
    assert len(entries) == tensors
    found = canonical_names(shapes, entries, family.renames)
    in_file = {new: shapes[old] for new, old in found.items()}
    if config.get("use_swiglu_ffn"):  # apart in memory, fused in files
        in_file = fused(in_file)
    check_tensors(entries, in_file, (), hub_id)
    assert find_family(model, parameter_shapes(model))[0] == config["model_type"]


def fused(shapes):
    result = {}
    for name, shape in shapes.items():
        if ".up_proj." in name:
            continue
        if ".gate_proj." in name:
            shape, name = (2 * shape[0], *shape[1:]), name.replace("gate_proj", "weights_in")
        result[name.replace("down_proj", "weights_out")] = shape
    return result
