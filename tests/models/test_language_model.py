# SPDX-License-Identifier: Apache-2.0
"""The language model: padding, packing, embeddings, windows, int8 weights, its split over a mesh.

What it computes is held against transformers in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_vlm.models.generate import read_prefix, start
from flax_vlm.models.language_model import build_language_model
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.models.prompts import Prompt
from flax_vlm.models.quantization import quantize
from flax_vlm.nn.int8 import dequantize
from flax_vlm.training import sharding
from flax_vlm.trees import num_bytes
from tests.nn import oracle

# every field that changes what is computed
SIZE = dict(
    vocab_size=29,
    width=16,
    depth=3,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    window=3,
    window_pattern="sf",
    post_norms=True,
    norm_plus_one=True,
    qk_norm=True,
    qkv_bias="qkv",
    attention_cap=4.0,
    logit_cap=3.0,
    embedding_scale=True,
)
RNG = np.random.default_rng(0)
TEXT = RNG.integers(1, 29, (2, 6)).astype(np.int32)


def make(**fields):
    model = build_language_model(**{**SIZE, **fields})
    return model, oracle.randomize(parameter_shapes(model), scale=0.4)


MODEL, PARAMS = make()


def run(model, params, text=None, mask=None, **options):
    function = jax.jit(lambda p, *x, **o: model.apply({"params": p}, *x, **o))
    return function(params, text, mask, **options)


def test_padding_on_either_side_changes_no_real_token():
    whole = run(MODEL, PARAMS, TEXT[:, :4]).logits
    for left in (0, 1, 2):
        text = np.full((2, 6), 7, np.int32)
        mask = np.zeros((2, 6), bool)
        text[:, left : left + 4], mask[:, left : left + 4] = TEXT[:, :4], True
        padded = run(MODEL, PARAMS, text, mask).logits[:, left : left + 4]
        oracle.assert_close(padded, whole)


def test_a_token_changes_only_those_that_see_it():
    changed = TEXT.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 29
    before, after = (run(MODEL, PARAMS, text).logits for text in (TEXT, changed))
    gap = np.abs(np.asarray(before - after)).max(axis=(0, 2))
    assert (gap[:2] == 0).all() and (gap[2:] > 1e-4).all()
    windows = dict(window_pattern="s", depth=1, window=2)
    narrow, params = make(**windows)
    before, after = (run(narrow, params, text).logits for text in (TEXT, changed))
    gap = np.abs(np.asarray(before - after)).max(axis=(0, 2))
    assert (gap[[0, 1, 4, 5]] == 0).all() and (gap[2:4] > 1e-4).all()


def test_packed_texts_do_not_see_each_other():
    packed = np.concatenate([TEXT[:1, :4], TEXT[1:, :5]], axis=1)  # [1, 9]
    segments = np.array([[0] * 4 + [1] * 5], np.int32)
    positions = np.array([[*range(4), *range(5)]], np.int32)
    out = run(MODEL, PARAMS, packed, segments=segments, positions=positions).logits
    oracle.assert_close(out[:, :4], run(MODEL, PARAMS, TEXT[:1, :4]).logits)
    oracle.assert_close(out[:, 4:], run(MODEL, PARAMS, TEXT[1:, :5]).logits)


def test_given_embeddings_are_taken_as_they_are_and_embed_scales_tokens():
    table = PARAMS["embedding"]["embedding"]
    x = MODEL.apply({"params": PARAMS}, TEXT, method="embed")
    oracle.assert_close(x, table[TEXT] * 4.0)
    out = run(MODEL, PARAMS, embeddings=x)
    oracle.assert_close(out.logits, run(MODEL, PARAMS, TEXT).logits)
    assert np.abs(out.logits - run(MODEL, PARAMS, embeddings=x / 4).logits).max() > 1e-2


def test_a_tied_output_uses_the_embedding():
    tied, params = make(tied=True, logit_cap=None)
    assert "lm_head" not in params
    out = run(tied, params, TEXT)
    expected = np.asarray(out.tokens, np.float64) @ params["embedding"]["embedding"].T
    oracle.assert_close(out.logits, expected)


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("dots", 3)])
def test_remat_and_unroll_change_neither_values_nor_gradients(remat, unroll):
    def loss(params, model):
        logits = model.apply({"params": params}, TEXT).logits
        return jnp.square(logits).mean()

    results = [
        jax.jit(jax.value_and_grad(lambda p, m=m: loss(p, m)))(PARAMS)
        for m in (MODEL, build_language_model(**SIZE, remat=remat, unroll=unroll))
    ]
    jax.tree.map(oracle.assert_close, *results)


def test_bfloat16_stays_near_float32_and_logits_are_float32():
    half = build_language_model(**SIZE, dtype="bfloat16")
    out, exact = run(half, PARAMS, TEXT), run(MODEL, PARAMS, TEXT)
    assert out.logits.dtype == jnp.float32 and out.tokens.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(out.logits - exact.logits).max() < 0.15


@pytest.mark.parametrize("tied", [False, True])
def test_int8_weights_are_a_quarter_of_the_bytes_and_off_by_half_a_step(tied):
    size = dict(width=64, mlp_dim=128, tied=tied)
    model, params = make(**size)
    small = quantize(params)
    assert num_bytes(small) < 0.3 * num_bytes(params)
    scales = {name: small["blocks"]["attention"][name]["kernel"]["scale_of_int8"] for name in "qo"}
    assert scales["q"].shape == (3, 1, 4, 6) and scales["o"].shape == (3, 1, 1, 64)
    steps = jax.tree.map(lambda x: np.abs(x).max() / 127, params)
    off = jax.tree.map(lambda a, b, s: np.abs(a - b).max() / s, dequantize(small), params, steps)
    assert max(jax.tree.leaves(off)) <= 0.5001
    logits = run(model.clone(weights="int8"), small, TEXT).logits
    exact = run(model, dequantize(small), TEXT).logits
    oracle.assert_close(logits, exact)
    error = np.abs(logits - run(model, params, TEXT).logits)
    assert 1e-4 < error.mean() < 0.05  # logits are spread by 1.3


def test_attention_maps_of_all_layers_can_be_asked_for():
    out, state = MODEL.apply({"params": PARAMS}, TEXT, mutable=["intermediates"])
    (weights,) = state["intermediates"]["blocks"]["attention"]["attention_weights"]
    assert weights.shape == (3, 2, 4, 6, 6)
    oracle.assert_close(weights.sum(-1), np.ones((3, 2, 4, 6)))
    seen = np.asarray(weights) > 0
    s, t = np.indices((6, 6))
    assert (seen[0] == ((t <= s) & (s - t < 3))).all() and (seen[1] == (t <= s)).all()
    oracle.assert_close(out.logits, run(MODEL, PARAMS, TEXT).logits)


def test_parameters_split_over_tensor_give_the_same_logits():
    mesh = sharding.make_mesh(2, 2, 2)
    model, _ = make(vocab_size=30)
    params = oracle.randomize(parameter_shapes(model), scale=0.4)
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    specs = {
        "blocks/attention/q/kernel": P(None, None, "tensor", None),
        "blocks/attention/k/kernel": P(None, None, "tensor", None),
        "blocks/attention/o/kernel": P(None, "tensor", None, None),
        "blocks/mlp/gate/kernel": P(None, None, "tensor"),
        "blocks/mlp/fc2/kernel": P(None, "tensor", None),
        "embedding/embedding": P("tensor", None),
        "lm_head/kernel": P(None, "tensor"),
        "lm_head/kernel/int8": P(None, "tensor"),
        "blocks/mlp/fc1/kernel/int8": P(None, None, "tensor"),
        "blocks/norm1/scale": P(None, None),
    }
    for path, spec in specs.items():
        shape = (3,) * (path.startswith("blocks")) + (4,) * (3 if "attention" in path else 2)
        shape = (3, 4) if "scale" in path else shape
        assert sharding.parameter_spec(path, shape, mesh) == spec, path
    text = np.tile(TEXT, (2, 1))
    with jax.set_mesh(mesh):
        out = run(model, placed, jax.device_put(text, sharding.batch_sharding(mesh)))
    oracle.assert_close(out.logits, run(model, params, text).logits)


def test_bad_calls_name_the_rule():
    with pytest.raises(ValueError, match="text or embeddings, give one of the two"):
        MODEL.apply({"params": PARAMS})
    with pytest.raises(ValueError, match="text or embeddings, give one of the two"):
        MODEL.apply({"params": PARAMS}, TEXT, embeddings=np.zeros((2, 6, 16)))
    with pytest.raises(ValueError, match="shapes must be"):
        MODEL.apply({"params": PARAMS}, TEXT, np.ones((2, 5), bool))
    with pytest.raises(ValueError, match="cannot be read into a cache"):
        cache = MODEL.init_cache(2, 6)
        MODEL.apply({"params": PARAMS}, TEXT, segments=TEXT, cache=cache)
    wrong = {
        "must divide num_heads, got 3 for 4": dict(num_kv_heads=3),
        "letters s .* and f": dict(window_pattern="sx"),
        "unknown weights 'int4'": dict(weights="int4"),
        "unknown rope_scaling 'longrope'": dict(rope_scaling={"name": "longrope"}),
        "must divide the width": dict(head_dim=None, num_heads=3, num_kv_heads=1),
        "unknown key": dict(heads=3),
    }
    for message, fields in wrong.items():
        with pytest.raises(ValueError, match=message):
            parameter_shapes(build_language_model(**{**SIZE, **fields}))


def test_dynamic_scaling_has_no_cache_beyond_its_context():
    scaling = {"name": "dynamic", "factor": 2.0, "context": 8}
    model = build_language_model(**SIZE, rope_scaling=scaling)
    assert model.init_cache(1, 8).capacity == 8
    with pytest.raises(ValueError, match="outgrows the 8 tokens.*got a cache of 9"):
        model.init_cache(1, 9)
    prefix = read_prefix(model, PARAMS, Prompt(TEXT[:, :5]))
    with pytest.raises(ValueError, match="got a cache of 9"):
        start(model, PARAMS, Prompt(TEXT[:, 5:], prefix=prefix), max_new_tokens=3)


def test_a_variant_is_a_row_of_the_table_and_fields_win_over_it():
    model = build_language_model("Llama-3.1-8B", depth=2)
    assert (model.depth, model.width, model.rope_scaling.factor) == (2, 4096, 8.0)
    with pytest.raises(ValueError, match="unknown variant 'Qwen2-0.6B'.*did you mean 'Qwen"):
        build_language_model("Qwen2-0.6B")


def test_models_are_hashable_so_that_a_compiled_program_can_be_found_again():
    assert hash(build_language_model(**SIZE)) == hash(MODEL) and MODEL == build_language_model(
        **SIZE
    )
