# SPDX-License-Identifier: Apache-2.0
"""A model trained here from scratch, exported, is the same model to transformers."""

import numpy as np
import pytest
import torch
import transformers as hf

import flax_vlm
from tests.integration.conftest import train
from tests.integration.test_export import IMAGES, TEXTS, export
from tests.parity.reference import TOLERANCE, error


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory, data_dir):
    """A CLIP; our tokenizer's end of text is 1."""
    folder = tmp_path_factory.mktemp("clip")
    done = train(folder, data_dir, config="tests/integration/clip_config.py", steps=5)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_model_trained_from_scratch_gives_the_same_logits_in_transformers(
    kind, finished, clip_run, tmp_path
):
    folder = {"siglip": finished[0], "clip": clip_run}[kind]
    done = export("--workdir", folder, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    model, report = hf.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == kind
    # as a stranger calls it: one processor for both, loaded by its class
    processor = hf.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    inputs = processor(
        text=TEXTS, images=[np.stack([x] * 3, -1) if x.ndim == 2 else x for x in IMAGES],
        padding="max_length", truncation=True, return_tensors="pt",
    )  # fmt: skip
    vlm = flax_vlm.load(folder)
    batch = {**vlm.processor.image_batch(IMAGES), **vlm.processor.texts(TEXTS)}
    np.testing.assert_array_equal(inputs["input_ids"], batch["text"])
    assert ("attention_mask" in inputs) == (kind == "clip")
    with torch.no_grad():
        wanted = model(**inputs).logits_per_image
    assert error(vlm.predict("logits", batch), wanted) <= TOLERANCE
