# SPDX-License-Identifier: Apache-2.0
"""Compute and parameters against the tables that others publish, whose conventions differ."""

import re

import numpy as np
import pytest

from flax_vlm.models import build_clip
from flax_vlm.scaling.flops import forward_flops
from flax_vlm.scaling.memory import parameter_counts
from flax_vlm.scaling.tables import load_fact
from tests.scaling.shared import points

# text tower: width, depth, embedding width
TEXT = {
    "S": (384, 12, 384),
    "M": (512, 12, 512),
    "B": (512, 12, 512),
    "L": (768, 12, 768),
    "H": (1024, 24, 1024),
    "g": (1024, 24, 1024),
    "G": (1280, 32, 1280),
    "e": (1280, 36, 1280),
}
ALTERNATIVE = {"S-alt": (256, 10, 256), "M-alt": (384, 12, 384), "B-text-plus": (768, 12, 768)}
NAME = re.compile(r"ViT-(S|M|B|L|H|g|bigG|G|e)-(\d\d)(?:-(alt|text-plus))?(-\d+)?(-quickgelu)?")


def model_of(name, image_size=224):
    """Returns our model of a name such as "ViT-B-16-text-plus", None if it is no plain ViT."""
    found = NAME.fullmatch(name)
    if not found:
        return None
    size, patch, other, *_ = found.groups()
    size = "G" if size == "bigG" else size
    width, depth, embed = ALTERNATIVE[f"{size}-{other}"] if other else TEXT[size]
    text = dict(width=width, depth=depth, mlp_dim=4 * width, num_heads=1)
    image = {"variant": f"{size}/{patch}", "image_size": int(image_size)}
    if name == "ViT-M-16-alt":  # the only one; its count shows it
        image["layer_scale"] = 1e-4
    return build_clip(image=image, text=text, embed_dim=embed)


def rows_of(table):
    for i, name in enumerate(table["model"]):
        model = model_of(name, table["image_size"][i])
        if model is not None:
            yield i, model


def test_flops_without_attention_equal_nezhurinas_profile():
    table = points("nezhurina2025_model_profile")
    count = 0
    for i, model in rows_of(table):
        if table["namespace"][i] in ("clip", "siglip"):  # both are CLIP towers there
            gflop = sum(forward_flops(model, attention=False).values()) / 1e9
            assert gflop == pytest.approx(table["gflops_per_sample"][i], abs=0.01)
            count += 1
    assert count == 26


def test_flops_of_each_tower_equal_open_clips_profile():
    table = points("open_clip_model_profile")
    count = 0
    for i, model in rows_of(table):
        flops, parameters = forward_flops(model), parameter_counts(model)
        for tower in ("image", "text"):
            assert flops[tower] / 1e9 == pytest.approx(table[f"{tower}_gflops"][i], abs=0.02)
        assert parameters["image"] / 1e6 == pytest.approx(table["image_mparams"][i], abs=0.0051)
        assert sum(parameters.values()) / 1e6 == pytest.approx(table["mparams"][i], abs=0.0051)
        count += 1
    assert count == 26  # 25 at 224 to 336 pixels, and H/14 at 378


def test_multiply_adds_are_within_a_percent_of_chertis_profile():
    table = points("cherti2022_arch_profile")
    ours = [
        (sum(forward_flops(model).values()) / 2e9, table["gmacs"][i]) for i, model in rows_of(table)
    ]
    assert len(ours) == 22
    np.testing.assert_allclose(*np.array(ours).T, rtol=1e-2)


def test_the_four_scales_of_datacomp_are_within_three_percent():
    table = load_fact("datacomp2023_scales")
    for name, samples, published in zip(
        *(table[k] for k in ("model", "samples_seen", "macs_paper")), strict=True
    ):
        macs = sum(forward_flops(model_of(name)).values()) / 2 * samples
        assert macs == pytest.approx(published, rel=0.03), name
