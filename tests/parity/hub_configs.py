# SPDX-License-Identifier: Apache-2.0
"""The configs of real checkpoints, as far as they set shapes, and their published sizes.

Typed from the models' known architectures, partial as a hub's config.json is where class defaults
agree; they are not the hub's files. Counts and numbers of tensors: transformers on torch's meta
device, 5.23 or 5.24. EVA-02 is in goldens/eva_shapes.json.
"""

BASE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
SO400M = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16
)
G_OPT = dict(hidden_size=1536, intermediate_size=6144, num_hidden_layers=40, num_attention_heads=16)
LABELS = {str(i): f"LABEL_{i}" for i in range(1000)}


def _clip(vision, text, projection):
    return dict(
        model_type="clip",
        projection_dim=projection,
        vision_config=dict(vision, projection_dim=projection),
        text_config=dict(text, projection_dim=projection, eos_token_id=2),
    )


def _siglip(vision, text):
    return dict(model_type="siglip", vision_config=vision, text_config=text)


def _dino(width, depth, heads, **more):
    return dict(
        model_type="dinov2",
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=518,
        patch_size=14,
        **more,
    )


CLIP_LARGE_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
GEMMA = 256_000

# hub id: (class of transformers, config.json, parameters, tensors)
HUB = {
    "google/vit-base-patch16-224": (
        "ViTForImageClassification",
        dict(model_type="vit", id2label=LABELS),
        86_567_656,
        200,
    ),
    "google/vit-base-patch16-224-in21k": ("ViTModel", dict(model_type="vit"), 86_389_248, 200),
    "google/vit-large-patch16-224": (
        "ViTForImageClassification",
        dict(model_type="vit", id2label=LABELS, **LARGE),
        304_326_632,
        392,
    ),
    "openai/clip-vit-base-patch32": ("CLIPModel", _clip({}, {}, 512), 151_277_313, 398),
    "openai/clip-vit-base-patch16": (
        "CLIPModel",
        _clip(dict(patch_size=16), {}, 512),
        149_620_737,
        398,
    ),
    "openai/clip-vit-large-patch14": (
        "CLIPModel",
        _clip(dict(patch_size=14, **LARGE), CLIP_LARGE_TEXT, 768),
        427_616_513,
        590,
    ),
    "openai/clip-vit-large-patch14-336": (
        "CLIPModel",
        _clip(dict(patch_size=14, image_size=336, **LARGE), CLIP_LARGE_TEXT, 768),
        427_944_193,
        590,
    ),
    "google/siglip-base-patch16-224": ("SiglipModel", _siglip({}, {}), 203_155_970, 408),
    "google/siglip-base-patch16-256": (
        "SiglipModel",
        _siglip(dict(image_size=256), {}),
        203_202_050,
        408,
    ),
    "google/siglip-base-patch16-512": (
        "SiglipModel",
        _siglip(dict(image_size=512), {}),
        203_791_874,
        408,
    ),
    "google/siglip-large-patch16-256": (
        "SiglipModel",
        _siglip(dict(image_size=256, **LARGE), LARGE),
        652_150_786,
        792,
    ),
    "google/siglip-large-patch16-384": (
        "SiglipModel",
        _siglip(dict(image_size=384, **LARGE), LARGE),
        652_478_466,
        792,
    ),
    "google/siglip-so400m-patch14-384": (
        "SiglipModel",
        _siglip(dict(image_size=384, patch_size=14, **SO400M), SO400M),
        877_960_498,
        888,
    ),
    "google/siglip2-base-patch16-224": (
        "SiglipModel",
        _siglip({}, dict(vocab_size=GEMMA)),
        375_187_970,
        408,
    ),
    "google/siglip2-large-patch16-256": (
        "SiglipModel",
        _siglip(dict(image_size=256, **LARGE), dict(vocab_size=GEMMA, **LARGE)),
        881_526_786,
        792,
    ),
    "google/siglip2-so400m-patch14-384": (
        "SiglipModel",
        _siglip(dict(image_size=384, patch_size=14, **SO400M), dict(vocab_size=GEMMA, **SO400M)),
        1_136_008_498,
        888,
    ),
    "google/siglip2-so400m-patch16-256": (
        "SiglipModel",
        _siglip(dict(image_size=256, **SO400M), dict(vocab_size=GEMMA, **SO400M)),
        1_135_670_962,
        888,
    ),
    "google/siglip2-so400m-patch16-512": (
        "SiglipModel",
        _siglip(dict(image_size=512, **SO400M), dict(vocab_size=GEMMA, **SO400M)),
        1_136_555_698,
        888,
    ),
    "google/siglip2-giant-opt-patch16-384": (
        "SiglipModel",
        _siglip(
            dict(image_size=384, **G_OPT), dict(vocab_size=GEMMA, projection_size=1536, **SO400M)
        ),
        1_871_885_426,
        1096,
    ),
    "google/siglip2-base-patch16-naflex": (
        "Siglip2Model",
        dict(model_type="siglip2", vision_config={}, text_config=dict(vocab_size=GEMMA)),
        375_234_050,
        408,
    ),
    "facebook/dinov2-small": ("Dinov2Model", _dino(384, 12, 6), 22_056_576, 223),
    "facebook/dinov2-base": ("Dinov2Model", _dino(768, 12, 12), 86_580_480, 223),
    "facebook/dinov2-large": ("Dinov2Model", _dino(1024, 24, 16), 304_368_640, 439),
    "facebook/dinov2-giant": (
        "Dinov2Model",
        _dino(1536, 40, 24, use_swiglu_ffn=True),
        1_136_480_768,
        727,  # in files; 807 in memory, where gate and input of the SwiGLU are apart
    ),
    "facebook/dinov2-with-registers-base": (
        "Dinov2WithRegistersModel",
        {**_dino(768, 12, 12), "model_type": "dinov2_with_registers"},
        86_583_552,
        224,
    ),
    "facebook/dinov2-with-registers-large": (
        "Dinov2WithRegistersModel",
        {**_dino(1024, 24, 16), "model_type": "dinov2_with_registers"},
        304_372_736,
        440,
    ),
}
