# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVAs of transformers with every parameter random, and what they are asked."""

import functools
import tempfile

import numpy as np
import torch
import transformers as hf

from flax_vlm.convert.loading import load_pretrained
from tests.parity.reference import build_changed, pixels, randomise, save

IMAGE_TOKEN, VOCAB = 110, 120
GRIDS = [[28, 56], [56, 28], [56, 56]]


def clip(**fields):
    given = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return hf.CLIPVisionConfig(**{**given, "image_size": 28, "patch_size": 14, **fields})


def siglip(**fields):
    given = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
    return hf.SiglipVisionConfig(**{**given, "image_size": 28, "patch_size": 14, **fields})


def text(config, **fields):
    given = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    size = dict(vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=128)
    return config(**{**given, **ids, **size, **fields})


def llava(vision, decoder, **fields):
    config = hf.LlavaConfig(
        vision_config=vision, text_config=decoder, image_token_index=IMAGE_TOKEN, **fields
    )
    return hf.LlavaForConditionalGeneration(config)


def llava_next(vision, decoder):
    config = hf.LlavaNextConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=GRIDS,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def onevision(vision, decoder):
    config = hf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=GRIDS,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def idefics3(kind, decoder, scale=2, **vision):
    given = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
    tower = {**given, "image_size": 56, "patch_size": 14, **vision}
    config = getattr(hf, f"{kind}Config")(
        vision_config=tower, text_config=decoder, image_token_id=IMAGE_TOKEN, scale_factor=scale
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


CASES = {
    "llava": lambda: llava(clip(), text(hf.LlamaConfig)),
    "llava, odd grid, Mistral": lambda: llava(
        clip(image_size=42, hidden_size=24, num_attention_heads=3, layer_norm_eps=0.1),
        text(hf.MistralConfig, sliding_window=5, num_key_value_heads=1),
        projector_hidden_act="gelu_pytorch_tanh",
    ),
    "llava, class token kept, Gemma": lambda: llava(
        clip(),
        text(hf.GemmaConfig, head_dim=16),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "llava, SigLIP, Qwen2": lambda: llava(
        siglip(),
        text(hf.Qwen2Config),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "llava_next": lambda: llava_next(clip(), text(hf.LlamaConfig)),
    "llava_onevision": lambda: onevision(
        siglip(vision_use_head=False), text(hf.Qwen2Config, tie_word_embeddings=True)
    ),
    "idefics3": lambda: idefics3("Idefics3", text(hf.LlamaConfig)),
    "smolvlm, 3 x 3 patches a token": lambda: idefics3(
        "SmolVLM", text(hf.LlamaConfig, tie_word_embeddings=True), scale=3, image_size=84
    ),
}
TILED = ("llava_next", "llava_onevision")  # packed with newlines
WITH_TILES = (*TILED, "idefics3", "smolvlm, 3 x 3 patches a token")  # images have one axis more


@functools.cache
def case(name):
    """Returns (model, folder, what we load from it)."""
    torch.manual_seed(0)
    model = randomise(CASES[name]())
    folder = save(model, tempfile.mkdtemp())
    return model, folder, load_pretrained(folder)


def order(model, tiles, tokens):
    """Returns [n] int, which visual token stands where, by transformers' own packing."""
    numbers = torch.arange(tiles * tokens, dtype=torch.float32).reshape(tiles, tokens, 1)
    newline = torch.tensor([float(tiles * tokens)])
    sizes = torch.tensor([[56, 28]])
    given = [[numbers], sizes]
    if isinstance(model, hf.LlavaNextForConditionalGeneration):
        given.append("default")
    packed = model.model.pack_image_features(*given, image_newline=newline)[0][0]
    return packed[:, 0].long().numpy()


def inputs(name):
    """Returns (what transformers is called with, what ours is): a row with an image, and a shorter
    one without, padded on the left."""
    model, _, loaded = case(name)
    module = build_changed(loaded.spec)
    size, tokens = loaded.spec["image"]["image_size"], module.tokens_per_image
    tiles = 3 if name in TILED else 1  # a base and two
    numbers = order(model, tiles, tokens) if name in TILED else np.arange(tokens)
    rng = np.random.default_rng(5)
    words = rng.integers(3, 100, (2, 6))
    ids = np.zeros((2, 6 + len(numbers)), np.int64)
    ids[0] = [*words[0, :2], *[IMAGE_TOKEN] * len(numbers), *words[0, 2:]]
    ids[1, -4:] = words[1, 2:]
    mask = np.ones(ids.shape, bool)
    mask[1, :-4] = False
    image, tensor = pixels(tiles, size, size)
    theirs = dict(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask).long(),
        pixel_values=tensor[None] if name in WITH_TILES else tensor,
    )
    if name in TILED:
        theirs["image_sizes"] = torch.tensor([[56, 28]])
    images = np.stack([image, np.zeros_like(image)])  # [2, tiles, H, W, 3]
    index = np.zeros(ids.shape, np.int32)
    index[0, 2 : 2 + len(numbers)] = numbers
    ours = (ids.astype(np.int32), images, mask, index)
    return theirs, ours
