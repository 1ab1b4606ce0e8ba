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

Result, seed 0, exact match in per cent:

                  test                              novel
                   MLP resampl.    blind majority     MLP resampl.    blind majority
    follow-up     95.9     91.5     19.6     19.6    96.1     89.4     20.9     20.9
    digit         92.5     76.3     10.5     15.4    93.3     75.0     15.0     15.0
    place         90.3     86.0     19.4     19.4    89.8     79.1     20.1     20.1
    relation      76.2     74.5     25.1     26.8    78.8     78.0     25.4     26.9
    counting      76.1     72.0     45.1     40.5    80.8     76.3     50.6     32.7
    color         73.1     70.9     13.7     17.5    46.9     43.9      8.5     19.6
    comparison    58.4     56.1     36.4      4.5    47.5     48.4     31.4      9.4
    shape         31.5     25.6     15.5     21.4    12.0     14.1      7.6     19.3

Above the better of blind model and majority on `test`, MLP and resampler: counting 31 and 27
points, color 56 and 53, relation 49 and 48. Shapes are learnt least. Minutes of both stages on two
quiet cores with a cold compilation cache: MLP 4:09 + 5:17, resampler 4:46 + 4:30; MLP on a slower
machine 5:07 + 5:44, with counting 76.1, color 69.7, relation 77.0.
"""

from configs import llava_shapes_stage1
from flax_vlm.data.instructions import KINDS
from flax_vlm.data.questions import CAPTIONS

# about ten minutes together with the first stage on two CPU cores; the resampler's take longer
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
    answers = f"{blind}/eval/{STEPS['blind']}"
    config.evals = {
        split: {
            "name": "answers",
            "every": 0,
            "batch_size": 250,
            "data": {
                "split": split,
                "options": {"image_size": llava_shapes_stage1.SIZE, "kinds": ASKED},
            },
            "beside": {"blind": f"{answers}/{split}/answers.jsonl"} if blind else {},
        }
        for split in ("test", "novel")
    }
    return config.lock()
