# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: what they keep, what they cut, and that their file is all there is."""

import json
import pickle

import numpy as np
import pytest
import tokenizers

from flax_vlm.build import build
from flax_vlm.data.text import TOKENIZERS, Tokenizer, byte_level, text_id, train_bpe

TEXTS = [
    f"a {s} {c} {o} on the mat" for s in ("small", "large") for c in "xyz" for o in ("cat", "dog")
]
ODD = ["", " ", "naïve Straße", "日本語 \U0001f600", "tab\tnew\nline", "a  b", "e\u0301 é", "<eos>"]


@pytest.fixture(params=["bpe", "byte"])
def tokenizer(request):
    return build(TOKENIZERS, {"name": request.param}, "tokenizer", texts=TEXTS)


def test_any_text_survives_encoding_and_decoding(tokenizer):
    ids, mask, truncated = tokenizer.encode(TEXTS + ODD, 64)
    assert (ids.dtype, mask.dtype, truncated.dtype) == (np.int32, bool, bool)
    assert ids.shape == mask.shape == (len(TEXTS + ODD), 64) and truncated.shape == ids.shape[:1]
    assert tokenizer.decode(ids) == TEXTS + ODD
    assert tokenizer.decode(ids[3]) == TEXTS[3]
    assert not truncated.any()


def test_decoding_stops_at_the_end_token(tokenizer):
    first, second = (tokenizer.encode([text], 4)[0][0, :1].tolist() for text in "ab")
    assert tokenizer.decode([*first, tokenizer.eos_id, *second]) == "a"
    assert tokenizer.decode([*first, tokenizer.pad_id, *second]) == "ab"


def test_row_is_the_text_its_end_token_and_padding(tokenizer):
    ids, mask, _ = tokenizer.encode([TEXTS[0], "a", ""], 50)
    lengths = mask.sum(1)
    assert lengths[2] == 1 < lengths[1] == 2 < lengths[0]
    for row, length in enumerate(lengths):
        assert mask[row, :length].all()
        assert ids[row, length - 1] == tokenizer.eos_id
        assert (ids[row, length:] == tokenizer.pad_id).all()
        assert tokenizer.eos_id not in ids[row, : length - 1]
    assert tokenizer.pad_id == 0 and tokenizer.eos_id == 1


def test_bpe_merges_frequent_pairs_and_bytes_do_not():
    bpe, byte = train_bpe(TEXTS, vocab_size=300), byte_level()
    assert bpe.encode(TEXTS, 64)[1].sum() < byte.encode(TEXTS, 64)[1].sum() / 2
    assert byte.encode(["é"], 64)[1].sum() == 3  # two bytes and the end


def test_long_text_is_cut_with_its_end_token_kept_and_is_reported(tokenizer):
    whole, _, _ = tokenizer.encode([TEXTS[0]], 64)
    length = int((whole != tokenizer.pad_id).sum())
    for bos in (False, True):
        tokenizer = byte_level(bos=bos) if bos else tokenizer
        whole, mask, _ = tokenizer.encode([TEXTS[0]], 64)
        length = int(mask.sum())
        ids, mask, truncated = tokenizer.encode([TEXTS[0], "a"], length - 2)
        assert truncated.tolist() == [True, False]
        assert mask[0].all() and ids[0, -1] == tokenizer.eos_id
        np.testing.assert_array_equal(ids[0, :-1], whole[0, : length - 3])
        assert not tokenizer.encode([TEXTS[0]], length)[2].any()


def test_begin_token_starts_every_text_if_asked_for():
    with_bos, without = byte_level(bos=True), byte_level()
    ids, mask, _ = with_bos.encode(["ab", ""], 6)
    assert ids[:, 0].tolist() == [with_bos.bos_id] * 2 and mask.sum(1).tolist() == [4, 2]
    assert with_bos.decode(ids) == ["ab", ""]
    assert without.bos_id is None
    with pytest.raises(ValueError, match="at least 2, got 1"):
        with_bos.encode(["a"], 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        without.encode(["a"], 0)


def test_special_token_in_a_caption_is_only_text(tokenizer):
    ids, mask, _ = tokenizer.encode(["a <eos> b <pad>"], 32)
    assert (ids[0] == tokenizer.eos_id).sum() == 1
    assert (ids[0][mask[0]] != tokenizer.pad_id).all()


def test_broken_surrogates_do_not_stop_a_run(tokenizer):
    assert tokenizer.decode(tokenizer.encode([json.loads('"a\\ud800b"')], 9)[0]) == ["a?b"]


def test_lower_case_is_an_option():
    lower, as_is = byte_level(lower=True), byte_level()
    np.testing.assert_array_equal(lower.encode(["A Dog"], 9)[0], as_is.encode(["a dog"], 9)[0])
    assert as_is.decode(as_is.encode(["A Dog"], 9)[0]) == ["A Dog"]
    upper = train_bpe([text.upper() for text in TEXTS], vocab_size=300, lower=True)
    assert upper == train_bpe(TEXTS, vocab_size=300, lower=True)


@pytest.mark.parametrize("multiple", [1, 8, 100])
def test_vocabulary_is_rounded_up_to_a_multiple_and_holds_all_ids(multiple):
    for tokenizer in (
        byte_level(multiple=multiple),
        train_bpe(TEXTS, vocab_size=290, multiple=multiple),
    ):
        assert tokenizer.vocab_size % multiple == 0
        assert 258 <= tokenizer.vocab_size < 290 + multiple
        assert tokenizer.encode(TEXTS + ODD, 64)[0].max() < tokenizer.vocab_size
    assert byte_level(multiple=1).vocab_size == 258


def test_saved_file_holds_everything(tokenizer, tmp_path):
    for settings in ({}, {"lower": True, "bos": True, "multiple": 64}):
        tokenizer = byte_level(**settings) if settings else tokenizer
        tokenizer.save(tmp_path)
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded == tokenizer and loaded == Tokenizer.load(tmp_path)
        assert (loaded.vocab_size, loaded.bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)
        for found, expected in zip(loaded.encode(ODD, 12), tokenizer.encode(ODD, 12), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_tokenizers_library_alone_reads_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    rows = alone.encode_batch(TEXTS[:2] + ["a"])
    ids, mask, _ = tokenizer.encode(TEXTS[:2] + ["a"], len(rows[0].ids))
    assert [row.ids for row in rows] == ids.tolist()
    assert [row.attention_mask for row in rows] == mask.astype(int).tolist()
    assert alone.get_vocab_size() == tokenizer.vocab_size


def test_tokenizer_travels_to_another_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer and hash(copy) == hash(tokenizer)
    np.testing.assert_array_equal(copy.encode(ODD, 20)[0], tokenizer.encode(ODD, 20)[0])


def test_training_is_deterministic_and_does_not_depend_on_the_order_of_texts():
    first = train_bpe(TEXTS, vocab_size=320)
    assert all(train_bpe(TEXTS[::-1], vocab_size=320) == first for _ in range(3))
    assert train_bpe(TEXTS[:3], vocab_size=320) != first


def test_wrong_settings_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 259 for all bytes, got 200"):
        train_bpe(TEXTS, vocab_size=200, bos=True)
    with pytest.raises(ValueError, match="multiple of at least 1"):
        byte_level(multiple=0)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="must state its padding.*got padding None and 0 tokens"):
        Tokenizer.load(tmp_path / "x.json")


def test_text_id_is_equal_for_equal_captions_only():
    assert text_id("A  red\tCircle ") == text_id("a red circle")
    assert text_id("e\u0301") == text_id("\u00e9")
    ids = [text_id(f"caption {i}") for i in range(3000)]
    assert len(set(ids)) == 3000 and min(ids) < 0 < max(ids)
    assert text_id("a").dtype == np.int32
    assert int(text_id("a red circle")) == 1419750294  # the same tomorrow


@pytest.mark.parametrize("space", [" ", "\u0120", "\u2581"])
def test_a_token_with_a_space_in_front_starts_a_word(space):
    vocabulary = {"<pad>": 0, "<eos>": 1, f"{space}a": 2, "b": 3, space: 4}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<pad>"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", 1)]
    )
    inner.enable_padding(pad_token="<pad>")
    found = Tokenizer(inner.to_str())
    assert [found.starts_word(i) for i in range(5)] == [False, False, True, False, True]
