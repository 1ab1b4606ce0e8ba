# SPDX-License-Identifier: Apache-2.0
"""The pre-LN transformer encoder shared by image and text towers.

Paper: Vaswani et al. 2017, arXiv:1706.03762, with the norm before each sub-layer (ViT,
arXiv:2010.11929, figure 1) and one after the last block. Layers are always scanned: every parameter
of a block has a leading layer axis, one layout for every checkpoint, and compile time does not grow
with the depth. `unroll` trades that back for speed and changes no number.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.build import lookup
from flax_vlm.nn.ambient_mesh import keep_rows
from flax_vlm.nn.attention import MultiHeadAttention
from flax_vlm.nn.initializers import INITS, Init
from flax_vlm.nn.mlp import Mlp
from flax_vlm.nn.norms import LayerNorm
from flax_vlm.nn.rotary import Rotary

# What the backward pass finds saved; the rest it computes again. From most memory to least.
REMAT_POLICIES = {
    "none": None,  # no rematerialisation
    "dots": jax.checkpoint_policies.dots_saveable,
    # not the scores q k^T, whose size grows with the square of the tokens
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """One layer: x + scale1 attention(ln1(x)), then x + scale2 mlp(ln2(x)).

    The scales are vectors [D] (LayerScale, Touvron et al. 2021, arXiv:2103.17239); most models have
    none.

    Attributes:
        num_heads: N.
        mlp_dim: M.
        inits: initialisers of the tower.
        activation: a key of mlp.ACTIVATIONS.
        norm_eps: epsilon of both norms.
        qkv_bias: which of q, k and v have a bias.
        gated_mlp: see mlp.Mlp.
        sub_norm: a norm before the last matmul of the attention and of the MLP (EVA-02).
        layer_scale: initial value of the scales; None has none.
        dropout: rate, after the attention, inside the MLP and after it.
        is_causal: may a position see only what comes before it?
        dtype: of the matmuls; parameters are float32.
        attention_implementation: "auto" or a key of attention.IMPLEMENTATIONS.
        deterministic: no dropout.
    """

    num_heads: int
    mlp_dim: int
    inits: Init
    activation: str
    norm_eps: float
    qkv_bias: str = "qkv"
    gated_mlp: bool = False
    sub_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    is_causal: bool = False
    dtype: str = "float32"
    attention_implementation: str = "auto"
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, rotary: Rotary | None
    ) -> tuple[jax.Array, None]:
        """Returns ([B, S, D], None): the carry of the scan, and nothing per layer.

        Args:
            x: [B, S, D].
            mask: [B|1, N|1, S|1, S] bool, True = keep; None keeps all.
            rotary: angles that q and k are turned by; None turns nothing.
        """
        x = keep_rows(x)
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        sub_norm_eps = self.norm_eps if self.sub_norm else None
        y = LayerNorm(self.norm_eps, name="ln1")(x)
        y = MultiHeadAttention(
            self.num_heads,
            qkv_bias=self.qkv_bias,
            norm_eps=sub_norm_eps,
            implementation=self.attention_implementation,
            dtype=self.dtype,
            in_init=self.inits.attention_in,
            out_init=self.inits.attention_out,
            name="attention",
        )(y, mask=mask, is_causal=self.is_causal, rotary=rotary)
        x = x + drop(self._scale("scale1", y))
        y = LayerNorm(self.norm_eps, name="ln2")(x)
        y = Mlp(
            self.mlp_dim,
            activation=self.activation,
            gated=self.gated_mlp,
            norm_eps=sub_norm_eps,
            dropout=self.dropout,
            dtype=self.dtype,
            in_init=self.inits.mlp_in,
            out_init=self.inits.mlp_out,
            bias_init=self.inits.mlp_bias,
            name="mlp",
        )(y, deterministic=self.deterministic)
        return keep_rows(x + drop(self._scale("scale2", y))), None

    def _scale(self, name: str, y: jax.Array) -> jax.Array:
        if self.layer_scale is None:
            return y
        initial = nn.initializers.constant(self.layer_scale)
        scale = self.param(name, initial, y.shape[-1:], jnp.float32)
        return y * scale.astype(y.dtype)[None, None, :]


class Encoder(nn.Module):
    """A stack of blocks (`blocks/...` with a leading layer axis) and a final `norm`.

    Attributes:
        depth: number of blocks.
        num_heads: N.
        mlp_dim: M.
        activation: a key of mlp.ACTIVATIONS.
        norm_eps: epsilon of every norm.
        qkv_bias: which of q, k and v have a bias.
        gated_mlp: see mlp.Mlp.
        sub_norm: see Block.
        layer_scale: see Block.
        init_scheme: a key of initializers.INITS.
        dropout: rate.
        is_causal: may a position see only what comes before it?
        dtype: of the matmuls; parameters are float32.
        remat: a key of REMAT_POLICIES.
        unroll: layers per iteration of the scan; `depth` leaves no loop in the program.
        attention_implementation: "auto" or a key of attention.IMPLEMENTATIONS.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    qkv_bias: str = "qkv"
    gated_mlp: bool = False
    sub_norm: bool = False
    layer_scale: float | None = None
    init_scheme: str = "vit"
    dropout: float = 0.0
    is_causal: bool = False
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention_implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        rotary: Rotary | None = None,
        *,
        layer: int | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns [B, S, D] after the final norm, or in front of it after some blocks.

        Args:
            x: [B, S, D].
            mask: [B|1, N|1, S|1, S] bool, True = keep; None keeps all.
            rotary: angles that q and k are turned by; None turns nothing.
            layer: how many blocks are run, without the final norm; None runs all, and the norm.
            deterministic: no dropout.

        Raises:
            ValueError: if there are not so many blocks.
        """
        if layer is not None and not 0 <= layer <= self.depth:
            raise ValueError(f"layer must be in 0..{self.depth}, got {layer}")
        policy = lookup(REMAT_POLICIES, self.remat, "remat policy")
        block = Block
        if self.remat != "none":
            # inside a loop nothing can be merged with the forward pass; unrolled layers can, which
            # would undo the saving
            block = nn.remat(Block, policy=policy, prevent_cse=self.unroll > 1)
        # all have parameters, whether they are run or not: a checkpoint is read and written whole
        length = self.depth if layer is None or self.is_initializing() else layer
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=length,
            unroll=min(self.unroll, max(length, 1)),
        )
        if length < self.depth:
            first = functools.partial(jax.tree.map, lambda leaf: leaf[:length])
            scanned = nn.map_variables(scanned, "params", first)
        blocks = scanned(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            inits=lookup(INITS, self.init_scheme, "init_scheme")(x.shape[-1], self.depth),
            activation=self.activation,
            norm_eps=self.norm_eps,
            qkv_bias=self.qkv_bias,
            gated_mlp=self.gated_mlp,
            sub_norm=self.sub_norm,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            is_causal=self.is_causal,
            dtype=self.dtype,
            attention_implementation=self.attention_implementation,
            deterministic=deterministic,
            name="blocks",
        )
        x, _ = blocks(x, mask, rotary)
        norm = LayerNorm(self.norm_eps, name="norm")
        return norm(x) if layer is None or self.is_initializing() else x
