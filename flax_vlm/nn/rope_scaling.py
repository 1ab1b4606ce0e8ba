# SPDX-License-Identifier: Apache-2.0
"""Frequencies of rotary embeddings, and how they are changed for contexts longer than trained on.

    none      theta^(-2 i / K), i = 0 .. K/2 - 1 (RoFormer, arXiv:2104.09864)
    linear    all divided by a factor (Chen et al. 2023, arXiv:2306.15595)
    dynamic   theta grows with the length of the sequence, beyond the context that was trained
              (NTK-aware, Peng et al. 2023, arXiv:2309.00071, appendix B.1)
    llama3    low frequencies are divided, high ones kept, between them a ramp over the frequency
              (LLaMA 3.1; Source: meta-llama/llama-models, `models/llama3/model.py`)
    yarn      the same with a ramp over the dimension, and larger logits (arXiv:2309.00071)

LongRoPE, whose factors are tables, and rotary embedding of a part of the head's width are not here.

Differs from transformers: frequencies are computed in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


def rope_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Returns theta^(-2 i / K): [K/2] float64.

    Raises:
        ValueError: if the head's width is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head width, got {head_dim}")
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """No change; the base of the variants.

    Attributes:
        needs_length: do the frequencies depend on the length of the sequence? Then a cache, whose
            keys were turned at another length, can hold no more than the context trained on.
        attention_factor: what cosine and sine are multiplied by.
    """

    needs_length = False
    attention_factor = 1.0

    def frequencies(
        self, theta: float, head_dim: int, length: jax.Array | None = None
    ) -> jax.Array:
        """Returns [K/2] float32, radians per position.

        Args:
            theta: base of the geometric series.
            head_dim: K.
            length: [] int32, the largest position of the batch plus one; used by "dynamic" alone.
        """
        return jnp.asarray(self.scale(rope_frequencies(theta, head_dim), theta), jnp.float32)

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the changed frequencies [K/2] float64."""
        return frequencies


@dataclasses.dataclass(frozen=True)
class Linear(RopeScaling):
    """All positions divided by a factor.

    Attributes:
        factor: at least 1.
    """

    factor: float

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the changed frequencies [K/2] float64."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Dynamic(RopeScaling):
    """theta (f L / C - (f - 1))^(K / (K - 2)) for sequences of L tokens, longer than C.

    Attributes:
        factor: f.
        context: C, tokens that were trained on.
    """

    factor: float
    context: int

    needs_length = True

    def frequencies(
        self, theta: float, head_dim: int, length: jax.Array | None = None
    ) -> jax.Array:
        """Returns [K/2] float32; see RopeScaling.frequencies."""
        rope_frequencies(theta, head_dim)  # refuses odd widths
        length = jnp.maximum(self.context if length is None else length, self.context)
        growth = self.factor * length.astype(jnp.float32) / self.context - (self.factor - 1)
        base = theta * growth ** (head_dim / (head_dim - 2))
        return base ** -jnp.asarray(np.arange(0, head_dim, 2) / head_dim, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Llama3(RopeScaling):
    """Wavelengths above C / low are stretched by the factor, those below C / high are kept.

    Attributes:
        factor: at least 1.
        low_freq_factor: low.
        high_freq_factor: high.
        context: C, tokens that were trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    context: int

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the changed frequencies [K/2] float64."""
        turns = self.context * frequencies / (2 * math.pi)  # within the context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn(RopeScaling):
    """Dimensions that turn more than beta_fast times in C are kept, less than beta_slow stretched.

    Attributes:
        factor: s, at least 1.
        context: C, tokens that were trained on.
        beta_fast: turns.
        beta_slow: turns.
        truncate: the ends of the ramp are whole dimensions.
        attention_factor: what cosine and sine are multiplied by; 0.1 ln s + 1 in the paper.
    """

    factor: float
    context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the changed frequencies [K/2] float64."""
        width = 2 * len(frequencies)

        def dimension(turns: float) -> float:  # that turns so often within the context
            return width * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high
        stretched = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
        return frequencies * (stretched / self.factor + 1 - stretched)


ROPE_SCALINGS: dict[str, type[RopeScaling]] = {
    "none": RopeScaling,
    "linear": Linear,
    "dynamic": Dynamic,
    "llama3": Llama3,
    "yarn": Yarn,
}
