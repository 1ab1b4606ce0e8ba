# SPDX-License-Identifier: Apache-2.0
"""What is trained: `build_objective(config)` composes a model and an objective by name."""

from collections.abc import Mapping
from typing import Any

from flax_vlm.build import build
from flax_vlm.models import MODELS
from flax_vlm.objectives.base import Objective
from flax_vlm.objectives.classification import Classification
from flax_vlm.objectives.contrastive import Contrastive

OBJECTIVES = {"contrastive": Contrastive, "classification": Classification}


def build_objective(
    model: Mapping[str, Any], objective: Mapping[str, Any], **given: Any
) -> Objective:
    """Returns the objective of a config, with its model inside.

    Args:
        model: {"name": ..., ...}, see `models.MODELS`.
        objective: {"name": ..., ...}, see `OBJECTIVES`.
        **given: arguments that do not stand in these two nodes (micro_batches of a gradient cache).

    Raises:
        ValueError: for an unknown name or key; lists the choices.
    """
    return build(OBJECTIVES, objective, "objective", model=build(MODELS, model, "model"), **given)
