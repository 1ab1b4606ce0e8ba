# SPDX-License-Identifier: Apache-2.0
"""The Perceiver Resampler against a NumPy float64 oracle written from the paper's listing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.nn.resampler import PerceiverResampler
from flax_vlm.training import sharding

B, F, P, D, Q, N, K = 3, 2, 5, 12, 4, 2, 8
RELU = {
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
}


def make(**fields):
    given = {"num_latents": Q, "depth": 2, "num_heads": N, "head_dim": K, "norm_eps": 0.1}
    return PerceiverResampler(**given | {"activation": "relu"} | fields)


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape, scale=0.5)), tree)


def start(model, x, mask=None):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, mask)["params"]
    return random_like(shapes)


def norm(x, p, eps=0.1):
    y = x - x.mean(-1, keepdims=True)
    return p["scale"] * y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) + p["bias"]


def oracle(model, params, x, mask=None):
    """The listing of arXiv:2204.14198, appendix A.1.1, one example at a time."""
    params = jax.tree.map(np.float64, params)
    results = []
    for example in range(len(x)):
        tokens = np.float64(x[example])
        if tokens.ndim == 3:
            if "time" in params:
                tokens = tokens + params["time"][: len(tokens), None]
            tokens = tokens.reshape(-1, tokens.shape[-1])
        if mask is not None:
            tokens = tokens[mask[example].reshape(-1)]
        latents = params["latents"]
        for layer in range(model.depth):
            p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
            a = p["attention"]
            query = norm(latents, a["latents_norm"])
            both = np.concatenate([norm(tokens, a["context_norm"]), query])
            q, k, v = (
                np.einsum("td,dnk->tnk", y, a[name]["kernel"])
                for name, y in (("q", query), ("k", both), ("v", both))
            )
            if model.qk_norm:
                q, k = norm(q, a["q_norm"]), norm(k, a["k_norm"])
            scores = np.exp(np.einsum("qnk,tnk->nqt", q, k) / np.sqrt(model.head_dim))
            scores /= scores.sum(-1, keepdims=True)
            out = np.einsum("nqt,tnk->qnk", scores, v)
            latents = latents + np.einsum("qnk,nkd->qd", out, a["o"]["kernel"])
            hidden = norm(latents, p["mlp_norm"]) @ p["mlp"]["fc1"]["kernel"]
            latents = latents + RELU[model.activation](hidden) @ p["mlp"]["fc2"]["kernel"]
        results.append(norm(latents, params["norm"]))
    return np.stack(results)


def tokens(*shape, seed=1):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize(
    ("fields", "shape", "masked"),
    [
        ({}, (B, P, D), False),
        ({"activation": "relu_squared"}, (B, P, D), True),
        ({"qk_norm": True}, (B, P, D), True),
        ({"num_frames": 3}, (B, F, P, D), False),
        ({"num_frames": 3}, (B, F, P, D), True),
        ({}, (B, F, P, D), False),
    ],
)
def test_it_is_the_papers_listing(fields, shape, masked):
    model, x = make(**fields), tokens(*shape)
    mask = np.random.default_rng(2).random(shape[:-1]) < 0.6 if masked else None
    if masked:
        mask.reshape(B, -1)[0] = False  # an example without any token
        assert 0 < mask.sum() < mask.size
    params = start(model, x, mask)
    found = model.apply({"params": params}, x, mask)
    expected = oracle(model, params, x, mask)
    assert found.shape == (B, Q, D)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, abs(expected).max()))


def test_any_number_of_tokens_gives_as_many_latents():
    model = make()
    params = start(model, tokens(1, P, D))
    for count in (1, 2, 9):
        assert model.apply({"params": params}, tokens(2, count, D)).shape == (2, Q, D)


def test_padding_changes_nothing_and_gets_no_gradient():
    model, x = make(), tokens(B, P, D)
    params = start(model, x)
    mask = np.arange(P)[None] < np.array([2, 5, 3])[:, None]

    def total(x, mask):
        return (model.apply({"params": params}, x, mask) ** 2).sum()

    other = np.where(mask[..., None], x, 1e3)
    np.testing.assert_allclose(
        model.apply({"params": params}, x, mask),
        model.apply({"params": params}, other, mask),
        atol=1e-6,
    )
    gradient = jax.grad(total)(x, mask)
    assert not np.any(gradient[~mask]) and np.all(np.any(gradient[mask], -1))


def test_latents_and_queries_start_as_large_as_told():
    x = jnp.zeros((1, P, 64))
    plain, given = (
        make(num_latents=64, **fields).init(jax.random.key(0), x)["params"]
        for fields in ({}, {"latent_std": 1.0, "query_gain": 4.0})
    )
    expected = trees.map_with_path(
        lambda path, leaf: leaf * {"latents": 50, "blocks/attention/q/kernel": 4}.get(path, 1),
        plain,
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), expected, given)
    assert float(given["latents"].std()) == pytest.approx(1, rel=0.05)


def test_frames_without_time_embeddings_may_come_in_any_order_and_with_them_not():
    x = tokens(B, F, P, D)
    for num_frames, equal in ((0, True), (F, False)):
        model = make(num_frames=num_frames)
        params = start(model, x)
        first, second = (model.apply({"params": params}, y) for y in (x, x[:, ::-1]))
        assert np.allclose(first, second, atol=1e-5) == equal


def test_more_frames_than_time_embeddings_are_refused():
    with pytest.raises(ValueError, match="time embeddings for 1 frames, got 2"):
        jax.eval_shape(make(num_frames=1).init, jax.random.key(0), tokens(B, F, P, D))


def test_a_mesh_changes_no_output_and_splits_heads_over_tensor(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 8)
    model, x = make(), tokens(4, P, D)
    params = start(model, x)
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    specs = {p: leaf.sharding.spec for p, leaf in trees.named_leaves(placed).items()}
    assert specs["blocks/attention/q/kernel"][2] == "tensor"
    assert specs["blocks/attention/o/kernel"][1] == "tensor"
    assert specs["blocks/mlp/fc1/kernel"][2] == "tensor"
    assert specs["blocks/mlp/fc2/kernel"][1] == "tensor"
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.asarray(x), sharding.batch_sharding(mesh))
        found = jax.jit(lambda p, x: model.apply({"params": p}, x))(placed, rows)
    np.testing.assert_allclose(found, model.apply({"params": params}, x), atol=2e-5)
