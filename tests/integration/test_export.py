# SPDX-License-Identifier: Apache-2.0
"""tools/export: a trained run becomes a folder of transformers, with its card."""

import json

import numpy as np

import flax_vlm
from flax_vlm.data.hf_tokenizers import load_tokenizer
from tests.integration.conftest import CONFIG, program

RNG = np.random.default_rng(1)
IMAGES = [RNG.integers(0, 256, shape, dtype=np.uint8) for shape in [(8, 8), (20, 30, 3)]]
TEXTS = ["a photo of the digit five", "A HANDWRITTEN seven, written very slowly"]


def export(*arguments):
    return program("-m", "flax_vlm.tools.export", *arguments)


def test_a_run_is_exported_with_its_card(finished, tmp_path):
    folder, _ = finished
    out = tmp_path / "hf"
    done = export("--workdir", folder, "--out", out, "--license", "cc0-1.0")
    assert done.returncode == 0, done.stderr[-2000:]
    vlm, again = flax_vlm.load(folder), flax_vlm.load(out)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["format"] == "siglip" and report["step"] == 12
    np.testing.assert_allclose(again.embed_image(IMAGES), vlm.embed_image(IMAGES), atol=1e-6)
    np.testing.assert_allclose(again.embed_text(TEXTS), vlm.embed_text(TEXTS), atol=1e-6)
    assert load_tokenizer(out).tokenizer == vlm.processor.tokenizer
    card = (out / "README.md").read_text()
    accuracy = json.loads((folder / "eval" / "12.json").read_text())["zero_shot/accuracy"]
    for line in (
        "license: cc0-1.0",
        "`digits`, split `train`.",
        "12 of 12 steps of 16 examples.",
        '"name": "adamw"',
        f"| zero_shot/accuracy | {accuracy:.4f} | digits, test |",
    ):
        assert line in card, line


def test_wrong_exports_are_explained(finished, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for arguments, message in (
        (["--workdir", finished[0], "--output", tmp_path], "holds ['thesis.tex']"),
        (["--workdir", finished[0], "--out", tmp_path / "x", "--format", "vit"], "it is for"),
        (["--workdir", tmp_path, "--out", tmp_path / "x"], "must hold config.json"),
    ):
        done = export(*arguments)
        assert done.returncode == 1 and message in done.stderr
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_eval_measures_an_exported_folder_as_the_run_it_came_from(finished, data_dir, tmp_path):
    assert export("--workdir", finished[0], "--out", tmp_path / "hf").returncode == 0
    recipe = ["--config", CONFIG, f"--config.data.dir={data_dir}"]
    folder = ["--checkpoint", tmp_path / "hf", "--workdir", tmp_path / "measured"]
    done = program("eval.py", *folder, *recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "measured" / "eval" / "0.json").read_text())
    assert found == json.loads((finished[0] / "eval" / "12.json").read_text())
    assert f"flax_vlm.load('{tmp_path / 'hf'}')" in done.stdout
    for arguments, message in (
        ([*folder[:2], "--workdir", finished[0], *recipe], "holds a run; give another --workdir"),
        (folder, "--checkpoint and --config belong together"),
    ):
        done = program("eval.py", *arguments)
        assert done.returncode == 1 and message in done.stdout + done.stderr
