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

Result, seed 0, exact match in per cent (majority answer of the kind): digit 98.7 (15.4), color 66.7
(17.5), counting 76.1 (51.9), follow-up 55.6 (19.6), comparison 52.0 (4.5), place 48.1 (19.4),
relation 39.8 (26.8), shape 39.5 (21.4); on novel pairs digit 95.4, counting 75.5, follow-up 49.2,
color 46.9, place 40.2, relation 38.3, comparison 37.7, shape 11.7. Counting is 24 above the
majority, colour 49, relation 13. About half of the places and relations are those of a thing chosen
at random: that a question names one is hardly learnt. 8.6 minutes for the first stage and 10.1 for
this one on one core beside other work; on two quiet cores they were not timed. Neither the
resampler nor the blind model was run.
"""

from configs import llava_shapes_stage1
from flax_vlm.data.instructions import KINDS

STEPS = 1100
# captions were the first stage's
ASKED = tuple(kind for kind in KINDS if kind not in ("description", "detail"))
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
    config.data.options = {"image_size": llava_shapes_stage1.SIZE, "kinds": ASKED}
    config.data.text.length = 104
    config.data.text.tokenizer = "file"
    config.data.text.path = f"{config.init_from}/tokenizer.json"
    config.objective.max_new_tokens = 12
    if variant != "blind":
        config.optimizer.freeze = ("image/.*",)
    config.evals = {
        split: {
            "name": "answers",
            "every": 0,
            "batch_size": 250,
            "data": {"name": "instructions", "split": split},
            "beside": {"blind": f"{blind}/eval/{STEPS}/{split}/answers.jsonl"} if blind else {},
        }
        for split in ("test", "novel")
    }
    return config.lock()
