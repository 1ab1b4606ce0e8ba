# SPDX-License-Identifier: Apache-2.0
"""Token ids and masks equal those of transformers, on small tokenizers of each family's kind."""

import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import models, trainers

from flax_vlm.data.hf_tokenizers import TextRecipe, load_tokenizer
from flax_vlm.data.text import Tokenizer, train_bpe
from tests.parity.texts import TEXTS, WORDS


def trained(tokenizer, model, **options):
    """Returns (vocab, merges) of a BPE trained with the normalizers of a transformers class."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizer.backend_tokenizer.normalizer
    backend.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    backend.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=900, show_progress=False, **options)
    )
    learned = json.loads(backend.to_str())["model"]
    return learned["vocab"], [tuple(pair) for pair in learned["merges"]]


def clip(folder):
    vocab, merges = trained(
        transformers.CLIPTokenizer(),
        models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"),
        end_of_word_suffix="</w>",
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    # real vocabularies end with these two
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    found = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    found.save_pretrained(folder)
    return folder


def siglip2(folder, kind=transformers.Siglip2Tokenizer):
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [f"<0x{i:02X}>" for i in range(256)]
    vocab, merges = trained(
        transformers.Siglip2Tokenizer(),
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        special_tokens=[*special, *pieces],
        limit_alphabet=60,
    )
    found = kind(
        vocab=vocab,
        merges=merges,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_max_length=64,
        model_input_names=["input_ids"],
    )
    found.save_pretrained(folder)
    return folder


def siglip(folder, rule="nmt_nfkc"):
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(t.lower().split()) for t in TEXTS[:14] * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=300,
        character_coverage=1.0,  # the scripts after those texts are unknown
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    found = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    found.save_pretrained(folder)
    return folder


FAMILIES = {"clip": (clip, 77), "siglip": (siglip, 64), "siglip2": (siglip2, 64)}


def assert_equal(ours, theirs, length):
    ids, mask, cut = ours.tokenizer.encode(TEXTS, length)
    options = dict(padding="max_length", truncation=True, max_length=length)
    for text, row, seen, was_cut in zip(TEXTS, ids, mask, cut, strict=True):
        wanted = theirs(text, return_attention_mask=True, **options)
        assert row.tolist() == wanted["input_ids"], text[:60]
        assert seen.tolist() == [bool(m) for m in wanted["attention_mask"]], text[:60]
        assert was_cut == (len(theirs(text, verbose=False)["input_ids"]) > length), text[:60]
    assert cut.any() and not cut.all()


@pytest.mark.parametrize("length", [None, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_masks_are_those_of_transformers(family, length, tmp_path):
    make, trained_length = FAMILIES[family]
    ours = load_tokenizer(make(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith({"clip": "CLIP"}.get(family, "Siglip"))
    assert ours.length == trained_length
    assert ours.uses_mask == (family == "clip")
    assert ours.tokenizer.pad_id == theirs.pad_token_id
    assert ours.tokenizer.eos_id == theirs.eos_token_id
    assert_equal(ours, theirs, length or ours.length)


def test_a_sentencepiece_model_without_normalisation_gives_the_same_ids(tmp_path):
    ours = load_tokenizer(siglip(tmp_path, "identity"))
    assert_equal(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), 64)


def test_clip_is_read_from_vocab_and_merges_as_old_folders_have_it(tmp_path):
    (tmp_path / "new").mkdir()
    whole = load_tokenizer(clip(tmp_path / "new"))
    old = tmp_path / "old"
    old.mkdir()
    model = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (old / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (old / "config.json").write_text(json.dumps({"model_type": "clip"}))
    ids = [recipe.tokenizer.encode(TEXTS, 77)[0] for recipe in (whole, load_tokenizer(old))]
    np.testing.assert_array_equal(*ids)


def test_texts_of_fixed_resolution_siglip_2_are_lower_cased_too(tmp_path):
    # these checkpoints name Gemma's class, with which transformers keeps the case
    siglip2(tmp_path, transformers.GemmaTokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    ours = load_tokenizer(tmp_path).tokenizer
    upper, lower = (ours.encode([text], 64)[0][0] for text in ("A Photo", "a photo"))
    assert upper.tolist() == lower.tolist()
    theirs = transformers.GemmaTokenizer.from_pretrained(tmp_path)
    wanted = theirs("a photo", padding="max_length", max_length=64)["input_ids"]
    assert lower.tolist() == wanted


@pytest.mark.parametrize("source", ["clip", "siglip", "siglip2", "trained", "trained with bos"])
def test_transformers_reads_what_we_write(source, tmp_path):
    (tmp_path / "in").mkdir()
    if source in FAMILIES:
        ours = load_tokenizer(FAMILIES[source][0](tmp_path / "in"))
    else:
        tokenizer = train_bpe(WORDS, vocab_size=600, lower=True, bos="bos" in source)
        ours = TextRecipe(tokenizer, length=40, uses_mask=True)
    out = tmp_path / "out"
    out.mkdir()
    ours.save(out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.model_max_length == ours.length
    assert_equal(ours, theirs, ours.length)
    again = load_tokenizer(out)
    assert again == ours
    assert Tokenizer.load(out) == ours.tokenizer
