# SPDX-License-Identifier: Apache-2.0
"""What all recipes share: every key, with the value that means "as usual"."""

from __future__ import annotations

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    """Returns a config with every key that a recipe may set."""
    return ConfigDict(
        {
            "seed": 0,  # of initialisation, data order, augmentation and dropout
            "steps": 1000,  # optimizer steps
            "batch_size": 256,  # global, in examples
            "micro_batches": 1,  # accumulation; a gradient cache for contrastive objectives
            "ema_decay": 0.0,  # of the parameters that are evaluated; 0 = off
            "nonfinite": "stop",  # or "skip": leave steps with a NaN out
            "log_every": 10,
            "init_from": "",  # start from a workdir, a Hugging Face folder or a hub id
            "init": {  # how they fit, flax_vlm/start/plan.py; every mismatch is an error
                # (there, here) pairs: the source's branch "image" is this model's "" (all of it)
                "subtrees": (("", ""),),
                "fresh": (),  # regexes of paths here that stay random, such as a new head
                "unused": (),  # regexes of paths there that are left out
                "resize_positions": "",  # nn/positions.py, RESIZE_METHODS; "" = same grid
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "rules": ()},  # -1 = all other devices
            "checkpoint": {"every": 1000, "keep": 2, "keep_every": 0},
            "data": {
                "name": "",  # digits, shapes, tfds:NAME, folder:PATH, ...; flax_vlm/data, DATASETS
                "rows": "captions",  # what an example becomes: captions, conversations, packed
                # conversations: data/chat_templates.py, or "checkpoint" for that of data.text.path;
                # images per row; leave images out
                "chat": {"template": "vicuna_v1", "num_images": 1, "blind": False},
                "split": "train",
                "dir": "",  # where datasets lie; "" = $FLAX_VLM_DATA_DIR or the user's cache
                "options": ConfigDict(),  # arguments of the source, e.g. names of columns
                "workers": 0,  # processes that decode; 0 = threads of this one
                "image_size": 224,  # pixels, or (height, width)
                "train_ops": (),  # image operations, data/images.py
                "eval_ops": (),
                "max_broken_share": 0.01,  # of images that may be unreadable before the run stops
                "text": {
                    "tokenizer": "bpe",  # bpe, byte; file, pretrained or chat, with a path
                    "path": "",
                    "options": ConfigDict(),  # where bpe is trained on another choice of the source
                    "vocab_size": 512,
                    "length": 64,
                    "lower": True,
                    "bos": False,
                    "special": (),  # further tokens that no text is cut into, "<image>"
                },
            },
            "model": ConfigDict(),  # name and arguments, flax_vlm/models
            "objective": ConfigDict(),  # name and arguments, flax_vlm/objectives
            "optimizer": ConfigDict(),  # name, lr, rules, flax_vlm/training/optimizers.py
            # {"rules": ((regex of kernels, rank), ...), "alpha": 16.0, "train": (regex, ...)}:
            # adapters and what `train` matches are trained, all else is frozen; {} = off
            "lora": ConfigDict(),
            "evals": ConfigDict(),  # name -> {name, data, every, ...}, flax_vlm/evaluation
            "profile": {"first": 0, "last": 0},  # steps to trace; 0, 0 = none
            "wandb": ConfigDict(),  # arguments of wandb.init; empty = off
        }
    )


def sealed(config: ConfigDict) -> ConfigDict:
    """Returns the config locked: from here on a new key is an error."""
    return config.lock()
