# SPDX-License-Identifier: Apache-2.0
"""Costs of the language model in closed form against the products that are traced."""

import jax
import jax.numpy as jnp
import pytest

from flax_vlm.models.fastv import prune
from flax_vlm.models.language_model import build_language_model
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.scaling import decoder_flops
from flax_vlm.scaling.flops import train_flops_per_example
from flax_vlm.trees import num_bytes
from tests.losses.cost import matmul_flops

SIZE = dict(width=24, depth=3, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=10, vocab_size=50)


@pytest.fixture(params=[False, True], ids=["own output", "tied, windows, capped"])
def model(request):
    more = (
        dict(tied=True, window=3, window_pattern="sf", attention_cap=5.0) if request.param else {}
    )
    return build_language_model(**SIZE, **more)


def traced(function, *arguments):
    return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_training_flops_are_those_of_the_products_that_are_traced(model):
    params = parameter_shapes(model)
    text = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    loss = lambda p, x: model.apply({"params": p}, x).logits.sum()  # noqa: E731
    assert traced(loss, params, text) == 2 * decoder_flops.language_model_flops(model, 9)
    assert train_flops_per_example(model, text_length=9) == 3 * decoder_flops.language_model_flops(
        model, 9
    )
    assert traced(jax.grad(loss), params, text) == 2 * train_flops_per_example(model, text_length=9)
    frozen = train_flops_per_example(model, text_length=9, frozen=["encoder"])
    assert frozen == decoder_flops.language_model_flops(model, 9)


def test_reading_a_prompt_and_every_token_cost_what_is_traced(model):
    params = parameter_shapes(model)
    cache = jax.eval_shape(lambda: model.init_cache(2, 17))

    def read(params, text, cache):
        x = model.apply({"params": params}, text, method="embed")
        tokens, cache = model.apply({"params": params}, x, cache=cache, method="decode")
        return model.apply({"params": params}, tokens[:, -1], method="logits")

    for tokens, ours in (
        (9, decoder_flops.prefill_flops(model, 9, 17)),
        (1, decoder_flops.decode_flops(model, 17)),
    ):
        text = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
        assert traced(read, params, text, cache) == 2 * ours


def test_a_pruned_prompt_costs_what_is_traced():
    model = prune(build_language_model(**SIZE), 1, 4)
    params = parameter_shapes(model)
    cache = jax.eval_shape(lambda: model.init_cache(2, 17, visual=True))

    def read(params, text, cache, visual=None):
        x = model.apply({"params": params}, text, method="embed")
        tokens, cache = model.apply(
            {"params": params}, x, cache=cache, visual=visual, method="decode"
        )
        return model.apply({"params": params}, tokens[:, -1], method="logits")

    text = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    visual = jax.ShapeDtypeStruct((2, 9), jnp.bool)
    prefill = traced(read, params, text, cache, visual)
    assert prefill == 2 * decoder_flops.prefill_flops(model, 9, 17)
    one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    assert traced(read, params, one, cache) == 2 * decoder_flops.decode_flops(model, 17)
    plain = build_language_model(**SIZE)
    assert prefill < 2 * decoder_flops.prefill_flops(plain, 9, 17)
    stores = [getattr(part, name) for part in (cache.first, cache.rest) for name in "kv"]
    assert decoder_flops.cache_bytes(model, 2, 17) == num_bytes(stores)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", None])
def test_cache_bytes_are_those_of_the_arrays(model, dtype):
    cache = jax.eval_shape(lambda: model.init_cache(3, 17, dtype))
    stores = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    assert decoder_flops.cache_bytes(model, 3, 17, dtype) == num_bytes(stores)


def test_published_models_cost_two_flops_per_weight_and_token_and_cache_as_known():
    llama = build_language_model("Llama-2-7b", dtype="bfloat16")
    weights = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # without embedding and norms
    scores = 4 * 32 * 4096 * 1000
    assert decoder_flops.decode_flops(llama, 1000) == 2 * weights + scores
    # half a mebibyte per token; a quarter of it with the eight heads of Mistral
    assert decoder_flops.cache_bytes(llama, 1, 1) == 2**19
    mistral = build_language_model("Mistral-7B-v0.2", dtype="bfloat16")
    assert decoder_flops.cache_bytes(mistral, 1, 1) == 2**17
    assert decoder_flops.bytes_per_token(llama, 8, 100, 2) == 2 * weights + 800 * 2**19
