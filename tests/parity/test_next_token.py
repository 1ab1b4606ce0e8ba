# SPDX-License-Identifier: Apache-2.0
"""The next-token loss against the loss that transformers computes from labels."""

import jax
import numpy as np
import torch

from flax_vlm.objectives import build_objective
from tests.parity.llava_models import IMAGE_TOKEN, case, inputs


def test_the_loss_is_that_of_transformers_for_the_same_labels():
    model, _, loaded = case("llava")
    theirs, (text, images, mask, index) = inputs("llava")
    supervised = (np.random.default_rng(3).random(text.shape) < 0.8) & mask & (text != IMAGE_TOKEN)
    supervised[:, 0] = False  # nothing stands before it
    supervised[1, -1], supervised[1, -4] = True, False  # the first token behind padding
    labels = np.where(supervised, text, -100)
    with torch.no_grad():
        expected = float(model(**theirs, labels=torch.from_numpy(labels).long()).loss)
    objective = build_objective(loaded.spec, {"name": "next_token"})
    batch = {
        "text": text,
        "text_mask": mask,
        "loss_mask": supervised,
        "images": images,
        "visual_index": index,
    }
    loss, _ = objective.loss(loaded.params, {}, batch, jax.random.key(0), train=False)
    assert float(loss.weight) == supervised.sum() > 5
    assert abs(float(loss.value()) - expected) <= 2e-5 * max(1.0, abs(expected))
