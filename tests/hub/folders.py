# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoint folders in the Hugging Face format, every parameter random; no torch."""

import json

import jax
import numpy as np

from flax_vlm import trees
from flax_vlm.build import build
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.saving import save_pretrained
from flax_vlm.data.hf_tokenizers import TextRecipe
from flax_vlm.data.text import train_bpe
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes

TOWER = {"width": 24, "depth": 2, "mlp_dim": 96, "num_heads": 6}
IMAGE = {"image_size": 30, "patch_size": 10, **TOWER}
WORDS = [f"a photo of the {word}, number 12" for word in "zero one two cat dog".split()]
TOKENIZER = train_bpe(WORDS, vocab_size=300, lower=True, multiple=1)
TEXT = {"name": "text_encoder", "vocab_size": 300, "length": 36, **TOWER}

SPECS = {
    "siglip": {"name": "siglip", "image": {"name": "vit", **IMAGE}, "text": TEXT},
    "siglip2": {"name": "siglip", "image": {"name": "naflex_vit", **IMAGE}, "text": TEXT},
    "clip": {
        "name": "clip",
        "image": {"name": "vit", **IMAGE},
        "text": {**TEXT, "eos_id": 1},
        "embed_dim": 14,
    },
    "vit": {"name": "vit", "activation": "gelu_erf", "norm_eps": 1e-12, "num_classes": 12, **IMAGE},
    "dinov2_with_registers": {
        "name": "vit",
        "activation": "gelu_erf",
        "layer_scale": 1.0,
        "num_registers": 4,
        "mask_token": True,
        **IMAGE,
    },
}
EVA = dict(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=[24, 16])
OTHER = {  # formats of other libraries, and towers without processors of their own
    "timm": dict(architecture="eva02_base_patch16_clip_224", num_classes=6, model_args=EVA),
    "blip_2_vision_model": dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=30, patch_size=10,
    ),
}  # fmt: skip
CLASSES = ("zero", "one", "cat", *(f"class {i}" for i in range(3, 12)))
LABELS = {"id2label": {str(i): name for i, name in enumerate(CLASSES)}}


def random_params(spec, seed=0):
    """Returns parameters whose every leaf is random, of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith(("scale", "scale1", "scale2")):
            return np.float32(1) + np.float32(0.2) * noise
        fan_in = np.prod(leaf.shape[int(trees.is_scanned(path)) : -1]) if leaf.ndim > 1 else 25
        size = 0.5 if "positions" in path or "embedding" in path else fan_in**-0.5
        return noise * np.float32(size)

    return trees.map_with_path(draw, parameter_shapes(build(MODELS, spec, "model")))


def write_folder(folder, family, *, preprocessor=None, tokenizer=True):
    """Writes a checkpoint and returns (folder, parameters)."""
    spec = SPECS[family] if family in SPECS else FAMILIES[family].read(OTHER[family], {})
    params = random_params(spec)
    extra = LABELS if family == "vit" else {}
    params = jax.tree.map(np.asarray, params)
    save_pretrained(folder, spec, params, model_type=family, extra_config=extra)
    if "text" in spec and tokenizer:
        TextRecipe(TOKENIZER, length=32, uses_mask=family == "clip").save(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder, params
