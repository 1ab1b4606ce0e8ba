# SPDX-License-Identifier: Apache-2.0
"""Published parameter counts, and ours beside them: what `train.py --dry-run` prints.

Ours are counted by `jax.eval_shape` on the full-size model: nothing is computed and nothing is
allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.build import lookup
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.trees import num_parameters

VIT_JAX = "google-research/vision_transformer, vit_jax/models_test.py, MODEL_SIZES"
TIMM = "timm, results/benchmark-infer-amp-nchw-pt291-cu130-5090.csv"
TIMM_OLD = "timm, results/benchmark-infer-amp-nchw-pt240-cu124-rtx3090.csv"
OPEN_CLIP = "open_clip, docs/model_profile.csv"
HF = "Hugging Face {}, counted on torch's meta device"
DERIVED = "no published count: arithmetic on big_vision's table of sizes"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published count and the model that it belongs to.

    Attributes:
        model: a key of MODELS.
        arguments: of the builder.
        parameters: the count as published: an int is exact, a float is millions with two decimals.
        source: where it is published.
    """

    model: str
    arguments: Mapping[str, Any]
    parameters: int | float
    source: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: key of PUBLISHED.
        ours: number of scalars in our parameters.
        published: an int is exact, a float is millions with two decimals.
        source: where it is published.
    """

    name: str
    ours: int
    published: int | float
    source: str

    @property
    def agrees(self) -> bool:
        """Do the two counts agree, to the precision of the published one?"""
        if isinstance(self.published, int):
            return self.ours == self.published
        return round(self.ours / 1e6, 2) == self.published


def _vit(variant: str, parameters: int | float, source: str, **arguments: Any) -> Published:
    return Published("vit", {"variant": variant, **arguments}, parameters, source)


def _classifier(variant: str, parameters: int | float, source: str, **arguments: Any) -> Published:
    return _vit(variant, parameters, source, num_classes=1000, **arguments)


def _clip(variant: str, parameters: int | float, source: str = OPEN_CLIP) -> Published:
    return Published("clip", {"variant": variant}, parameters, source)


def _language_model(variant: str, parameters: int | float, source: str) -> Published:
    return Published("language_model", {"variant": variant}, parameters, source)


def _siglip(variant: str, parameters: int | float, source: str = OPEN_CLIP) -> Published:
    return Published("siglip", {"variant": variant}, parameters, source)


PUBLISHED: dict[str, Published] = {
    # 1000 classes, class token, 224 pixels, where nothing else is said
    "ViT-mu/16": _classifier("mu/16", 76_712, DERIVED),
    "ViT-Ti/16": _classifier("Ti/16", 5_717_416, VIT_JAX),
    "ViT-S/32": _classifier("S/32", 22_878_952, VIT_JAX),
    "ViT-S/16": _classifier("S/16", 22_050_664, VIT_JAX),
    "ViT-S/16 GAP": _classifier("S/16", 22_049_896, VIT_JAX, pool="gap"),
    "ViT-B/32": _classifier("B/32", 88_224_232, VIT_JAX),
    "ViT-B/16": _classifier("B/16", 86_567_656, VIT_JAX),
    "ViT-B/16 GAP": _classifier("B/16", 86_566_120, VIT_JAX, pool="gap"),
    "ViT-B/8": _classifier("B/8", 86_576_872, VIT_JAX),
    "ViT-L/32": _classifier("L/32", 306_535_400, VIT_JAX),
    "ViT-L/16": _classifier("L/16", 304_326_632, VIT_JAX),
    "ViT-L/14": _classifier("L/14", 304.20, TIMM),
    "ViT-H/14": _classifier("H/14", 632_045_800, VIT_JAX),
    "ViT-g/14": _classifier("g/14", 1012.61, TIMM_OLD),
    "ViT-G/14": _classifier("G/14", 1844.44, TIMM_OLD),
    "ViT-G-opt/16": _classifier("G-opt/16", 1_665_026_536, DERIVED),
    # image towers of SigLIP: MAP head, no classes
    "ViT-So400m/14 MAP": _vit("So400m/14", 427.68, OPEN_CLIP, pool="map"),
    "ViT-So400m/16 MAP, 256 px": _vit("So400m/16", 427.89, TIMM, pool="map", image_size=256),
    "ViT-g-opt/16 MAP, 256 px": _vit("g-opt/16", 1163.17, TIMM, pool="map", image_size=256),
    "SigLIP B/16": _siglip("B/16", 203_155_970, HF.format("google/siglip-base-patch16-224")),
    "SigLIP B/16-256": _siglip("B/16-256", 203.20),
    "SigLIP B/16-384": _siglip("B/16-384", 203.45),
    "SigLIP B/16-512": _siglip("B/16-512", 203.79),
    "SigLIP B/16-i18n": _siglip("B/16-i18n", 370.63),
    "SigLIP L/16": _siglip("L/16", 652_150_786, HF.format("google/siglip-large-patch16-256")),
    "SigLIP L/16-384": _siglip("L/16-384", 652.48),
    "SigLIP So400m/14": _siglip("So400m/14", 877.36),
    "SigLIP So400m/14-384": _siglip(
        "So400m/14-384", 877_960_498, HF.format("google/siglip-so400m-patch14-384")
    ),
    "SigLIP 2 B/16": _siglip("B/16-v2", 375_187_970, HF.format("google/siglip2-base-patch16-224")),
    "CLIP S/32": _clip("S/32", 63.09),
    "CLIP S/16": _clip("S/16", 62.26),
    "CLIP M/32": _clip("M/32", 103.12),
    "CLIP M/16": _clip("M/16", 102.02),
    "CLIP B/32": _clip("B/32", 151_277_313, HF.format("openai/clip-vit-base-patch32")),
    "CLIP B/16": _clip("B/16", 149_620_737, HF.format("openai/clip-vit-base-patch16")),
    "CLIP L/14": _clip("L/14", 427_616_513, HF.format("openai/clip-vit-large-patch14")),
    "CLIP L/14-336": _clip("L/14-336", 427_944_193, HF.format("openai/clip-vit-large-patch14-336")),
    "CLIP H/14": _clip("H/14", 986.11),
    "CLIP g/14": _clip("g/14", 1366.68),
    "CLIP G/14": _clip("G/14", 2539.57),
    "CLIP e/14": _clip("e/14", 4581.09),
    **{
        name: _language_model(name, count, HF.format(f"{owner}/{repository or name}"))
        for name, count, owner, repository in (
            ("SmolLM2-135M", 134_515_008, "HuggingFaceTB", ""),
            ("SmolLM2-360M", 361_821_120, "HuggingFaceTB", ""),
            ("SmolLM2-1.7B", 1_711_376_384, "HuggingFaceTB", ""),
            ("Llama-2-7b", 6_738_415_616, "meta-llama", "Llama-2-7b-hf"),
            ("Llama-2-13b", 13_015_864_320, "meta-llama", "Llama-2-13b-hf"),
            ("Llama-3.1-8B", 8_030_261_248, "meta-llama", ""),
            ("Mistral-7B-v0.2", 7_241_732_096, "mistralai", "Mistral-7B-Instruct-v0.2"),
            ("Qwen2-0.5B", 494_032_768, "Qwen", ""),
            ("Qwen2-7B", 7_615_616_512, "Qwen", ""),
            ("Qwen3-0.6B", 596_049_920, "Qwen", ""),
            ("Qwen3-8B", 8_190_735_360, "Qwen", ""),
            ("Gemma-2b", 2_506_172_416, "google", "gemma-2b"),
            ("Gemma-7b", 8_537_680_896, "google", "gemma-7b"),
            ("Gemma-2-2b", 2_614_341_888, "google", "gemma-2-2b"),
            ("Gemma-2-9b", 9_241_705_984, "google", "gemma-2-9b"),
        )
    },
}


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters of a model of MODELS; computes and allocates nothing."""
    return num_parameters(parameter_shapes(model))


def parameter_counts(names: Iterable[str] = tuple(PUBLISHED)) -> list[Row]:
    """Returns one row per model: our count, the published one and where it is published.

    Args:
        names: keys of PUBLISHED; all of them take about five seconds.

    Raises:
        ValueError: for an unknown name.
    """
    rows = []
    for name in names:
        entry = lookup(PUBLISHED, name, "published model")
        model = MODELS[entry.model](**entry.arguments)
        rows.append(Row(name, count_parameters(model), entry.parameters, entry.source))
    return rows
