# SPDX-License-Identifier: Apache-2.0
"""Batches are a function of the step; what cannot be read is masked, counted, and may be fatal."""

import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from flax_vlm import batch as contract
from flax_vlm.build import build
from flax_vlm.data.accounts import Accounts, DataError
from flax_vlm.data.images import IMAGE_OPS, REASONS
from flax_vlm.data.pipeline import Dataset, Preprocess
from flax_vlm.data.sources import MemorySource
from flax_vlm.data.text import byte_level, text_id
from tests.data.conftest import encoded

BATCH, STEPS = 12, 6  # of 31 examples: batches 2 and 5 hold the end of an epoch
OPS = [
    {"name": "rotate", "degrees": 15},
    {"name": "random_crop", "size": (8, 10), "pad": 1},
    {"name": "color_jitter"},
]


def preprocess(ops=OPS, image_size=(8, 10), text_length=24):
    built = tuple(build(IMAGE_OPS, op, "image op") for op in ops)
    return Preprocess(built, image_size, byte_level(), text_length)


PLAIN = preprocess([{"name": "resize", "size": (8, 10)}])


def take(iterator, count):
    with iterator:
        return [next(iterator) for _ in range(count)]


def join(shards):
    """Returns the global batch of the parts that the shards read."""
    return {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        assert found[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


@pytest.fixture(scope="module")
def dataset(noise):
    return Dataset(noise, preprocess(), seed=5)


@pytest.fixture(scope="module")
def reference(dataset):
    return take(dataset.batches(0, batch_size=BATCH), STEPS)


def test_batch_follows_the_contract(reference):
    for batch in reference:
        assert {key: batch[key].dtype.name for key in contract.HOST_KEYS} == contract.HOST_KEYS
        device = {key: x for key, x in batch.items() if key not in contract.HOST_KEYS}
        assert contract.check_batch(device) == BATCH
        assert set(device) == {"image", "text", "text_mask", "text_id", "label", "example_mask"}
        assert batch["image"].shape[1:] == (8, 10, 3) and batch["text"].shape[1:] == (24,)
        assert batch["example_mask"].all() and not batch["broken"].any()


def test_rows_belong_together(reference):
    for batch in reference:
        captions = byte_level().decode(batch["text"])
        assert captions == [f"picture number {label}" for label in batch["label"]]
        assert batch["text_id"].tolist() == [text_id(caption) for caption in captions]


def test_every_epoch_has_every_example_once_in_another_order(dataset):
    labels = np.concatenate([b["label"] for b in take(dataset.batches(0, batch_size=31), 3)])
    epochs = labels.reshape(3, 31)
    for epoch in epochs:
        assert sorted(epoch) == list(range(31))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    ordered = take(dataset.batches(0, batch_size=31, shuffle=False), 2)
    assert all(batch["label"].tolist() == list(range(31)) for batch in ordered)


def test_augmentation_differs_between_epochs(dataset):
    first, second = take(dataset.batches(0, batch_size=31, shuffle=False), 2)
    assert (first["image"] != second["image"]).any((1, 2, 3)).sum() > 25


def test_seed_decides_order_and_augmentation(noise, reference):
    same = take(Dataset(noise, preprocess(), seed=5).batches(0, batch_size=BATCH), 2)
    assert_equal(same[1], reference[1])
    other = take(Dataset(noise, preprocess(), seed=6).batches(0, batch_size=BATCH), 1)
    assert (other[0]["label"] != reference[0]["label"]).any()


@pytest.mark.parametrize("num_shards", [2, 3, 4])
def test_shards_hold_consecutive_rows_of_the_global_batch(dataset, reference, num_shards):
    shards = [
        take(dataset.batches(0, batch_size=BATCH, shard=k, num_shards=num_shards), STEPS)
        for k in range(num_shards)
    ]
    for parts, expected in zip(zip(*shards, strict=True), reference, strict=True):
        assert len(parts[0]["image"]) == BATCH // num_shards
        assert_equal(join(parts), expected)


@pytest.mark.parametrize(("shard", "num_shards"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_resumed_run_reads_what_an_uninterrupted_one_does(
    dataset, reference, step, shard, num_shards
):
    rows = slice(shard * BATCH // num_shards, (shard + 1) * BATCH // num_shards)
    resumed = dataset.batches(step, batch_size=BATCH, shard=shard, num_shards=num_shards)
    for found, expected in zip(take(resumed, STEPS - step), reference[step:], strict=True):
        assert_equal(found, {key: x[rows] for key, x in expected.items()})


@pytest.mark.parametrize(
    ("step", "shard", "num_shards", "workers"), [(0, 0, 1, 1), (1, 1, 2, 3), (2, 3, 4, 2)]
)
def test_worker_processes_change_no_batch(noise, reference, step, shard, num_shards, workers):
    dataset = Dataset(noise, preprocess(), seed=5, workers=workers)
    rows = slice(shard * BATCH // num_shards, (shard + 1) * BATCH // num_shards)
    resumed = dataset.batches(step, batch_size=BATCH, shard=shard, num_shards=num_shards)
    for found, expected in zip(take(resumed, STEPS - step), reference[step:], strict=True):
        assert_equal(found, {key: x[rows] for key, x in expected.items()})


def test_worker_processes_read_stored_datasets_and_padding(shapes):
    source = shapes["test"]
    same = [
        list(Dataset(source, PLAIN, workers=workers).ordered(batch_size=10)) for workers in (0, 1)
    ]
    assert len(same[0]) == len(same[1]) == 3
    for found, expected in zip(*same, strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_ordered_has_every_example_once_and_as_many_batches_in_every_shard(noise, num_shards):
    dataset = Dataset(noise, PLAIN)
    shards = [
        list(dataset.ordered(batch_size=10, shard=k, num_shards=num_shards))
        for k in range(num_shards)
    ]
    assert {len(shard) for shard in shards} == {4}
    batches = [join(parts) for parts in zip(*shards, strict=True)]
    labels = np.concatenate([b["label"][b["example_mask"]] for b in batches])
    assert labels.tolist() == list(range(31))
    last = batches[-1]
    assert last["example_mask"].tolist() == [True] + [False] * 9
    assert not last["image"][1:].any() and (last["label"][1:] == -1).all()
    assert last["text_mask"][1:].sum(1).tolist() == [1] * 9  # never attention over nothing
    assert not last["broken"].any()


def test_dataset_smaller_than_the_batch_works_both_ways():
    source = MemorySource([{"image": np.full((8, 10, 3), 9, np.uint8), "caption": "nine"}] * 3)
    dataset = Dataset(source, PLAIN)
    (batch,) = take(dataset.batches(4, batch_size=8), 1)
    assert batch["example_mask"].all()
    (batch,) = dataset.ordered(batch_size=8)
    assert batch["example_mask"].sum() == 3 and batch["label"].tolist() == [-1] * 8


def test_iterator_can_be_closed_twice_and_reads_nothing_afterwards(dataset):
    iterator = dataset.batches(0, batch_size=4)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_wrong_batch_size_shard_or_source_is_refused(dataset, noise):
    with pytest.raises(ValueError, match="a multiple of the 5 shards, got 12"):
        dataset.batches(0, batch_size=12, num_shards=5)
    with pytest.raises(ValueError, match=r"shard must be in 0\.\.1, got 2"):
        dataset.ordered(batch_size=12, shard=2, num_shards=2)
    with pytest.raises(ValueError, match="workers must be at least 0"):
        Dataset(noise, PLAIN, workers=-1)
    with pytest.raises(ValueError, match="must have examples, got an empty source"):
        Dataset([], PLAIN)


def test_image_of_another_size_than_declared_stops_the_run(noise):
    crop = preprocess([{"name": "center_crop", "size": 9}])
    with pytest.raises(ValueError, match=r"must end with \(8, 10, 3\) uint8, got \(9, 9, 3\)"):
        next(Dataset(noise, crop).batches(0, batch_size=4))


def test_dataset_travels_to_another_process(dataset, reference):
    copy = pickle.loads(pickle.dumps(dataset))
    assert_equal(take(copy.batches(1, batch_size=BATCH), 1)[0], reference[1])


def test_cut_captions_keep_their_end_token_and_are_counted(noise):
    short = preprocess([{"name": "resize", "size": (8, 10)}], text_length=17)
    accounts = Accounts()
    for batch in Dataset(noise, short).ordered(batch_size=10):
        kept = batch["example_mask"]
        assert (batch["text_truncated"] == (kept & (batch["label"] >= 10))).all()
        assert (batch["text"][kept, -1] == short.tokenizer.eos_id).all()
        accounts.take(batch)
    assert accounts.truncated == 21 and accounts.seen == 31  # "picture number 10" and on


@pytest.fixture
def partly_broken(tmp_path):
    """Returns 20 examples: 4 lost for three reasons, 1 animated."""
    rng = np.random.default_rng(0)
    images = [encoded(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(20)]
    frame = np.zeros((9, 9), np.uint8)
    images[2] = images[2][:60]
    images[5] = b""
    images[11] = tmp_path / "nowhere.png"
    images[12] = images[12][:70]
    images[17] = encoded(frame, "GIF", save_all=True, append_images=[Image.fromarray(frame + 99)])
    return MemorySource(
        [{"image": x, "caption": f"number {i}", "label": i} for i, x in enumerate(images)]
    )


def test_broken_examples_are_black_masked_and_counted_by_reason(partly_broken):
    accounts, batches = Accounts(max_broken_share=0.3, min_examples=5), []
    for batch in Dataset(partly_broken, PLAIN).ordered(batch_size=8):
        left = accounts.take(batch)
        assert set(left) == set(batch) - set(contract.HOST_KEYS)
        batches.append(batch)
    whole = join(batches)
    reasons = [REASONS[code] for code in whole["broken"]]
    assert {i: r for i, r in enumerate(reasons) if r != "ok"} == {
        2: "damaged",
        5: "empty",
        11: "unreadable",
        12: "damaged",
        17: "animated",
    }
    lost = [2, 5, 11, 12]
    assert np.flatnonzero(~whole["example_mask"]).tolist() == [*lost, 20, 21, 22, 23]
    assert not whole["image"][lost].any() and whole["image"][[0, 3]].any((1, 2, 3)).all()
    assert whole["label"][lost].tolist() == lost and whole["text_mask"][lost].any(1).all()
    assert accounts.counts() == {
        "seen": 20,
        "broken": 4,
        "text_truncated": 0,
        "broken/animated": 1,
        "broken/damaged": 2,
        "broken/empty": 1,
        "broken/unreadable": 1,
    }
    assert accounts.summary().startswith("4 of 20 examples broken (2 damaged, ")


def test_run_stops_when_more_than_the_set_share_is_broken(partly_broken):
    batches = list(Dataset(partly_broken, PLAIN).ordered(batch_size=4))
    # broken of seen: 1/4, 2/8, 3/12, 4/16, 4/20
    fits = Accounts(max_broken_share=0.25, min_examples=1)
    for batch in batches:
        fits.take(batch)
    strict = Accounts(max_broken_share=0.24, min_examples=10)
    strict.take(batches[0])
    strict.take(batches[1])
    with pytest.raises(DataError, match=r"at most 24% .*got 3 of 12 examples broken \("):
        strict.take(batches[2])


def test_padding_is_no_example_and_animation_no_loss():
    source = MemorySource([{"image": b"", "caption": "a"}] * 3)
    (batch,) = Dataset(source, PLAIN).ordered(batch_size=8)
    accounts = Accounts(min_examples=4)
    accounts.take(batch)  # three examples are too few to judge
    assert (accounts.seen, accounts.broken) == (3, 3)
    with pytest.raises(DataError):
        accounts.take(batch)


def test_first_broken_images_are_logged_with_their_name(partly_broken, caplog):
    with caplog.at_level(logging.WARNING, "flax_vlm.data.pipeline"):
        PLAIN(partly_broken[11], np.random.default_rng(0))
    assert "nowhere.png: unreadable" in caplog.text
