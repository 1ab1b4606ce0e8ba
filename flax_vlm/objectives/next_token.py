# SPDX-License-Identifier: Apache-2.0
"""Language modelling, with or without images: captions, visual instruction tuning, text alone.

    loss = sum over supervised tokens of -log p(token | image, tokens before) / their number

Liu et al., 2023, arXiv:2304.08485, section 4.2. Supervised are the tokens of `loss_mask`: what an
assistant says and its end token (data/conversations.py). The mean is over all tokens of the global
batch, as in LLaVA's code: a long answer weighs more than a short one.

What is frozen is split off before the gradient is taken (training/step.py): an image encoder that
is not trained is run without a tape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_vlm.batch import normalize_image
from flax_vlm.losses.tokens import next_token_targets, token_loss
from flax_vlm.meters import Mean
from flax_vlm.models.attention_maps import text_attention
from flax_vlm.models.generate import advance, start
from flax_vlm.models.language_model import LanguageModel
from flax_vlm.models.prompts import Prompt
from flax_vlm.objectives.base import Aux, Batch, Extras, Params, PredictFn

INDICES = ("visual_index", "visual_weight", "positions", "segments")  # given to the model as is


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Every supervised token is predicted from what stands before it.

    Attributes:
        model: a Llava, or a LanguageModel for text alone.
        image_mean: per channel, in units of x / 255.
        image_std: per channel, in units of x / 255.
        logit_chunk: positions whose logits are in memory at once, [B, logit_chunk, V] float32; they
            are computed again in the backward pass. 0 takes all. Changes no number.
        max_new_tokens: of the prediction "generate".
        stop_ids: tokens that end a generated text; they are part of it.
        pad_id: what stands behind it.
    """

    model: nn.Module
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    logit_chunk: int = 0
    max_new_tokens: int = 32
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0

    @property
    def additive(self) -> bool:
        """True: the loss of a token does not depend on other rows."""
        return True

    @property
    def sees(self) -> bool:
        """Does the model take images?"""
        return not isinstance(self.model, LanguageModel)

    @property
    def predictions(self) -> Mapping[str, PredictFn]:
        """Functions of (params, extras, batch): "logits" [B, L, V] float32, of the token after each
        one; "generate" [B, max_new_tokens] int32, the most probable continuation of prompts that
        are padded on the left; "image_tokens" [B, I T, D], the encoder's output; "visual_tokens",
        what the language model is shown of it; "text_attention" [B, L, L], see
        `attention_maps.text_attention`.
        """

        def seen(method: str) -> PredictFn:
            return lambda params, extras, batch: self.model.apply(
                {"params": params}, self._images(batch), method=method
            )

        predictions: dict[str, PredictFn] = {
            "logits": lambda params, extras, batch: self._outputs(params, batch).logits,
            "generate": lambda params, extras, batch: self._generate(params, batch),
        }
        if self.sees:
            predictions |= {name: seen(name) for name in ("image_tokens", "visual_tokens")}
            predictions["text_attention"] = lambda params, extras, batch: text_attention(
                self.model,
                params,
                batch["text"],
                self._images(batch),
                text_mask=batch.get("text_mask"),
                **indices(batch),
            )
        return predictions

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        """Returns random parameters and no extras."""
        inputs = (batch["text"], self._images(batch)) if self.sees else (batch["text"],)
        return self.model.init(rng, *inputs)["params"], {}

    def loss(
        self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[Mean, Aux]:
        """Returns the loss summed over supervised tokens, and how many were most probable."""
        target, counted = next_token_targets(
            batch["text"], batch["loss_mask"], batch.get("segments")
        )
        if "example_mask" in batch:
            counted = counted & batch["example_mask"][:, None]
        tokens = self._outputs(params, batch, rng, train=train).tokens  # [B, L, D]

        def of(tokens: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = self.model.apply({"params": params}, tokens, method="logits")
            return token_loss(logits, target), jnp.argmax(logits, axis=-1) == target

        losses, correct = in_chunks(of, self.logit_chunk, tokens, target)
        return Mean.of(losses, counted), Aux({"token_accuracy": Mean.of(correct, counted)})

    def after_update(
        self, params: Params, extras: Extras, stats: dict[str, Any], step: jax.Array
    ) -> Extras:
        """Returns the extras as they are."""
        return extras

    def _images(self, batch: Batch) -> jax.Array | None:
        images = batch.get("images", batch.get("image"))
        if images is None:
            return None
        if not self.sees:
            raise ValueError(
                f"a {type(self.model).__name__} reads text alone, got images of shape "
                f"{tuple(images.shape)}; take them out of the data, or choose the model llava"
            )
        return normalize_image(images, self.image_mean, self.image_std)

    def _outputs(
        self, params: Params, batch: Batch, rng: jax.Array | None = None, *, train: bool = False
    ) -> Any:
        images = self._images(batch)
        seen = (images,) if self.sees else ()
        rngs = {"dropout": rng} if train else {}
        return self.model.apply(
            {"params": params},
            batch["text"],
            *seen,
            batch.get("text_mask"),
            **indices(batch),
            train=train,
            rngs=rngs,
        )

    def _generate(self, params: Params, batch: Batch) -> jax.Array:
        images, text, mask = self._images(batch), batch["text"], batch.get("text_mask")
        model, decoder = self.model, params
        prompt = Prompt(text=text, mask=mask)
        if self.sees:
            given = {key: batch[key] for key in ("visual_index", "visual_weight") if key in batch}
            embeddings = model.apply({"params": params}, text, images, **given, method="embed")
            visual = text == model.image_token_id
            prompt = Prompt(embeddings=embeddings, mask=mask, visual=visual)
            model, decoder = model.language_model, params["language_model"]
        state = start(
            model, decoder, prompt, max_new_tokens=self.max_new_tokens, pad_id=self.pad_id
        )
        stop_ids = jnp.asarray(self.stop_ids, jnp.int32)
        return advance(
            model, decoder, state, self.max_new_tokens, None, stop_ids, self.pad_id
        ).tokens


def indices(batch: Batch) -> dict[str, jax.Array]:
    """Returns the INDICES that a batch has."""
    return {key: batch[key] for key in INDICES if key in batch}


def in_chunks(function: Any, size: int, *arrays: jax.Array) -> Any:
    """Returns function(*arrays) for arrays [B, L, ...], computed `size` positions at a time.

    Args:
        function: arrays [B, S, ...] -> a tree of arrays [B, S]; positions do not depend on each
            other.
        size: positions at once; their intermediates are computed again in the backward pass. 0
            takes all and keeps them.
        *arrays: [B, L, ...].

    Raises:
        ValueError: if size does not divide L.
    """
    length = arrays[0].shape[1]
    if size in (0, length):
        return function(*arrays)
    if length % size:
        raise ValueError(f"logit_chunk must divide the length of the text, got {size} and {length}")

    def cut(x: jax.Array) -> jax.Array:  # [B, L, ...] -> [L / size, B, size, ...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length)

    chunks = tuple(map(cut, arrays))
    return jax.tree.map(joined, jax.lax.map(lambda c: jax.checkpoint(function)(*c), chunks))
