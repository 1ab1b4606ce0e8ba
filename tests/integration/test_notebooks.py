# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, on a tiny model."""

import re

import nbclient
import nbformat
import numpy as np
import pytest

import flax_vlm
from tests.data.test_jinja_templates import LLAVA as TEMPLATE
from tests.hub.folders import write_folder
from tests.hub.test_generate import LLAVA, write
from tests.integration.conftest import ROOT


def run(name):
    """Returns the executed notebook and its PNG pictures."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": ROOT}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return "".join(o.get("text", "") for o in outputs), pictures


def test_the_quickstart_notebook_runs(finished, data_dir, monkeypatch):
    monkeypatch.setenv("FLAX_VLM_WORKDIR", str(finished[0]))
    monkeypatch.setenv("FLAX_VLM_DATA_DIR", data_dir)
    _, pictures = run("01_quickstart.ipynb")
    assert len(pictures) == 3, "predictions, similarity, attention"


def test_the_notebook_on_checkpoints_runs_on_a_folder(data_dir, tmp_path, monkeypatch):
    folder, _ = write_folder(tmp_path, "siglip")
    monkeypatch.setenv("FLAX_VLM_CHECKPOINT", str(folder))
    monkeypatch.setenv("FLAX_VLM_DATA_DIR", data_dir)
    monkeypatch.setenv("FLAX_VLM_STEPS", "2")
    printed, pictures = run("02_load_any_checkpoint.ipynb")
    assert len(pictures) == 4, "predictions, retrieval, attention, components"
    found = re.search(r"largest difference (\S+) of (\S+)", printed)
    difference, largest = map(float, found.groups())
    assert difference <= 2e-5 * max(1, largest)
    assert "zero_shot/accuracy" in printed and "tokenizer.json" in printed


def test_the_notebook_on_questions_runs_on_a_folder(data_dir, tmp_path, monkeypatch):
    write(tmp_path, LLAVA, "llava")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setenv("FLAX_VLM_CHECKPOINT", str(tmp_path))
    monkeypatch.setenv("FLAX_VLM_DATA_DIR", data_dir)
    monkeypatch.setenv("FLAX_VLM_STEPS", "2")
    printed, pictures = run("03_ask_about_images.ipynb")
    assert len(pictures) == 1, "the patches that words look at"
    assert "4 visual tokens per image, in a grid of (2, 2)" in printed
    assert printed.count("assistant: ") == 3 and "user: And what is behind it?" in printed
    assert "test/counting/majority" in printed and "chat_template.jinja" in printed
    assert "same answers: True" in printed
    found = re.search(r"largest difference (\S+) of (\S+)", printed)
    difference, largest = map(float, found.groups())
    assert difference <= 2e-5 * max(1, largest)


def test_the_scaling_notebook_runs_and_draws_four_figures():
    notebook = nbformat.read(ROOT / "notebooks" / "04_scaling.ipynb", as_version=4)
    resources = {"metadata": {"path": ROOT}}
    nbclient.NotebookClient(notebook, timeout=240, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 4, "batch sizes, law, isoFLOP, frontier"
    printed = "".join(output.get("text", "") for output in outputs)
    assert "not identifiable" in printed and "needs at least 4 points, got 3" in printed


def test_a_loaded_model_embeds_classifies_and_predicts(finished):
    vlm = flax_vlm.load(finished[0])
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, shape, dtype=np.uint8) for shape in [(8, 8), (20, 30, 3), (9, 8, 3)]
    ]
    embedded, texts = vlm.embed_image(images), vlm.embed_text(["a five", "seven"])
    assert embedded.shape == (3, 16) and texts.shape == (2, 16)
    assert embedded.dtype == texts.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1.0, rtol=1e-5)
    probabilities = vlm.classify(images, ["one", "two", "three"])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    # the rows do not depend on how many are computed at once
    np.testing.assert_allclose(vlm.embed_image(images[1:2])[0], embedded[1], atol=2e-6)
    # predict takes pixels, or floats that are normalised already
    pixels = vlm.processor.images(images)
    normalised = ((pixels / 255.0 - 0.5) / 0.5).astype(np.float32)
    same = vlm.predict("image_embedding", {"image": normalised})
    np.testing.assert_allclose(same, embedded, atol=2e-5)
    assert vlm.predict("image_tokens", {"image": pixels}).shape == (3, 16, 16)
    assert vlm.config["steps"] == 12 and vlm.params["logit_scale"].shape == ()


def test_wrong_uses_of_a_loaded_model_are_explained(finished, tmp_path):
    vlm = flax_vlm.load(finished[0])
    with pytest.raises(ValueError, match="unknown prediction 'embedding', choose one of"):
        vlm.predict("embedding", {})
    with pytest.raises(ValueError, match="image 1 could not be read"):
        vlm.embed_image([np.zeros((8, 8, 3), np.uint8), b"no image"])
    with pytest.raises(ValueError, match="must hold config.json"):
        flax_vlm.load(tmp_path)
    with pytest.raises(ValueError, match="is no folder here, and the Hugging Face hub did not"):
        flax_vlm.load("google/siglip-base-patch16-224")
