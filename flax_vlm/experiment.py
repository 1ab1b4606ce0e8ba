# SPDX-License-Identifier: Apache-2.0
"""The composition root: a config becomes an Experiment. The only file that may import every layer.

config -> Program (program.py): objective, optimizer, mesh, train step    no data, no memory
       -> tokenizer, datasets, evaluators                                 on first use
       -> train(workdir), evaluate(...)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax

from flax_vlm import trees
from flax_vlm.build import build as build_by_name
from flax_vlm.data import load_source
from flax_vlm.data.accounts import Accounts, DataError
from flax_vlm.data.chat_templates import IMAGE_MARKER
from flax_vlm.data.pipeline import Dataset
from flax_vlm.data.recipe import build_preprocess, build_tokenizer
from flax_vlm.data.sources import Source
from flax_vlm.data.text import Tokenizer
from flax_vlm.evaluation import EVALUATORS, pictures
from flax_vlm.evaluation.base import Predictor
from flax_vlm.hub.checkpoint_config import evaluation_config
from flax_vlm.objectives.base import Extras, Params
from flax_vlm.program import Config, Program, plain
from flax_vlm.training import metrics, profiling, sharding, workdir
from flax_vlm.training.checkpoints import CheckpointError, Checkpoints, load_params
from flax_vlm.training.loop import Evaluation, Loop
from flax_vlm.training.nonfinite import NonFiniteError, NonFiniteGuard
from flax_vlm.training.state import TrainState, abstract_state, evaluation_params

# tables of tokens: of a text tower, of a language model alone or inside of another model
EMBEDDINGS = r"((text|language_model)/)?embedding/embedding"
# What a person can mend: programs print the message alone.
USER_ERRORS = (ValueError, OSError, CheckpointError, NonFiniteError, DataError)


def mesh_for_evaluation(mesh: Config) -> dict[str, Any]:
    """Returns the mesh of a config fitted to the devices at hand; results do not depend on it."""
    parts = mesh["fsdp"] * mesh["tensor"]
    if jax.device_count() % parts:
        return {**mesh, "data": -1, "fsdp": 1, "tensor": 1}
    return {**mesh, "data": -1}


@dataclasses.dataclass(frozen=True)
class Experiment(Program):
    """Everything that a config composes: the program, its data and its evaluators."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the config, trained on the captions of the training split if need be."""
        spec = self.config["data"]
        options = {**spec["options"], **spec["text"]["options"]}
        tokenizer = build_tokenizer(
            spec["text"], lambda: self._source({**spec, "options": options})
        )
        leaves = trees.named_leaves(self.shapes.params)
        for path in (p for p in leaves if re.fullmatch(EMBEDDINGS, p)):
            if tokenizer.vocab_size > leaves[path].shape[0]:
                raise ValueError(
                    f"the model's vocabulary {path} must hold the {tokenizer.vocab_size} tokens of "
                    f"the tokenizer, got {leaves[path].shape[0]}; raise the model's vocab_size or "
                    f"lower data.text.vocab_size"
                )
        self._check_image_token(tokenizer)
        return tokenizer

    def _check_image_token(self, tokenizer: Tokenizer) -> None:
        expected = getattr(self.objective.model, "image_token_id", None)
        found = tokenizer.id_of(IMAGE_MARKER)
        if expected is not None and found != expected:
            raise ValueError(
                f"model.image_token_id must be the tokenizer's id of {IMAGE_MARKER!r}, {found}, "
                f"got {expected}"
            )

    def _preprocess(self, spec: Config, *, train: bool) -> Any:
        tokens = getattr(self.objective.model, "tokens_per_image", 0)
        return build_preprocess(spec, self.tokenizer, train=train, tokens_per_image=tokens)

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
            preprocess=self._preprocess(spec, train=True),
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
                preprocess=self._preprocess(source, train=False),
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

    def batches(self, step: int) -> Any:
        """Returns this process's rows of the global batches from `step` on, a function of it."""
        index, count = sharding.data_shard(self.batch_sharding)
        return self.train_data.batches(
            step, batch_size=self.batch_size, shard=index, num_shards=count
        )

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
        first = jax.process_index() == 0
        stopwatch = profiling.Stopwatch(folder / "timings.jsonl" if first else None)
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
                print(accounts.summary())
        return state, done

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


def evaluate_run(folder: pathlib.Path) -> dict[str, float]:
    """Evaluates the last checkpoint of a workdir, on the devices that are here."""
    config = workdir.load_config(folder)
    run = Experiment.from_config({**config, "mesh": mesh_for_evaluation(config["mesh"])})
    return run.evaluate_checkpoint(folder)


def evaluate_pretrained(recipe: Config, source: str, folder: pathlib.Path) -> dict[str, float]:
    """Evaluates a Hugging Face folder or hub id with the data and evaluators of a recipe.

    Args:
        recipe: see hub.checkpoint_config.evaluation_config.
        source: the folder or hub id.
        folder: where eval/0.json and the pictures go; holds no other run.

    Raises:
        ValueError: if the folder is the workdir of a run, or the checkpoint cannot be evaluated.
    """
    if workdir.is_workdir(folder):
        raise ValueError(f"{folder} holds a run; give another --workdir for --checkpoint")
    config = evaluation_config(plain(recipe), source)
    run = Experiment.from_config({**config, "mesh": mesh_for_evaluation(config["mesh"])})
    state = run.init_state()
    return run.evaluate(state.params, state.extras, 0, folder)
