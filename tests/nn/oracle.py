# SPDX-License-Identifier: Apache-2.0
"""NumPy float64 references of the layers: written from the equations, one loop-free line each."""

import functools
import math

import jax
import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
}


def randomize(tree, seed=0, scale=0.5):
    """Every leaf random normal: zeros and ones of a default initialisation hide errors."""
    rng = np.random.default_rng(seed)
    leaf = lambda x: np.asarray(scale * rng.standard_normal(x.shape), np.float32)  # noqa: E731
    return jax.tree.map(leaf, tree)


def random_params(module, *inputs, scale=0.5, **options):
    """Random parameters of a module, without running its initialisers."""
    init = functools.partial(module.init, **options)
    return randomize(jax.eval_shape(init, jax.random.key(0), *inputs)["params"], scale=scale)


def apply(module, params, *inputs, **options):
    """module.apply in one compiled program: quicker on first use than operation by operation."""
    static = {k: v for k, v in options.items() if isinstance(v, bool | str | list)}
    rest = {k: v for k, v in options.items() if k not in static}
    run = jax.jit(functools.partial(module.apply, **static))
    return run({"params": params}, *inputs, **rest)


def f64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def layer(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def assert_close(actual, reference, tolerance=2e-5):
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert actual.shape == reference.shape
    error = np.abs(actual - reference) / np.maximum(1.0, np.abs(reference))
    assert np.isfinite(actual).all() and error.max() <= tolerance, f"largest error {error.max()}"


def layer_norm(p, x, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def rms_norm(scale, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def softmax_attention(q, k, v, mask=None, is_causal=False, scale=None, cap=None):
    """Weights [B,N,S,T] and output [B,S,N,K], one query at a time."""
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    (B, S, N, K), T = q.shape, k.shape[1]
    keep = np.ones((B, N, S, T), bool) if mask is None else np.broadcast_to(mask, (B, N, S, T))
    weights, out = np.zeros((B, N, S, T)), np.zeros_like(q)
    for b, n, s in np.ndindex(B, N, S):
        seen = [t for t in range(T) if keep[b, n, s, t] and (t <= s or not is_causal)]
        if seen:
            scores = np.array([q[b, s, n] @ k[b, t, n] for t in seen])
            scores = scores / math.sqrt(K) if scale is None else scores * scale
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            weights[b, n, s, seen] = np.exp(scores - scores.max())
            weights[b, n, s] /= weights[b, n, s].sum()
            out[b, s, n] = weights[b, n, s] @ v[b, :, n]
    return weights, out


def attention(p, x, context=None, mask=None, is_causal=False):
    context = x if context is None else context
    q, k, v = (
        np.einsum("btd,dnk->btnk", y, p[name]["kernel"]) + p[name]["bias"]
        for name, y in (("q", x), ("k", context), ("v", context))
    )
    _, out = softmax_attention(q, k, v, mask, is_causal)
    return np.einsum("bsnk,nkd->bsd", out, p["o"]["kernel"]) + p["o"]["bias"]


def mlp(p, x, activation):
    hidden = ACTIVATIONS[activation](x @ p["fc1"]["kernel"] + p["fc1"]["bias"])
    return hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def block(p, x, activation, eps, mask=None, is_causal=False):
    x = x + attention(p["attention"], layer_norm(p["ln1"], x, eps), None, mask, is_causal)
    return x + mlp(p["mlp"], layer_norm(p["ln2"], x, eps), activation)


def encoder(p, x, activation="gelu_tanh", eps=1e-6, mask=None, is_causal=False):
    for index in range(p["blocks"]["ln1"]["scale"].shape[0]):
        x = block(layer(p["blocks"], index), x, activation, eps, mask, is_causal)
    return layer_norm(p["norm"], x, eps)


def map_head(p, tokens, activation="gelu_tanh", eps=1e-6):
    probe = np.repeat(p["probe"], tokens.shape[0], axis=0)
    y = attention(p["attention"], probe, tokens)
    return (y + mlp(p["mlp"], layer_norm(p["norm"], y, eps), activation))[:, 0]


def patch_tokens(p, image):
    """Convolution of every patch by two loops over the grid."""
    kernel = p["kernel"]
    h, w = kernel.shape[:2]
    rows, columns = image.shape[1] // h, image.shape[2] // w
    out = np.zeros((image.shape[0], rows * columns, kernel.shape[-1]))
    for r, c in np.ndindex(rows, columns):
        patch = image[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
        out[:, r * columns + c] = np.einsum("bhwc,hwcd->bd", patch, kernel)
    return out + p.get("bias", 0.0)


def unit(x):
    return x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-8)
