# SPDX-License-Identifier: Apache-2.0
"""Pictures of any size to tiles and indices; the numbers of transformers are in tests/parity."""

import dataclasses

import numpy as np
import pytest

from flax_vlm.data.anyres import AnyRes, best_pinpoint, tile_index, unpadded
from flax_vlm.data.chat_templates import Rendered, expand_markers
from flax_vlm.data.hf_images import image_recipe
from flax_vlm.data.tile_rows import TileRows
from flax_vlm.data.tiles import NEWLINE, row_places

HALF = (0.5, 0.5, 0.5)
NEXT = AnyRes("LlavaNextImageProcessor", ((4, 8), (8, 4), (8, 8)), 4, HALF, HALF, grid=(2, 2))
ONEVISION = dataclasses.replace(NEXT, max_tiles=9)
ROWS = TileRows("Idefics3ImageProcessor", 8, 4, HALF, HALF, grid=(1, 1))


def test_the_diagram_of_a_wide_picture():
    index, weight = NEXT.places((4, 8), True)
    expected = [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]
    assert index[:, 0].tolist() == expected and (weight == 1).all()
    image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    tiles = NEXT.tiles(image, True)
    assert tiles.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(np.concatenate([tiles[1], tiles[2]], axis=1), image)
    assert NEXT.text((4, 8), True) == "<image>" * 14


def test_padding_is_black_and_its_tokens_are_left_out():
    image = np.full((2, 8, 3), 200, np.uint8)
    tiles = NEXT.tiles(image, True)
    whole = np.concatenate([tiles[1], tiles[2]], axis=1)
    assert (whole[1:3] == 200).all() and not whole[[0, 3]].any()
    rows = NEXT.places((2, 8), True)[0][4:, 0]  # one of two rows of tokens: half a row is none
    assert (rows == NEWLINE).sum() == 2
    tall = dataclasses.replace(NEXT, grid=(4, 4)).places((2, 8), True)[0][16:, 0]
    assert (tall == NEWLINE).sum() == 2, "two of four rows of tokens are padding"


def test_half_a_token_of_picture_is_padding():
    assert unpadded((8, 5), (4, 4)) == (slice(None), slice(1, 3))
    assert unpadded((5, 8), (4, 4)) == (slice(1, 3), slice(None))
    assert unpadded((3, 3), (4, 4)) == (slice(None), slice(0, 4))


def test_rows_of_many_tokens_are_shrunk_to_weighted_sums():
    small = dataclasses.replace(ONEVISION, max_tiles=1)
    index, weight = small.places((8, 8), True)
    inner = index[4:].reshape(2, 3, 4)  # 4 x 4 tokens become 2 x 2, and a newline per row
    assert (inner[:, 2, 0] == NEWLINE).all()
    np.testing.assert_allclose(weight.sum(axis=1), 1.0)
    np.testing.assert_allclose(weight[4], 0.25)  # halfway between four tokens
    assert sorted(inner[0, 0].tolist()) == [4, 5, 6, 7]
    assert len(ONEVISION.places((8, 8), True)[0]) == 4 + 4 * 5, "16 tokens are not too many for 9"


def test_several_pictures_of_onevision_are_not_cut():
    image = np.zeros((2, 4, 3), np.uint8)
    tiles = ONEVISION.tiles(image, False)
    assert tiles.shape == (1, 4, 4, 3) and ONEVISION.num_tiles((2, 4), False) == 1
    assert (tiles[0, 0] == 127).all() and not tiles[0, 1:3].any(), "a square of the mean colour"
    assert ONEVISION.places((2, 4), False)[0][:, 0].tolist() == [0, 1, 2, 3, NEWLINE]
    assert NEXT.num_tiles((4, 8), False) == 3


def test_a_row_counts_on_from_picture_to_picture():
    index, _ = row_places(NEXT, [(4, 8), (8, 4)], num_tiles=7, tokens_per_tile=4)
    assert index.max() == 28, "the newline is behind the tokens of all seven tiles"
    assert index[0, 0] == 0 and index[14, 0] == 12 and len(index) == 14 + 16


def test_rows_of_tiles_are_announced_in_words():
    assert ROWS.text((4, 8), True) == (
        "<fake_token_around_image><row_1_col_1><image><fake_token_around_image><row_1_col_2>"
        "<image>\n\n<fake_token_around_image><global-img><image><fake_token_around_image>"
    )
    image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    tiles = ROWS.tiles(image, True)
    np.testing.assert_array_equal(np.concatenate([tiles[0], tiles[1]], axis=1), image)
    assert ROWS.places((4, 8), True)[0][:, 0].tolist() == [0, 1, 2]
    whole = dataclasses.replace(ROWS, is_cut=False)
    assert whole.num_tiles((4, 8), True) == len(whole.tiles(image, True)) == 1
    assert whole.text((4, 8), True).count("<image>") == 1


def test_the_pinpoint_that_keeps_the_most_and_wastes_the_least_is_chosen():
    assert best_pinpoint((4, 8), NEXT.pinpoints) == (4, 8)
    assert best_pinpoint((2, 2), NEXT.pinpoints) == (4, 8), "of equals the first"
    assert best_pinpoint((100, 90), NEXT.pinpoints) == (8, 8)
    assert tile_index((2, 1), (1, 2)).tolist() == [[2, 3], [4, 5]]


def test_spans_of_answers_move_with_the_markers():
    text = "Q <image> A one Q <image> A two"
    spans = tuple((text.index(w), text.index(w) + 3) for w in ("one", "two"))
    found = expand_markers(Rendered(text, spans), ["<image>" * 3, ""])
    assert [found.text[a:b] for a, b in found.spans] == ["one", "two"]
    assert found.text == "Q <image><image><image> A one Q  A two"
    with pytest.raises(ValueError, match="an answer must not hold an image marker"):
        expand_markers(Rendered("<image>", ((0, 7),)), ["x"])


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"image_grid_pinpoints": [[300, 336]]}, "whole tiles of 336"),
        ({"size": {"height": 336, "width": 300}}, "must be squares"),
        ({"do_resize": False}, "must resize"),
    ],
)
def test_layouts_that_cannot_be_are_refused(config, match):
    given = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 336}}
    with pytest.raises(ValueError, match=match):
        image_recipe({**given, **config})
