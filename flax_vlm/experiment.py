# SPDX-License-Identifier: Apache-2.0
"""The composition root: a config becomes an Experiment. The only file that may import every layer.

config -> objective (model inside), optimizer, mesh, shapes and shardings    no data, no memory
       -> tokenizer, datasets, evaluators                                    on first use
       -> train(workdir), evaluate(...)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_vlm import trees
from flax_vlm.build import build as build_by_name
from flax_vlm.data import load_source
from flax_vlm.data.accounts import Accounts, DataError
from flax_vlm.data.images import pair
from flax_vlm.data.pipeline import Dataset
from flax_vlm.data.recipe import build_preprocess, build_tokenizer
from flax_vlm.data.sources import Source
from flax_vlm.data.text import Tokenizer
from flax_vlm.evaluation import EVALUATORS, pictures
from flax_vlm.evaluation.base import Predictor
from flax_vlm.objectives import build_objective
from flax_vlm.objectives.base import Extras, Objective, Params
from flax_vlm.scaling.flops import train_flops_per_example
from flax_vlm.training import metrics, profiling, sharding, workdir
from flax_vlm.training.checkpoints import CheckpointError, Checkpoints, load_params
from flax_vlm.training.loop import Evaluation, Loop
from flax_vlm.training.nonfinite import NonFiniteError, NonFiniteGuard
from flax_vlm.training.optimizers import Optimizer, build_optimizer
from flax_vlm.training.state import (
    TrainState,
    abstract_state,
    evaluation_params,
    make_init,
    state_shardings,
)
from flax_vlm.training.step import make_train_step

Config = Mapping[str, Any]

# What a person can mend: programs print the message alone.
USER_ERRORS = (ValueError, OSError, CheckpointError, NonFiniteError, DataError)


def build(config: Config) -> Experiment:
    """Returns the experiment of a config; allocates nothing and reads no data.

    Args:
        config: nested mapping (a ConfigDict or the JSON of a workdir); see configs/defaults.py.

    Raises:
        ValueError: for an unknown name or key, a mesh that does not fit the devices, a tensor that
            a rule cannot split, or a rule that matches no parameter.
    """
    config = plain(config)
    given = {}
    if (
        config["objective"].get("name") == "contrastive"
    ):  # its micro-batches go to the gradient cache
        given["micro_batches"] = config["micro_batches"]
    objective = build_objective(config["model"], config["objective"], **given)
    mesh_sizes = {axis: config["mesh"][axis] for axis in sharding.AXES}
    mesh = sharding.make_mesh(**mesh_sizes)
    batch = example_batch(config)
    params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
    paths = list(trees.named_leaves(params))
    optimizer = build_optimizer(config["optimizer"], config["steps"], paths)
    init = make_init(objective, optimizer, ema=config["ema_decay"] > 0)
    shapes = jax.eval_shape(init, jax.random.key(0), batch)
    rules = tuple((pattern, tuple(axes)) for pattern, axes in config["mesh"]["rules"])
    return Experiment(
        config=config,
        objective=objective,
        optimizer=optimizer,
        mesh=mesh,
        shapes=shapes,
        shardings=state_shardings(shapes, mesh, rules),
    )


def plain(config: Config) -> dict[str, Any]:
    """Returns a config as nested dicts of JSON values: what is saved and what is compared."""
    as_dict = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(as_dict))


def example_batch(config: Config, size: int = 1) -> dict[str, np.ndarray]:
    """Returns a batch of zeros with the shapes of the config."""
    height, width = pair(config["data"]["image_size"])
    length = config["data"]["text"]["length"]
    return {
        "image": np.zeros((size, height, width, 3), np.uint8),
        "text": np.zeros((size, length), np.int32),
        "text_mask": np.zeros((size, length), bool),
        "text_id": np.zeros(size, np.int32),
        "label": np.zeros(size, np.int32),
        "example_mask": np.ones(size, bool),
    }


def mesh_for_evaluation(mesh: Config) -> dict[str, Any]:
    """Returns the mesh of a config fitted to the devices at hand; results do not depend on it."""
    parts = mesh["fsdp"] * mesh["tensor"]
    if jax.device_count() % parts:
        return {**mesh, "data": -1, "fsdp": 1, "tensor": 1}
    return {**mesh, "data": -1}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config composes.

    Attributes:
        config: plain nested dicts.
        objective: what is trained.
        optimizer: how.
        mesh: over which devices.
        shapes: TrainState of ShapeDtypeStructs.
        shardings: TrainState of NamedShardings.
    """

    config: dict[str, Any]
    objective: Objective
    optimizer: Optimizer
    mesh: jax.sharding.Mesh
    shapes: TrainState
    shardings: TrainState

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """Rows of a batch over the mesh."""
        return sharding.batch_sharding(self.mesh)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the config, trained on the captions of the training split if need be."""
        spec = self.config["data"]
        tokenizer = build_tokenizer(spec["text"], lambda: self._source(spec))
        table = trees.named_leaves(self.shapes.params).get("text/embedding/embedding")
        if table is not None and tokenizer.vocab_size > table.shape[0]:
            raise ValueError(
                f"the model's text vocabulary must hold the {tokenizer.vocab_size} tokens of the "
                f"tokenizer, got {table.shape[0]}; raise model.text.vocab_size or lower "
                f"data.text.vocab_size"
            )
        return tokenizer

    def _source(self, spec: Config) -> Source:
        extra = spec.get("options", {})
        directory = spec.get("dir") or self.config["data"]["dir"] or None
        return load_source(spec["name"], split=spec["split"], data_dir=directory, **extra)

    @functools.cached_property
    def train_data(self) -> Dataset:
        """The training split, augmented."""
        spec = self.config["data"]
        return Dataset(
            source=self._source(spec),
            preprocess=build_preprocess(spec, self.tokenizer, train=True),
            seed=self.config["seed"],
            workers=spec["workers"],
        )

    @functools.cached_property
    def evaluators(self) -> dict[str, tuple[int, Any]]:
        """{name in config.evals: (every, evaluator)}."""
        built = {}
        for name, spec in self.config["evals"].items():
            spec = dict(spec)
            every, batch_size = spec.pop("every", 0), spec.pop("batch_size", 256)
            source = self.config["data"] | dict(spec.pop("data"))
            dataset = Dataset(
                source=self._source(source),
                preprocess=build_preprocess(source, self.tokenizer, train=False),
            )
            evaluator = build_by_name(
                EVALUATORS, spec, "evaluator", dataset=dataset, batch_size=batch_size
            )
            built[name] = (every, evaluator)
        return built

    @functools.cached_property
    def predictor(self) -> Predictor:
        """Calls the objective's predictions over the mesh; give it parameters by `with_params`."""
        rows = self.batch_sharding
        return Predictor(self.objective.predictions, {}, {}, rows, shard=sharding.data_shard(rows))

    def init_state(self) -> TrainState:
        """Returns a random state, born sharded: never whole on one device."""
        init = make_init(self.objective, self.optimizer, ema=self.config["ema_decay"] > 0)
        batch = example_batch(self.config)
        # the batch is a constant of the program: only its shapes matter
        born = jax.jit(lambda key: init(key, batch), out_shardings=self.shardings)
        state = born(jax.random.key(self.config["seed"]))
        if self.config["init_from"]:
            source = pathlib.Path(self.config["init_from"]) / "checkpoints"
            params, _, _ = load_params(source, self.shardings.params)
            state = dataclasses.replace(state, params=params)
        return state

    def train_step(self) -> Any:
        """Returns the jitted step (state, batch) -> (state, metrics); the state is donated."""
        step = make_train_step(
            self.objective,
            self.optimizer,
            seed=self.config["seed"],
            micro_batches=self.config["micro_batches"] if self.objective.additive else 1,
            ema_decay=self.config["ema_decay"],
        )
        return jax.jit(
            step,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, None),
            donate_argnums=0,
        )

    def batches(self, step: int) -> Any:
        """Returns this process's rows of the global batches from `step` on, a function of it."""
        index, count = sharding.data_shard(self.batch_sharding)
        size = self.config["batch_size"]
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if size % parts:
            raise ValueError(
                f"batch_size must be a multiple of mesh.data x mesh.fsdp = {parts}, got {size}"
            )
        return self.train_data.batches(step, batch_size=size, shard=index, num_shards=count)

    def evaluate(
        self,
        params: Params,
        extras: Extras,
        step: int,
        folder: pathlib.Path,
        names: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Runs evaluators; process 0 writes eval/<step>.json and the pictures in eval/<step>/.

        Args:
            params: as they are sharded.
            extras: what gradients do not train.
            step: that the parameters are of.
            folder: the workdir.
            names: keys of config.evals; None runs all.

        Returns:
            {"<evaluator>/<metric>": value}, the same on every process.
        """
        predictor = self.predictor.with_params(params, extras)
        first = jax.process_index() == 0
        pictures_folder = folder / "eval" / str(step) if first else None
        results: dict[str, float] = {}
        for name in self.evaluators if names is None else names:
            # a folder each: two evaluators of one kind write pictures of one name
            folder_of_this = pictures_folder / name if pictures_folder else None
            found = self.evaluators[name][1].run(predictor, folder_of_this)
            results |= {f"{name}/{key}": float(value) for key, value in found.items()}
        if first:
            file = folder / "eval" / f"{step}.json"
            before = json.loads(file.read_text()) if file.exists() else {}
            workdir.save_json(file, {**before, **results})
        return results

    def evaluate_checkpoint(self, folder: pathlib.Path) -> dict[str, float]:
        """Evaluates the last checkpoint of a workdir, restored onto this experiment's mesh."""
        params, extras, step = load_params(folder / "checkpoints", self.shardings.params)
        return self.evaluate(params, extras, step, folder)

    def train(self, folder: pathlib.Path, show_progress: bool = True) -> tuple[TrainState, bool]:
        """Trains in a workdir, or goes on where it stopped.

        Returns:
            The last state, and whether all steps are done (False: told to stop, state saved).
        """
        stopwatch = profiling.Stopwatch()
        first = jax.process_index() == 0
        workdir.check_same_run(folder, self.config)
        if first:
            workdir.save_json(folder / "config.json", self.config)
            self.tokenizer.save(folder / "tokenizer.json")
        checkpoint = self.config["checkpoint"]
        checkpoints = Checkpoints(
            folder / "checkpoints",
            checkpoint["every"],
            checkpoint["keep"],
            checkpoint["keep_every"],
        )
        start = checkpoints.latest_step() or 0
        if start >= self.config["steps"] and first:
            print(f"{folder} has all {start} steps already; nothing to train")
        with stopwatch.measure("restore" if start else "init"):
            target = abstract_state(self.shapes, self.shardings)
            state = checkpoints.restore(target) if start else self.init_state()
        writers = self._writers(folder, start) if first else metrics.Writers([])
        accounts = Accounts(max_broken_share=self.config["data"]["max_broken_share"])
        peak, _ = profiling.peak_flops()
        loop = Loop(
            train_step=self.train_step(),
            batches=self.batches,
            put=lambda rows: sharding.put_batch(rows, self.batch_sharding),
            account=accounts.take,
            steps=self.config["steps"],
            batch_size=self.config["batch_size"],
            log_every=self.config["log_every"],
            flops_per_example=self.flops_per_example(),
            peak_flops=peak * self.mesh.size,
            checkpoints=checkpoints,
            writers=writers,
            evaluations=self._evaluations(folder, writers),
            nonfinite=NonFiniteGuard(self.config["nonfinite"]),
            trace=profiling.TraceWindow(folder / "trace", **self.config["profile"]),
            stopwatch=stopwatch,
            show_progress=show_progress,
        )
        try:
            with jax.set_mesh(self.mesh):  # for the losses and kernels that are written per device
                state, done = loop.run(state, start)
        finally:
            checkpoints.close()
            writers.close()
            if first:
                stopwatch.append_to(folder / "timings.jsonl", start=start, stop=loop.last_step)
                print(accounts.summary())
        return state, done

    def flops_per_example(self) -> float:
        """Returns the model FLOPs of one training example (scaling/flops.py states what counts)."""
        spec = self.config["data"]
        return train_flops_per_example(
            self.objective.model,
            pair(spec["image_size"]),
            spec["text"]["length"],
            frozen=self.optimizer.freeze,
        )

    def _writers(self, folder: pathlib.Path, start: int) -> metrics.Writers:
        writers: list[metrics.Writer] = [
            metrics.JsonlWriter(folder / "metrics.jsonl", start),
            metrics.TensorBoardWriter(folder / "tensorboard", start),
        ]
        if self.config["wandb"]:
            writers.append(metrics.WandbWriter(folder, self.config, self.config["wandb"]))
        return metrics.Writers(writers)

    def _evaluations(self, folder: pathlib.Path, writers: metrics.Writers) -> list[Evaluation]:
        """Returns one Evaluation per interval: evaluators that are due together run together."""
        groups: dict[int, list[str]] = {}
        for name, (every, _) in self.evaluators.items():
            groups.setdefault(every, []).append(name)

        def run(state: TrainState, step: int, names: list[str]) -> None:
            params = evaluation_params(state, self.optimizer)
            results = self.evaluate(params, state.extras, step, folder, names)
            writers.evaluation(step, {f"eval/{key}": value for key, value in results.items()})
            if jax.process_index() == 0:
                self._show(step, folder, writers)

        return [
            Evaluation(functools.partial(run, names=names), every)
            for every, names in groups.items()
        ]

    def _show(self, step: int, folder: pathlib.Path, writers: metrics.Writers) -> None:
        """Draws the training curve and sends the pictures of this step to the writers."""
        curve = pictures.training_curve(workdir.history(folder), title=folder.name)
        files = [pictures.save_figure(curve, folder / "training_curve.png")]
        for file in [*files, *sorted((folder / "eval" / str(step)).rglob("*.png"))]:
            writers.picture(step, f"{file.parent.name}/{file.stem}", file)
