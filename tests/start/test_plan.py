# SPDX-License-Identifier: Apache-2.0
"""Which leaf fills which, and what is said where that does not work out."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.build import build
from flax_vlm.models import MODELS
from flax_vlm.nn.positions import resize_positions
from flax_vlm.start.plan import PositionTable, Start, match_leaves, position_tables
from flax_vlm.training import sharding

TOWER = {"width": 12, "depth": 2, "mlp_dim": 20, "num_heads": 2}


def siglip(image_size=(12, 16), length=6, **image):
    vision = {"name": "vit", "patch_size": 4, "image_size": image_size, **TOWER, **image}
    text = {"name": "text_encoder", "vocab_size": 11, "length": length, **TOWER}
    return build(MODELS, {"name": "siglip", "image": vision, "text": text}, "model")


def classifier(**fields):
    spec = {"name": "vit", "patch_size": 4, "image_size": (12, 16), "pool": "map", **TOWER}
    return build(MODELS, {**spec, "num_classes": 5, **fields}, "model")


@functools.cache
def shapes_of(model):
    image = model.image.image_size if hasattr(model, "image") else model.image_size
    inputs = [np.zeros((1, *image, 3), np.float32)]
    if hasattr(model, "text"):
        inputs.append(np.zeros((1, model.text.length), np.int32))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return {path: tuple(x.shape) for path, x in trees.named_leaves(params).items()}


@dataclasses.dataclass
class Memory:
    """A source whose parameters are drawn."""

    model: object
    name: str = "memory"

    @property
    def shapes(self):
        return shapes_of(self.model)

    @functools.cached_property
    def values(self):
        rng = np.random.default_rng(4)
        return {path: rng.normal(size=s).astype(np.float32) for path, s in self.shapes.items()}

    def load(self, places):
        return {path: jax.device_put(self.values[path], place) for path, place in places.items()}


def load(source, model, **options):
    start = Start.plan(source, model, shapes_of(model), **options)
    mesh = sharding.make_mesh(1, 8, 1)
    params = trees.unflatten(
        {path: jax.ShapeDtypeStruct(s, np.float32) for path, s in shapes_of(model).items()}
    )
    places = trees.named_leaves(sharding.parameter_shardings(params, mesh))
    loaded = start.load(places)
    assert all(x.sharding == places[path] for path, x in loaded.items())
    return loaded


IMAGE = {"subtrees": [["image", ""]], "fresh": ["head/.*"]}


def test_a_tower_fills_a_classifier_whose_head_stays_random():
    source, model = Memory(siglip()), classifier()
    loaded = load(source, model, **IMAGE)
    assert set(loaded) == {p for p in shapes_of(model) if not p.startswith("head/")}
    for path, value in loaded.items():
        np.testing.assert_array_equal(value, source.values[f"image/{path}"])


def test_the_whole_tree_is_the_default_and_what_lies_outside_of_subtrees_stays_random():
    source = Memory(siglip())
    assert load(source, siglip()).keys() == source.shapes.keys()
    text = load(source, siglip(depth=3), subtrees=[["text", "text"]])
    assert text.keys() == {path for path in source.shapes if path.startswith("text/")}


def test_every_misfit_is_listed_at_once():
    model = classifier(width=16, pool="gap", pre_norm=True)
    with pytest.raises(ValueError, match="memory does not fit the model") as error:
        Start.plan(Memory(siglip()), model, shapes_of(model), subtrees=[["image", ""]])
    for line in (
        "head/kernel: not in the source; init.fresh keeps it random",
        "ln_pre/scale: not in the source",
        "image/pool/probe: of the source, without a place here; init.unused leaves it out",
        "patches/kernel: (4, 4, 3, 16) here, (4, 4, 3, 12) in the source",
        "positions: (12, 16) here, (12, 12) in the source",
    ):
        assert line in str(error.value), line


def test_an_unused_leaf_does_not_fill_its_place():
    model, unused = classifier(), {"unused": ["image/pool/probe"]}
    with pytest.raises(ValueError, match="pool/probe: not in the source; init.fresh keeps it"):
        Start.plan(Memory(siglip()), model, shapes_of(model), **IMAGE, **unused)
    fresh = {**IMAGE, "fresh": ["head/.*", "pool/probe"]}
    assert "pool/probe" not in load(Memory(siglip()), model, **fresh, **unused)


def test_unused_leaves_are_left_out():
    model = classifier(pool="gap", class_token=False)
    loaded = load(Memory(siglip()), model, **IMAGE, unused=["image/pool/.*"])
    assert not [path for path in loaded if "pool" in path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**IMAGE, "fresh": ["heads/.*"]}, "init.fresh must match a parameter path"),
        ({**IMAGE, "unused": ["pool/.*"]}, "init.unused must match a parameter path"),
        ({**IMAGE, "subtrees": [["vision", ""]]}, "got 0 below 'vision' in the source and 38"),
        ({**IMAGE, "subtrees": [["image", "tower"]]}, "and 0 below 'tower' here"),
        ({**IMAGE, "subtrees": [["image", ""]] * 2}, "positions: in two of init.subtrees"),
        ({**IMAGE, "fresh": [".*"]}, "init.fresh leaves nothing to load"),
        ({**IMAGE, "resize_positions": "cubic"}, "unknown init.resize_positions 'cubic'"),
    ],
)
def test_wrong_settings_are_named(options, message):
    model = classifier()
    with pytest.raises(ValueError, match=message):
        Start.plan(Memory(siglip()), model, shapes_of(model), **options)


@pytest.mark.parametrize("method", ["bicubic_torch", "bilinear_antialias", "bicubic_antialias"])
def test_positions_of_images_are_resampled_to_the_new_grid(method):
    class_token = {"pool": "cls", "class_token": True}
    source, model = Memory(siglip(**class_token)), classifier(image_size=(20, 8), **class_token)
    loaded = load(source, model, **IMAGE, resize_positions=method)
    table = source.values["image/positions"]  # [1 + 3 * 4, D]
    expected = resize_positions(table, (3, 4), (5, 2), method=method, num_prefix=1)
    assert expected.shape == (11, 12)
    np.testing.assert_array_equal(loaded["positions"], expected)
    np.testing.assert_array_equal(loaded["positions"][0], table[0])
    if method == "bilinear_antialias":
        grid = table[1:].reshape(3, 4, 12)
        oracle = jax.image.resize(grid, (5, 2, 12), "linear", antialias=True).reshape(10, 12)
        np.testing.assert_allclose(loaded["positions"][1:], oracle, atol=2e-6)


def test_the_same_grid_is_not_touched_and_a_turned_one_is_seen():
    source = Memory(siglip())
    same = load(source, classifier(), **IMAGE, resize_positions="bicubic_torch")
    np.testing.assert_array_equal(same["positions"], source.values["image/positions"])
    turned = classifier(image_size=(16, 12))  # as many patches, elsewhere
    with pytest.raises(ValueError, match=r"grids \(4, 3\) and \(3, 4\); set init.resize_positions"):
        Start.plan(source, turned, shapes_of(turned), **IMAGE)
    loaded = load(source, turned, **IMAGE, resize_positions="bicubic_torch")
    assert np.abs(loaded["positions"] - source.values["image/positions"]).max() > 0.1


def test_positions_of_texts_are_cut_and_never_made():
    source = Memory(siglip(length=6))
    loaded = load(source, siglip(length=4), resize_positions="bicubic_torch")
    np.testing.assert_array_equal(loaded["text/positions"], source.values["text/positions"][:4])
    for length, method, message in (
        (9, "bicubic_torch", "positions of texts can be cut but not made"),
        (4, "", "set init.resize_positions"),
    ):
        with pytest.raises(ValueError, match=message):
            model = siglip(length=length)
            Start.plan(source, model, shapes_of(model), resize_positions=method)


def test_tables_are_not_resized_where_one_has_a_class_token():
    model = classifier(pool="cls", image_size=(20, 8))
    with pytest.raises(ValueError, match="positions.*; one has a class token .* lacks"):
        Start.plan(
            Memory(siglip()), model, shapes_of(model), **{**IMAGE, "fresh": ["head/.*", "cls"]},
            unused=["image/pool/.*"], resize_positions="bicubic_torch",
        )  # fmt: skip


def test_position_tables_are_found_in_every_encoder():
    tables = position_tables(siglip(pool="cls", class_token=True))
    assert tables == {
        "image/positions": PositionTable((3, 4), 1), "text/positions": PositionTable(None)
    }  # fmt: skip
    assert position_tables(classifier(position_embedding="sincos2d")) == {}
    assert position_tables(classifier()) == {"positions": PositionTable((3, 4))}


def test_prefixes_are_whole_names():
    pairs, problems = match_leaves(["a/w", "ab/w"], ["s/w"], subtrees=[["s", "a"]])
    assert pairs == {"a/w": "s/w"} and not problems
