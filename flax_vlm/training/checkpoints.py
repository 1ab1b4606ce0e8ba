# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the training state through Orbax: asynchronous, atomic, restored onto any mesh.

Orbax 0.12's `CheckpointManager` stays behind this file. No data iterator is saved: the data
position is `state.step`. Order on start: the workdir's own last checkpoint, then `init_from`, then
random parameters.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from flax_vlm import trees
from flax_vlm.training.sharding import replicated

# Errors that mean "the disk said no". Orbax reports a full disk as ValueError (OUT_OF_RANGE or
# RESOURCE_EXHAUSTED from TensorStore), and only when the asynchronous write is waited for.
_DISK_ERRORS = (OSError, ValueError, RuntimeError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is still intact."""


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one workdir.

    Attributes:
        directory: holds one folder per step.
        every: save each `every` steps.
        keep: number of latest checkpoints that are kept.
        keep_every: also keep every checkpoint whose step this divides; 0 = none.
    """

    directory: pathlib.Path
    every: int
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self) -> None:
        self._manager = ocp.CheckpointManager(
            pathlib.Path(self.directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, keep_period=self.keep_every or None
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the last complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def is_due(self, step: int) -> bool:
        """Returns whether `step` is one that is saved."""
        return step % self.every == 0

    def restore(self, target: Any) -> Any:
        """Returns the last complete checkpoint as a tree like `target`.

        Args:
            target: tree of ShapeDtypeStructs with shardings: any mesh, also another than it was
                saved from.

        Raises:
            CheckpointError: if it cannot be read, or has other tensors than the target.
        """
        step = self.latest_step()
        try:
            args = ocp.args.StandardRestore(_plain(target), strict=True)
            return type(target)(**self._manager.restore(step, args=args))
        except _DISK_ERRORS as error:
            raise CheckpointError(
                f"checkpoint {self.directory}/{step} could not be restored: {_first_line(error)}; "
                f"steps at hand: {self._manager.all_steps()}. Move that folder away to resume from "
                f"the step before"
            ) from error

    def save(self, step: int, state: Any) -> None:
        """Starts to write `state` as the checkpoint of `step`; a step that exists is left alone.

        Raises:
            CheckpointError: if this or the previous save failed.
        """
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_plain(state)), force=True)
        except _DISK_ERRORS as error:
            raise self._save_error(error) from error

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except _DISK_ERRORS as error:
            raise self._save_error(error) from error

    def close(self) -> None:
        """Waits for running saves and frees the writer threads."""
        self._manager.close()

    def _save_error(self, error: Exception) -> CheckpointError:
        self._manager.reload()
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory}: {_first_line(error)}; "
            f"the last complete one is step {self.latest_step()}. Free disk space and start the "
            f"same command again to resume from it"
        )


def parameter_shapes(directory: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the parameters of the last checkpoint; reads no tensor.

    Raises:
        CheckpointError: if there is no complete checkpoint.
    """
    directory = pathlib.Path(directory).absolute()
    with ocp.CheckpointManager(directory, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        stored = manager.item_metadata(_last_step(manager)).tree["params"]
        return {path: tuple(leaf.shape) for path, leaf in trees.named_leaves(stored).items()}


def load_params(
    directory: pathlib.Path,
    shardings: Any = None,
    *,
    prefer_ema: bool = True,
    partial: bool = False,
) -> tuple[Any, Any, int]:
    """Returns (parameters, extras, step) of the last checkpoint, without the optimizer's state.

    Args:
        directory: the `checkpoints` folder of a workdir.
        shardings: tree of NamedShardings of the parameters, which extras follow; None puts all on
            the first device.
        prefer_ema: take the moving average of parameters where the run kept one.
        partial: read only the parameters that `shardings` names, and no extras.

    Raises:
        CheckpointError: if there is no complete checkpoint, or it has other parameters.
    """
    directory = pathlib.Path(directory).absolute()
    with ocp.CheckpointManager(directory, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        step = _last_step(manager)
        stored = manager.item_metadata(step).tree
        places = trees.named_leaves(shardings) if shardings is not None else {}
        if partial:
            parts = ("params", "ema")
            stored = {
                key: trees.split(stored.get(key) or {}, places.__contains__)[0] for key in parts
            }
        parameters = trees.named_leaves(stored["params"])
        _check_same_parameters(places, parameters, directory / str(step))
        elsewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if places:
            elsewhere = replicated(next(iter(places.values())).mesh)

        def target(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = places.get(trees.owner(path, leaf, parameters), elsewhere)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        keys = ("params", "ema", "extras")
        item = trees.map_with_path(target, {key: stored[key] for key in keys if stored.get(key)})
        arguments = ocp.checkpoint_utils.construct_restore_args(item)
        restored = manager.restore(
            step,
            args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
        )
    params = restored["params"]
    if prefer_ema and "ema" in restored:
        averaged = trees.named_leaves(restored["ema"])
        params = trees.map_with_path(lambda path, leaf: averaged.get(path, leaf), params)
    return params, restored.get("extras", {}), step


def _last_step(manager: ocp.CheckpointManager) -> int:
    step = manager.latest_step()
    if step is None:
        raise CheckpointError(f"{manager.directory} must hold a complete checkpoint, found none")
    return step


def _check_same_parameters(wanted: Any, stored: Any, where: pathlib.Path) -> None:
    missing = sorted(wanted.keys() - stored.keys())
    surplus = sorted(stored.keys() - wanted.keys())
    if wanted and (missing or surplus):
        raise CheckpointError(
            f"{where} must hold the parameters of the model; it lacks {missing} and has {surplus} "
            f"beside; use the config that it was trained with"
        )


def _plain(state: Any) -> dict[str, Any]:
    """Returns a dataclass as a dict: the files then say nothing of our classes."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
