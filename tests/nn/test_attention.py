# SPDX-License-Identifier: Apache-2.0
"""Every attention kernel computes the same, and the choice between them is a pure function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_vlm.nn import attention
from flax_vlm.nn.attention import MultiHeadAttention, attend, choose_implementation
from flax_vlm.nn.masks import causal_mask, combine_masks, padding_mask
from tests.nn import oracle

B, S, T, N, K = 2, 5, 7, 3, 8


def qkv(queries=S, keys=T, seed=0, heads=N, head_dim=K, batch=B):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, heads, head_dim) for n in (queries, keys, keys)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def random_mask(shape, seed=1):
    mask = np.random.default_rng(seed).random(shape) < 0.6
    mask[..., 0, :] = True
    return mask


@pytest.mark.parametrize("implementation", ["xla", "explicit", "auto"])
@pytest.mark.parametrize("shape", [None, (B, 1, S, T), (B, N, S, T), (1, 1, S, T), (B, 1, 1, T)])
def test_attention_equals_the_float64_oracle_under_every_kind_of_mask(implementation, shape):
    q, k, v = qkv()
    mask = None if shape is None else random_mask(shape)
    _, expected = oracle.softmax_attention(*oracle.f64([q, k, v]), mask)
    oracle.assert_close(attend(q, k, v, mask=mask, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", ["xla", "explicit"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fewer_heads_of_keys_serve_neighbouring_queries(implementation, kv_heads):
    q = qkv(heads=4)[0]
    _, k, v = qkv(heads=kv_heads, seed=5)
    mask = random_mask((B, 4, S, T))
    _, expected = oracle.softmax_attention(*oracle.f64([q, k, v]), mask, scale=0.9)
    out = attend(q, k, v, mask=mask, scale=0.9, implementation=implementation)
    oracle.assert_close(out, expected)


def test_splash_attention_takes_fewer_heads_of_keys_and_a_scale():
    q = qkv(queries=5, keys=5, heads=4, head_dim=64, batch=1)[0]
    _, k, v = qkv(queries=5, keys=5, heads=2, head_dim=64, batch=1, seed=5)
    _, expected = oracle.softmax_attention(*oracle.f64([q, k, v]), None, True, scale=0.3)
    out = attend(q, k, v, is_causal=True, scale=0.3, implementation="splash")
    oracle.assert_close(out, expected)


def test_capped_logits_equal_the_oracle_and_only_explicit_attention_can():
    q, k, v = qkv(seed=2)
    _, expected = oracle.softmax_attention(*oracle.f64([2 * q, k, v]), cap=1.5)
    oracle.assert_close(attend(2 * q, k, v, logit_cap=1.5), expected)
    assert choose_implementation("cuda", "bfloat16", SHORT, SHORT, has_cap=True) == "explicit"
    for name in ("xla", "splash"):
        with pytest.raises(ValueError, match="cannot cap logits"):
            attend(q, k, v, logit_cap=1.5, implementation=name)


@pytest.mark.parametrize("implementation", ["xla", "explicit"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_causal_attention_equals_the_oracle(implementation, with_mask):
    q, k, v = qkv(keys=S)
    mask = random_mask((B, 1, S, S)) if with_mask else None
    _, expected = oracle.softmax_attention(*oracle.f64([q, k, v]), mask, True)
    out = attend(q, k, v, mask=mask, is_causal=True, implementation=implementation)
    oracle.assert_close(out, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_splash_attention_equals_the_oracle_at_lengths_that_fill_no_block(is_causal):
    q, k, v = qkv(queries=5, keys=5, heads=2, head_dim=64, batch=1)
    _, expected = oracle.softmax_attention(*oracle.f64([q, k, v]), None, is_causal)
    out = attend(q, k, v, is_causal=is_causal, implementation="splash")
    oracle.assert_close(out, expected)


def test_splash_attention_is_mapped_over_the_ambient_mesh():
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    q, k, v = qkv(queries=3, keys=6, heads=2, head_dim=64)
    _, expected = oracle.softmax_attention(*oracle.f64([q, k, v]))
    function = lambda *x: attend(*x, implementation="splash")  # noqa: E731
    spec = P("data", None, "tensor")
    with jax.set_mesh(mesh):
        out = jax.jit(function)(q, k, v)
        # inside a shard_map the axes are taken: the kernel is called as it is
        mapped = jax.shard_map(
            function, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
        )
        again = jax.jit(mapped)(q, k, v)
    oracle.assert_close(out, expected)
    oracle.assert_close(again, expected)


def test_splash_attention_lowers_for_tpu_forward_and_backward():
    shapes = [jax.ShapeDtypeStruct((2, 1100, 2, 64), jnp.bfloat16)] * 3

    def loss(q, k, v):
        out = attend(q, k, v, implementation="splash", platform="tpu")
        return out.astype(jnp.float32).sum()

    text = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(*shapes)
    assert text.mlir_module().count("tpu_custom_call") >= 3  # forward, dq, dkv


@pytest.mark.gpu
def test_cudnn_attention_equals_the_oracle_on_nvidia():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(queries=64, keys=64, head_dim=64))
    _, expected = oracle.softmax_attention(*oracle.f64([q, k, v]))
    out = attend(q, k, v, implementation="cudnn")
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-2)


@pytest.mark.parametrize("implementation", ["xla", "explicit"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_query_that_may_see_nothing_gives_zeros_and_finite_gradients(implementation, is_causal):
    q, k, v = qkv(keys=S)
    mask = random_mask((B, 1, S, S))
    mask[1, 0, 3] = False
    mask[1, 0, 2, :3] = False  # sees only what causality hides

    def total(q, k, v):
        out = attend(q, k, v, mask=mask, is_causal=is_causal, implementation=implementation)
        return jnp.square(out).sum(), out

    gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    _, expected = oracle.softmax_attention(*oracle.f64([q, k, v]), mask, is_causal)
    oracle.assert_close(out, expected)
    assert (np.asarray(out)[1, 3] == 0).all()
    assert ((np.asarray(out)[1, 2] == 0).all()) == is_causal
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_attention_keeps_its_dtype_and_takes_the_softmax_in_float32():
    q, k, v = (jnp.asarray(8 * x, jnp.bfloat16) for x in qkv(queries=4, keys=64))
    expected_weights, _ = oracle.softmax_attention(*oracle.f64([q, k, v]))
    weights = attention.attention_weights(q, k)
    assert weights.dtype == jnp.float32
    oracle.assert_close(weights, expected_weights)  # bf16 logits would be off by 1e-1
    for implementation in ("xla", "explicit"):
        assert attend(q, k, v, implementation=implementation).dtype == jnp.bfloat16


LONG, SHORT = (8, 2304, 16, 64), (8, 256, 16, 64)
MESH = {"data": 2, "fsdp": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("expected", "platform", "dtype", "shape", "options"),
    [
        ("xla", "cpu", "bfloat16", LONG, {}),
        ("xla", "rocm", "bfloat16", SHORT, {}),
        ("cudnn", "cuda", "bfloat16", SHORT, {}),
        ("cudnn", "cuda", "float16", (8, 257, 16, 80), {}),
        ("xla", "cuda", "float32", SHORT, {}),
        ("xla", "cuda", "bfloat16", (8, 256, 16, 60), {}),
        ("xla", "cuda", "bfloat16", (8, 256, 16, 136), {}),
        ("xla", "cuda", "bfloat16", (8, 1, 16, 64), {}),
        ("cudnn", "cuda", "bfloat16", SHORT, {"has_mask": True}),
        ("xla", "cuda", "bfloat16", (8, 257, 16, 64), {"has_mask": True}),
        ("xla", "tpu", "bfloat16", SHORT, {}),
        ("splash", "tpu", "bfloat16", LONG, {}),
        ("splash", "tpu", "float32", (8, 1024, 16, 128), {}),
        ("xla", "tpu", "bfloat16", (8, 2304, 16, 72), {}),
        ("xla", "tpu", "bfloat16", LONG, {"has_mask": True}),
        ("xla", "tpu", "bfloat16", LONG, {"num_devices": 16}),
        ("splash", "tpu", "bfloat16", LONG, {"num_devices": 16, "mesh_shape": MESH}),
        ("xla", "tpu", "bfloat16", (6, *LONG[1:]), {"num_devices": 16, "mesh_shape": MESH}),
        ("xla", "tpu", "bfloat16", (8, 2304, 6, 64), {"num_devices": 16, "mesh_shape": MESH}),
    ],
)
def test_the_kernel_is_chosen_by_platform_dtype_and_shape(
    expected, platform, dtype, shape, options
):
    assert choose_implementation(platform, dtype, shape, shape, **options) == expected


def test_few_queries_over_many_keys_do_not_ask_for_splash():
    assert choose_implementation("tpu", "bfloat16", (8, 1, 16, 64), LONG) == "xla"


def test_auto_asks_for_the_kernel_of_the_platform_that_is_given(monkeypatch):
    called = []
    fake = lambda q, k, v, *rest: called.append(rest[-1]) or v[:, :2]  # noqa: E731
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "cudnn", fake)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(queries=2))
    attend(q, k, v, platform="cuda")
    assert called == ["cuda"]


def test_wrong_calls_name_the_rule_and_the_choices():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="flash.*choose one of.*cudnn.*explicit.*splash.*xla"):
        attend(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="as many queries as keys, got 5 and 7"):
        attend(q, k, v, is_causal=True)
    with pytest.raises(ValueError, match="takes no mask"):
        attend(q, k, v, mask=random_mask((B, 1, S, T)), implementation="splash")
    with pytest.raises(ValueError, match="shapes must be"):
        attend(q, k, v[:, :3])
    with pytest.raises(ValueError, match="heads of keys must divide those of queries, got 2 for 3"):
        attend(q, k[:, :, :2], v[:, :, :2])


def test_masks_combine_by_conjunction():
    keep = jnp.array([[True, True, False], [True, False, False]])
    mask = combine_masks(None, padding_mask(keep), causal_mask(3))
    expected = np.tril(np.ones((3, 3), bool)) & np.asarray(keep)[:, None, :]
    np.testing.assert_array_equal(mask[:, 0], expected)
    assert combine_masks(None, None) is None


@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention_equals_the_oracle(cross):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((B, S, 12)).astype(np.float32)
    context = rng.standard_normal((B, T, 10)).astype(np.float32) if cross else None
    mask = random_mask((B, 1, S, T if cross else S))
    module = MultiHeadAttention(num_heads=3)
    params = oracle.random_params(module, x, context)
    assert params["q"]["kernel"].shape == (12, 3, 4)
    assert params["o"]["kernel"].shape == (3, 4, 12)
    expected = oracle.attention(oracle.f64(params), x, context, mask)
    oracle.assert_close(oracle.apply(module, params, x, context, mask=mask), expected)


def test_attention_weights_sum_to_one_and_reproduce_the_output():
    x = np.random.default_rng(4).standard_normal((B, S, 12)).astype(np.float32)
    module = MultiHeadAttention(num_heads=3)
    params = oracle.random_params(module, x)
    out, state = oracle.apply(module, params, x, mutable=["intermediates"])
    (weights,) = state["intermediates"]["attention_weights"]
    assert weights.shape == (B, 3, S, S)
    oracle.assert_close(weights.sum(-1), np.ones((B, 3, S)))
    p = oracle.f64(params)
    v = np.einsum("btd,dnk->btnk", x, p["v"]["kernel"]) + p["v"]["bias"]
    mixed = np.einsum("bnst,btnk->bsnk", np.asarray(weights, np.float64), v)
    expected = np.einsum("bsnk,nkd->bsd", mixed, p["o"]["kernel"]) + p["o"]["bias"]
    oracle.assert_close(out, expected)
    oracle.assert_close(oracle.apply(module, params, x), expected)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide the width, got width 12 and 5"):
        MultiHeadAttention(num_heads=5).init(jax.random.key(0), np.ones((1, 2, 12), np.float32))
