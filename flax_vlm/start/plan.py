# SPDX-License-Identifier: Apache-2.0
"""Starting from other parameters: which leaf of a source fills which leaf of a model.

    config.init_from        where the source lies
    config.init.subtrees    (("image", ""),): the source's branch "image" is this model's whole tree

Leaves outside of all subtrees stay as they were drawn; adapters always do (objectives/lora.py); a
source's own adapters are merged. Inside of the subtrees every leaf here is filled or matched by
`fresh`, and every leaf there is used or matched by `unused`.

Position tables of another grid are resampled if `resize_positions` says how: "bicubic_torch" is
what transformers' `interpolate_pos_encoding` does for ViT, CLIP, SigLIP and DINOv2 (torch bicubic,
no antialias), "bicubic_antialias" for DINOv2 with registers, "bilinear_antialias" for SigLIP 2
NaFlex; the class token's position is copied. Positions of texts have no grid: a longer table is
cut, a shorter one is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding

from flax_vlm import trees
from flax_vlm.build import lookup
from flax_vlm.models.text_encoder import TextEncoder
from flax_vlm.models.vit import VisionTransformer
from flax_vlm.nn.positions import RESIZE_METHODS, Grid, resize_positions
from flax_vlm.objectives.lora import ADAPTERS
from flax_vlm.start.sources import Shapes, Source
from flax_vlm.training.sharding import replicated


@dataclasses.dataclass(frozen=True)
class PositionTable:
    """What the rows of a learned table stand for.

    Attributes:
        grid: of patches, row-major; None for the positions of a text.
        num_prefix: rows before the grid.
    """

    grid: Grid | None
    num_prefix: int = 0


def position_tables(model: nn.Module, prefix: str = "") -> dict[str, PositionTable]:
    """Returns {path: PositionTable} of a model and of the encoders that are its fields."""
    if isinstance(model, TextEncoder):
        return {f"{prefix}positions": PositionTable(None)}
    if isinstance(model, VisionTransformer):
        table = PositionTable(model.grid, int(model.class_token and model.class_position))
        return {f"{prefix}positions": table} if model.position_embedding == "learned" else {}
    found: dict[str, PositionTable] = {}
    for field in dataclasses.fields(model):
        part = getattr(model, field.name)
        if isinstance(part, nn.Module) and field.name != "parent":
            found |= position_tables(part, f"{prefix}{field.name}/")
    return found


def match_leaves(
    target: Sequence[str],
    source: Sequence[str],
    *,
    subtrees: Sequence[tuple[str, str]],
    fresh: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> tuple[dict[str, str], list[str]]:
    """Returns ({path here: path there}, one line for each leaf that has no counterpart).

    Args:
        target: paths of the model.
        source: paths of the source.
        subtrees: (there, here) pairs of path prefixes.
        fresh: regexes of paths here that are not filled.
        unused: regexes of paths there that are left out.

    Raises:
        ValueError: if a subtree is empty, or a pattern matches nothing.
    """
    trees.check_patterns(fresh, target, "init.fresh")
    trees.check_patterns(unused, source, "init.unused")
    pairs: dict[str, str] = {}
    problems = []
    for there, here in subtrees:
        offered, wanted = _inside(there, source), _inside(here, target)
        if not offered or not wanted:
            raise ValueError(
                f"init.subtrees needs parameters on both sides, got {len(offered)} below {there!r} "
                f"in the source and {len(wanted)} below {here!r} here"
            )
        for rest, path in wanted.items():
            if trees.matches(fresh, path):
                continue
            if path in pairs or offered.get(rest) in pairs.values():
                problems.append(f"{path}: in two of init.subtrees")
            elif rest not in offered or trees.matches(unused, offered[rest]):
                problems.append(f"{path}: not in the source; init.fresh keeps it random")
            else:
                pairs[path] = offered[rest]
        surplus = (offered[rest] for rest in offered.keys() - wanted.keys())
        problems += [
            f"{path}: of the source, without a place here; init.unused leaves it out"
            for path in sorted(surplus)
            if not trees.matches(unused, path)
        ]
    return pairs, problems


def _inside(prefix: str, paths: Sequence[str]) -> dict[str, str]:
    """Returns {path below the prefix: whole path}; the prefix "" has all."""
    start = f"{prefix}/" if prefix else ""
    return {path.removeprefix(start): path for path in paths if path.startswith(start)}


@dataclasses.dataclass(frozen=True)
class Start:
    """What is loaded, checked against the model before anything is read or allocated.

    Attributes:
        source: where from.
        pairs: {path here: path there}.
        resized: {path here: function from the source's table to the one here}.
    """

    source: Source
    pairs: Mapping[str, str]
    resized: Mapping[str, Callable[[np.ndarray], np.ndarray]]

    @classmethod
    def plan(
        cls,
        source: Source,
        model: nn.Module,
        shapes: Shapes,
        *,
        subtrees: Sequence[tuple[str, str]] = (("", ""),),
        fresh: Sequence[str] = (),
        unused: Sequence[str] = (),
        resize_positions: str = "",
    ) -> Start:
        """Returns the plan.

        Args:
            source: where the parameters come from.
            model: that starts from them.
            shapes: {path: shape} of its parameters.
            subtrees: see `match_leaves`, as are `fresh` and `unused`.
            fresh: regexes of paths here.
            unused: regexes of paths there.
            resize_positions: key of positions.RESIZE_METHODS; "" allows no other grid.

        Raises:
            ValueError: listing all that does not fit.
        """
        if resize_positions:
            lookup(RESIZE_METHODS, resize_positions, "init.resize_positions")
        base = {path: s for path, s in shapes.items() if not path.startswith(f"{ADAPTERS}/")}
        pairs, problems = match_leaves(
            list(base), list(source.shapes), subtrees=subtrees, fresh=fresh, unused=unused
        )
        here, there = position_tables(model), position_tables(source.model)
        resized = {}
        for path, origin in pairs.items():
            new, old = base[path], source.shapes[origin]
            tables = here.get(path), there.get(origin)
            if new == old and tables[0] == tables[1]:
                continue
            found = f"{path}: {new} here, {old} in the source"
            reason = _not_resizable(*tables, new, old, resize_positions)
            if reason is None:
                resized[path] = _resizer(*tables, new[0], resize_positions)
            else:
                problems.append(f"{found}{reason}")
        if not pairs and not problems:
            problems.append("init.fresh leaves nothing to load")
        if problems:
            lines = "\n  ".join(problems)
            raise ValueError(f"{source.name} does not fit the model:\n  {lines}")
        return cls(source, pairs, resized)

    def load(self, places: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
        """Returns {path here: parameter}, read straight onto its sharding.

        Args:
            places: {path here: sharding} of at least what is loaded.
        """
        # a table that is resized is small: it passes through the host
        targets = {
            path: replicated(places[path].mesh) if path in self.resized else places[path]
            for path in self.pairs
        }
        loaded: dict[str, jax.Array] = {}
        values = self.source.load({self.pairs[path]: place for path, place in targets.items()})
        for path, origin in self.pairs.items():
            value = values[origin]
            if path in self.resized:
                table = self.resized[path](np.asarray(value))
                value = jax.make_array_from_callback(table.shape, places[path], table.__getitem__)
            loaded[path] = value
        return loaded


def _not_resizable(
    here: PositionTable | None,
    there: PositionTable | None,
    new: Sequence[int],
    old: Sequence[int],
    method: str,
) -> str | None:
    """Returns why a table cannot be brought to another size, None if it can."""
    if here is None or there is None or new[1:] != old[1:]:
        return ""
    if (here.grid is None) != (there.grid is None) or here.num_prefix != there.num_prefix:
        return "; one has a class token or a grid that the other lacks"
    if not method:
        return f", grids {here.grid} and {there.grid}; set init.resize_positions"
    if here.grid is None and new[0] > old[0]:
        return "; positions of texts can be cut but not made"
    return None


def _resizer(
    here: PositionTable, there: PositionTable, length: int, method: str
) -> Callable[[np.ndarray], np.ndarray]:
    if here.grid is None:
        return lambda table: table[:length]
    return lambda table: resize_positions(
        table, there.grid, here.grid, method=method, num_prefix=here.num_prefix
    )
