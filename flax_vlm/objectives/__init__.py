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

OBJECTIVES = {"contrastive": Contrastive, "classification": Classification}


def build_objective(
    model: Mapping[str, Any],
    objective: Mapping[str, Any],
    lora: Mapping[str, Any] | None = None,
    **given: Any,
) -> Objective:
    """Returns the objective of a config, with its model inside.

    Args:
        model: {"name": ..., ...}, see `models.MODELS`.
        objective: {"name": ..., ...}, see `OBJECTIVES`.
        lora: fields of `lora.LoRA`, adapters beside the model's parameters; None or {} has none.
        **given: arguments that do not stand in these two nodes (micro_batches of a gradient cache).

    Raises:
        ValueError: for an unknown name or key; lists the choices.
    """
    built = build(MODELS, model, "model")
    return with_lora(build(OBJECTIVES, objective, "objective", model=built, **given), lora or {})
