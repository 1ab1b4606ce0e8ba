# SPDX-License-Identifier: Apache-2.0
"""The text towers of SigLIP and CLIP: embeddings, an encoder, one pooled vector, a linear head.

SigLIP (Zhai et al. 2023, arXiv:2303.15343): every position sees every other **and the padding**
(texts are padded to the full length with the end token, and the released weights were trained so),
the last position is pooled, the head has a bias. CLIP (Radford et al. 2021, arXiv:2103.00020):
causal, the end-of-text token is pooled, the head has no bias; what follows the end of the text
changes nothing.

The defaults are SigLIP's; models/clip.py sets CLIP's. Sources: big_vision
`models/proj/image_text/text_transformer.py`, open_clip `transformer.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.build import build, lookup
from flax_vlm.models.variants import VARIANTS
from flax_vlm.nn.initializers import INITS
from flax_vlm.nn.masks import padding_mask
from flax_vlm.nn.pooling import pool_end_of_text, pool_last
from flax_vlm.nn.transformer import Encoder
from flax_vlm.shapes import check_shapes

POOLINGS = ("last", "eos")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextOutput:
    """What a text encoder returns.

    Attributes:
        tokens: [B, L, D] after the final norm.
        pooled: [B, D], or [B, E] where the encoder has a head.
    """

    tokens: jax.Array
    pooled: jax.Array


class TextEncoder(nn.Module):
    """A text encoder.

        tokens = norm(blocks(embedding[text] + positions));  pooled = head(tokens[pooled position])

    Attributes:
        vocab_size: V.
        length: the context, L at most.
        width: D.
        depth: number of blocks.
        mlp_dim: M.
        num_heads: N.
        embed_dim: E of the head, computed in float32; None has no head.
        head_bias: the head has a bias; not in CLIP.
        pooling: "last" position, or "eos", the end-of-text token.
        eos_id: id of the end-of-text token for "eos"; None takes the largest id of each text, which
            is CLIP's.
        is_causal: a position sees only what comes before it.
        mask_padding: hide padding (`text_mask`) from attention, and pool the last real token for
            "last". Off in released SigLIP and CLIP models.
        activation: a key of mlp.ACTIVATIONS.
        norm_eps: epsilon of every norm.
        dropout: rate.
        init_scheme: a key of initializers.INITS.
        dtype: of the matmuls, "float32" or "bfloat16"; parameters are float32.
        remat: a key of transformer.REMAT_POLICIES.
        unroll: layers per iteration of the scan.
        attention_implementation: "auto" or a key of attention.IMPLEMENTATIONS.
    """

    vocab_size: int
    length: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    embed_dim: int | None = None
    head_bias: bool = True
    pooling: str = "last"
    eos_id: int | None = None
    is_causal: bool = False
    mask_padding: bool = False
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    init_scheme: str = "vit"
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention_implementation: str = "auto"

    def setup(self) -> None:
        """Creates the parts; their names are the parameter paths."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r}, choose one of {list(POOLINGS)}")
        inits = lookup(INITS, self.init_scheme, "init_scheme")(self.width, self.depth)
        self.embedding = nn.Embed(
            self.vocab_size, self.width, dtype=self.dtype, embedding_init=inits.embedding
        )
        self.positions = self.param(
            "positions", inits.positions, (self.length, self.width), jnp.float32
        )
        self.encoder = Encoder(
            self.depth,
            self.num_heads,
            self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            init_scheme=self.init_scheme,
            dropout=self.dropout,
            is_causal=self.is_causal,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
            attention_implementation=self.attention_implementation,
        )
        if self.embed_dim is not None:
            self.head = nn.Dense(
                self.embed_dim,
                use_bias=self.head_bias,
                kernel_init=inits.head,
                dtype=jnp.float32,
            )

    def __call__(
        self, text: jax.Array, text_mask: jax.Array | None = None, *, train: bool = False
    ) -> TextOutput:
        """Returns the tokens and the pooled vector.

        Args:
            text: [B, L] int32 token ids, L at most the context.
            text_mask: [B, L] bool, True = real token; used where `mask_padding` is set, and needed
                there.
            train: dropout is on and needs the rng "dropout".

        Raises:
            ValueError: if the text is longer than the context, or a mask is needed and missing.
        """
        length = check_shapes("B L; B L", text, text_mask)["L"]
        if length > self.length:
            raise ValueError(
                f"the text must fit the context of {self.length} tokens, got {length}; "
                "truncate it in the data config"
            )
        if self.mask_padding and text_mask is None:
            raise ValueError("mask_padding needs a text_mask, got None")
        keep = text_mask if self.mask_padding else None
        x = self.embedding(text)  # [B, L, D]
        x = x + self.positions[None, :length].astype(x.dtype)
        mask = None if keep is None else padding_mask(keep)
        tokens = self.encoder(x, mask, deterministic=not train)
        if self.pooling == "last":
            pooled = pool_last(tokens, keep)
        else:
            pooled = pool_end_of_text(tokens, text, self.eos_id)
        return TextOutput(tokens, pooled if self.embed_dim is None else self.head(pooled))


def build_text_encoder(
    variant: str | None = None, *, pool: str = "last", **fields: Any
) -> TextEncoder:
    """Returns a TextEncoder.

    Args:
        variant: a size of variants.VARIANTS, "B"; None takes width, depth, mlp_dim and num_heads
            from `fields`.
        pool: the field `pooling`.
        **fields: other fields of TextEncoder; they win over the variant.

    Raises:
        ValueError: for an unknown variant, field or pooling.
    """
    size = lookup(VARIANTS, variant, "variant") if variant is not None else {}
    spec = {"name": "text_encoder", "pooling": pool, **size, **fields}
    return build({"text_encoder": TextEncoder}, spec, "text encoder")
