# SPDX-License-Identifier: Apache-2.0
"""Whole folders against transformers: its image processor, tokenizer and model, from pixels and
words to logits, in both directions."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from sklearn.datasets import load_sample_images

import flax_vlm
from configs import siglip_finetune
from flax_vlm.experiment import Experiment
from tests.parity import test_tokenizers
from tests.parity.reference import TOLERANCE, error, randomise
from tests.parity.test_vit_clip_siglip import SMALL
from tests.parity.test_vit_clip_siglip import TEXT as HF_TEXT

PHOTOS = load_sample_images().images
TEXTS = ["a photo of a cat", "Two DOGS, running! 🐱", "犬の写真 " * 30]


def clip(folder):
    test_tokenizers.clip(folder)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ends = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    text = {**HF_TEXT, "vocab_size": len(vocab), "max_position_embeddings": 77, **ends}
    vision = {**SMALL, "image_size": 30, "patch_size": 10}
    hf.CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size=30).save_pretrained(folder)
    return hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=14))


def siglip2(folder):
    test_tokenizers.siglip2(folder)
    text = {**HF_TEXT, "vocab_size": 1000, "max_position_embeddings": 64, "projection_size": 24}
    vision = {**SMALL, "num_patches": 16, "patch_size": 8}
    hf.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return hf.Siglip2Model(hf.Siglip2Config(vision_config=vision, text_config=text))


def dinov2(folder):
    # asks for images of another size than it was trained with, as the hub's do
    options = dict(size={"shortest_edge": 44}, crop_size={"height": 40, "width": 40})
    hf.BitImageProcessorPil(**options, do_convert_rgb=True).save_pretrained(folder)
    config = hf.Dinov2Config(**{**SMALL, "image_size": 70, "patch_size": 10, "mlp_ratio": 2})
    return hf.Dinov2Model(config)


def classifier(folder):
    hf.ViTImageProcessorPil(size={"height": 30, "width": 30}).save_pretrained(folder)
    labels = {0: "cat", 1: "dog", 2: "bird"}
    config = hf.ViTConfig(
        **SMALL, image_size=30, patch_size=10, id2label=labels,
        label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


FAMILIES = {"clip": clip, "siglip2": siglip2, "dinov2": dinov2, "vit": classifier}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (folder of transformers, model)}."""
    found = {}
    for name, make in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        model = randomise(make(folder))
        model.save_pretrained(folder)
        found[name] = folder, model
    return found


@torch.no_grad()
def reference(folder, model, texts=()):
    """Returns what transformers computes of the photographs (and texts) from its own folder."""
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    inputs = dict(processor(list(PHOTOS), return_tensors="pt"))
    if texts:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        length = min(tokenizer.model_max_length, 77)
        inputs |= tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length,
            return_tensors="pt",
        )  # fmt: skip
    names = ("input_ids", "pixel_values", "pixel_attention_mask", "spatial_shapes")
    return model(**{k: v for k, v in inputs.items() if k in names})


def ours(vlm, texts):
    batch = {**vlm.processor.image_batch(PHOTOS), **vlm.processor.texts(texts)}
    return vlm.predict("logits", batch)


@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_photographs_and_texts_give_the_logits_of_transformers(name, folders):
    folder, model = folders[name]
    vlm = flax_vlm.load(folder)
    wanted = reference(folder, model, TEXTS)
    # the objective's logits are those of as many images as texts
    rows = [ours(vlm, TEXTS[i : i + 2]) for i in (0, 1)]
    found = np.concatenate([rows[0], rows[1][:, 1:]], axis=1)
    assert error(found, wanted.logits_per_image) <= TOLERANCE
    assert error(vlm.embed_image(PHOTOS), wanted.image_embeds) <= TOLERANCE
    assert error(vlm.embed_text(TEXTS), wanted.text_embeds) <= TOLERANCE


def test_an_encoder_at_another_size_gives_the_tokens_of_transformers(folders):
    folder, model = folders["dinov2"]
    vlm = flax_vlm.load(folder)
    wanted = reference(folder, model)
    tokens = vlm.image_tokens(PHOTOS)
    assert tokens.shape == (2, 1 + 16, 24) and error(tokens, wanted.last_hidden_state) <= TOLERANCE
    pooled = wanted.pooler_output
    assert error(vlm.embed_image(PHOTOS), pooled / pooled.norm(dim=-1, keepdim=True)) <= TOLERANCE


def test_a_classifier_gives_the_probabilities_of_transformers(folders):
    folder, model = folders["vit"]
    vlm = flax_vlm.load(folder)
    assert vlm.class_names == ("cat", "dog", "bird")
    assert error(vlm.classify(PHOTOS), reference(folder, model).logits.softmax(-1)) <= TOLERANCE


def test_attention_maps_are_those_of_transformers(folders):
    folder, _ = folders["dinov2"]
    eager = hf.Dinov2Model.from_pretrained(folder, attn_implementation="eager")
    inputs = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")(
        list(PHOTOS), return_tensors="pt"
    )
    with torch.no_grad():
        wanted = eager(**inputs, output_attentions=True).attentions[-1][:, :, 0, 1:]
    found = np.stack(flax_vlm.load(folder).attention(PHOTOS))
    assert error(found.reshape(2, 3, 16), wanted) <= TOLERANCE


def test_adapters_trained_on_a_checkpoint_are_merged_into_it_and_nothing_else_changes(
    folders, tmp_path
):
    folder, model = folders["clip"]
    config = siglip_finetune.get_config(str(folder))
    config.unlock()
    config.steps, config.batch_size = 2, 16
    config.data.dir, config.evals = str(tmp_path / "digits"), {}
    config.model.image.image_size = config.data.image_size = 30
    config.data.train_ops = config.data.eval_ops = ({"name": "resize", "size": 30},)
    config.optimizer = {"name": "sgd", "lr": 0.5}
    config.lora = {"rules": (("image/.*/(q|v)/kernel", 2),), "alpha": 4.0}
    _, done = Experiment.from_config(config).train(tmp_path / "run", show_progress=False)
    assert done
    vlm, out = flax_vlm.load(tmp_path / "run"), tmp_path / "out"
    assert vlm.save_pretrained(out) == "clip"
    tuned = hf.CLIPModel.from_pretrained(out)
    before, after = model.state_dict(), tuned.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {
        f"vision_model.encoder.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qv"
    }
    wanted = reference(out, tuned, TEXTS[:2])
    assert error(ours(vlm, TEXTS[:2]), wanted.logits_per_image) <= TOLERANCE


@pytest.mark.parametrize("name", list(FAMILIES))
def test_there_and_back_the_whole_folder_is_the_same_to_transformers(name, folders, tmp_path):
    folder, model = folders[name]
    vlm = flax_vlm.load(folder)
    if name == "dinov2":  # loaded at another size its positions would be resampled ones
        (tmp_path / "in").mkdir()
        model.save_pretrained(tmp_path / "in")
        vlm = flax_vlm.load(tmp_path / "in")
    out = tmp_path / "out"
    vlm.save_pretrained(out, max_shard_bytes=20_000)
    again, report = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.config.id2label == model.config.id2label
    texts = TEXTS if name in ("clip", "siglip2") else ()
    first, second = reference(folder, model, texts), reference(folder, again, texts)
    if name != "dinov2":
        second = reference(out, again, texts)
    key = {"vit": "logits", "dinov2": "last_hidden_state"}.get(name, "logits_per_image")
    assert torch.equal(first[key], second[key])
