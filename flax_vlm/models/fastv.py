# SPDX-License-Identifier: Apache-2.0
"""FastV: after a few layers a language model drops the visual tokens that nobody looks at.

    layers 0 .. K-1    [ a v0 v1 v2 v3 b c ]     c, the last token, looks at v1 and v2 in layer K-1
    layers K ..        [ a    v1 v2    b c ]     the others are gone, and so are their keys

Paper: Chen et al. 2024, arXiv:2403.06764, section 4 (K = 2, half of the visual tokens). The rank is
the attention of the prompt's last real token, mean over heads; tokens keep their positions.

Differs from the paper: a number of tokens is dropped and not a share, so that all shapes are known;
a row without visual tokens drops padding in their place, and must have it (`check_room`).
Training and texts that are read without `visual` drop nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_vlm.models.language_model import LanguageModel
from flax_vlm.nn.kv_cache import KVCache, init_cache
from flax_vlm.shapes import check_shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedCache:
    """Keys and values of the layers before the pruning and of those after it.

    Attributes:
        first: of layers 0 .. K-1, all tokens.
        rest: of the others, without what was dropped: its capacity is smaller by as much.
    """

    first: KVCache
    rest: KVCache

    @property
    def capacity(self) -> int:
        """T of the first layers, what a text needs."""
        return self.first.capacity

    @property
    def batch(self) -> int:
        """B."""
        return self.first.batch

    def grow(self, capacity: int) -> PrunedCache:
        """Returns the cache with more slots; see KVCache."""
        more = capacity - self.capacity
        return PrunedCache(self.first.grow(capacity), self.rest.grow(self.rest.capacity + more))

    def take(self, rows: jax.Array) -> PrunedCache:
        """Returns the cache of chosen rows; see KVCache."""
        return PrunedCache(self.first.take(rows), self.rest.take(rows))


class FastV(LanguageModel):
    """A LanguageModel, same parameters, that drops visual tokens of a prompt.

    Attributes:
        prune_layer: K, how many layers see everything; at least 1.
        prune_tokens: how many visual tokens are dropped from every row; at least 1.
    """

    prune_layer: int = 2
    prune_tokens: int = 1

    def _check(self) -> None:
        super()._check()
        if not 1 <= self.prune_layer < self.depth or self.prune_tokens < 1:
            raise ValueError(
                f"FastV prunes after 1..{self.depth - 1} layers and drops at least one token, got "
                f"prune_layer {self.prune_layer} and prune_tokens {self.prune_tokens}"
            )

    def init_cache(
        self, batch: int, capacity: int, dtype: str | None = None, *, visual: bool = False
    ) -> PrunedCache:
        """Returns an empty cache for a prompt; arguments as in LanguageModel.

        Args:
            batch: B.
            capacity: slots for the whole prompt and all that is generated.
            dtype: of the store.
            visual: the prompt is read with `visual`, so that later layers need fewer slots.
        """
        self.check_capacity(capacity)
        heads = (self.num_kv_heads, self.head_dim, dtype or self.dtype)
        left = capacity - self.prune_tokens * visual
        first = init_cache(self.prune_layer, batch, capacity, *heads)
        return PrunedCache(first, init_cache(self.depth - self.prune_layer, batch, left, *heads))

    def decode(
        self,
        embeddings: jax.Array,
        mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: PrunedCache | None = None,
        visual: jax.Array | None = None,
    ) -> tuple[jax.Array, PrunedCache | None]:
        """Returns (tokens [B, S, D] after the final norm, zeros where they were dropped; cache).

        Args:
            embeddings: as in LanguageModel.
            mask: as in LanguageModel.
            positions: as in LanguageModel.
            segments: as in LanguageModel; not with `visual`.
            cache: as in LanguageModel.
            visual: [B, S] bool, True = visual token: prune_tokens of them are dropped. None drops
                nothing.

        Raises:
            ValueError: if there are not more tokens than are dropped, or they are packed.
        """
        if cache is None and visual is None:  # and where parameters are made
            return super().decode(embeddings, mask, positions=positions, segments=segments)
        check_shapes("B S D; B S; B S; B S; B S", embeddings, mask, positions, segments, visual)
        first, rest = (None, None) if cache is None else (cache.first, cache.rest)
        drop = 0 if visual is None else self.prune_tokens
        batch, length = embeddings.shape[:2]
        self._check_prompt(length, drop, segments)
        positions = self._positions(embeddings, mask, positions, first)
        first, *inputs = self._layer_inputs(positions, mask, segments, first)
        state = (embeddings.astype(self.dtype), first)
        before, after = range(self.prune_layer), range(self.prune_layer, self.depth)
        (x, first), weights = self._layers(before, state, inputs, attention=drop > 0)
        if drop:
            rank = prompt_rank(weights, first, visual, mask)
            kept = jnp.sort(jnp.argsort(-rank, axis=1)[:, : length - drop], axis=1)  # [B, S']
            x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
            positions = jnp.take_along_axis(positions, kept, axis=1)
            mask = None if mask is None else jnp.take_along_axis(mask, kept, axis=1)
        rest, *inputs = self._layer_inputs(positions, mask, segments, rest)
        (x, rest), _ = self._layers(after, (x, rest), inputs)
        tokens = self.norm(x)
        if drop:
            rows = jnp.arange(batch)[:, None]
            tokens = jnp.zeros((batch, length, self.width), x.dtype).at[rows, kept].set(tokens)
        return tokens, None if cache is None else PrunedCache(first, rest)

    def _check_prompt(self, length: int, drop: int, segments: Any) -> None:
        if drop >= length or (drop and segments is not None):
            packed = "packed texts" if segments is not None else f"{length} tokens"
            raise ValueError(
                f"FastV drops {drop} visual tokens of one prompt per row, got {packed}; give a "
                f"longer prompt, or no `visual`"
            )

    def _layers(
        self,
        numbers: range,
        state: tuple[jax.Array, KVCache | None],
        inputs: list[Any],
        attention: bool = False,
    ) -> tuple[tuple[jax.Array, KVCache | None], jax.Array | None]:
        """Returns the state (x, cache) after some layers, and [B, N, S, T], the attention of the
        last of them, where it is asked for; the cache is of these layers alone.
        """
        windows, *seen = inputs
        params, block = self.blocks.variables["params"], self._make_blocks(1, parent=None)

        def one(state: Any, layer: jax.Array, collections: tuple[str, ...] = ()) -> Any:
            # taken out layer by layer: a slice of the whole range would be copied at every token
            cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, layer, 1)  # noqa: E731
            window = None if windows is None else cut(windows)
            place = (layer - numbers.start)[None]
            variables = {"params": jax.tree.map(cut, params)}
            (state, _), sown = block.apply(
                variables, state, place, window, *seen, mutable=collections
            )
            return state, sown

        together = len(numbers) - attention
        layers = jnp.arange(numbers.start, numbers.stop)
        unroll = max(1, min(self.unroll, together))
        state, _ = jax.lax.scan(one, state, layers[:together], unroll=unroll)
        if not attention:
            return state, None
        state, sown = one(state, layers[together], ("intermediates",))
        return state, sown["intermediates"]["attention"]["attention_weights"][0][0]


def prompt_rank(
    weights: jax.Array, cache: KVCache | None, visual: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Returns [B, S] float32, what stays first: text, then padding, then visual tokens by the
    attention that the last real token pays them. How much padding there is changes no choice.

    Args:
        weights: [B, N, S, T] softmax weights of a layer; T are the tokens, or slots of the cache.
        cache: that the S tokens were read into last; None: T = S.
        visual: [B, S] bool, True = visual token.
        mask: [B, S] bool, True = real token; None keeps all.
    """
    length = visual.shape[1]
    mask = jnp.ones(visual.shape, bool) if mask is None else mask
    last = jnp.where(mask, jnp.arange(length)[None], 0).max(axis=1)  # [B]
    seen = jnp.take_along_axis(weights.mean(axis=1), last[:, None, None], axis=1)[:, 0]  # [B, T]
    if cache is not None:
        seen = jax.lax.dynamic_slice_in_dim(seen, cache.length - length, length, axis=1)
    return jnp.where(mask, jnp.where(visual, seen, jnp.inf), 2.0)  # attention is at most 1


def prune(model: LanguageModel, layer: int, tokens: int) -> LanguageModel:
    """Returns the model that drops so many visual tokens of a prompt after so many layers; the
    model itself for no tokens.

    Args:
        model: a language model; its parameters fit.
        layer: K.
        tokens: that are dropped from every row.
    """
    if tokens == 0:
        return model
    names = [field.name for field in dataclasses.fields(model) if field.name not in _LINEN]
    fields = {name: getattr(model, name) for name in names}
    return FastV(**fields, prune_layer=layer, prune_tokens=tokens)


_LINEN = ("parent", "name")


def check_room(model: FastV, visual: np.ndarray, mask: np.ndarray) -> None:
    """Raises ValueError if a row has too few visual tokens: all of them would go, or text; for
    arrays of the host, before a prompt is read.

    Args:
        model: what reads the prompt.
        visual: [B, S] bool, True = visual token.
        mask: [B, S] bool, True = real token.
    """
    number, drop = np.asarray(visual).sum(axis=1), model.prune_tokens
    padding = (~np.asarray(mask)).sum(axis=1)
    short = np.flatnonzero((number < drop) & ((number > 0) | (padding < drop)))
    if len(short):
        raise ValueError(
            f"FastV drops {drop} visual tokens of every row, or as much padding of one that has "
            f"none; rows {short[:5].tolist()} have {number[short[:5]].tolist()} visual tokens and "
            f"{padding[short[:5]].tolist()} of padding: put them into a batch of their own, or pad "
            f"them on the left"
        )
