# SPDX-License-Identifier: Apache-2.0
"""Beam search: the n most probable continuations found by keeping n open ones per row.

    score = log p(tokens | prompt) / tokens^length_penalty

Of every open beam all next tokens are candidates. The best (1 + number of stop tokens) n of them
are looked at: those that end and are among the first n join the finished ones, of which n are kept;
the best n that do not end stay open. A row is over when its best open beam, were it to end now,
would not be better than its worst finished one; at the last step everything ends.

The same as transformers 5 (`GenerationMixin._beam_search`, early_stopping=False), so that scores
can be compared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_vlm.models.generate import is_stop, next_logits, start
from flax_vlm.models.language_model import LanguageModel
from flax_vlm.models.prompts import Prompt
from flax_vlm.nn.kv_cache import KVCache

NEVER = -1e9  # score of what cannot be chosen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """Texts of a row, best first.

    Attributes:
        tokens: [B, n, max_new_tokens] int32.
        scores: [B, n] float32.
        lengths: [B, n] int32.
    """

    tokens: jax.Array
    scores: jax.Array
    lengths: jax.Array

    def take(self, chosen: jax.Array, scores: jax.Array | None = None) -> Beams:
        """Returns the chosen ones [B, m] of every row, with other scores if they are given."""
        return Beams(
            jnp.take_along_axis(self.tokens, chosen[:, :, None], axis=1),
            jnp.take_along_axis(self.scores, chosen, axis=1) if scores is None else scores,
            jnp.take_along_axis(self.lengths, chosen, axis=1),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    cache: KVCache  # of B n rows
    logits: jax.Array  # [B n, V]
    running: Beams
    finished: Beams
    is_open: jax.Array  # [B] bool, can the row still get better?
    step: jax.Array


def beam_search(
    model: LanguageModel,
    params: Any,
    prompt: Prompt,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    cache_dtype: str | None = None,
) -> Beams:
    """Returns the best continuations of every row, the token that ended them included.

    Args:
        model: the language model.
        params: its parameters.
        prompt: what is read.
        num_beams: n.
        max_new_tokens: T; beams that did not end before end there.
        length_penalty: above 0 favours long texts; 0 compares bare log probabilities.
        stop_ids: tokens that end a text.
        pad_id: what follows the end.
        cache_dtype: of the cache; None takes the model's.

    Raises:
        ValueError: if the vocabulary is too small for so many candidates.
    """
    candidates = max(2, 1 + len(stop_ids)) * num_beams
    if num_beams < 1 or candidates > num_beams * model.vocab_size:
        raise ValueError(
            f"beam search needs at least one beam and {candidates} candidates among "
            f"{num_beams} x {model.vocab_size} tokens, got num_beams {num_beams}"
        )
    state = start(
        model,
        params,
        prompt,
        max_new_tokens=max_new_tokens,
        cache_dtype=cache_dtype,
        pad_id=pad_id,
    )
    ids = jnp.asarray(stop_ids, jnp.int32)
    fixed = (num_beams, candidates)
    return _search(
        model, *fixed, params, state.cache, state.logits, state.tokens, ids, length_penalty
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    model: LanguageModel,
    beams: int,
    candidates: int,
    params: Any,
    cache: KVCache,
    logits: jax.Array,
    empty: jax.Array,
    stop_ids: jax.Array,
    penalty: jax.Array | float,
) -> Beams:
    batch, total = empty.shape
    copies = jnp.repeat(jnp.arange(batch), beams)  # [B n]
    shape = (batch, beams)
    tokens = jnp.broadcast_to(empty[:, None], (*shape, total))
    none = jnp.zeros(shape, jnp.int32)
    first = jnp.where(jnp.arange(beams)[None] == 0, 0.0, NEVER)  # all beams are the same yet
    first = jnp.broadcast_to(first, shape)
    search = _Search(
        cache=cache.take(copies),
        logits=logits[copies],
        running=Beams(tokens, first, none),
        finished=Beams(tokens, jnp.full(shape, NEVER), none),
        is_open=jnp.ones(batch, bool),
        step=jnp.zeros((), jnp.int32),
    )

    def unfinished(search: _Search) -> jax.Array:
        return (search.step < total) & search.is_open.any()

    def one(search: _Search) -> _Search:
        found, beam, token = _candidates(search, candidates)
        ends = is_stop(token, stop_ids) | (search.step + 1 == total)
        running, chosen = _keep_running(found, ends, beams)
        finished = _keep_finished(search, found, ends, beams, penalty)
        chosen_beam = jnp.take_along_axis(beam, chosen, axis=1)  # [B, n]
        rows = (jnp.arange(batch)[:, None] * beams + chosen_beam).reshape(-1)
        last = jnp.take_along_axis(token, chosen, axis=1).reshape(-1)
        real = jnp.ones(batch * beams, bool)
        logits, cache = next_logits(model, params, last, real, search.cache.take(rows))
        best = running.scores[:, 0] / (search.step + 1.0) ** penalty
        worst = finished.scores.min(axis=1)
        is_open = search.is_open & (best > worst)
        return _Search(cache, logits, running, finished, is_open, search.step + 1)

    return jax.lax.while_loop(unfinished, one, search).finished


def _candidates(search: _Search, count: int) -> tuple[Beams, jax.Array, jax.Array]:
    """Returns (the best `count` continuations, the beam each goes on from, its last token)."""
    batch, beams = search.running.scores.shape
    gains = jax.nn.log_softmax(search.logits.astype(jnp.float32), axis=-1)
    vocabulary = gains.shape[-1]
    scores = search.running.scores[:, :, None] + gains.reshape(batch, beams, vocabulary)
    scores, index = jax.lax.top_k(scores.reshape(batch, beams * vocabulary), count)
    beam, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
    found = search.running.take(beam, scores)
    place = (jnp.zeros((), jnp.int32),) * 2 + (search.step,)
    tokens = jax.lax.dynamic_update_slice(found.tokens, token[:, :, None], place)
    return Beams(tokens, scores, found.lengths + 1), beam, token


def _keep_running(found: Beams, ends: jax.Array, beams: int) -> tuple[Beams, jax.Array]:
    scores, chosen = jax.lax.top_k(found.scores + jnp.where(ends, NEVER, 0.0), beams)
    return found.take(chosen, scores), chosen


def _keep_finished(
    search: _Search, found: Beams, ends: jax.Array, beams: int, penalty: jax.Array | float
) -> Beams:
    counted = ends & (jnp.arange(ends.shape[1])[None] < beams) & search.is_open[:, None]
    scores = found.scores / (search.step + 1.0) ** penalty + jnp.where(counted, 0.0, NEVER)
    everything = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1),
        search.finished,
        Beams(found.tokens, scores, found.lengths),
    )
    scores, chosen = jax.lax.top_k(everything.scores, beams)
    return everything.take(chosen, scores)
