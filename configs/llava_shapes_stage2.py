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

Result, seed 0, exact match in per cent on `test`:

    MLP        follow-up 95.9, digit 92.5, place 90.3, relation 76.2, counting 76.1, color 73.1,
        comparison 58.4, shape 31.5
    resampler  follow-up 91.5, digit 76.3, place 86.0, relation 74.5, counting 72.0, color 70.9,
        comparison 56.1, shape 25.6
    blind model and majority answer  follow-up 19.6 and 19.6, digit 10.5 and 15.4, place 19.4 and
        19.4, relation 25.1 and 26.8, counting 45.1 and 40.5, color 13.7 and 17.5, comparison 36.4
        and 4.5, shape 15.5 and 21.4

and on `novel`:

    MLP        follow-up 96.1, digit 93.3, place 89.8, relation 78.8, counting 80.8, color 46.9,
        comparison 47.5, shape 12.0
    resampler  follow-up 89.4, digit 75.0, place 79.1, relation 78.0, counting 76.3, color 43.9,
        comparison 48.4, shape 14.1
    blind model and majority answer  follow-up 20.9 and 20.9, digit 15.0 and 15.0, place 20.1 and
        20.1, relation 25.4 and 26.9, counting 50.6 and 32.7, color 8.5 and 19.6, comparison 31.4
        and 9.4, shape 7.6 and 19.3

Above the better of blind model and majority on `test`, MLP and resampler: counting 31 and 27
points, color 56 and 53, relation 49 and 48. Shapes are learnt least. Both stages took 9:26 minutes
(MLP) and 9:16 (resampler) on two quiet cores with a cold compilation cache.
"""

from configs import llava_shapes_stage1
from flax_vlm.data.instructions import KINDS
from flax_vlm.data.questions import CAPTIONS

# together with the first stage under ten minutes on two CPU cores; the resampler's take longer
STEPS = {"mlp": 800, "resampler": 600, "blind": 800}
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
    config.steps = config.checkpoint.every = STEPS[variant]
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
            "beside": {"blind": f"{blind}/eval/{STEPS['blind']}/{split}/answers.jsonl"}
            if blind
            else {},
        }
        for split in ("test", "novel")
    }
    return config.lock()
