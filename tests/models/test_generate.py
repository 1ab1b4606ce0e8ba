# SPDX-License-Identifier: Apache-2.0
"""Generation: the cache, padding, stops, streams, prefixes, sampling, the mesh, int8.

Tokens, logits and beam scores are held against transformers in tests/parity."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.models.beam_search import beam_search
from flax_vlm.models.generate import generate, read_prefix, start, stream
from flax_vlm.models.language_model import LanguageModel, build_language_model
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.models.prompts import Prompt, StopStrings, left_pad
from flax_vlm.models.quantization import quantize
from flax_vlm.models.sampling import Sampling, filter_logits
from flax_vlm.training import sharding
from flax_vlm.trees import num_bytes
from tests.nn import oracle

VOCAB, NEW = 30, 6
MODEL = build_language_model(
    vocab_size=VOCAB,
    width=16,
    depth=2,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    window=4,
    window_pattern="sf",
)
PARAMS = oracle.randomize(parameter_shapes(MODEL), scale=0.4)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(1, VOCAB, n).tolist() for n in (5, 3, 8)]


def prompt(texts=TEXTS, **options):
    text, mask = left_pad(texts, multiple=8, **options)
    return Prompt(text, mask=mask)


def tokens_of(texts=TEXTS, model=MODEL, params=PARAMS, **options):
    given = texts if isinstance(texts, Prompt) else prompt(texts)
    return np.asarray(generate(model, params, given, max_new_tokens=NEW, **options).tokens)


GREEDY = tokens_of()


def test_greedy_tokens_are_the_most_probable_ones_of_a_model_without_a_cache():
    apply = jax.jit(lambda x, m: MODEL.apply({"params": PARAMS}, x, m).logits)
    for text, row in zip(TEXTS, GREEDY, strict=True):
        whole = [*text, *row]
        ids, mask = left_pad([whole], multiple=16)
        logits = np.asarray(apply(ids, mask))[0, 16 - len(whole) :]
        np.testing.assert_array_equal(logits[len(text) - 1 : -1].argmax(-1), row)
    assert len({tuple(row) for row in GREEDY.tolist()}) == 3


def test_neighbours_and_padding_change_nothing():
    for row, text in enumerate(TEXTS):
        np.testing.assert_array_equal(tokens_of([text])[0], GREEDY[row])
    right = np.zeros((3, 8), np.int32)
    mask = np.zeros((3, 8), bool)
    for row, text in enumerate(TEXTS):
        right[row, : len(text)], mask[row, : len(text)] = text, True
    np.testing.assert_array_equal(tokens_of(Prompt(right, mask=mask)), GREEDY)
    np.testing.assert_array_equal(tokens_of(prompt(pad_id=9)), GREEDY)


def test_a_prompt_of_embeddings_is_read_like_its_text():
    given = prompt()
    x = MODEL.apply({"params": PARAMS}, given.text, method="embed")
    np.testing.assert_array_equal(tokens_of(Prompt(embeddings=x, mask=given.mask)), GREEDY)


def test_prompts_of_many_lengths_compile_one_program_each_to_read_and_to_go_on(monkeypatch):
    traces = []
    real = LanguageModel.decode

    def counted(self, x, *rest, **options):
        traces.append(x.shape)
        return real(self, x, *rest, **options)

    monkeypatch.setattr(LanguageModel, "decode", counted)
    model = MODEL.clone(norm_eps=1e-3)  # a model that no other test has compiled
    for lengths, stop in (((2, 5), 0), ((7, 1), 3), ((8, 8), 4)):
        texts = [[3] * n for n in lengths]
        tokens_of(texts, model=model, stop_ids=[stop])
        state = start(model, PARAMS, prompt(texts), max_new_tokens=NEW)
        list(stream(model, PARAMS, state, stop_ids=[stop], every=2))
    assert sorted(traces) == [(2, 1, 16), (2, 8, 16)]


def test_a_stream_gives_every_token_as_it_comes_and_ends_when_all_rows_have_ended():
    state = start(MODEL, PARAMS, prompt(), max_new_tokens=NEW)
    seen = [np.asarray(s.tokens)[:, int(s.step) - 1] for s in stream(MODEL, PARAMS, state)]
    np.testing.assert_array_equal(np.stack(seen, axis=1), GREEDY)
    stop = sorted({int(row[2]) for row in GREEDY})
    state = start(MODEL, PARAMS, prompt(), max_new_tokens=NEW, pad_id=29)
    steps = [int(s.step) for s in stream(MODEL, PARAMS, state, stop_ids=stop, pad_id=29)]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] <= 3


def test_what_follows_the_stop_token_is_padding_and_is_not_counted():
    stop = int(GREEDY[0, 2])
    out = generate(MODEL, PARAMS, prompt(), max_new_tokens=NEW, stop_ids=[stop], pad_id=VOCAB - 1)
    for ours, free, length in zip(np.asarray(out.tokens), GREEDY, out.lengths, strict=True):
        expected = free.tolist().index(stop) + 1 if stop in free else NEW
        assert length == expected
        np.testing.assert_array_equal(ours[:expected], free[:expected])
        assert (ours[expected:] == VOCAB - 1).all()


def test_stop_strings_end_rows_across_tokens_and_are_cut():
    # the string lies across the second and the third token of row 1
    stops = StopStrings(lambda ids: "".join(f"<{i}>" for i in ids), (f"{GREEDY[1, 1]}><",))
    state = start(MODEL, PARAMS, prompt(), max_new_tokens=NEW)
    for last in stream(MODEL, PARAMS, state, stop_strings=stops):
        tokens, lengths, done = (np.asarray(x) for x in (last.tokens, last.lengths, last.done))
    assert done[1] and lengths[1] == 3 and lengths.max() == NEW
    np.testing.assert_array_equal(tokens[1, :3], GREEDY[1, :3])
    assert stops.cut(tokens[1, :3].tolist()) == f"<{GREEDY[1, 0]}><"
    out = generate(MODEL, PARAMS, prompt(), max_new_tokens=NEW, stop_strings=stops)
    text = stops.cut(np.asarray(out.tokens)[1, : int(out.lengths[1])].tolist())
    assert text == f"<{GREEDY[1, 0]}><"
    assert stops.cut([1, 2]) == "<1><2>"


def test_a_prefix_is_read_once_and_continued_by_questions_of_several_lengths():
    image = RNG.integers(1, VOCAB, (1, 5)).astype(np.int32)
    prefix = read_prefix(MODEL, PARAMS, Prompt(image))
    given = prompt()
    together = tokens_of([[*image[0].tolist(), *text] for text in TEXTS])
    for _ in range(2):  # it is not used up
        out = tokens_of(Prompt(given.text, mask=given.mask, prefix=prefix))
        np.testing.assert_array_equal(out, together)
    assert not np.array_equal(together, GREEDY)


def test_a_conversation_goes_on_from_the_cache_of_the_answer():
    stop = int(GREEDY[1, 0])  # row 1 ends at once
    first = generate(MODEL, PARAMS, prompt(), max_new_tokens=3, stop_ids=[stop])
    said = [
        row[:n] for row, n in zip(np.asarray(first.tokens).tolist(), first.lengths, strict=True)
    ]
    again = np.array([[5, 7], [0, 9], [3, 4]], np.int32)
    mask = again > 0
    out = tokens_of(Prompt(again, mask=mask, prefix=first.cache))
    asked = [row[keep].tolist() for row, keep in zip(again, mask, strict=True)]
    whole = [[*a, *b, *c] for a, b, c in zip(TEXTS, said, asked, strict=True)]
    np.testing.assert_array_equal(out, tokens_of(whole))


def exact_probabilities(logits, temperature, top_k, top_p):
    """One row in float64, by sorting and counting."""
    x = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-x)
    order = order[: top_k or len(order)]
    p = np.exp(x[order] - x[order].max())
    p /= p.sum()
    count = 1 + int(np.searchsorted(np.cumsum(p), top_p)) if top_p < 1 else len(p)
    result = np.zeros(len(x))
    result[order[:count]] = p[:count] / p[:count].sum()
    return result


FILTERS = [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 4, 1.0), (1.0, 0, 0.7), (1.3, 6, 0.8)]


def test_filtered_logits_are_the_exact_distribution_of_every_row():
    logits = (2 * RNG.standard_normal((len(FILTERS), 12))).astype(np.float32)
    columns = (np.array(column) for column in zip(*FILTERS, strict=True))
    ours = jax.nn.softmax(filter_logits(jnp.asarray(logits), Sampling(*columns)), axis=-1)
    for row, numbers, out in zip(logits, FILTERS, ours, strict=True):
        expected = exact_probabilities(row, *numbers)
        assert ((np.asarray(out) > 0) == (expected > 0)).all()
        oracle.assert_close(out, expected)


@pytest.mark.parametrize("numbers", [(0.7, 0, 1.0), (1.5, 7, 0.9)])
def test_sampled_tokens_follow_the_exact_distribution(numbers):
    rows = 4000
    text = np.tile(np.array(TEXTS[:1], np.int32), (rows, 1))
    prefix = read_prefix(MODEL, PARAMS, Prompt(text[:1, :-1]))
    out = generate(
        MODEL,
        PARAMS,
        Prompt(text[:, -1:], prefix=prefix),
        max_new_tokens=1,
        sampling=Sampling(*numbers),
        key=jax.random.key(3),
    )
    logits = MODEL.apply({"params": PARAMS}, text[:1]).logits[0, -1]
    p = exact_probabilities(logits, *numbers)
    counts = np.bincount(np.asarray(out.tokens)[:, 0], minlength=VOCAB)
    assert counts[p == 0].sum() == 0
    large = p * rows >= 5  # chi-square needs five expected in a cell; the rest is one cell
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(p[large], p[~large].sum()) * rows
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi2, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom >= 3 and chi2 < freedom + 4 * np.sqrt(2 * freedom)  # one seed in 3000 is above


def test_draws_depend_on_the_key_and_the_row_but_not_on_neighbours():
    options = dict(sampling=Sampling(temperature=2.0), key=jax.random.key(1))
    same = [TEXTS[0]] * 3
    out = tokens_of(same, **options)
    np.testing.assert_array_equal(out, tokens_of(same, **options))
    np.testing.assert_array_equal(out[:2], tokens_of(same[:2], **options))
    assert len({tuple(row) for row in out.tolist()}) == 3
    assert not np.array_equal(out, tokens_of(same, **{**options, "key": jax.random.key(2)}))
    hot = tokens_of(sampling=Sampling(temperature=1e6), key=jax.random.key(1))
    assert all(len(set(row)) > 2 for row in hot.tolist())  # every step draws anew
    cold = dict(sampling=Sampling(temperature=1e-4), key=jax.random.key(1))
    np.testing.assert_array_equal(tokens_of(**cold), GREEDY)
    one = dict(sampling=Sampling(top_k=1), key=jax.random.key(1))
    np.testing.assert_array_equal(tokens_of(**one), GREEDY)


def test_a_cache_over_the_mesh_gives_the_same_tokens():
    mesh = sharding.make_mesh(2, 2, 2)
    texts = [*TEXTS, TEXTS[1]]
    expected = tokens_of(texts)
    placed = jax.device_put(PARAMS, sharding.parameter_shardings(PARAMS, mesh))
    given = jax.device_put(prompt(texts), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        out = generate(MODEL, placed, given, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, expected)
    rows, heads = out.cache.k.sharding.shard_shape(out.cache.k.shape)[1::2]
    assert (rows, heads) == (1, 1)  # of 4 rows and 2 heads


def test_an_int8_cache_is_small_and_its_logits_near():
    exact, small = (
        start(MODEL, PARAMS, prompt(), max_new_tokens=NEW, cache_dtype=dtype)
        for dtype in ("float32", "int8")
    )
    assert num_bytes(small.cache.k) * 4 == num_bytes(exact.cache.k)
    error = np.abs(np.asarray(exact.logits - small.logits))
    assert 1e-5 < error.max() < 0.05 * np.asarray(exact.logits).std()


def test_int8_weights_generate():
    out = tokens_of(model=MODEL.clone(weights="int8"), params=quantize(PARAMS))
    assert (out == GREEDY).mean() > 0.5


def test_the_best_beam_is_the_best_text_of_all():
    model = MODEL.clone(vocab_size=5)
    params = oracle.randomize(parameter_shapes(model), scale=0.4, seed=2)
    text = np.array([[1, 4, 2]], np.int32)
    out = beam_search(
        model, params, Prompt(text), num_beams=25, max_new_tokens=3, length_penalty=0.0
    )
    every = np.array(list(itertools.product(range(5), repeat=3)), np.int32)
    whole = np.concatenate([np.tile(text, (125, 1)), every], axis=1)
    logits = model.apply({"params": params}, whole).logits
    gains = np.asarray(jax.nn.log_softmax(logits, -1))[:, 2:5]
    scores = np.take_along_axis(gains, every[..., None], axis=2)[..., 0].sum(1)
    best = np.argsort(-scores)[:25]
    oracle.assert_close(out.scores[0], scores[best])
    np.testing.assert_array_equal(out.tokens[0, 0], every[best[0]])


def test_bad_requests_name_the_rule():
    given = prompt()
    for message, call in {
        "the cache must hold prefix, prompt and 6 new tokens, 14 slots, got 13": lambda: tokens_of(
            capacity=13
        ),
        "max_new_tokens must be at least 1, got 0": lambda: generate(
            MODEL, PARAMS, given, max_new_tokens=0
        ),
        "sampling needs a random key": lambda: tokens_of(sampling=Sampling()),
        "temperature must be above 0": lambda: tokens_of(
            sampling=Sampling(0.0), key=jax.random.key(0)
        ),
        "top_p must lie in": lambda: tokens_of(sampling=Sampling(top_p=1.2), key=jax.random.key(0)),
        r"real token, rows \[1\] have none": lambda: tokens_of(
            Prompt(given.text, mask=given.mask & np.array([[1], [0], [1]], bool))
        ),
        r"at least one token, those of rows \[1\]": lambda: left_pad([[1], []]),
        "give one of the two": lambda: tokens_of(Prompt()),
        "one row or those of the prompt, got 2 for 3": lambda: tokens_of(
            Prompt(given.text, prefix=read_prefix(MODEL, PARAMS, Prompt(given.text[:2])))
        ),
        "beam search needs at least one beam": lambda: beam_search(
            MODEL, PARAMS, given, num_beams=0, max_new_tokens=2
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
