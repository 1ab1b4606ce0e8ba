# SPDX-License-Identifier: Apache-2.0
"""LLaVA's second stage on the shapes world and the digits: questions and answers.

    python train.py --config configs/llava_shapes_stage1.py --workdir runs/llava_stage1
    python train.py --config configs/llava_shapes_stage2.py --workdir runs/llava_stage2
    python train.py --config configs/llava_shapes_stage2.py:resampler,runs/r_stage1 --workdir DIR

Goes on from the first stage: the image encoder is frozen, connector and language model are trained
on conversations. The arguments are the connector of the first stage ("mlp", "resampler", "blind")
and its workdir. `test` asks about held-out scenes, `novel` about scenes with pairs of colour and
shape that training never shows.

Result: MEASURED
"""

from configs import llava_shapes_stage1


def get_config(arguments: str = "mlp"):
    """Returns the recipe.

    Args:
        arguments: "variant" or "variant,workdir of the first stage".
    """
    variant, _, start = arguments.partition(",")
    config = llava_shapes_stage1.get_config(variant).unlock()
    config.init_from = start or "runs/llava_stage1"
    config.steps = 2400
    config.checkpoint.every = 1200
    config.data.options = {"image_size": 32}
    config.data.text.length = 112
    config.data.text.tokenizer = "file"
    config.data.text.path = f"{config.init_from}/tokenizer.json"
    config.optimizer.lr = 1e-3
    if variant != "blind":
        config.optimizer.freeze = ("image/.*",)
    config.evals = {
        split: {
            "name": "answers",
            "every": 0,
            "batch_size": 250,
            "data": {"name": "instructions", "split": split},
        }
        for split in ("test", "novel")
    }
    return config.lock()
