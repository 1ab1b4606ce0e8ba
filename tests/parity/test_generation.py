# SPDX-License-Identifier: Apache-2.0
"""Generation gives the tokens, the logits and the scores of transformers' generate."""

import functools

import jax
import numpy as np
import pytest
import torch

from flax_vlm.models.beam_search import beam_search
from flax_vlm.models.generate import advance, generate, start
from flax_vlm.models.prompts import Prompt
from tests.parity.language_models import VOCAB, case
from tests.parity.reference import TOLERANCE, build_changed, error

NEW = 7
PROMPTS = np.random.default_rng(0).integers(3, VOCAB, (3, 6)).astype(np.int32)
MASK = np.ones((3, 6), bool)
MASK[1, :2] = False
MASK[2, :5] = False
PROMPTS = np.where(MASK, PROMPTS, 0)


@functools.cache
def ours(name):
    loaded = case(name)[2]
    return build_changed(loaded.spec), loaded.params


@torch.no_grad()
def theirs(name, prompts=PROMPTS, mask=MASK, stop=None, **options):
    settings = dict(
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )
    ids, mask = torch.from_numpy(prompts).long(), torch.from_numpy(mask).long()
    return case(name)[0].generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("name", ["llama with biases", "mistral", "qwen3", "gemma2"])
def test_greedy_tokens_and_logits_are_those_of_transformers(name):
    model, params = ours(name)
    reference = theirs(name, output_logits=True)
    state = start(model, params, Prompt(PROMPTS, mask=MASK), max_new_tokens=NEW)
    for column in range(NEW):
        assert error(state.logits, reference.logits[column]) <= TOLERANCE
        top = np.sort(np.asarray(state.logits), axis=-1)
        assert (top[:, -1] - top[:, -2] > 1e-3).all()  # no tie that a rounding could turn
        state = advance(model, params, state, column + 1, None, np.zeros(0, np.int32), 0)
    assert np.array_equal(state.tokens, reference.sequences[:, 6:])


def test_rows_end_at_their_own_stop_token_as_in_transformers():
    model, params = ours("llama with biases")
    free = np.asarray(
        generate(model, params, Prompt(PROMPTS, mask=MASK), max_new_tokens=NEW).tokens
    )
    stop = [int(free[0, 2]), int(free[1, 4])]
    reference = theirs("llama with biases", stop=stop).sequences[:, 6:].numpy()
    out = generate(
        model, params, Prompt(PROMPTS, mask=MASK), max_new_tokens=NEW, stop_ids=stop, pad_id=0
    )
    tokens = np.asarray(out.tokens)
    assert np.array_equal(tokens[:, : reference.shape[1]], reference)
    for row, length in zip(tokens, np.asarray(out.lengths), strict=True):
        assert not set(row[: length - 1]) & set(stop) and (row[length:] == 0).all()
        assert length == NEW or row[length - 1] in stop
    assert len(set(np.asarray(out.lengths).tolist())) > 1


@pytest.mark.parametrize(
    "name, beams, penalty, num_stops",
    [("llama with biases", 3, 1.0, 1), ("gemma2", 2, 0.0, 2), ("mistral", 4, 2.0, 0)],
)
def test_beam_scores_and_texts_are_those_of_transformers(name, beams, penalty, num_stops):
    model, params = ours(name)
    stop = None
    if num_stops:  # tokens that beams do meet on their way
        free = theirs(name, num_beams=beams, length_penalty=penalty).sequences[:, 6:]
        stop = [int(free[row, 2 + row]) for row in range(num_stops)]
    reference = theirs(
        name,
        stop=stop,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=penalty,
        output_scores=True,
    )
    out = beam_search(
        model,
        params,
        Prompt(PROMPTS, mask=MASK),
        num_beams=beams,
        max_new_tokens=NEW,
        length_penalty=penalty,
        stop_ids=stop or (),
    )
    expected = reference.sequences_scores.reshape(3, beams)
    assert error(out.scores, expected) <= TOLERANCE
    sequences = reference.sequences[:, 6:].reshape(3, beams, -1).numpy()
    lengths = np.asarray(out.lengths)
    assert (lengths.min() < NEW) == bool(num_stops)
    for b, n in np.ndindex(3, beams):
        row, length = np.asarray(out.tokens)[b, n], lengths[b, n]
        # transformers fills with the stop token where the padding id is 0
        assert np.array_equal(row[:length], sequences[b, n, :length])
        assert (row[length:] == 0).all()
        assert length == NEW or row[length - 1] in stop


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_cached_logits_equal_those_without_a_cache_past_the_window(name):
    model, params = ours(name)
    ids = np.random.default_rng(5).integers(3, VOCAB, (2, 12)).astype(np.int32)
    mask = np.ones((2, 12), bool)
    mask[1, :3] = False
    apply = jax.jit(lambda x, m, c: model.apply({"params": params}, x, m, cache=c))
    whole = model.apply({"params": params}, ids, mask).logits
    cache, pieces = model.init_cache(2, 13), []
    for first, last in ((0, 5), (5, 6), (6, 11), (11, 12)):
        out = apply(ids[:, first:last], mask[:, first:last], cache)
        cache = out.cache
        pieces.append(np.asarray(out.logits))
    logits = np.concatenate(pieces, axis=1)
    assert error(logits[mask], np.asarray(whole)[mask]) <= TOLERANCE / 2
