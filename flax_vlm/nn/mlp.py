# SPDX-License-Identifier: Apache-2.0
"""The transformer's MLP, plain or gated, and the activations that tell its families apart.

jax.nn.gelu is the tanh approximation by default and torch's is erf; the name here always says
which. Largest difference on [-6, 6]: erf against tanh 4.7e-4, erf against quick 2.0e-2.

The gated form with "silu" is SwiGLU (Shazeer 2020, arXiv:2002.05202), with biases in DINOv2 and
EVA-02, without in language models; with "gelu_tanh" it is Gemma's GeGLU.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.build import lookup
from flax_vlm.nn.norms import LayerNorm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # big_vision, SigLIP
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),  # Hugging Face ViT, open_clip
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP
    "silu": jax.nn.silu,  # gated: DINOv2 giant, EVA-02, LLaMA
    "relu": jax.nn.relu,  # IDEFICS' resampler
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # Flamingo's
}


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), or gated: fc2(activation(gate(x)) * fc1(x)).

    Dropout comes before fc2.

    Attributes:
        mlp_dim: M, the hidden width.
        activation: a key of ACTIVATIONS.
        gated: multiply with a second linear map of the input, `gate`.
        use_bias: the linear maps have biases; not in language models.
        norm_eps: epsilon of a LayerNorm `norm` before fc2 (sub-LN, EVA-02); None has none.
        dropout: rate.
        dtype: of the matmuls; parameters are float32.
        in_init: initialiser of fc1's kernel.
        out_init: initialiser of fc2's kernel.
        bias_init: initialiser of the biases.
    """

    mlp_dim: int
    activation: str = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    norm_eps: float | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    in_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    out_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.normal(1e-6)

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Returns [..., D] for x [..., D]."""
        width = x.shape[-1]
        activation = lookup(ACTIVATIONS, self.activation, "activation")
        dense = dict(use_bias=self.use_bias, bias_init=self.bias_init, dtype=self.dtype)
        hidden = nn.Dense(self.mlp_dim, kernel_init=self.in_init, name="fc1", **dense)(x)
        if self.gated:
            gate = nn.Dense(self.mlp_dim, kernel_init=self.in_init, name="gate", **dense)(x)
            x = activation(gate) * hidden  # [..., M]
        else:
            x = activation(hidden)  # [..., M]
        if self.norm_eps is not None:
            x = LayerNorm(self.norm_eps, name="norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return nn.Dense(width, kernel_init=self.out_init, name="fc2", **dense)(x)  # [..., D]
