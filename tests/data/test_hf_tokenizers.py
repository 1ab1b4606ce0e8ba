# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of checkpoint folders, written here by hand as transformers writes them."""

import json
import struct

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from flax_vlm.data.hf_tokenizers import TextRecipe, load_chat_tokenizer, load_tokenizer
from flax_vlm.data.recipe import build_tokenizer
from flax_vlm.data.sentencepiece_model import read_sentencepiece
from flax_vlm.data.text import Tokenizer, train_bpe

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def clip_vocab():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, ["c a", "ca t</w>"]


def clip_folder(folder, **config):
    vocab, merges = clip_vocab()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return write(folder, tokenizer_config={"tokenizer_class": "CLIPTokenizer", **config})


def gemma_folder(folder, **config):
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *"\u2581abcABC"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9, pad_id=3, pad_token="<unk>")
    tokenizer.save(str(folder / "tokenizer.json"))
    return write(folder, tokenizer_config={"tokenizer_class": "GemmaTokenizerFast", **config})


def field(number, value):
    """Returns one field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    head = bytes([value & 127 | (128 if value > 127 else 0)])
    return head + (varint(value >> 7) if value > 127 else b"")


PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("\u2581", -3.0, 1)]
PIECES += [("\u2581a", -2.0, 1), ("\u2581ab", -2.5, 1), ("b", -1.0, 1), ("a", -4.0, 1)]
PIECES += [("ς", -5.0, 1), ("σ", -5.0, 1), ("ο", -5.0, 1)]


def spiece(pieces=PIECES, model_type=1, unk_id=2):
    packed = b""
    for text, score, kind in pieces:
        packed += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    trainer = field(3, model_type) + field(4, len(pieces)) + field(40, unk_id)
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 1) + field(5, 1)
    return packed + field(2, trainer) + field(3, normalizer)


def siglip_folder(folder, **config):
    (folder / "spiece.model").write_bytes(spiece())
    return write(folder, tokenizer_config={"tokenizer_class": "SiglipTokenizer", **config})


FOLDERS = {"clip": clip_folder, "siglip": siglip_folder, "siglip2": gemma_folder}


def rows(recipe, *texts, length=8):
    ids, mask, _ = recipe.tokenizer.encode(texts, length)
    return ids.tolist(), mask.tolist()


def test_clip_lowers_case_begins_ends_and_pads_with_the_end_token(tmp_path):
    recipe = load_tokenizer(clip_folder(tmp_path))
    vocab, _ = clip_vocab()
    bos, eos = vocab[BOS], vocab[EOS]
    assert (recipe.length, recipe.uses_mask) == (77, True)
    ids, mask = rows(recipe, "A  CAT", "")
    assert ids[0] == [bos, vocab["a</w>"], vocab["cat</w>"], *[eos] * 5]
    assert mask[0] == [True] * 4 + [False] * 4
    assert ids[1] == [bos, *[eos] * 7] and mask[1] == [True] * 2 + [False] * 6
    assert recipe.tokenizer.decode(ids[0]) == "a cat"
    assert recipe.tokenizer.decode(recipe.tokenizer.encode(["Äh, ja"], 20)[0]) == ["äh , ja"]


def test_siglip_drops_case_and_punctuation_and_takes_the_likeliest_pieces(tmp_path):
    recipe = load_tokenizer(siglip_folder(tmp_path))
    assert (recipe.length, recipe.uses_mask) == (64, False)
    ids, mask = rows(recipe, "AB  a!b.", "", "xyz ab", length=6)
    # "\u2581ab" (-2.5) beats "\u2581a" "b" (-3); "a!b." is "ab"
    assert ids[0] == [5, 5, 1, 1, 1, 1]
    assert mask[0] == [True] * 3 + [False] * 3
    assert ids[1] == [1] * 6
    assert ids[2] == [3, 2, 5, 1, 1, 1]  # one unknown token for three unknown letters


def test_siglip_knows_the_sigma_that_ends_a_word(tmp_path):
    recipe = load_tokenizer(siglip_folder(tmp_path))
    final, middle, omicron = 8, 9, 10
    assert rows(recipe, "ΟΣ ΣΟ", length=7)[0] == [[3, omicron, final, 3, middle, omicron, 1]]
    assert rows(recipe, "Σ", length=4)[0] == [[3, middle, 1, 1]]


def test_siglip_2_lowers_case_and_ignores_the_files_own_padding(tmp_path):
    recipe = load_tokenizer(gemma_folder(tmp_path))
    assert (recipe.length, recipe.uses_mask) == (64, False)
    assert rows(recipe, "Ab cabc") == ([[5, 6, 4, 7, 5, 6, 7, 1]], [[True] * 8])
    assert rows(recipe, "B", length=3) == ([[6, 1, 0]], [[True, True, False]])


def test_the_config_of_a_folder_overrides_its_family(tmp_path):
    recipe = load_tokenizer(gemma_folder(tmp_path, do_lower_case=False, add_bos_token=True))
    assert rows(recipe, "aB", length=5)[0] == [[2, 5, 9, 1, 0]]
    recipe = load_tokenizer(gemma_folder(tmp_path, pad_token={"content": "<bos>"}, eos_token="b"))
    assert rows(recipe, "a", length=3)[0] == [[5, 6, 2]]
    siglip = load_tokenizer(siglip_folder(tmp_path, do_lower_case=False))
    assert rows(siglip, "aB.", length=4)[0] == [[4, 2, 1, 1]]


@pytest.mark.parametrize(
    "stated, positions, length",
    [(30, 20, 20), (12, 20, 12), (1e30, 20, 20), (None, None, 77), (1e30, None, 77)],
)
def test_length_is_the_shorter_of_tokenizer_and_model(stated, positions, length, tmp_path):
    text = {} if positions is None else {"max_position_embeddings": positions}
    write(tmp_path, config={"model_type": "clip", "text_config": text})
    assert load_tokenizer(clip_folder(tmp_path, model_max_length=stated)).length == length


@pytest.mark.parametrize("family", FOLDERS)
def test_special_tokens_in_a_caption_are_text(family, tmp_path):
    tokenizer = load_tokenizer(FOLDERS[family](tmp_path)).tokenizer
    for token in ("<|endoftext|>", "</s>", "<eos>", "<pad>"):
        ids, mask, _ = tokenizer.encode([f"a {token} b"], 60)
        assert ids[0].tolist().index(tokenizer.eos_id) == mask.sum() - 1


@pytest.mark.parametrize("family", FOLDERS)
def test_a_family_is_known_by_its_model_type_too(family, tmp_path):
    named = load_tokenizer(FOLDERS[family](tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    write(tmp_path, config={"model_type": family})
    assert load_tokenizer(tmp_path) == named


@pytest.mark.parametrize("family", [*FOLDERS, "trained"])
def test_writing_and_reading_again_changes_nothing(family, tmp_path):
    if family == "trained":
        recipe = TextRecipe(train_bpe(["ab"] * 9, vocab_size=300, bos=True), 9, uses_mask=False)
    else:
        recipe = load_tokenizer(FOLDERS[family](tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    recipe.save(out)
    assert load_tokenizer(out) == recipe
    assert Tokenizer.load(out) == recipe.tokenizer
    special = json.loads((out / "special_tokens_map.json").read_text())
    assert special["eos_token"] == recipe.tokenizer.token(recipe.tokenizer.eos_id)


def test_the_tokenizer_of_conversations_puts_nothing_around_a_text(tmp_path):
    trained = train_bpe(["ab"] * 9, vocab_size=300, bos=True, special=("<image>",))
    TextRecipe(trained, 9, uses_mask=True, chat=True).save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("<bos>ab<image>").ids == trained.encode_chat("<bos>ab<image>")[0]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["padding_side"] == "left", "prompts end where answers begin"
    text = {"tokenizer": "chat", "path": str(tmp_path)}
    again = build_tokenizer(text, source=None)
    assert again == load_chat_tokenizer(tmp_path).tokenizer
    for name in ("pad_id", "eos_id", "bos_id", "vocab_size"):
        assert getattr(again, name) == getattr(trained, name)


def test_a_config_names_a_checkpoint_folder(tmp_path):
    text = {"tokenizer": "pretrained", "path": str(gemma_folder(tmp_path))}
    assert build_tokenizer(text, source=None) == load_tokenizer(tmp_path).tokenizer


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"tokenizer_class": "BertTokenizer"},
            "unknown tokenizer_class 'BertTokenizer'.*CLIP",
        ),
        ({"tokenizer_class": None}, "unknown tokenizer_class None"),
        ({"add_eos_token": False}, "end token behind texts"),
        ({"pad_token": "<nothing>"}, "must have the token '<nothing>'"),
    ],
)
def test_folders_that_we_cannot_follow_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(gemma_folder(tmp_path, **change))


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    for family in FOLDERS:
        write(tmp_path, config={"model_type": family})
        with pytest.raises(ValueError, match=r"must have a tokenizer.json.*got \['config.json'\]"):
            load_tokenizer(tmp_path)
    write(tmp_path, tokenizer={"version": "1.0"})
    with pytest.raises(ValueError, match="it has no model"):
        load_tokenizer(tmp_path)


def test_a_generic_tokenizer_must_state_its_length_and_end(tmp_path):
    folder = gemma_folder(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(ValueError, match="must state model_max_length"):
        load_tokenizer(folder)
    write(folder, config={"text_config": {"max_position_embeddings": 16}})
    with pytest.raises(ValueError, match="0 tokens around a text"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (spiece()[:-3], "is damaged"),
        (spiece()[:20], "is damaged"),
        (b"\xff" * 30, "is damaged"),
        (b"<html></html>", "is damaged"),
        (b"", "must have an unknown piece, got 0"),
        (spiece(unk_id=99), "must have an unknown piece"),
        (spiece(model_type=2), "must be a Unigram model.*model_type 2"),
        (spiece([*PIECES, ("<x>", 0.0, 4)]), "user-defined"),
    ],
)
def test_other_sentencepiece_files_are_refused(content, message, tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_sentencepiece(path)


def test_a_sentencepiece_file_cut_anywhere_is_refused_or_whole(tmp_path):
    path, whole = tmp_path / "spiece.model", spiece()
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        try:
            found = read_sentencepiece(path)
        except ValueError:
            continue
        # cut between two messages: what is there is right
        assert found.pieces == tuple((t, s) for t, s, _ in PIECES)[: len(found.pieces)]


def test_encoding_is_a_row_per_text(tmp_path):
    tokenizer = load_tokenizer(clip_folder(tmp_path)).tokenizer
    ids, mask, cut = tokenizer.encode(["cat " * 9, "cat"], 5)
    assert (ids.dtype, ids.shape, mask.shape) == (np.int32, (2, 5), (2, 5))
    assert cut.tolist() == [True, False]
    assert ids[0, -1] == tokenizer.eos_id and mask[0].all()
