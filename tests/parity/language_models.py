# SPDX-License-Identifier: Apache-2.0
"""Tiny language models of transformers, their inputs and their outputs."""

import functools
import json
import tempfile

import numpy as np
import torch
import transformers as hf
from safetensors.torch import save_file

from flax_vlm.convert.loading import load_pretrained
from tests.parity.reference import randomise, save

VOCAB = 43
# epsilon 0.1: a wrong one would not be seen at its real size
SIZE = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=0.1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
QWEN_WINDOW = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
CAPS = dict(attn_logit_softcapping=1.5, final_logit_softcapping=8.0, query_pre_attn_scalar=7)
# heads of queries per head of keys: 1, 2, 4; with and without a head width of its own
CASES = {
    "llama": ("Llama", dict(num_key_value_heads=4)),
    "llama with biases": (
        "Llama",
        dict(num_key_value_heads=2, head_dim=10, attention_bias=True, mlp_bias=True),
    ),
    "mistral": ("Mistral", dict(num_key_value_heads=1, sliding_window=3)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True, **QWEN_WINDOW)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=10)),
    "gemma": ("Gemma", dict(num_key_value_heads=1, head_dim=10)),
    "gemma2": (
        "Gemma2",
        dict(num_key_value_heads=2, head_dim=10, num_hidden_layers=3, sliding_window=3, **CAPS),
    ),
}
THETA = 100.0  # turns enough within ten tokens for a wrong one to be seen


def make(kind, **config):
    """Returns a random model, its attention written out."""
    theta = {"rope_type": "default", "rope_theta": THETA}
    settings = {"rope_parameters": theta, **SIZE, **config}
    config = getattr(hf, f"{kind}Config")(**settings, attn_implementation="eager")
    return randomise(getattr(hf, f"{kind}ForCausalLM")(config))


@functools.cache
def case(name):
    """Returns (model, folder it is saved in, what load_pretrained makes of it)."""
    kind, config = CASES[name]
    model = make(kind, **config)
    folder = save(model, tempfile.mkdtemp())
    return model, folder, load_pretrained(folder)


def inputs(seed=3, rows=3, length=8):
    """Returns ids [B, S] and mask: a whole row, one padded on the left, one on the right."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), bool)
    mask[1, :3] = False
    mask[2, 5:] = False
    return np.where(mask, ids, 0), mask


def reference(model, ids, mask):
    """Returns the logits of transformers as a tensor with a graph."""
    mask = torch.from_numpy(mask).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = torch.from_numpy(np.asarray(ids)).long()
    return model(ids, attention_mask=mask, position_ids=positions).logits


def gradients(model, folder, loss):
    """Returns the gradient of every parameter in our names, through our own loader."""
    model.zero_grad()
    loss.backward()
    tensors = {name: p.grad.contiguous() for name, p in model.named_parameters()}
    target = tempfile.mkdtemp()
    save_file(tensors, f"{target}/model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    with open(f"{target}/config.json", "w") as file:
        json.dump(config, file)
    return load_pretrained(target).params
