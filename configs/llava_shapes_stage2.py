# SPDX-License-Identifier: Apache-2.0
r"""LLaVA's second stage on the shapes world and the digits: questions and answers.

    python train.py --config configs/llava_shapes_stage1.py --workdir runs/llava_stage1
    python train.py --config configs/llava_shapes_stage2.py --workdir runs/llava_stage2
    python train.py --config configs/llava_shapes_stage2.py:resampler,runs/r_stage1 --workdir DIR
    python train.py --config configs/llava_shapes_stage2.py:mlp,runs/llava_stage2,average_pool \
        --workdir DIR --config.steps=400

Goes on from the first stage: the image encoder is frozen, connector and language model are trained
on conversations. The arguments are the connector of the first stage ("mlp", "resampler", "blind"),
its workdir, and a way to have fewer visual tokens (a key of COMPRESSIONS; what each costs is in
docs/vision_language.md). `test` asks about held-out scenes, `novel` about scenes with pairs of
colour and shape that training never shows.

With the workdir of a blind run its accuracy is printed beside:

    python train.py --config configs/llava_shapes_stage1.py:blind --workdir runs/b1
    python train.py --config configs/llava_shapes_stage2.py:blind,runs/b1 --workdir runs/b2
    python train.py --config configs/llava_shapes_stage2.py:mlp,runs/llava_stage1,,runs/b2 \
        --workdir DIR

Result, seed 0, exact match in per cent on `test` (blind model, majority answer of the kind):
follow-up 96.7 (19.6, 19.6), digit 92.5 (10.5, 15.4), place 86.8 (19.4, 19.4), relation 81.6 (26.8,
26.8), counting 75.0 (45.8, 40.5), color 74.4 (10.7, 17.5), comparison 49.1 (30.1, 4.5), shape 23.5
(18.5, 21.4). On `novel`: follow-up 92.1, digit 89.6, place 85.0, relation 85.6, counting 76.3,
color 47.6, comparison 45.7, shape 12.9. Above the better of blind and majority: counting 29, color
57, relation 55 points. Shapes are hardly told apart: naming one is no better than the majority.
11.8 minutes for both stages on two quiet, slow cores with a cold compilation cache. The resampler
has not been run with this recipe.
"""

from configs import llava_shapes_stage1
from flax_vlm.data.instructions import KINDS
from flax_vlm.data.questions import CAPTIONS

STEPS = 800
# captions were the first stage's
ASKED = tuple(kind for kind in KINDS if kind not in CAPTIONS)
# changes of the model; the encoder has 16 patches
COMPRESSIONS = {
    "": {},
    "average_pool": {"compression": {"name": "average_pool", "scale": 2}},
    "token_merging": {"compression": {"name": "token_merging", "tokens": 4}},
    "token_merging_8": {"compression": {"name": "token_merging", "tokens": 8}},
    "fastv": {"pruning": {"layer": 2, "keep": 4}},
    "fastv_8": {"pruning": {"layer": 2, "keep": 8}},
}


def get_config(arguments: str = "mlp"):
    """Returns the recipe.

    Args:
        arguments: "variant,workdir of the first stage,compression,workdir of the blind run"; what
            is left out or empty takes its default.
    """
    variant, start, compression, blind = [*arguments.split(","), "", "", ""][:4]
    config = llava_shapes_stage1.get_config(variant).unlock()
    config.init_from = start or "runs/llava_stage1"
    config.model.update(COMPRESSIONS[compression])
    config.steps = config.checkpoint.every = STEPS
    kinds = (*ASKED, "counting", "counting", "relation")  # these two are learnt last
    config.data.options = {"image_size": llava_shapes_stage1.SIZE, "kinds": kinds, "turns": 4}
    config.data.text.length = 76 + llava_shapes_stage1.VISUAL_TOKENS[variant]
    config.data.text.tokenizer = "file"
    config.data.text.path = f"{config.init_from}/tokenizer.json"
    config.objective.max_new_tokens = 12
    config.optimizer.lr = 2e-3
    if variant != "blind":
        config.optimizer.freeze = ("image/.*",)
    config.evals = {
        split: {
            "name": "answers",
            "every": 0,
            "batch_size": 250,
            "data": {
                "split": split,
                "options": {"image_size": llava_shapes_stage1.SIZE, "kinds": ASKED},
            },
            "beside": {"blind": f"{blind}/eval/{STEPS}/{split}/answers.jsonl"} if blind else {},
        }
        for split in ("test", "novel")
    }
    return config.lock()
