# SPDX-License-Identifier: Apache-2.0
"""A hub id becomes a folder: from the cache without a network, and nothing but safe files."""

import pathlib
import shutil

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects

import flax_vlm
from flax_vlm.snapshots import find_folder, is_hub_id
from tests.hub.folders import write_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository org/tiny as the hub has it; `downloads` are the files that were asked for."""
    remote = tmp_path / "remote"
    write_folder(remote, "siglip")
    for name in ("pytorch_model.bin", "modeling_tiny.py", "model.fp16.safetensors"):
        (remote / name).write_bytes(b"x")
    (remote / "onnx").mkdir()
    (remote / "onnx" / "config.json").write_text("{}")
    (remote / "README.md").write_text("---\nlicense: mit\n---\n")
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None, ignore_patterns=None):
        files = [str(p.relative_to(remote)) for p in remote.rglob("*") if p.is_file()]
        patterns = dict(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        kept = list(filter_repo_objects(files, **patterns))
        cached = tmp_path / "cache" / COMMIT
        cached.mkdir(parents=True, exist_ok=True)
        for file in kept:
            shutil.copy(remote / file, cached / file)
        asked.append((name, revision, sorted(kept)))
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote, asked


def test_a_hub_id_is_downloaded_without_pickles_code_and_second_copies(hub):
    remote, asked = hub
    vlm = flax_vlm.load("org/tiny", revision="v1")
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    ours, local = vlm.embed_image([image]), flax_vlm.load(remote).embed_image([image])
    np.testing.assert_array_equal(ours, local)
    (_, first, texts), (name, second, weights) = asked
    assert first == "v1" and name == "org/tiny"
    assert second == COMMIT, "the weights are those of the files that were read"
    assert texts == [
        "README.md", "config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert weights == ["model.safetensors"]
    assert vlm.origin.license == "mit" and vlm.origin.name == "org/tiny"


def test_the_revision_may_be_part_of_the_name(hub):
    _, asked = hub
    assert find_folder("org/tiny@refs/pr/3").name == COMMIT
    assert asked[0][:2] == ("org/tiny", "refs/pr/3")


def test_a_repository_of_pickles_is_refused_with_a_way_out(hub):
    remote, _ = hub
    (remote / "model.safetensors").unlink()
    with pytest.raises(ValueError, match='has no safetensors at revision main.*"org/tiny@refs/pr'):
        flax_vlm.load("org/tiny")


def test_the_cache_serves_without_a_network(tmp_path, monkeypatch):
    repo = tmp_path / "models--org--tiny"
    folder, _ = write_folder(repo / "snapshots" / COMMIT, "vit")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_folder("org/tiny") == pathlib.Path(folder)
    with pytest.raises(ValueError, match=r"the Hugging Face hub did not give it .*set HF_HOME"):
        find_folder("org/other")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("google/siglip-base-patch16-224", True),
        ("org/name@refs/pr/1", True),
        ("runs/a/b", False),
        ("name", False),
        ("../org", False),
        ("/org/name", False),
        ("tests/hub", False),
    ],
)
def test_what_a_hub_id_looks_like(name, is_one):
    assert is_hub_id(name) == is_one
