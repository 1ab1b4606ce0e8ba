# SPDX-License-Identifier: Apache-2.0
"""LLaVA's first stage on the shapes world and the digits: captions.

    python train.py --config configs/llava_shapes_stage1.py --workdir runs/llava_stage1
    python train.py --config configs/llava_shapes_stage1.py:resampler --workdir runs/r_stage1

LLaVA starts from a CLIP and a language model and trains nothing but the connector here. Nothing is
pretrained in this repository, so the image encoder and the language model learn their trade from
the captions, too; configs/llava15_7b_stage1.py is the recipe of the paper. Of six captions four
list all things in any order, each followed by its place, so that the place has to be found by what
the thing is like; one counts colours and shapes; one reads a digit.

A patch lies in one of sixteen places. With the usual, small position embeddings what it shows
drowns where it lies, and which thing lies where is not learnt: "vit_small", the weight decay and
pixels in units of 0.3 keep the two of one size.

The argument chooses the connector: "mlp" (LLaVA-1.5) or "resampler" (Flamingo's Perceiver
Resampler with as many latents as there are patches); "blind" is the same recipe without images, for
comparison.

Result: see configs/llava_shapes_stage2.py, which goes on from here.
"""

from configs.defaults import defaults, sealed
from flax_vlm.data.instructions import KINDS
from flax_vlm.data.shapes_world import BACKGROUND

SIZE = 48  # pixels
PATCH = 12
VOCABULARY = 512
PATCHES = (SIZE // PATCH) ** 2
VISUAL_TOKENS = {"mlp": PATCHES, "resampler": PATCHES, "blind": 0}
CONNECTORS = {
    "mlp": {"name": "mlp"},
    "resampler": {
        "name": "resampler",
        "resampler": {
            "num_latents": VISUAL_TOKENS["resampler"],
            "depth": 1,
            "num_heads": 2,
            "head_dim": 48,
            "latent_std": 1.0,
            "query_gain": 4.0,  # few patches a head: broad means are sharpened too late
        },
    },
}


def get_config(variant: str = "mlp"):
    """Returns the recipe.

    Args:
        variant: a key of VISUAL_TOKENS.
    """
    config = defaults()
    config.steps = config.checkpoint.every = 1000
    config.batch_size = 32
    config.log_every = 50
    config.data.name = "instructions"
    captions = ("detail",) * 4 + ("inventory", "digit")
    config.data.options = {"image_size": SIZE, "kinds": captions, "turns": 1}
    config.data.rows = "conversations"
    config.data.chat.template = "short"
    config.data.chat.blind = variant == "blind"
    config.data.image_size = SIZE
    config.data.train_ops = ({"name": "resize", "size": SIZE},)
    config.data.eval_ops = ({"name": "resize", "size": SIZE},)
    config.data.text.length = 36 + VISUAL_TOKENS[variant]
    config.data.text.vocab_size = VOCABULARY
    # the second stage asks: its words get tokens, too
    config.data.text.options = {"kinds": KINDS, "turns": 2, "train_size": 4000}
    config.data.text.lower = False
    config.data.text.special = ("<image>",)
    decoder = {
        "vocab_size": VOCABULARY,
        "width": 96,
        "depth": 4,
        "mlp_dim": 256,
        "num_heads": 4,
        "length": 256,
        "qk_norm": True,  # attention gets sharp earlier
        "unroll": 4,
    }
    tower = {
        "width": 96,
        "depth": 3,
        "mlp_dim": 384,
        "num_heads": 4,
        "init_scheme": "vit_small",
        "unroll": 3,
    }
    config.model = {
        "name": "llava",
        "image": {"name": "vit", "image_size": SIZE, "patch_size": PATCH, "pool": "gap", **tower},
        "connector": CONNECTORS.get(variant, CONNECTORS["mlp"]),
        "language_model": decoder,
        "image_token_id": 2,  # behind <pad> and <eos>
        "feature_layer": tower["depth"],  # in front of the final norm, as transformers has it
    }
    if variant == "blind":
        config.model = {"name": "language_model", **decoder}
    config.objective = {
        "name": "next_token",
        "image_mean": tuple(level / 255 for level in BACKGROUND),  # empty patches are zero
        "image_std": (0.3, 0.3, 0.3),
        "stop_ids": (1,),
        "max_new_tokens": 32,
    }
    config.optimizer = {
        "name": "muon",
        "lr": 3e-3,
        "weight_decay": 0.5,
        "grad_clip": 1.0,
        "schedule": {"name": "warmup_cosine", "warmup": 0.05},
    }
    return sealed(config)
