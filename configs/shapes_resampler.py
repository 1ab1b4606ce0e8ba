# SPDX-License-Identifier: Apache-2.0
"""The shapes recipe with a Perceiver Resampler over the patches: how many tokens does it take?

    python train.py --config configs/shapes_resampler.py:4 --workdir DIR

The argument is the number of latents, each of which looks at all 16 patches; their mean is the
image embedding. All numbers with three seeds: configs/ladders/resampler_tokens.py.

Result: docs/scaling.md.
"""

from configs import siglip_shapes


def get_config(num_latents: str = "4"):
    """Returns the recipe.

    Args:
        num_latents: Q.
    """
    config = siglip_shapes.get_config().unlock()
    # many small batches and the softmax loss: the compute ladder learns the most from those
    config.steps = 800
    config.batch_size = 32
    config.checkpoint.every = 800
    config.optimizer.lr = 1e-3
    config.objective.pair_loss.name = "softmax"
    config.data.options.train_size = 80_000  # every scene once
    config.model.embed_dim = 64
    for tower in (config.model.image, config.model.text):
        tower.update({"width": 64, "depth": 3, "mlp_dim": 256})
    config.model.image.pool = "resampler"
    config.model.image.resampler = {
        "num_latents": int(num_latents),
        "depth": 2,
        "num_heads": 4,
        "head_dim": 16,
    }
    for evaluation in config.evals.values():
        evaluation.every = 0
    return config.lock()
