# SPDX-License-Identifier: Apache-2.0
"""Parameter counts of full-size models equal the published ones."""

import pytest

from flax_vlm.models import clip, language_model_sizes, siglip
from flax_vlm.models.published import PUBLISHED, Row, parameter_counts
from flax_vlm.models.variants import VARIANTS


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_parameter_count_equals_the_published_one(name):
    (row,) = parameter_counts([name])
    assert row.name == name and row.source
    assert row.agrees, f"{name}: ours {row.ours:,}, published {row.published:,} by {row.source}"


def test_every_variant_has_a_row():
    vits = {e.arguments["variant"].split("/")[0] for e in PUBLISHED.values() if e.model == "vit"}
    clips = {e.arguments["variant"] for e in PUBLISHED.values() if e.model == "clip"}
    assert set(VARIANTS) <= vits | {name.split("/")[0] for name in clips}
    assert set(clip.PRESETS) == clips
    siglips = {e.arguments["variant"] for e in PUBLISHED.values() if e.model == "siglip"}
    assert {name for name in siglip.PRESETS if not name.endswith("-v2")} <= siglips
    assert set(language_model_sizes.PRESETS) <= set(PUBLISHED)


def test_agreement_is_exact_for_integers_and_to_two_decimals_of_a_million_otherwise():
    assert Row("a", 1_004_999, 1.00, "s").agrees
    assert not Row("a", 1_005_001, 1.00, "s").agrees
    assert not Row("a", 1_000_001, 1_000_000, "s").agrees


def test_unknown_names_are_errors_that_list_the_choices():
    with pytest.raises(ValueError, match="unknown published model 'ViT-B/15'.*did you mean"):
        parameter_counts(["ViT-B/15"])
