# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and counts of full-size checkpoints; nothing is allocated on either side."""

import json
import math
import pathlib

import pytest
import torch
import transformers as hf

import flax_vlm
from flax_vlm.build import build
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.rules import canonical_names, check_tensors, expand
from flax_vlm.convert.saving import find_family
from flax_vlm.models import MODELS
from flax_vlm.models.naflex import NaFlexVisionTransformer
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.trees import named_leaves, num_parameters
from tests.parity.hub_configs import HUB

# what a config does not say: tensors that tell it
TENSORS_THAT_TELL = {
    "google/vit-base-patch16-224": ["classifier.weight"],
    "google/vit-large-patch16-224": ["classifier.weight"],
    "google/vit-base-patch16-224-in21k": ["pooler.dense.weight"],
    **{hub_id: ["embeddings.mask_token"] for hub_id in HUB if "dinov2" in hub_id},
}


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


def test_every_checkpoint_listed_has_the_family_size_and_count_of_its_config():
    eva = json.loads((pathlib.Path(__file__).parent / "goldens" / "eva_shapes.json").read_text())
    configs = {
        "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k": eva["EVA02-B-16"]["config"],
        "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k": eva["EVA02-L-14-336"]["config"],
        **{hub_id: config for hub_id, (_, config, _, _) in HUB.items()},
    }
    listed = flax_vlm.list_pretrained()
    assert len({c.hub_id for c in listed}) == len(listed) == len(configs)
    for c in listed:
        config = configs[c.hub_id]
        assert c.family == config.get("model_type", "open_clip")
        names = dict.fromkeys(TENSORS_THAT_TELL.get(c.hub_id, ()), ())
        model = build(MODELS, FAMILIES[c.family].read(config, names), "model")
        assert c.parameters == num_parameters(parameter_shapes(model)), c.hub_id
        tower = getattr(model, "image", model)
        assert c.image_size == (
            None if isinstance(tower, NaFlexVisionTransformer) else tower.image_size
        )
        assert c.licence in ("apache-2.0", "mit") and c.source.startswith("arXiv:")


def test_the_public_face_is_listed_and_imported_on_first_use():
    assert flax_vlm.__all__ == ["__version__", *flax_vlm._PUBLIC]
    assert all(hasattr(flax_vlm, name) for name in flax_vlm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'loud', public are"):
        flax_vlm.loud  # noqa: B018


def fused(shapes):
    result = {}
    for name, shape in shapes.items():
        if ".up_proj." in name:
            continue
        if ".gate_proj." in name:
            shape, name = (2 * shape[0], *shape[1:]), name.replace("gate_proj", "weights_in")
        result[name.replace("down_proj", "weights_out")] = shape
    return result
