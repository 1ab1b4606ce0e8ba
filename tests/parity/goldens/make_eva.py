# SPDX-License-Identifier: Apache-2.0
"""Makes eva.npz: tiny EVA towers of timm and a tiny EVA-02-CLIP of open_clip, and their numbers.

Run by hand where timm 1.0.31 and open_clip_torch 3.3.0 are installed, which the test extra leaves
out: `python tests/parity/goldens/make_eva.py`. Every parameter is random.
"""

import pathlib

import numpy as np
import open_clip
import timm
import torch
from timm.models import eva, register_model

SIZES = dict(embed_dim=16, depth=2, num_heads=2, patch_size=4)
TINY = dict(embed_dim=8, depth=2, num_heads=2, patch_size=4, img_size=12)


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


def half(tensors):
    """Rounds to float16 and stores as such, which keeps the file small; the model gets the same."""
    return {name: t.half().numpy() for name, t in tensors.items()}


@torch.no_grad()
def main():
    assert hasattr(eva, "Eva")
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 3, 24, 16)).astype(np.float16)
    square = rng.standard_normal((2, 3, 12, 12)).astype(np.float16)
    text = np.array([[47, 5, 6, 49, 0, 0], [47, 3, 9, 8, 7, 49]])
    arrays = dict(image=image, square=square, text=text.astype(np.int32))
    towers = {
        "eva02": ("eva02_base_patch16_clip_224", dict(SIZES, num_classes=6)),
        "eva01": ("eva_giant_patch14_clip_224", dict(SIZES, num_classes=0, mlp_ratio=2.5)),
    }
    for key, (name, kwargs) in towers.items():
        model = randomise(timm.create_model(name, img_size=(24, 16), **kwargs))
        tensors = half(model.state_dict())
        model.load_state_dict({n: torch.from_numpy(t).float() for n, t in tensors.items()})
        arrays |= {f"{key}/{n}": t for n, t in tensors.items()}
        x = torch.from_numpy(image).float()
        arrays[f"{key}:tokens"] = model.forward_features(x).numpy()
        arrays[f"{key}:pooled"] = model(x).numpy()
    vision = dict(image_size=12, timm_model_name="eva02_tiny_test", timm_pool="token")
    config = dict(context_length=6, vocab_size=50, width=8, heads=2, layers=2)
    model = randomise(open_clip.CustomTextCLIP(10, {**vision, "timm_proj": None}, config), seed=1)
    tensors = half(model.state_dict())
    model.load_state_dict({n: torch.from_numpy(t).float() for n, t in tensors.items()})
    arrays |= {f"open_clip/{n}": t for n, t in tensors.items()}
    image_embedding, text_embedding, scale = model(
        torch.from_numpy(square).float(), torch.from_numpy(text)
    )
    arrays["open_clip:image"] = image_embedding.numpy()
    arrays["open_clip:text"] = text_embedding.numpy()
    arrays["open_clip:scale"] = scale.numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("eva.npz"), **arrays)


if __name__ == "__main__":
    main()
