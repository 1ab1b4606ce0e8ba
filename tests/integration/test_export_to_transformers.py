# SPDX-License-Identifier: Apache-2.0
"""A model trained here from scratch, exported, is the same model to transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import flax_vlm
from configs import llava_shapes_stage1, llava_shapes_stage2
from flax_vlm.build import build
from flax_vlm.convert.saving import find_format
from flax_vlm.experiment import Experiment
from flax_vlm.models import MODELS
from tests.integration.conftest import train
from tests.integration.test_export import IMAGES, TEXTS, export
from tests.integration.test_stages import small
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


@pytest.fixture(scope="module")
def llava_run(tmp_path_factory):
    """Both stages of the recipe, tiny; a high rate, so that answers differ."""
    folder = tmp_path_factory.mktemp("llava")
    first = small(llava_shapes_stage1.get_config(), folder)
    second = small(llava_shapes_stage2.get_config(f"mlp,{folder}/1"), folder)
    for name, config in (("1", first), ("2", second)):
        config.steps, config.checkpoint.every, config.optimizer.lr = 12, 12, 3e-2
        (folder / name).mkdir()
        Experiment.from_config(config, jax.devices()[:1]).train(folder / name, show_progress=False)
    return folder / "2"


QUESTIONS = ["What colour is the big circle?", "How many?"]


def asked(image, question):
    parts = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_a_model_trained_from_scratch_answers_the_same_in_transformers(llava_run, tmp_path):
    done = export("--workdir", llava_run, "--out", tmp_path)
    assert done.returncode == 0 and '"format": "llava"' in done.stdout, done.stderr[-2000:]
    # as a stranger calls it
    model, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(model) is hf.LlavaForConditionalGeneration
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = hf.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    images = [np.stack([IMAGES[0]] * 3, -1), IMAGES[1]]
    inputs = processor.apply_chat_template(
        [asked(*pair) for pair in zip(images, QUESTIONS, strict=True)],
        add_generation_prompt=True, tokenize=True, return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )  # fmt: skip
    vlm = flax_vlm.load(llava_run)
    ids, mask = inputs["input_ids"].numpy().astype(np.int32), inputs["attention_mask"].numpy() > 0
    batch = {"text": ids, "text_mask": mask, "images": vlm.processor.images(images)[:, None]}
    tokenizer, image = vlm.processor.tokenizer, "<image>" * vlm.model.tokens_per_image
    for row, keep, question in zip(ids, mask, QUESTIONS, strict=True):
        text = f"Q: {image}\n{question} A:"
        assert row[keep].tolist() == tokenizer.encode_chat(text)[0], "no token of an end"
    with torch.no_grad():
        wanted = model(**inputs).logits.numpy()
    assert error(vlm.predict("logits", batch)[mask], wanted[mask]) <= TOLERANCE
    assert wanted[mask].std(axis=0).max() > 0.1, "there is something to compare"
    written = model.generate(**inputs, max_new_tokens=8)[:, ids.shape[1] :]
    theirs = [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
    assert vlm.generate(images, QUESTIONS, max_new_tokens=8) == theirs


@pytest.mark.parametrize(
    ("variant", "expected"), [("mlp", "llava"), ("blind", "qwen3"), ("resampler", None)]
)
def test_the_recipe_at_its_full_size_is_held_or_refused(variant, expected):
    spec = llava_shapes_stage2.get_config(variant).model.to_dict()
    model = build(MODELS, spec, "model")
    if expected is None:
        with pytest.raises(ValueError, match="the connector must be mlp, got ResamplerConnector"):
            find_format(model, None)
    else:
        assert find_format(model, None)[0] == expected
