# SPDX-License-Identifier: Apache-2.0
"""Two towers of a few lines, with dropout and patch dropout: they compile in no time and compute in
whatever their parameters are, also in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_vlm import trees
from flax_vlm.models.text_encoder import TextOutput
from flax_vlm.models.two_towers import TwoTowers
from flax_vlm.models.vit import VisionOutput
from flax_vlm.nn.patches import drop_patches


class ToyImage(nn.Module):
    """Eight patches of 24 numbers, of which training keeps three."""

    width: int = 7
    embed_dim: int = 5
    dropout: float = 0.2
    patch_dropout: float = 0.5

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.tanh(nn.Dense(self.width, name="patches")(image.reshape(len(image), 8, 24)))
        if train and self.patch_dropout:
            x = drop_patches(x, self.make_rng("patch_dropout"), keep=3)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.tanh(nn.Dense(self.width, name="mlp")(x))
        return VisionOutput(x, nn.Dense(self.embed_dim, name="head")(x.mean(1)))


class ToyText(nn.Module):
    """Token embeddings, a layer, the mean of the real tokens."""

    width: int = 6
    embed_dim: int = 5
    dropout: float = 0.2

    @nn.compact
    def __call__(self, text, text_mask=None, *, train=False):
        x = nn.Embed(40, self.width, name="embedding")(text)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.tanh(nn.Dense(self.width, name="mlp")(x)) * text_mask[:, :, None]
        return TextOutput(x, nn.Dense(self.embed_dim, name="head")(x.sum(1)))


def toy_model(init_bias=-2.0, dropout=0.2, patch_dropout=0.5):
    image, text = ToyImage(dropout=dropout, patch_dropout=patch_dropout), ToyText(dropout=dropout)
    return TwoTowers(image, text, init_scale=6.0, init_bias=init_bias)


def make_batch(size, seed=0):
    """Two equal captions, padding among the tokens, one example that is padding."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 40, (size, 6)).astype(np.int32)
    text[3] = text[5]
    text_id = rng.permutation(1000)[:size].astype(np.int32)
    text_id[3] = text_id[5]
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8),
        "text": text,
        "text_mask": np.arange(6) < rng.integers(2, 7, (size, 1)),
        "text_id": text_id,
        "example_mask": np.arange(size) != size - 2,
    }


def randomised(objective, batch, dtype="float32", seed=1):
    """(params, extras): no parameter keeps its initial value, zeros hide errors."""
    shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)
    rng = np.random.default_rng(seed)

    def one(path, x):
        centre = {"logit_scale": np.log(15.0), "logit_bias": -2.0}.get(path, 0.0)
        centre = 1.0 if path.endswith("/scale") else centre
        return jnp.asarray(centre + 0.4 * rng.normal(size=x.shape), dtype)

    params = trees.map_with_path(one, shapes[0])
    return params, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])
