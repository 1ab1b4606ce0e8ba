# SPDX-License-Identifier: Apache-2.0
"""What is trained: `build_objective(config)` composes a model and an objective by name."""

from collections.abc import Mapping
from typing import Any

from flax_vlm.build import build
from flax_vlm.models import MODELS
from flax_vlm.objectives.base import Objective
from flax_vlm.objectives.classification import Classification
from flax_vlm.objectives.contrastive import Contrastive
from flax_vlm.objectives.lora import with_lora
from flax_vlm.objectives.momentum_contrast import MomentumContrast
from flax_vlm.objectives.next_token import NextToken

OBJECTIVES = {
    "contrastive": Contrastive,
    "momentum_contrast": MomentumContrast,
    "classification": Classification,
    "next_token": NextToken,
}


def build_objective(
    model: Mapping[str, Any],
    objective: Mapping[str, Any],
    lora: Mapping[str, Any] | None = None,
    *,
    micro_batches: int = 1,
) -> Objective:
    """Returns the objective of a config, with its model inside.

    Args:
        model: {"name": ..., ...}, see `models.MODELS`.
        objective: {"name": ..., ...}, see `OBJECTIVES`.
        lora: fields of `lora.LoRA`, adapters beside the model's parameters; None or {} has none.
        micro_batches: for objectives with a gradient cache, which cut the batch themselves; the
            others leave that to the training step.

    Raises:
        ValueError: for an unknown name or key; lists the choices.
    """
    given: dict[str, Any] = {"model": build(MODELS, model, "model")}
    if hasattr(OBJECTIVES.get(objective.get("name")), "micro_batches"):
        given["micro_batches"] = micro_batches
    return with_lora(build(OBJECTIVES, objective, "objective", **given), lora or {})
