# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer: patches, positions, an encoder, a pooled vector, a projection or classes.

Paper: Dosovitskiy et al. 2021, arXiv:2010.11929 (ViT); Zhai et al. 2022, arXiv:2106.04560 (sizes,
MAP head).

Differs from the paper: initialisers, GELU kind (tanh) and epsilon (1e-6) follow big_vision
`models/vit.py`, and the classifier's head starts at zero as there. The class token has a position
of its own as in the paper, Hugging Face and CLIP; big_vision adds the positions before it puts the
class token in front (`class_position=False`).

Other families are this module with other fields. CLIP: `pre_norm`, no `patch_bias`, "quick_gelu", a
bias-free head. SigLIP: pooling "map". DINOv2 (Oquab et al. 2023, arXiv:2304.07193): `layer_scale`,
`mask_token`, the giant `gated_mlp`; with registers (Darcet et al. 2023, arXiv:2309.16588):
`num_registers`. EVA-02 (Fang et al. 2023, arXiv:2303.11331): `rotary_grid`, `gated_mlp`,
`sub_norm`, `qkv_bias` "qv".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.build import build, lookup
from flax_vlm.models.variants import decode_variant
from flax_vlm.models.vit_checks import check_choices, check_image
from flax_vlm.nn.initializers import INITS
from flax_vlm.nn.norms import LayerNorm
from flax_vlm.nn.patches import PatchEmbed, as_pair, drop_patches, grid_size, num_kept
from flax_vlm.nn.pooling import MAPHead, pool_class_token, pool_mean
from flax_vlm.nn.positions import sincos2d
from flax_vlm.nn.resampler import PerceiverResampler
from flax_vlm.nn.rotary import Rotary, rotary2d
from flax_vlm.nn.transformer import Encoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionOutput:
    """What a vision encoder returns.

    Attributes:
        tokens: [B, T, D] after the final norm: the class token, if there is one, the registers, the
            patches in row-major order.
        pooled: [B, D], or [B, E] where the encoder has a head.
    """

    tokens: jax.Array
    pooled: jax.Array


class VisionTransformer(nn.Module):
    """An image encoder.

        before: patches(image) + positions[1:]                                  [B, P, D]
        after:  [cls + positions[0] | registers | patches(image) + positions[1:]]
        tokens = norm(blocks(ln_pre(after)))                                    [B, T, D]

    Attributes:
        width: D.
        depth: number of blocks.
        mlp_dim: M.
        num_heads: N.
        patch_size: pixels, a number or (height, width).
        image_size: pixels, a number or (height, width); every image must have it.
        pooling: "cls" the class token, "gap" the mean of the patches, "map" an attention head over
            all tokens, "resampler" the mean of a Perceiver Resampler's latents.
        resampler: arguments of resampler.PerceiverResampler.
        class_token: put a learned token in front of the patches.
        class_position: the class token has a learned position too (as in the paper, Hugging Face
            and CLIP).
        num_registers: learned tokens without position between class token and patches.
        mask_token: a learned vector that can stand for patches; see `__call__`.
        position_embedding: "learned", or "sincos2d", a fixed table without parameters (and zero for
            the class token).
        rotary_grid: (rows, columns) of the grid that rotary positions were trained on; every block
            then turns q and k of the patches too. None has no rotary positions.
        patch_bias: the patch embedding has a bias; not in CLIP.
        drop_remainder: ignore border pixels that fill no patch; see patches.grid_size.
        pre_norm: a norm `ln_pre` before the first block, as in CLIP.
        activation: a key of mlp.ACTIVATIONS.
        norm_eps: epsilon of every norm.
        qkv_bias: which of q, k and v have a bias, "qkv", "qv" or "".
        gated_mlp: see mlp.Mlp.
        sub_norm: see transformer.Block.
        layer_scale: see transformer.Block.
        embed_dim: E of the head, a linear map of the pooled vector computed in float32; None has no
            head.
        head_bias: the head has a bias; not in CLIP.
        head_tanh: tanh after the head (the "pooler" of Hugging Face's ViT).
        patch_dropout: share of the patches dropped in training (FLIP); the class token always
            stays.
        dropout: rate in the encoder and on the embedded tokens.
        init_scheme: a key of initializers.INITS.
        dtype: of the matmuls, "float32" or "bfloat16"; parameters are float32.
        remat: a key of transformer.REMAT_POLICIES.
        unroll: layers per iteration of the scan.
        attention_implementation: "auto" or a key of attention.IMPLEMENTATIONS.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int | Sequence[int] = 16
    image_size: int | Sequence[int] = 224
    pooling: str = "cls"
    resampler: Mapping[str, Any] | None = None
    class_token: bool = True
    class_position: bool = True
    num_registers: int = 0
    mask_token: bool = False
    position_embedding: str = "learned"
    rotary_grid: tuple[int, int] | None = None
    patch_bias: bool = True
    drop_remainder: bool = False
    pre_norm: bool = False
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    qkv_bias: str = "qkv"
    gated_mlp: bool = False
    sub_norm: bool = False
    layer_scale: float | None = None
    embed_dim: int | None = None
    head_bias: bool = True
    head_tanh: bool = False
    patch_dropout: float = 0.0
    dropout: float = 0.0
    init_scheme: str = "vit"
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention_implementation: str = "auto"

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return grid_size(self.image_size, self.patch_size, drop_remainder=self.drop_remainder)

    @property
    def num_prefix(self) -> int:
        """How many tokens stand before the patches."""
        return int(self.class_token) + self.num_registers

    def setup(self) -> None:
        """Creates the parts; their names are the parameter paths."""
        check_choices(self)
        inits = lookup(INITS, self.init_scheme, "init_scheme")(self.width, self.depth)
        self.patches = PatchEmbed(
            self.width,
            self.patch_size,
            use_bias=self.patch_bias,
            drop_remainder=self.drop_remainder,
            dtype=self.dtype,
            kernel_init=inits.patches,
        )
        if self.class_token:
            self.cls = self.param("cls", inits.class_token, (1, self.width), jnp.float32)
        if self.num_registers:
            shape = (self.num_registers, self.width)
            self.registers = self.param("registers", inits.class_token, shape, jnp.float32)
        if self.mask_token:
            shape = (1, self.width)
            self.mask = self.param("mask", nn.initializers.zeros, shape, jnp.float32)
        if self.position_embedding == "learned":
            length = self.grid[0] * self.grid[1] + int(self.class_token and self.class_position)
            self.positions = self.param(
                "positions", inits.positions, (length, self.width), jnp.float32
            )
        self.embedding_dropout = nn.Dropout(self.dropout)
        if self.pre_norm:
            self.ln_pre = LayerNorm(self.norm_eps)
        self.encoder = Encoder(
            self.depth,
            self.num_heads,
            self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            qkv_bias=self.qkv_bias,
            gated_mlp=self.gated_mlp,
            sub_norm=self.sub_norm,
            layer_scale=self.layer_scale,
            init_scheme=self.init_scheme,
            dropout=self.dropout,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
            attention_implementation=self.attention_implementation,
        )
        if self.pooling == "map":
            self.pool = MAPHead(
                self.num_heads,
                self.mlp_dim,
                inits,
                activation=self.activation,
                norm_eps=self.norm_eps,
                dtype=self.dtype,
                attention_implementation=self.attention_implementation,
            )
        if self.pooling == "resampler":
            self.pool = PerceiverResampler(**self.resampler, dtype=self.dtype)
        if self.embed_dim is not None:
            self.head = nn.Dense(
                self.embed_dim,
                use_bias=self.head_bias,
                kernel_init=inits.head,
                dtype=jnp.float32,
            )

    def __call__(
        self, image: jax.Array, *, train: bool = False, masked: jax.Array | None = None
    ) -> VisionOutput:
        """Returns the tokens and the pooled vector.

        Args:
            image: [B, H, W, C] float32, normalised.
            masked: [B, P] bool, True = the mask token stands for this patch (its position stays).
            train: dropout ("dropout") and patch dropout ("patch_dropout") are on and need their
                rngs.

        Raises:
            ValueError: if the image is not float, or has another size than the encoder's, or
                patches are masked without a mask token.
        """
        output = self._encode(image, train=train, masked=masked)
        if self.embed_dim is None:
            return output
        pooled = self.head(output.pooled)
        return VisionOutput(output.tokens, jnp.tanh(pooled) if self.head_tanh else pooled)

    def features(
        self, image: jax.Array, layer: int | None = None, *, train: bool = False
    ) -> jax.Array:
        """Returns [B, T, D], what a language model is shown.

        Args:
            image: [B, H, W, C] float32, normalised.
            layer: of how many blocks, without the final norm; None of all, with it.
            train: dropout is on.
        """
        if self.is_initializing():  # pooling has parameters, too
            self(image)
        return self._tokens(image, train=train, layer=layer)

    def _encode(self, image: jax.Array, **options: Any) -> VisionOutput:
        tokens = self._tokens(image, **options)
        return VisionOutput(tokens, self._pool(tokens))

    def _tokens(
        self,
        image: jax.Array,
        *,
        train: bool,
        masked: jax.Array | None = None,
        layer: int | None = None,
    ) -> jax.Array:
        check_image(image, self.image_size)
        x = self._embed(image, train=train, masked=masked)  # [B, T, D]
        x = self.embedding_dropout(x, deterministic=not train)
        if self.pre_norm:
            x = self.ln_pre(x)
        return self.encoder(x, None, self._rotary(), layer=layer, deterministic=not train)

    def _embed(self, image: jax.Array, *, train: bool, masked: jax.Array | None) -> jax.Array:
        x = self.patches(image)  # [B, P, D]
        if masked is not None:
            if not self.mask_token:
                raise ValueError("masked patches need mask_token=True, got False")
            x = jnp.where(masked[:, :, None], self.mask[None].astype(x.dtype), x)
        patch_positions, class_position = self._position_table()
        x = x + patch_positions[None].astype(x.dtype)
        keep = num_kept(x.shape[1], self.patch_dropout)
        if train and keep < x.shape[1]:
            x = drop_patches(x, self.make_rng("patch_dropout"), keep)
        prefix = [self.cls + class_position] if self.class_token else []  # [1, D]
        prefix += [self.registers] if self.num_registers else []  # [R, D]
        if prefix:
            first = jnp.concatenate(prefix)[None].astype(x.dtype)
            first = jnp.broadcast_to(first, (x.shape[0], *first.shape[1:]))
            x = jnp.concatenate([first, x], axis=1)  # [B, 1 + R + P, D]
        return x

    def _rotary(self) -> Rotary | None:
        if self.rotary_grid is None:
            return None
        return rotary2d(
            self.grid,
            self.width // self.num_heads,
            reference=self.rotary_grid,
            num_prefix=self.num_prefix,
        )

    def _position_table(self) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of the patches [P, D] and of the class token [1, D]."""
        zero = jnp.zeros((1, self.width))
        if self.position_embedding == "sincos2d":
            return jnp.asarray(sincos2d(self.grid, self.width)), zero
        if self.class_token and self.class_position:
            return self.positions[1:], self.positions[:1]
        return self.positions, zero

    def _pool(self, tokens: jax.Array) -> jax.Array:
        if self.pooling == "cls":
            return pool_class_token(tokens)
        if self.pooling == "gap":
            return pool_mean(tokens, num_prefix=self.num_prefix)
        if self.pooling == "resampler":
            return pool_mean(self.pool(tokens))
        return self.pool(tokens)


class ViTClassifier(VisionTransformer):
    """A VisionTransformer with a linear layer `head` to classes.

    The head starts at zero: every class is equally likely.

    Attributes:
        num_classes: number of classes.
    """

    num_classes: int = 1000

    def setup(self) -> None:
        """Creates the encoder's parts and the head."""
        if self.embed_dim is not None:
            raise ValueError(
                f"a classifier has no embed_dim, got {self.embed_dim}; set num_classes"
            )
        super().setup()
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, dtype=jnp.float32)

    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns logits [B, num_classes] float32.

        Args:
            image: [B, H, W, C] float32, normalised.
            train: dropout and patch dropout are on.
        """
        return self.head(self._encode(image, train=train).pooled)

    def encode(self, image: jax.Array, *, train: bool = False) -> VisionOutput:
        """Returns the tokens and the pooled vector that the head sees.

        Args:
            image: [B, H, W, C] float32, normalised.
            train: dropout and patch dropout are on.
        """
        return self._encode(image, train=train)


def vit_fields(
    variant: str | None, pool: str, class_token: bool | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields of a VisionTransformer; arguments of `build_vit`."""
    given = {"pooling": pool, "class_token": pool == "cls" if class_token is None else class_token}
    given |= decode_variant(variant) if variant is not None else {}
    given |= fields
    # lists from JSON: fields must be hashable
    for key in ("image_size", "patch_size", "rotary_grid"):
        if given.get(key) is not None:
            given[key] = given[key] if isinstance(given[key], int) else as_pair(given[key])
    return given


def build_vit(
    variant: str | None = None,
    *,
    num_classes: int | None = None,
    pool: str = "cls",
    class_token: bool | None = None,
    **fields: Any,
) -> VisionTransformer:
    """Returns a ViTClassifier if `num_classes` is given, a VisionTransformer if not.

    Args:
        variant: size and patch size, "B/16"; None takes width, depth, mlp_dim, num_heads and
            patch_size from `fields`.
        num_classes: number of classes.
        pool: the field `pooling`.
        class_token: None puts one in exactly where `pool` is "cls".
        **fields: other fields of VisionTransformer; they win over the variant.

    Raises:
        ValueError: for an unknown field, a patch size that does not divide the image, or fields
            that contradict each other.
    """
    given = vit_fields(variant, pool, class_token, fields)
    if num_classes is None:
        model = build({"vit": VisionTransformer}, {"name": "vit", **given}, "model")
    else:
        model = build(
            {"vit": ViTClassifier}, {"name": "vit", "num_classes": num_classes, **given}, "model"
        )
    check_choices(model)
    return model
