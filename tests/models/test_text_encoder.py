# SPDX-License-Identifier: Apache-2.0
"""The text encoder against a float64 oracle, and what padding does to it in SigLIP and in CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.models.text_encoder import build_text_encoder
from tests.nn import oracle

SIZE = dict(vocab_size=23, length=7, width=12, depth=2, mlp_dim=20, num_heads=3)
EOS = 2
TEXT = jnp.array([[5, 9, 4, EOS, 1, 1, 1], [8, 3, EOS, 1, 1, 1, 1], [7, 22, 6, 4, 9, 8, EOS]])
MASK = jnp.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool)

SIGLIP = dict(embed_dim=5)
CLIP = dict(
    embed_dim=5,
    head_bias=False,
    pool="eos",
    eos_id=EOS,
    is_causal=True,
    activation="quick_gelu",
    norm_eps=0.1,
    init_scheme="clip_text",
)
DIALECTS = {
    "siglip": SIGLIP,
    "clip": CLIP,
    "largest id": {**CLIP, "eos_id": None},
    "no head": {},
    "masked": {**SIGLIP, "mask_padding": True},
    "masked and causal": {**CLIP, "mask_padding": True, "pool": "last"},
}


def reference(model, p, text, text_mask):
    text, text_mask = np.asarray(text), np.asarray(text_mask)
    x = p["embedding"]["embedding"][text] + p["positions"][: text.shape[1]]
    mask = text_mask[:, None, None, :] if model.mask_padding else None
    tokens = oracle.encoder(
        p["encoder"], x, model.activation, model.norm_eps, mask, model.is_causal
    )
    if model.pooling == "last":
        index = text_mask.sum(1) - 1 if model.mask_padding else np.full(3, text.shape[1] - 1)
    elif model.eos_id is None:
        index = text.argmax(1)
    else:
        index = np.array([list(row).index(model.eos_id) for row in text])
    pooled = tokens[np.arange(3), index]
    if "head" in p:
        pooled = pooled @ p["head"]["kernel"] + p["head"].get("bias", 0.0)
    return tokens, pooled


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_every_dialect_equals_the_float64_oracle(dialect):
    model = build_text_encoder(**SIZE, **DIALECTS[dialect])
    params = oracle.random_params(model, TEXT, MASK, scale=0.4)
    tokens, pooled = reference(model, oracle.f64(params), TEXT, MASK)
    out = oracle.apply(model, params, TEXT, MASK)
    oracle.assert_close(out.tokens, tokens)
    oracle.assert_close(out.pooled, pooled)


def pooled_before_and_after(fields, changed_text, mask=None):
    model = build_text_encoder(**SIZE, **fields)
    params = oracle.random_params(model, TEXT, MASK, scale=0.4)
    run = lambda text: np.asarray(oracle.apply(model, params, text, mask).pooled)  # noqa: E731
    return run(TEXT), run(changed_text)


OTHER_PADDING = TEXT.at[0, 5].set(17).at[1, 3].set(EOS)


def test_tokens_after_the_end_of_the_text_change_nothing_in_clip():
    before, after = pooled_before_and_after(CLIP, OTHER_PADDING)
    np.testing.assert_array_equal(before, after)


def test_padding_is_attended_to_in_siglip_by_design():
    before, after = pooled_before_and_after(SIGLIP, OTHER_PADDING)
    assert (np.abs(before - after)[:2].max(1) > 1e-3).all()
    np.testing.assert_array_equal(before[2], after[2])


def test_hidden_padding_changes_nothing():
    fields = {**SIGLIP, "mask_padding": True}
    before, after = pooled_before_and_after(fields, OTHER_PADDING, MASK)
    np.testing.assert_array_equal(before, after)


def test_a_causal_text_shorter_than_the_context_gives_the_same_embedding():
    before, after = pooled_before_and_after(CLIP, TEXT[:, :4].at[2, 3].set(EOS))
    oracle.assert_close(before[:2], after[:2])


def test_texts_longer_than_the_context_and_missing_masks_are_errors():
    model = build_text_encoder(**SIZE)
    with pytest.raises(ValueError, match="must fit the context of 7 tokens, got 9; truncate it"):
        model.init(jax.random.key(0), jnp.zeros((2, 9), jnp.int32))
    with pytest.raises(ValueError, match="mask_padding needs a text_mask"):
        build_text_encoder(**SIZE, mask_padding=True).init(jax.random.key(0), TEXT)
    with pytest.raises(ValueError, match="unknown pooling 'cls', choose one of"):
        build_text_encoder(**SIZE, pool="cls").init(jax.random.key(0), TEXT)
    with pytest.raises(ValueError, match="unknown variant 'B/16', choose one of"):
        build_text_encoder("B/16", vocab_size=5, length=3)
    with pytest.raises(ValueError, match=r"unknown key \['vocab'\]"):
        build_text_encoder("B", vocab=5, length=3)
