# SPDX-License-Identifier: Apache-2.0
"""The forms of scaling laws, as a table: sums of powers, an offset, a floor.

    y = floor + sum over terms of  coefficient * prod over variables of (x + offset)^(+-exponent)

Coefficients, floors and offsets are positive, so their logarithms are what a fit moves ("internal"
values); exponents are moved as they are. One evaluator with derivatives serves every form; a new
law is one entry of LAWS.

Papers: power law, Cherti et al. 2022, arXiv:2212.07143; saturating, Zhai et al. 2022,
arXiv:2106.04560, equation 1 (Nezhurina et al. 2025, arXiv:2506.04598, write the same law as
a (C + b)^c + d: their b is our d, their c our -b, their d our c); L(N, D), Hoffmann et al. 2022,
arXiv:2203.15556, equation 2; native multimodal models, Shukor et al. 2025, arXiv:2504.07951; visual
tokens, Li et al. 2024, arXiv:2411.03312.

Differs from the papers: Li et al. write A / N^a * B / T^b, where only the product A B can be found;
here it is one coefficient.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

MAX_LOG = 300.0  # a step that overflows is a bad step, not an error


@dataclasses.dataclass(frozen=True)
class Term:
    """coefficient * prod (variable + offset)^(sign * exponent).

    Attributes:
        coefficient: name of a parameter.
        powers: (variable, name of its exponent, +1 or -1) each.
        offset: name of a parameter that is added to the variable; None adds nothing.
    """

    coefficient: str
    powers: tuple[tuple[str, str, int], ...]
    offset: str | None = None


@dataclasses.dataclass(frozen=True)
class Law:
    """A form that can be fitted.

    Attributes:
        equation: as printed.
        variables: names of what y depends on, in order.
        terms: what is added.
        floor: name of the irreducible part; None has none.
        compute: how the compute of a run follows from the variables.
        source: paper.
    """

    equation: str
    variables: tuple[str, ...]
    terms: tuple[Term, ...]
    floor: str | None
    compute: str
    source: str

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents: parameters that are not fitted as logarithms."""
        return tuple(exponent for term in self.terms for _, exponent, _ in term.powers)

    @property
    def offsets(self) -> tuple[str, ...]:
        """Names of the offsets."""
        return tuple(term.offset for term in self.terms if term.offset)

    @property
    def linear(self) -> tuple[str, ...]:
        """Names of coefficients and floor: y is linear in them."""
        return (*(t.coefficient for t in self.terms), *([self.floor] if self.floor else []))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters, in the order of internal values."""
        return (*self.linear, *self.exponents, *self.offsets)

    def to_internal(self, parameters: Mapping[str, float]) -> np.ndarray:
        """Returns [k] float64: logarithms of what is positive, exponents as they are."""
        values = [float(parameters[name]) for name in self.parameters]
        return np.array(
            [
                v if name in self.exponents else np.log(max(v, 1e-300))
                for name, v in zip(self.parameters, values, strict=True)
            ]
        )

    def to_parameters(self, internal: np.ndarray) -> dict[str, float]:
        """Returns {name: value} of internal values [k], in the order of the equation."""
        found = {
            name: float(v if name in self.exponents else np.exp(min(v, MAX_LOG)))
            for name, v in zip(self.parameters, internal, strict=True)
        }
        return {
            name: found[name] for name in re.findall(r"[A-Za-z]+", self.equation) if name in found
        }

    def basis(self, internal: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Returns [..., n, m]: what each linear parameter is multiplied by."""
        columns = [self._term(term, internal, x)[0] for term in self.terms]
        columns = [np.exp(np.minimum(log, MAX_LOG)) for log in columns]
        columns += [np.ones_like(columns[0])] if self.floor else []
        return np.stack(columns, axis=-1)

    def evaluate(self, internal: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns y [..., n] and its derivative by the internal values [..., n, k].

        Args:
            internal: [..., k].
            x: [v, n], one row per variable.
        """
        place = {name: i for i, name in enumerate(self.parameters)}
        basis = self.basis(internal, x)
        linear = np.exp(np.minimum(internal[..., : len(self.linear)], MAX_LOG))
        parts = basis * linear[..., None, :]  # [..., n, m]
        gradient = np.zeros((*parts.shape[:-1], len(place)))
        gradient[..., : len(self.linear)] = parts
        for i, term in enumerate(self.terms):
            _, by_exponent, by_offset = self._term(term, internal, x)
            for (_, exponent, _), derivative in zip(term.powers, by_exponent, strict=True):
                gradient[..., place[exponent]] = parts[..., i] * derivative
            if term.offset:
                gradient[..., place[term.offset]] = parts[..., i] * by_offset
        return parts.sum(axis=-1), gradient

    def _term(
        self, term: Term, internal: np.ndarray, x: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Returns ln of a term over its coefficient, and the derivatives of that logarithm."""
        place = {name: i for i, name in enumerate(self.parameters)}
        shift = np.exp(internal[..., place[term.offset], None]) if term.offset else 0.0
        log, by_exponent, by_offset = np.zeros((*internal.shape[:-1], x.shape[1])), [], 0.0
        for variable, exponent, sign in term.powers:
            base = x[self.variables.index(variable)] + shift
            power = sign * internal[..., place[exponent], None]
            log = log + power * np.log(base)
            by_exponent.append(sign * np.log(base) * np.ones_like(log))
            by_offset = by_offset + power * shift / base
        return log, by_exponent, by_offset


def _chinchilla(compute: str, source: str) -> Law:
    return Law(
        "y = E + A / N^alpha + B / D^beta",
        ("N", "D"),
        (Term("A", (("N", "alpha", -1),)), Term("B", (("D", "beta", -1),))),
        "E",
        compute,
        source,
    )


LAWS: dict[str, Law] = {
    "power": Law(
        "y = beta C^alpha",
        ("C",),
        (Term("beta", (("C", "alpha", 1),)),),
        None,
        "C is given",
        "Cherti et al. 2022, arXiv:2212.07143",
    ),
    "power_floor": Law(
        "y = a C^-b + c",
        ("C",),
        (Term("a", (("C", "b", -1),)),),
        "c",
        "C is given",
        "Kaplan et al. 2020, arXiv:2001.08361; Zhai et al. 2022, arXiv:2106.04560, with d = 0",
    ),
    "saturating": Law(
        "y = a (C + d)^-b + c",
        ("C",),
        (Term("a", (("C", "b", -1),), "d"),),
        "c",
        "C is given",
        "Zhai et al. 2022, arXiv:2106.04560; Nezhurina et al. 2025, arXiv:2506.04598",
    ),
    "chinchilla": _chinchilla("C = 6 N D", "Hoffmann et al. 2022, arXiv:2203.15556"),
    "early_fusion": _chinchilla(
        "C = 6 N D, D = text and image tokens", "Shukor et al. 2025, arXiv:2504.07951"
    ),
    "late_fusion": _chinchilla(
        "C = 6 (N_v D_v + N D), N_v and D_v of the vision encoder",
        "Shukor et al. 2025, arXiv:2504.07951",
    ),
    "visual_tokens": Law(
        "y = A / (N^a T^b) + D",
        ("N", "T"),
        (Term("A", (("N", "a", -1), ("T", "b", -1))),),
        "D",
        "inference: C ~ N (Q + T), Q text tokens and T visual tokens",
        "Li et al. 2024, arXiv:2411.03312",
    ),
}
