# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported folder: data, recipe, metrics and licence, as the hub reads them.

What is not known is not made up: a converted checkpoint points to the card of its source, and
without a licence the card says that there is none yet.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from flax_vlm import __version__, trees
from flax_vlm.hub.loaded_model import LoadedModel
from flax_vlm.models.language_model import LanguageModel
from flax_vlm.models.llava import Llava
from flax_vlm.models.naflex import NaFlexVisionTransformer
from flax_vlm.models.two_towers import TwoTowers
from flax_vlm.models.vit import ViTClassifier
from flax_vlm.nn.patches import as_pair
from flax_vlm.snapshots import is_hub_id

CARD = "README.md"
MARK = "flax_vlm"  # the tag by which an earlier export is known

# nodes of a config that say how it was trained; the rest says where and how often it was saved
_RECIPE = (
    "seed",
    "steps",
    "batch_size",
    "micro_batches",
    "ema_decay",
    "init_from",
    "init",
    "lora",
) + ("objective", "optimizer")
_DATA = ("name", "split", "options", "rows", "image_size", "train_ops", "eval_ops", "text")


# model_type of formats that transformers does not read
_OTHER_LIBRARIES = {"timm": "timm", "open_clip": "open_clip"}


def is_export(card: str) -> bool:
    """Returns whether a model card was written here."""
    front = card.split("---", 2)[1] if card.startswith("---") else ""
    return f"\n- {MARK}\n" in front


def model_card(vlm: LoadedModel, model_type: str, license: str | None = None) -> str:
    """Returns the card of a model.

    Args:
        vlm: the model.
        model_type: key of FAMILIES, the format that it is written in.
        license: an identifier of the hub, "apache-2.0"; None takes that of the checkpoint that the
            model was loaded from.
    """
    license = license or vlm.origin.license
    parts = [
        front_matter(vlm, model_type, license),
        f"# {_public(vlm.origin.name)}\n",
        _description(vlm),
        _use(vlm, model_type),
        _training(vlm) if vlm.step is not None else _conversion(vlm),
        _licence(vlm, license),
    ]
    return "\n".join(parts)


def front_matter(vlm: LoadedModel, model_type: str, license: str | None) -> str:
    """Returns the YAML block that the hub reads."""
    library = _OTHER_LIBRARIES.get(model_type, "transformers")
    lines = [f"library_name: {library}", f"pipeline_tag: {_task(vlm)}", "tags:", f"- {MARK}"]
    base = vlm.config.get("init_from", vlm.origin.name)
    if is_hub_id(base):
        lines += ["base_model:", f"- {base.partition('@')[0]}"]
    if license:
        lines.append(f"license: {license}")
    return "\n".join(["---", *lines, "---", ""])


def _task(vlm: LoadedModel) -> str:
    for kind, task in _TASKS.items():
        if isinstance(vlm.model, kind):
            return task
    return "image-classification" if _is_classifier(vlm) else "image-feature-extraction"


# class of a model: its task on the hub; all others are encoders
_TASKS = {
    TwoTowers: "zero-shot-image-classification",
    Llava: "image-text-to-text",
    LanguageModel: "text-generation",
}


def _is_classifier(vlm: LoadedModel) -> bool:
    return isinstance(vlm.model, ViTClassifier)


def _public(name: str) -> str:
    """Returns a hub id, or the last part of a path: the rest concerns nobody else."""
    return name if is_hub_id(name) else pathlib.Path(name).name


def _description(vlm: LoadedModel) -> str:
    count = trees.num_parameters(vlm.params)
    lines = [f"A {type(vlm.model).__name__} with {count:,} parameters."]
    if not isinstance(vlm.model, LanguageModel):
        lines.append(_of_images(getattr(vlm.model, "image", vlm.model)))
    decoder = getattr(vlm.model, "language_model", None)
    parts = {"text tower": getattr(vlm.model, "text", None), "language model": decoder}
    if isinstance(vlm.model, LanguageModel):
        parts["language model"] = vlm.model
    for name, part in parts.items():
        if part is not None:
            lines.append(
                f"Its {name} has width {part.width}, {part.depth} layers, {part.vocab_size:,} "
                f"tokens and a context of {part.length}."
            )
    return "\n".join([*lines, f"Written by flax_vlm {__version__}.", ""])


def _of_images(tower: nn.Module) -> str:
    height, width = as_pair(tower.image_size)
    size = f"images of {height} x {width} pixels"
    if isinstance(tower, NaFlexVisionTransformer):
        size = "images of any aspect ratio"
    return (
        f"It sees {size} in patches of {' x '.join(map(str, as_pair(tower.patch_size)))}, width "
        f"{tower.width}, {tower.depth} layers."
    )


_TRANSFORMERS = {
    "zero-shot-image-classification": (
        "from transformers import AutoImageProcessor, AutoModel, AutoTokenizer",
        'tokens = AutoTokenizer.from_pretrained(folder)(["a cat"], padding="max_length",\n'
        '    truncation=True, return_tensors="pt")',
        "logits = AutoModel.from_pretrained(folder)(**tokens, **pixels).logits_per_image",
    ),
    "image-classification": (
        "from transformers import AutoImageProcessor, AutoModelForImageClassification",
        "model = AutoModelForImageClassification.from_pretrained(folder)",
        "logits = model(**pixels).logits",
    ),
    "image-feature-extraction": (
        "from transformers import AutoImageProcessor, AutoModel",
        "model = AutoModel.from_pretrained(folder)",
        "tokens = model(**pixels).last_hidden_state",
    ),
    "image-text-to-text": (
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "processor = AutoProcessor.from_pretrained(folder)",
        'question = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True,',
        '    return_dict=True, return_tensors="pt")',
        "model = AutoModelForImageTextToText.from_pretrained(folder)",
        "answer = processor.decode(model.generate(**inputs, max_new_tokens=64)[0])",
    ),
    "text-generation": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "inputs = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": "Hello"}], add_generation_prompt=True,',
        '    return_dict=True, return_tensors="pt")',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0])",
    ),
}
_PIXELS = 'pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")'


def _use(vlm: LoadedModel, model_type: str) -> str:
    ours = ["import flax_vlm", "", "vlm = flax_vlm.load(folder)"]
    lines = ["## Use", "", *_code(ours)]
    if model_type not in _OTHER_LIBRARIES:
        head, *rest = _TRANSFORMERS[_task(vlm)]
        pixels = [_PIXELS] if "AutoImageProcessor" in head else []
        lines += ["or with torch:", "", *_code([head, "", *pixels, *rest])]
    return "\n".join(lines)


def _code(lines: Sequence[str]) -> list[str]:
    return ["```python", *lines, "```", ""]


def _training(vlm: LoadedModel) -> str:
    config = vlm.config.to_dict()
    data = {key: config["data"][key] for key in _DATA if config["data"].get(key)}
    if data.get("rows", "captions") != "captions":
        data["chat"] = config["data"]["chat"]
    recipe = {key: config[key] for key in _RECIPE if config.get(key)}
    for node, key in ((recipe, "init_from"), (data.get("text", {}), "path")):
        if node.get(key):
            node[key] = _public(node[key])
    return "\n".join(
        [
            "## Data\n",
            f"`{data['name']}`, split `{data['split']}`.\n",
            _block(data),
            "## Recipe\n",
            f"{vlm.step:,} of {config['steps']:,} steps of {config['batch_size']:,} examples.\n",
            _block(recipe),
            "## Metrics\n",
            _metrics(vlm),
        ]
    )


def _block(value: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(value, indent=1, default=list)}\n```\n"


def _metrics(vlm: LoadedModel) -> str:
    if not vlm.origin.results:
        return f"Step {vlm.step} was not evaluated.\n"
    evals = vlm.config["evals"]
    lines = ["| metric | value | data |", "|---|---|---|"]
    for name, value in vlm.origin.results.items():
        data = evals[name.partition("/")[0]]["data"]
        lines.append(f"| {name} | {value:.4f} | {data['name']}, {data.get('split', '')} |")
    return "\n".join([f"After step {vlm.step}, by the evaluators of the run.\n", *lines, ""])


def _conversion(vlm: LoadedModel) -> str:
    return "\n".join(
        [
            "## Data, recipe and metrics\n",
            f"The weights are those of `{_public(vlm.origin.name)}` in another file; see its model "
            "card.\n",
        ]
    )


def _licence(vlm: LoadedModel, license: str | None) -> str:
    known = license or "None stated: ask the author before use."
    start = vlm.config.get("init_from")
    derived = ""
    if start:
        derived = f" The weights derive from `{_public(start)}`, whose licence applies too."
    return f"## Licence\n\n{known}{derived}\n"
