# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a language model that sees, against XLA's count on an unrolled one."""

import jax
import jax.numpy as jnp
import pytest

from flax_vlm.models.llava import build_llava
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.scaling.flops import LLAVA_PARTS, forward_flops, train_flops_per_example

CONNECTORS = {
    "linear": {"name": "linear"},
    "mlp": {"name": "mlp"},
    "pixel_shuffle": {"name": "pixel_shuffle", "scale": 2},
    "resampler": {
        "name": "resampler",
        "resampler": {"num_latents": 8, "depth": 2, "num_heads": 4, "head_dim": 32},
    },
}


def build(connector="mlp", **fields):
    tower = dict(width=128, depth=3, mlp_dim=512, num_heads=2, unroll=3)
    decoder = dict(width=192, depth=2, mlp_dim=384, num_heads=4, num_kv_heads=2, unroll=2)
    return build_llava(
        {"name": "vit", "image_size": 64, "patch_size": 8, **tower},
        CONNECTORS[connector],
        {"vocab_size": 256, **decoder},
        image_token_id=3,
        **fields,
    )


def xla_flops(model, length, images, gradient_of=()):
    params = parameter_shapes(model)
    text = jax.ShapeDtypeStruct((1, length), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, images, 64, 64, 3), jnp.float32)

    def loss(trained, frozen, text, pixels):
        return model.apply({"params": {**frozen, **trained}}, text, pixels).logits.sum()

    trained = {name: params[name] for name in gradient_of}
    frozen = {name: x for name, x in params.items() if name not in trained}
    function = jax.grad(loss) if trained else loss
    compiled = jax.jit(function).lower(trained, frozen, text, pixels).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("connector", CONNECTORS)
def test_the_forward_pass_costs_what_xla_counts(connector):
    model = build(connector, feature_layer=2)
    flops = sum(forward_flops(model, text_length=96, images=2).values())
    assert xla_flops(model, 96, 2) == pytest.approx(flops, rel=0.05)


def test_a_merge_of_tokens_saves_in_the_connector():
    whole, pooled = build(), build(compression={"name": "average_pool", "scale": 2})
    costs = [forward_flops(m, text_length=64)["connector"] for m in (whole, pooled)]
    assert costs[0] == 4 * costs[1]


@pytest.mark.parametrize("trained", [("connector",), ("connector", "language_model"), LLAVA_PARTS])
def test_a_training_step_costs_what_xla_counts_whatever_is_frozen(trained):
    model = build()
    frozen = [name for name in LLAVA_PARTS if name not in trained]
    flops = train_flops_per_example(model, text_length=96, frozen=frozen)
    # the gradient of the pixels, of the embedded text and of the last logits' sum are not taken
    assert xla_flops(model, 96, 1, trained) == pytest.approx(flops, rel=0.1)
