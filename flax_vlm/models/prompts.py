# SPDX-License-Identifier: Apache-2.0
"""What goes into generation and what ends it: prompts, padding on the left, stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from flax_vlm.nn.kv_cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is read before anything is generated.

    Attributes:
        text: [B, S] int32 token ids; or None.
        embeddings: [B, S, D] in place of the text, visual tokens among them; or None.
        mask: [B, S] bool, True = real token; None if all are. Pad on the left, so that what is
            generated follows; padding elsewhere changes nothing either.
        prefix: the cache of `read_prefix`, of one row or of B: what stands before; or None.
        visual: [B, S] bool, True = visual token: what models/fastv.py may drop; other models do
            not read it. None drops nothing.
    """

    text: Any = None
    embeddings: Any = None
    mask: Any = None
    prefix: KVCache | None = None
    visual: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        given = self.embeddings if self.text is None else self.text
        return given.shape[0], given.shape[1]


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Ends a row whose text holds one of some strings; the host looks, tokens know no strings.

    Attributes:
        decode: token ids -> text.
        strings: none of them empty.
    """

    decode: Callable[[Sequence[int]], str]
    strings: tuple[str, ...]

    def cut(self, tokens: Sequence[int]) -> str:
        """Returns the text before the first stop string, all of it if there is none."""
        text = self.decode(tokens)
        found = [i for i in map(text.find, self.strings) if i >= 0]
        return text[: min(found)] if found else text

    def found(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns [B] bool: rows with a stop string."""
        texts = [self.decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
        return np.array([any(s in text for s in self.strings) for text in texts])


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int = 0, multiple: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (text [B, S] int32, mask [B, S] bool), padded on the left.

    Args:
        prompts: token ids, at least one each.
        pad_id: what padding is filled with; nobody sees it.
        multiple: S is one of it, so that prompts of many lengths share one compiled program.

    Raises:
        ValueError: if a prompt is empty.
    """
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty or not len(prompts):
        raise ValueError(f"a prompt needs at least one token, those of rows {empty} have none")
    length = max(map(len, prompts))
    length += -length % multiple
    text = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros(text.shape, bool)
    for row, prompt in enumerate(prompts):
        text[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return text, mask
