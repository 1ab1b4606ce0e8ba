# SPDX-License-Identifier: Apache-2.0
"""What visual tokens cost: a LLaVA against transformers, and ways to have fewer of them.

    python benchmarks/visual_tokens.py --batch 1 8 --rounds 5

Needs the test extra (torch, transformers). A LLaVA-1.5 with 576 visual tokens per image and random
weights, the language model as wide as SmolLM2-135M, goes from transformers to flax_vlm through a
checkpoint folder. Everything runs in this process, in float32, greedily, in turns and on the same
cores. A prompt is timed alone, from pixels to the first logits, then with its new tokens; the
difference is decoding. What is reported is the ratio of times within a round: the machine may do
other things, too.

"library": ours against transformers, as its `generate` runs by default. "compression": each way
against ours with all tokens, and the cache's bytes in closed form and of the arrays. "resampler":
the same parameters take 64, 256 and 576 tokens and 8 frames of 64 to 64 tokens; FLOPs are XLA's
count of an unrolled language model that reads the question and those tokens, or all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from flax_vlm.build import build
from flax_vlm.convert.loading import load_pretrained
from flax_vlm.models import MODELS
from flax_vlm.models.fastv import PrunedCache
from flax_vlm.models.generate import generate, start
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.models.prompts import Prompt
from flax_vlm.nn.connectors import build_connector
from flax_vlm.scaling.decoder_flops import cache_bytes
from flax_vlm.trees import num_bytes

IMAGE_TOKEN, VOCABULARY, SIZE, QUESTION = 5, 8192, 336, 63
LATENTS = {"num_latents": 64, "depth": 2, "num_heads": 8, "head_dim": 64, "num_frames": 8}
# changes of the model's spec
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "average_pool, 2 x 2": {"compression": {"name": "average_pool", "scale": 2}},
    "pixel_shuffle, 2 x 2": {"compression": {"name": "pixel_shuffle", "scale": 2}},
    "token_merging to 144": {"compression": {"name": "token_merging", "tokens": 144}},
    "FastV, K 2, half": {"pruning": {"layer": 2, "keep": 288}},
    "FastV, K 2, a quarter": {"pruning": {"layer": 2, "keep": 144}},
    "resampler, 64 latents": {"connector": {"name": "resampler", "resampler": LATENTS}},
}
Calls = dict[str, Callable[[], Any]]  # "prompt" and "all"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model and its parameters."""

    model: Any
    params: Any


def make_theirs(depth: int) -> Any:
    """Returns the LLaVA of transformers; kernels are N(0, 1 / inputs), so that logits spread."""
    torch.manual_seed(0)
    tower = dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    decoder = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **tower, num_hidden_layers=4, image_size=SIZE, patch_size=14
        ),
        text_config=transformers.LlamaConfig(
            **decoder,
            num_hidden_layers=depth,
            num_key_value_heads=3,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=IMAGE_TOKEN,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def make_ours(folder: str) -> tuple[dict[str, Any], Contender]:
    """Returns (spec, the same model)."""
    loaded = load_pretrained(folder)
    return loaded.spec, Contender(
        build(MODELS, loaded.spec, "model"), jax.device_put(loaded.params)
    )


def changed(spec: Mapping[str, Any], whole: Contender, change: Mapping[str, Any]) -> Contender:
    """Returns the model with other fields; what has another shape is random."""
    model = build(MODELS, {**spec, **change}, "model")
    rng = np.random.default_rng(3)

    def one(shape: jax.ShapeDtypeStruct, found: Any) -> Any:
        if found is not None and found.shape == shape.shape:
            return found
        return jnp.asarray(rng.normal(0, 0.05, shape.shape), jnp.float32)

    shapes = parameter_shapes(model)
    params = {
        name: jax.tree.map(lambda s: one(s, None), shapes[name])
        if jax.tree.structure(shapes[name]) != jax.tree.structure(whole.params[name])
        else jax.tree.map(one, shapes[name], whole.params[name])
        for name in shapes
    }
    return Contender(model, params)


def our_prompt(contender: Contender, batch: int) -> Callable[[], Prompt]:
    """Returns a function that makes the prompt from pixels, the encoder's work included."""
    model, params = contender.model, contender.params
    text, pixels = inputs(batch, model.tokens_per_image)
    visual = text == IMAGE_TOKEN
    embed = jax.jit(lambda p, t, x: model.apply({"params": p}, t, x, method="embed"))
    return lambda: Prompt(embeddings=embed(params, text, pixels), visual=visual)


def inputs(batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (text [B, S] with one placeholder per visual token, pixels [B, H, W, 3])."""
    rng = np.random.default_rng(1)
    words = rng.integers(10, VOCABULARY, (batch, QUESTION + 1)).astype(np.int32)
    image = np.full((batch, tokens), IMAGE_TOKEN, np.int32)
    pixels = rng.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)
    return np.concatenate([words[:, :1], image, words[:, 1:]], axis=1), pixels


def our_calls(contender: Contender, batch: int, new: int) -> Calls:
    """Returns what is timed."""
    prompt = our_prompt(contender, batch)
    decoder, params = contender.model.language_model, contender.params["language_model"]
    return {
        "prompt": lambda: jax.block_until_ready(
            start(decoder, params, prompt(), max_new_tokens=new)
        ),
        "all": lambda: jax.block_until_ready(
            generate(decoder, params, prompt(), max_new_tokens=new)
        ),
    }


def their_calls(model: Any, batch: int, new: int, tokens: int) -> Calls:
    """Returns what is timed."""
    text, pixels = inputs(batch, tokens)
    ids, image = torch.from_numpy(text).long(), torch.from_numpy(pixels.transpose(0, 3, 1, 2))
    given = dict(input_ids=ids, pixel_values=image, attention_mask=torch.ones_like(ids))
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return {
        "prompt": lambda: model(**given, use_cache=True, logits_to_keep=1),
        "all": lambda: model.generate(**given, **options)[:, text.shape[1] :],
    }


def seconds(function: Callable[[], Any]) -> float:
    """Returns how long a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def time_in_turns(contenders: Mapping[str, Calls], rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns {contender: {"prompt" and "decode": seconds [rounds]}}; the first round warms up."""
    calls = {(name, phase): c[phase] for name, c in contenders.items() for phase in c}
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key in calls if turn % 2 else reversed(calls):
            times[key].append(seconds(calls[key]))
    found = {key: np.array(values[1:]) for key, values in times.items()}
    return {
        name: {
            "prompt": found[name, "prompt"],
            "decode": found[name, "all"] - found[name, "prompt"],
        }
        for name in contenders
    }


def ratio(ours: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Returns median, tenth and ninetieth percentile of the ratios of times within a round."""
    low, middle, high = np.percentile(ours / reference, (10, 50, 90)).tolist()
    return {"median": middle, "p10": low, "p90": high}


def library_row(times: Mapping[str, Any], batch: int, new: int, prompt: int) -> dict[str, Any]:
    """Returns ours against transformers."""
    row: dict[str, Any] = {"row": "library", "batch": batch}
    for phase, tokens in (("prompt", prompt), ("decode", new)):
        ours, theirs = (times[name][phase] for name in ("all tokens", "transformers"))
        row[f"{phase}_tokens_per_second"] = {
            "flax_vlm": batch * tokens / float(np.median(ours)),
            "transformers": batch * tokens / float(np.median(theirs)),
        }
        row[f"{phase}_time_ratio"] = ratio(ours, theirs)
    return row


def compression_row(
    name: str, contender: Contender, times: Mapping[str, Any], batch: int, new: int
) -> dict[str, Any]:
    """Returns a way to have fewer tokens against all of them."""
    decoder, params = contender.model.language_model, contender.params["language_model"]
    cache = start(decoder, params, our_prompt(contender, batch)(), max_new_tokens=new).cache
    parts = (cache.first, cache.rest) if isinstance(cache, PrunedCache) else (cache,)
    return {
        "row": "compression",
        "batch": batch,
        "name": name,
        "visual_tokens": contender.model.tokens_per_image,
        "cache_bytes": num_bytes([(part.k, part.v) for part in parts]),
        "cache_bytes_in_closed_form": cache_bytes(decoder, batch, cache.capacity),
        "prompt_time_ratio": ratio(times[name]["prompt"], times["all tokens"]["prompt"]),
        "decode_time_ratio": ratio(times[name]["decode"], times["all tokens"]["decode"]),
    }


def resampler_rows(whole: Contender, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields what a resampler saves the language model, for several numbers of tokens."""
    decoder, params = whole.model.language_model, whole.params["language_model"]
    width = whole.model.image.width
    connector = build_connector({"name": "resampler", "resampler": LATENTS}, decoder.width)
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(connector.init, jax.random.key(0), jnp.zeros((1, 8, 64, width)))
    weights = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.05, s.shape), s.dtype), shapes)
    resample = jax.jit(lambda w, x: connector.apply(w, x)[0])
    question = rng.normal(size=(1, QUESTION + 1, decoder.width)).astype(np.float32)
    for shape in ((64,), (256,), (576,), (8, 64)):
        features = rng.normal(size=(1, *shape, width)).astype(np.float32)
        number = int(np.prod(shape))
        tokens = {"resampled": resample(weights, features)}
        tokens["all"] = rng.normal(size=(1, number, decoder.width)).astype(np.float32)
        prompts = {
            n: Prompt(embeddings=jnp.concatenate([x, question], 1)) for n, x in tokens.items()
        }

        def read(name: str, prompts: Any = prompts) -> Any:
            return jax.block_until_ready(start(decoder, params, prompts[name], max_new_tokens=1))

        times: dict[str, list[float]] = {name: [] for name in prompts}
        resampling = []
        for turn in range(rounds + 1):
            for name in prompts if turn % 2 else reversed(prompts):
                times[name].append(seconds(lambda n=name: read(n)))
            resampling.append(
                seconds(lambda x=features: jax.block_until_ready(resample(weights, x)))
            )
        resampled, all_tokens = (np.array(times[name][1:]) for name in ("resampled", "all"))
        flops = {name: xla_flops(decoder, params, p.embeddings) for name, p in prompts.items()}
        yield {
            "row": "resampler",
            "input": list(shape),
            "output": int(tokens["resampled"].shape[1]),
            "language_model_flops": flops,
            "language_model_flops_ratio": flops["resampled"] / flops["all"],
            "language_model_time_ratio": ratio(resampled, all_tokens),
            "with_resampling_time_ratio": ratio(resampled + resampling[1:], all_tokens),
        }


def xla_flops(decoder: Any, params: Any, embeddings: jax.Array) -> float:
    """Returns XLA's count for reading embeddings, of a model without a loop."""
    unrolled = decoder.clone(unroll=decoder.depth)

    def read(params: Any, x: jax.Array) -> jax.Array:
        tokens, _ = unrolled.apply({"params": params}, x, method="decode")
        return unrolled.apply({"params": params}, tokens[:, -1], method="logits")

    return float(jax.jit(read).lower(params, embeddings).compile().cost_analysis()["flops"])


@torch.no_grad()
def main() -> int:
    """Returns the exit code: 1 if the two do not generate the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=8, help="layers of the language model")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.threads :])
    torch.set_num_threads(arguments.threads)
    theirs = make_theirs(arguments.depth)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        spec, whole = make_ours(folder)
    others = {name: changed(spec, whole, change) for name, change in COMPRESSIONS.items()}
    equal, rows, prompt = True, [], whole.model.tokens_per_image + QUESTION + 1
    for batch in arguments.batch:
        new = arguments.new
        calls = {"all tokens": our_calls(whole, batch, new)}
        calls["transformers"] = their_calls(theirs, batch, new, whole.model.tokens_per_image)
        calls |= {name: our_calls(one, batch, new) for name, one in others.items()}
        same = np.array_equal(calls["all tokens"]["all"]().tokens, calls["transformers"]["all"]())
        equal &= same
        times = time_in_turns(calls, arguments.rounds)
        rows.append(library_row(times, batch, new, prompt) | {"tokens_equal": bool(same)})
        rows += [
            compression_row(name, one, times, batch, new)
            for name, one in {"all tokens": whole, **others}.items()
        ]
    rows += resampler_rows(whole, arguments.rounds)
    for row in rows:
        print(json.dumps(row))
    print(json.dumps({"visual_tokens": whole.model.tokens_per_image, "rows": rows}))
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
