# SPDX-License-Identifier: Apache-2.0
"""`flax_vlm.load(source)`: a workdir, a Hugging Face folder or a hub id becomes a LoadedModel.

Either way the source is read as a config (`model`, `objective`, `data`) and parameters, which go
straight to the devices that own them; from there on there is one way.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flax_vlm import trees
from flax_vlm.build import build
from flax_vlm.convert.loading import load_pretrained, read_config
from flax_vlm.convert.resolution import with_image_size
from flax_vlm.data.hf_images import ImageRecipe
from flax_vlm.data.hf_tokenizers import TextRecipe
from flax_vlm.data.images import pair
from flax_vlm.data.text import Tokenizer
from flax_vlm.hub.checkpoint_config import ENCODER, checkpoint_config, load_processor
from flax_vlm.hub.loaded_model import LoadedModel, Origin
from flax_vlm.hub.processor import Processor
from flax_vlm.models import MODELS
from flax_vlm.models.clip import CLIP
from flax_vlm.nn.patches import as_pair
from flax_vlm.objectives import build_objective
from flax_vlm.objectives.base import Objective
from flax_vlm.objectives.encoder import Encoder
from flax_vlm.objectives.lora import merge, split_adapters
from flax_vlm.objectives.next_token import NextToken
from flax_vlm.snapshots import find_folder
from flax_vlm.training import workdir
from flax_vlm.training.checkpoints import load_params, parameter_shapes
from flax_vlm.training.sharding import Rule, parameter_shardings

Shardings = Callable[[Any], Any]
# parts of a model that have a dtype each; the connector of a llava follows its language model
DTYPE_PARTS = {
    "siglip": ("image", "text"),
    "clip": ("image", "text"),
    "llava": ("image", "language_model"),
}

# which of transformers' classes does an operation, for an export; the first that is there
_PROCESSORS = {"pad_to_square": "LlavaImageProcessor", "center_crop": "CLIPImageProcessor"}


def load(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
    batch_size: int = 64,
) -> LoadedModel:
    """Returns the model of a workdir of train.py, of a Hugging Face folder, or of a hub id.

    Of a workdir it is the last checkpoint: the moving average where the run kept one, with LoRA
    adapters merged. Nothing of a checkpoint is executed, and no pickle is read.

    Args:
        source: a workdir; a folder with config.json and safetensors; or "org/name" of the hub.
        revision: branch, tag or commit of the hub.
        mesh: devices to spread the parameters over, see `training.sharding.make_mesh`; rows are
            split over it too. None is one device.
        rules: of the parameters' shardings, before the built-in ones.
        dtype: of the parameters and the matmuls, "bfloat16" halves the memory; None is float32
            parameters, and matmuls as the run had them.
        batch_size: images or texts that are computed at once.

    Raises:
        ValueError: if it is none of these, its family is not supported, or its files are damaged.
        CheckpointError: if a workdir has no complete checkpoint.
    """
    folder = find_folder(source, revision)
    shardings = None
    if mesh is not None:
        shardings = functools.partial(parameter_shardings, mesh=mesh, rules=rules)
    read = _read_run if workdir.is_workdir(folder) else _read_checkpoint
    parts = read(folder, str(source), shardings, dtype)
    return LoadedModel(**parts, batch_size=batch_size, mesh=mesh)


def _read_checkpoint(
    folder: pathlib.Path, name: str, shardings: Shardings | None, dtype: str | None
) -> dict[str, Any]:
    config = checkpoint_config(folder)
    loaded = load_pretrained(folder, shardings=shardings, dtype=dtype or "float32")
    processor = load_processor(folder, loaded.spec)
    recipe = processor.image_recipe
    tower = loaded.spec.get("image", loaded.spec)
    if isinstance(recipe, ImageRecipe) and recipe.image_size != as_pair(tower["image_size"]):
        # DINOv2 was trained at 518 and asks for images of 224
        loaded = with_image_size(loaded, recipe.image_size)
        if shardings is not None:
            loaded.params.update(jax.device_put(loaded.params, shardings(loaded.params)))
    config["model"] = with_dtype(loaded.spec, dtype)
    objective = _objective(config)
    return dict(
        objective=objective,
        params=loaded.params,
        extras={},
        config=ConfigDict(config).lock(),
        processor=processor,
        origin=_checkpoint_origin(folder, name, loaded.model_type),
    )


def _read_run(
    folder: pathlib.Path, name: str, shardings: Shardings | None, dtype: str | None
) -> dict[str, Any]:
    config = workdir.load_config(folder)
    directory, places = folder / "checkpoints", None
    if shardings is not None:
        shapes = parameter_shapes(directory)
        places = shardings(
            trees.unflatten({p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()})
        )
    params, extras, step = load_params(directory, places)
    if config.get("lora"):
        merged = functools.partial(merge, alpha=config["lora"]["alpha"])
        base = None if places is None else split_adapters(places)[0]
        params = jax.jit(merged, out_shardings=base)(params)
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype) if x.ndim else x, params)
    config["model"] = with_dtype(config["model"], dtype)
    objective = _objective(config)
    return dict(
        objective=objective,
        params=params,
        extras=extras,
        config=ConfigDict(config).lock(),
        processor=_run_processor(folder, config, objective),
        origin=Origin(name, results=_results(folder, step)),
        step=step,
    )


def _objective(config: Mapping[str, Any]) -> Objective | Encoder:
    spec = dict(config["objective"])
    if spec["name"] != ENCODER["name"]:
        return build_objective(config["model"], spec)
    model = build(MODELS, config["model"], "model")
    return build({"encoder": Encoder}, spec, "objective", model=model)


def with_dtype(spec: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Returns the config of a model whose matmuls are in another dtype; None leaves it."""
    if dtype is None:
        return dict(spec)
    parts = DTYPE_PARTS.get(spec["name"], ())
    if not parts:
        return {**spec, "dtype": dtype}
    return {**spec, **{part: {**spec.get(part, {}), "dtype": dtype} for part in parts}}


def _run_processor(
    folder: pathlib.Path, config: Mapping[str, Any], objective: Objective
) -> Processor:
    data = config["data"]
    ops = tuple(data["eval_ops"])
    names = {op["name"] for op in ops}
    recipe = ImageRecipe(
        processor=next((c for op, c in _PROCESSORS.items() if op in names), "SiglipImageProcessor"),
        ops=ops,
        image_size=pair(data["image_size"]),
        mean=tuple(objective.image_mean),
        std=tuple(objective.image_std),
    )
    if isinstance(objective, NextToken):
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        text = TextRecipe(tokenizer, data["text"]["length"], uses_mask=True, chat=True)
        return Processor(recipe if objective.sees else None, text)
    if not hasattr(objective.model, "text"):
        return Processor(recipe, None)
    # transformers would hide padding from SigLIP's text encoder if its tokenizer gave a mask
    uses_mask = isinstance(objective.model, CLIP)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return Processor(recipe, TextRecipe(tokenizer, data["text"]["length"], uses_mask))


def _results(folder: pathlib.Path, step: int) -> dict[str, float]:
    file = folder / "eval" / f"{step}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _checkpoint_origin(folder: pathlib.Path, name: str, model_type: str) -> Origin:
    _, config = read_config(folder)
    labels = config.get("id2label") or {}
    names = tuple(labels[key] for key in sorted(labels, key=int)) if labels else None
    return Origin(name, model_type, license=_license(folder), class_names=names)


def _license(folder: pathlib.Path) -> str | None:
    """Returns what the front matter of a model card says."""
    card = folder / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", front.group(1), re.M) if front else None
    return found.group(1) if found else None
