# SPDX-License-Identifier: Apache-2.0
"""A batch ten times larger than the device holds: the shapes recipe through the gradient cache.

    python train.py --config configs/siglip_shapes_large_batch.py --workdir runs/siglip_shapes_large

2,560 pairs are contrasted with each other in every step; the towers see 128 at a time. As many
examples as configs/siglip_shapes.py, in a twentieth of its steps.

Result: none yet
"""

from configs import siglip_shapes


def get_config():
    """Returns the recipe."""
    config = siglip_shapes.get_config().unlock()
    config.steps = 120
    config.batch_size = 2560
    config.micro_batches = 20
    config.log_every = 1
    config.checkpoint.every = 40
    config.objective.pair_loss.form = "sharded"
    config.optimizer.lr = 4e-3
    config.optimizer.schedule.warmup = 0.1
    for evaluation in config.evals.values():
        evaluation.every = 40
    return config.lock()
