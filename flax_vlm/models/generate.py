# SPDX-License-Identifier: Apache-2.0
"""Text from a language model: a prompt is read into a cache once, then tokens come one by one.

    prompt  [pad pad a b c]          slots of the cache, the same for all rows
    cache   [ -   -  0 1 2 | 3 4 5 ...]   positions of each row's own text; "-" is seen by nobody

Two compiled programs do it, whatever the lengths of the prompts: `start` reads the prompt,
`advance` loops on the device until a given number of tokens is there or every row has ended. All
tokens at once, a stream of them and stop strings differ only in how often the host asks.

The cache also holds the last token, so that a conversation can go on from it: one pass through the
model more than other libraries need.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_vlm.models.language_model import LanguageModel
from flax_vlm.models.prompts import Prompt, StopStrings
from flax_vlm.models.sampling import Sampling, check_sampling, choose_tokens
from flax_vlm.nn.kv_cache import KVCache

STOP_STRING_EVERY = 8  # tokens between two looks of the host for stop strings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """Texts that are being written.

    Attributes:
        cache: of all tokens so far.
        logits: [B, V] float32, of the next token.
        tokens: [B, max_new_tokens] int32; what is not there yet is the padding id.
        lengths: [B] int32, tokens of each row, the one that ended it included.
        done: [B] bool, rows that have ended.
        step: [] int32, columns of `tokens` that are filled.
        keys: [B] random keys.
    """

    cache: KVCache
    logits: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    step: jax.Array
    keys: jax.Array


def read_prefix(
    model: LanguageModel, params: Any, prompt: Prompt, cache_dtype: str | None = None
) -> KVCache:
    """Returns the cache of a prompt, for use as the `prefix` of others: an image, say, of which
    several questions are asked.

    Args:
        model: the language model.
        params: its parameters.
        prompt: what stands before; it may have a prefix itself.
        cache_dtype: of the cache, and of all that go on from it; None takes the model's.
    """
    capacity = _slots(prompt, 0)
    return _read(model, capacity, cache_dtype, params, prompt)[1]


def start(
    model: LanguageModel,
    params: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    capacity: int | None = None,
    cache_dtype: str | None = None,
    pad_id: int = 0,
) -> Generation:
    """Returns a generation whose prompt has been read and that has no token yet.

    Args:
        model: the language model.
        params: its parameters.
        prompt: what is read.
        max_new_tokens: how many columns `tokens` has.
        key: random key of all rows; None is enough for greedy decoding.
        capacity: slots of the cache; None takes what is needed. One for all requests makes them
            share a compiled program.
        cache_dtype: of the cache, "float32", "bfloat16" or "int8"; None takes the model's. A
            prefix keeps its own.
        pad_id: what `tokens` is filled with.

    Raises:
        ValueError: if the cache is too short for the request.
    """
    needed = _slots(prompt, max_new_tokens)
    capacity = needed if capacity is None else capacity
    if capacity < needed:
        raise ValueError(
            f"the cache must hold prefix, prompt and {max_new_tokens} new tokens, {needed} slots, "
            f"got {capacity}; give a larger capacity, a shorter prompt or fewer new tokens"
        )
    logits, cache = _read(model, capacity, cache_dtype, params, prompt)
    batch = prompt.shape[0]
    key = jax.random.key(0) if key is None else key
    return Generation(
        cache=cache,
        logits=logits,
        tokens=jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        step=jnp.zeros((), jnp.int32),
        keys=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch)),
    )


def _slots(prompt: Prompt, new: int) -> int:
    if (prompt.text is None) == (prompt.embeddings is None):
        raise ValueError("a prompt is text or embeddings, give one of the two")
    batch, length = prompt.shape
    if prompt.mask is not None and _is_readable(prompt.mask):
        blind = np.flatnonzero(~np.asarray(prompt.mask).any(axis=1))
        if len(blind):
            raise ValueError(f"every row of a prompt needs a real token, rows {blind} have none")
    if prompt.prefix is None:
        return length + new
    rows = prompt.prefix.batch
    if rows not in (1, batch):
        raise ValueError(f"a prefix has one row or those of the prompt, got {rows} for {batch}")
    return prompt.prefix.capacity + length + new


def _is_readable(mask: Any) -> bool:
    # in a jitted program there is nothing to look at, and over several processes no single one can
    # look at all rows
    return not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    model: LanguageModel, capacity: int, cache_dtype: str | None, params: Any, prompt: Prompt
) -> tuple[jax.Array, KVCache]:
    batch = prompt.shape[0]
    if prompt.prefix is None:
        has_visual = prompt.visual is not None
        cache = model.init_cache(batch, capacity, cache_dtype, visual=has_visual)
    else:
        rows = jnp.arange(batch) % prompt.prefix.batch
        model.check_capacity(capacity)
        cache = prompt.prefix.take(rows).grow(capacity)
    variables = {"params": params}
    x = prompt.embeddings
    if x is None:
        x = model.apply(variables, prompt.text, method="embed")
    given = dict(cache=cache, visual=prompt.visual)
    tokens, cache = model.apply(variables, x, prompt.mask, **given, method="decode")
    mask = jnp.ones(prompt.shape, bool) if prompt.mask is None else prompt.mask
    last = jnp.where(mask, jnp.arange(prompt.shape[1])[None], 0).max(axis=1)
    tokens = jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]  # [B, D]
    return model.apply(variables, tokens, method="logits"), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    model: LanguageModel,
    params: Any,
    state: Generation,
    limit: jax.Array | int,
    sampling: Sampling | None,
    stop_ids: jax.Array,
    pad_id: jax.Array | int,
) -> Generation:
    """Returns the generation with `limit` columns filled, fewer if all rows have ended.

    The memory of `state` is taken over: it cannot be used again.

    Args:
        model: the language model.
        params: its parameters.
        state: of `start` or of this function.
        limit: at most max_new_tokens.
        sampling: None takes the most probable token.
        stop_ids: [n] int32, tokens that end a row.
        pad_id: token of rows that have ended.
    """

    def unfinished(state: Generation) -> jax.Array:
        return (state.step < limit) & ~state.done.all()

    def one(state: Generation) -> Generation:
        token = choose_tokens(state.logits, sampling, state.keys, state.step)
        token = jnp.where(state.done, pad_id, token)  # [B]
        column = (jnp.zeros((), jnp.int32), state.step)
        logits, cache = next_logits(model, params, token, ~state.done, state.cache)
        return dataclasses.replace(
            state,
            cache=cache,
            logits=logits,
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], column),
            lengths=state.lengths + ~state.done,
            done=state.done | is_stop(token, stop_ids),
            step=state.step + 1,
        )

    return jax.lax.while_loop(unfinished, one, state)


def next_logits(
    model: LanguageModel, params: Any, token: jax.Array, real: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Returns (logits [B, V] of the token after this one, cache with this one).

    Args:
        model: the language model.
        params: its parameters.
        token: [B] int32.
        real: [B] bool; where False the token is padding.
        cache: with a free slot.
    """
    out = model.apply({"params": params}, token[:, None], real[:, None], cache=cache)
    return out.logits[:, 0], out.cache


def is_stop(token: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """Returns [...] bool: tokens [...] that are among stop_ids [n]."""
    return (token[..., None] == stop_ids.reshape((1,) * token.ndim + (-1,))).any(-1)


def stream(
    model: LanguageModel,
    params: Any,
    state: Generation,
    *,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: StopStrings | None = None,
    pad_id: int = 0,
    every: int = 1,
) -> Iterator[Generation]:
    """Yields the generation each time `every` more tokens are there, and at the end.

    Read what is yielded before asking for more: its memory is taken over.

    Args:
        model: the language model.
        params: its parameters.
        state: of `start`.
        sampling: None takes the most probable token.
        stop_ids: tokens that end a row.
        stop_strings: end a row too, at the next look of the host.
        pad_id: token of rows that have ended.
        every: tokens between two looks of the host.
    """
    if sampling is not None:
        check_sampling(sampling)
    ids = jnp.asarray(stop_ids, jnp.int32)
    total = state.tokens.shape[1]
    for limit in range(every, total + every, every):
        state = advance(model, params, state, min(limit, total), sampling, ids, pad_id)
        if stop_strings is not None:
            found = stop_strings.found(np.asarray(state.tokens), np.asarray(state.lengths))
            state = dataclasses.replace(state, done=state.done | jnp.asarray(found))
        finished = limit >= total or bool(state.done.all())
        yield state
        if finished:
            return


def generate(
    model: LanguageModel,
    params: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: StopStrings | None = None,
    pad_id: int = 0,
    capacity: int | None = None,
    cache_dtype: str | None = None,
) -> Generation:
    """Returns the finished generation: `tokens` [B, max_new_tokens] and `lengths` [B].

    Args:
        model: the language model.
        params: its parameters; those of quantization.quantize for a model with weights="int8".
        prompt: what is read.
        max_new_tokens: at most so many are generated.
        sampling: None takes the most probable token.
        key: random key; needed for sampling.
        stop_ids: tokens that end a row; they are part of its text.
        stop_strings: end a row too; `StopStrings.cut` gives the text before them.
        pad_id: token of rows that have ended.
        capacity: slots of the cache, see `start`.
        cache_dtype: of the cache, see `start`.

    Raises:
        ValueError: if there is nothing to generate, the cache is too short, or sampling has no key
            or bad numbers.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if sampling is not None and key is None:
        raise ValueError("sampling needs a random key, got None")
    state = start(
        model,
        params,
        prompt,
        max_new_tokens=max_new_tokens,
        key=key,
        capacity=capacity,
        cache_dtype=cache_dtype,
        pad_id=pad_id,
    )
    every = max_new_tokens if stop_strings is None else STOP_STRING_EVERY
    options = dict(sampling=sampling, stop_ids=stop_ids, stop_strings=stop_strings, pad_id=pad_id)
    return collections.deque(stream(model, params, state, every=every, **options), maxlen=1).pop()
