# SPDX-License-Identifier: Apache-2.0
"""Packing the conversations of a config, and training on the rows."""

import pytest

from configs import llava_shapes_stage1, siglip_shapes
from flax_vlm.data.packing import PackedSource
from flax_vlm.experiment import Experiment
from flax_vlm.program import example_batch
from flax_vlm.tools.pack import pack

LENGTH, IMAGES, SIZE = 256, 4, 40


@pytest.fixture
def config(tmp_path):
    config = llava_shapes_stage1.get_config().unlock()
    config.data.dir = str(tmp_path / "data")
    config.data.options = {"kinds": ("description",), "train_size": SIZE, "turns": 1}
    config.data.text.options = config.data.options
    config.data.text.length, config.data.chat.num_images = LENGTH, IMAGES
    config.model.language_model.length = LENGTH
    config.batch_size = 8
    return config


def test_a_run_reads_the_rows_that_were_packed_for_it_at_any_step(config, tmp_path):
    counts = pack(Experiment.from_config(config), tmp_path / "packed")
    assert counts["examples"] == SIZE and counts["without_room"] == 0
    assert counts["rows"] < SIZE / 2 and counts["filled"] > 2 * counts["filled_unpacked"]
    config.data.name, config.data.rows = f"packed:{tmp_path}/packed/index.json", "packed"
    config.data.text.tokenizer = "file"
    config.data.text.path = f"{tmp_path}/packed/tokenizer.json"
    run = Experiment.from_config(config)
    source = run.train_data.source
    assert isinstance(source, PackedSource) and len(source) == counts["rows"]
    names = [one["meta"]["id"] for row in range(len(source)) for one in source[row]["packed"]]
    assert sorted(names) == sorted(f"train {n}" for n in range(SIZE))
    with run.batches(5) as batches:
        batch = next(batches)
    shapes = {key: (x.shape, x.dtype) for key, x in example_batch(config, size=8).items()}
    assert shapes.items() <= {key: (x.shape, x.dtype) for key, x in batch.items()}.items()
    assert batch["segments"].max() > 1 and batch["loss_mask"].any(axis=1).all()


def test_a_tokenizer_is_not_trained_on_packed_rows(config, tmp_path):
    pack(Experiment.from_config(config), tmp_path)
    config.data.name, config.data.rows = f"packed:{tmp_path}/index.json", "packed"
    with pytest.raises(ValueError, match="set data.text.tokenizer to 'file' and data.text.path"):
        _ = Experiment.from_config(config).tokenizer


def test_captions_are_not_packed(tmp_path):
    config = siglip_shapes.get_config().unlock()
    config.data.dir = str(tmp_path / "data")
    config.data.options = {"train_size": 20, "test_size": 5}
    with pytest.raises(ValueError, match="conversations are packed, got data.rows 'captions'"):
        pack(Experiment.from_config(config), tmp_path)
