# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers with every parameter random, and how ours are held against them.

torch and transformers belong to the test extra: where they are absent these tests fail, they do not
skip."""

import pathlib
import re

import jax
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from flax_vlm.build import build
from flax_vlm.convert.loading import load_pretrained
from flax_vlm.models import MODELS

TOLERANCE = 2e-5  # times max(1, |reference|)


def randomise(model, seed=0):
    """Returns the model in eval mode, every parameter drawn anew (biases, norms, gates too)."""
    generator = torch.Generator().manual_seed(seed)
    # Gemma stores its scales as their distance from one; scales near two make tokens so large that
    # the rounding of two correct programs differs by the tolerance
    from_one = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if re.fullmatch(r"Gemma\d*RMSNorm", type(module).__name__)
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim <= 1:
                is_scale = name.endswith(("weight", "lambda1")) and name not in from_one
                p.copy_((1.0 if is_scale else 0.0) + 0.2 * noise)
            elif any(word in name for word in ("embed", "token", "probe")):
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * p[0].numel() ** -0.5)
    return model.eval()


def save(model, folder):
    model.save_pretrained(folder)
    return pathlib.Path(folder)


def load(folder, **changes):
    """Returns (module, variables, spec) of a folder; `changes` replace fields of the spec, "a.b" in
    a tower."""
    loaded = load_pretrained(folder)
    return (build_changed(loaded.spec, **changes), {"params": loaded.params}, loaded.spec)


def build_changed(spec, **changes):
    spec = {k: dict(v) if isinstance(v, dict) else v for k, v in spec.items()}
    for path, value in changes.items():
        *tower, field = path.split("__")
        (spec[tower[0]] if tower else spec)[field] = value
    return build(MODELS, spec, "model")


def apply(module, variables, *inputs, **kwargs):
    """Returns the outputs of a module as NumPy arrays."""
    function = jax.jit(lambda v, *x: module.apply(v, *x, **kwargs))
    return jax.tree.map(np.asarray, function(variables, *inputs))


def pixels(batch, height, width, seed=1):
    """Returns images [B, H, W, 3] float32, and the same as a torch tensor [B, 3, H, W]."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((batch, height, width, 3)).astype(np.float32)
    return image, torch.from_numpy(image.transpose(0, 3, 1, 2).copy())


def everything(model, image, ids):
    """Method of a two-tower model that computes all there is to compare in one program."""
    return model(image, ids), model.image_tokens(image)


def error(ours, reference):
    """Returns the largest difference, in units of max(1, |reference|)."""
    reference = reference.detach().numpy() if isinstance(reference, torch.Tensor) else reference
    ours = np.asarray(ours)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float((np.abs(ours - reference) / np.maximum(1.0, np.abs(reference))).max())


def relative_error(ours, reference):
    """Returns the largest difference, in units of the largest reference."""
    reference = reference.detach().numpy()
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())


def swapped(folder, *pairs):
    """Exchanges tensors in a folder: names where one part is replaced by another."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for a, b in pairs:
        for name in [n for n in tensors if a in n]:
            other = name.replace(a, b)
            tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
