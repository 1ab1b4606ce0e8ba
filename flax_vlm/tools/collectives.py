# SPDX-License-Identifier: Apache-2.0
"""Counts what a compiled program sends between devices, by reading its HLO text.

An instruction inside a loop counts as often as the loop runs: by XLA's own `known_trip_count` (CPU,
GPU), or by the constant that the loop's counter is compared with (TPU). Bytes are those of the
instruction's result on one device: what an all-gather leaves there, what a collective-permute
receives. An asynchronous collective counts once, at its start; TPU programs repeat it in the
fusions that overlap it with other work and that wait for it. XLA writes some reduce-scatters on TPU
as an all-reduce and a slice: they are counted as written.
"""

from __future__ import annotations

import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # others carry their bits in their name

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# "%name = SHAPE kind(": an asynchronous pair is counted once, at its start
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_LATER_PART = re.compile(r"%async-collective-done[\w.]* =| fusion\(.*kind=kOutput")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")


def count_collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Returns {kind: {"count": executions, "bytes": received per device}} of one run of a program.

    Args:
        hlo: text of a compiled module (`compiled.as_text()`).
    """
    bodies, entry = _computations(hlo)
    found: dict[str, dict[str, int]] = {}

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                _add(found, *match.groups(), times)
            if match or _LATER_PART.search(line):
                continue
            runs = times * (_trips(line, bodies) if " while(" in line else 1)
            callees = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                callees += [branch.strip().lstrip("%") for branch in group.split(",")]
            for callee in callees:
                visit(callee, runs)

    visit(entry, 1)
    return found


def _add(
    found: dict[str, dict[str, int]], shape: str, kind: str, start: str | None, times: int
) -> None:
    of_kind = found.setdefault(kind, {"count": 0, "bytes": 0})
    of_kind["count"] += times
    of_kind["bytes"] += times * _result_bytes(shape, is_start=start is not None)


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns how often a while loop runs; 1 where its text does not say."""
    known = _KNOWN_TRIPS.search(line)
    if known:
        return int(known.group(1))
    condition = bodies.get(_CONDITION.search(line).group(1), [])
    limits = [int(n) for text in condition for n in _LIMIT.findall(text)]
    counts_up = any("direction=LT" in text for text in condition)
    return limits[0] if counts_up and len(limits) == 1 else 1


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns {computation: its lines} and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = bodies.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif current is not None:
            current.append(line)
    return bodies, entry


def _result_bytes(shape: str, is_start: bool) -> int:
    """Returns the bytes of "f32[8,128]{1,0}" or of a tuple; of a start, those of its result."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype) // 8
        for dtype, dims in _ARRAY.findall(shape)
    ]
    # a start returns (operands, results, ...): of a gather the result is the largest
    return max(sizes) if is_start and shape.startswith("(") else sum(sizes)


def _bits(dtype: str) -> int:
    return BITS.get(dtype) or int(re.search(r"\d+", dtype).group())
