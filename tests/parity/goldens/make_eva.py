# SPDX-License-Identifier: Apache-2.0
"""Makes eva.npz, tiny EVA towers of timm and a tiny EVA-02-CLIP of open_clip with their numbers,
and eva_shapes.json, the names and shapes of the full-size ones.

Run by hand where timm 1.0.31 and open_clip_torch 3.3.0 are installed, which the test extra leaves
out: `python tests/parity/goldens/make_eva.py`. Every parameter is random. A model's tensors are one
float16 vector: a file for each would be mostly headers.
"""

import json
import pathlib
import re

import numpy as np
import open_clip
import timm
import torch
from timm.models import register_model

FOLDER = pathlib.Path(__file__).parent
SIZES = dict(embed_dim=24, depth=2, num_heads=3, patch_size=4, img_size=(20, 12))
TINY = dict(embed_dim=8, depth=2, num_heads=2, patch_size=4, img_size=12)
TOWERS = {
    "eva02": ("eva02_base_patch16_clip_224", dict(SIZES, num_classes=6)),
    "eva01": ("eva_giant_patch14_clip_224", dict(SIZES, num_classes=0, mlp_ratio=2.5)),
}
OFFSET = 300.0  # on the positions, in the offset test


@register_model
def eva02_tiny_test(pretrained=False, **kwargs):
    """A tower that open_clip can build by its name."""
    return timm.create_model("eva02_base_patch16_clip_224", **{**TINY, **kwargs})


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim <= 1:
                p.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
            elif any(word in name for word in ("embed", "token")):
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * p[0].numel() ** -0.5)
    return model.eval()


def rounded(key, model):
    """Returns what is stored of a model, whose parameters become the float16 that are stored."""
    tensors = {name: t.half() for name, t in model.state_dict().items()}
    model.load_state_dict({name: t.float() for name, t in tensors.items()})
    names = json.dumps({name: list(t.shape) for name, t in tensors.items()})
    values = np.concatenate([t.numpy().ravel() for t in tensors.values()])
    return {f"{key}/names": np.array(names), f"{key}/values": values}


@torch.no_grad()
def numbers():
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 3, 20, 12)).astype(np.float16)
    square = rng.standard_normal((2, 3, 12, 12)).astype(np.float16)
    text = np.array([[47, 5, 6, 49, 0, 0], [47, 3, 9, 8, 7, 49]])
    arrays = dict(image=image, square=square, text=text.astype(np.int32))
    x = torch.from_numpy(image).float()
    for key, (name, kwargs) in TOWERS.items():
        model = randomise(timm.create_model(name, **kwargs))
        arrays |= rounded(key, model)
        arrays[f"{key}:tokens"] = model.forward_features(x).numpy()
        arrays[f"{key}:pooled"] = model(x).numpy()
        model.pos_embed.add_(OFFSET)
        arrays[f"{key}:offset"] = model.forward_features(x).numpy()
    vision = dict(image_size=12, timm_model_name="eva02_tiny_test", timm_pool="token")
    config = dict(context_length=6, vocab_size=50, width=8, heads=2, layers=2)
    model = randomise(open_clip.CustomTextCLIP(10, {**vision, "timm_proj": None}, config), seed=1)
    arrays |= rounded("open_clip", model)
    found = model(torch.from_numpy(square).float(), torch.from_numpy(text))
    for name, value in zip(("image", "text", "scale"), found, strict=True):
        arrays[f"open_clip:{name}"] = value.numpy()
    np.savez_compressed(FOLDER / "eva.npz", **arrays)


def shapes(model):
    """Returns {name with {layer}: shape}; every layer has the same."""
    found = {}
    for name, t in model.state_dict().items():
        name = re.sub(r"blocks\.\d+\.", "blocks.{layer}.", name)
        assert found.setdefault(name, list(t.shape)) == list(t.shape)
    return found


def full_size():
    result = {}
    with torch.device("meta"):
        for name in ("EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336"):
            config = open_clip.get_model_config(name)
            config.pop("custom_text")
            result[name] = dict(model_cfg=dict(config)), open_clip.CustomTextCLIP(**config)
        name = "eva_giant_patch14_clip_224"
        config = dict(architecture=name, num_classes=1024)
        result[name] = config, timm.create_model(name, num_classes=1024)
    stored = {
        name: dict(
            config=config,
            parameters=sum(p.numel() for p in model.parameters()),
            tensors=len(model.state_dict()),
            shapes=shapes(model),
        )
        for name, (config, model) in result.items()
    }
    (FOLDER / "eva_shapes.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    numbers()
    full_size()
