# SPDX-License-Identifier: Apache-2.0
"""`flax_vlm.load` and `flax_vlm.save_pretrained`: checkpoints in and out, for people.

workdir of train.py ----------\
    Hugging Face folder, hub id --- config (model, objective, data) + parameters -> LoadedModel
LoadedModel -> folder
"""

from flax_vlm.hub.export import save_pretrained
from flax_vlm.hub.loaded_model import LoadedModel, Origin
from flax_vlm.hub.loading import load

__all__ = ["LoadedModel", "Origin", "load", "save_pretrained"]
