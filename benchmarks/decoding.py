# SPDX-License-Identifier: Apache-2.0
"""Reading a prompt and generating on this machine: flax_vlm against transformers, same weights.

    python benchmarks/decoding.py --variant SmolLM2-135M --prompt 640 --new 32 --batch 1 8

Needs the test extra (torch, transformers). Both run greedily in this process, in float32, in turns
and on the same cores, with the same random weights, which go from one to the other through a
checkpoint folder; transformers runs as `generate` does by default (SDPA, growing cache, no
torch.compile). A prompt is timed alone, then with its new tokens; the difference is what decoding
took. The result is the ratio of the times in each round, since the machine may do other things too.

Besides: bytes of the cache, in closed form and of the arrays, and how far int8 weights and an int8
cache move the logits of the last prompt token (root mean square over the logits' spread).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers

from flax_vlm.convert.saving import save_pretrained
from flax_vlm.models.generate import generate, start
from flax_vlm.models.language_model import build_language_model
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.models.prompts import Prompt
from flax_vlm.models.quantization import quantize
from flax_vlm.scaling.decoder_flops import cache_bytes
from flax_vlm.trees import map_with_path, num_bytes


def random_parameters(model: Any) -> Any:
    """Returns parameters whose logits are spread: every kernel is N(0, 1 / its inputs)."""
    rng = np.random.default_rng(0)

    def one(path: str, leaf: Any) -> np.ndarray:
        if path.endswith(("scale", "bias")):
            return np.full(leaf.shape, path.endswith("scale") and not model.norm_plus_one, "f4")
        inputs = leaf.shape[-3] if "attention" in path else leaf.shape[-2]
        if path.endswith("o/kernel"):
            inputs = leaf.shape[-3] * leaf.shape[-2]
        if path.endswith("embedding"):
            inputs = leaf.shape[-1]
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(inputs**-0.5)

    return map_with_path(one, parameter_shapes(model))


def seconds(function: Callable[[], Any]) -> float:
    """Returns how long a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def contenders(model: Any, params: Any, theirs: Any, text: np.ndarray, new: int) -> dict[str, Any]:
    """Returns what is timed: {(library, "prompt" or "all"): call}."""
    ids = torch.from_numpy(text).long()
    mask = torch.ones_like(ids)
    prompt = Prompt(text)
    capacity = text.shape[1] + new
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return {
        ("flax_vlm", "prompt"): lambda: jax.block_until_ready(
            start(model, params, prompt, max_new_tokens=new, capacity=capacity)
        ),
        ("flax_vlm", "all"): lambda: jax.block_until_ready(
            generate(model, params, prompt, max_new_tokens=new)
        ),
        ("transformers", "prompt"): lambda: theirs(ids, use_cache=True, logits_to_keep=1),
        ("transformers", "all"): lambda: theirs.generate(ids, attention_mask=mask, **options),
    }


@torch.no_grad()
def compare(model: Any, params: Any, theirs: Any, batch: int, arguments: Any) -> dict[str, Any]:
    """Returns the figures of one batch size."""
    rng = np.random.default_rng(1)
    text = rng.integers(3, model.vocab_size, (batch, arguments.prompt)).astype(np.int32)
    calls = contenders(model, params, theirs, text, arguments.new)
    same = np.array_equal(
        calls["flax_vlm", "all"]().tokens, calls["transformers", "all"]()[:, arguments.prompt :]
    )
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(arguments.rounds + 1):
        for name in calls if turn % 2 else reversed(calls):
            times[name].append(seconds(calls[name]))
    found = {name: np.array(values[1:]) for name, values in times.items()}  # the first warms up
    report: dict[str, Any] = {"batch": batch, "tokens_equal": bool(same)}
    for phase, tokens in (("prompt", arguments.prompt), ("decode", arguments.new)):
        taken = {}
        for library in ("flax_vlm", "transformers"):
            prompt = found[library, "prompt"]
            taken[library] = prompt if phase == "prompt" else found[library, "all"] - prompt
            report[f"{phase}_tokens_per_second_{library}"] = float(
                batch * tokens / np.median(taken[library])
            )
        ratio = taken["flax_vlm"] / taken["transformers"]
        low, middle, high = np.percentile(ratio, (10, 50, 90)).tolist()
        report[f"{phase}_time_ratio"] = {"median": middle, "p10": low, "p90": high}
    return report


def memory_and_error(model: Any, params: Any, arguments: Any) -> dict[str, Any]:
    """Returns bytes of weights and cache, and how far int8 moves the logits."""
    rng = np.random.default_rng(1)
    text = rng.integers(3, model.vocab_size, (4, arguments.prompt)).astype(np.int32)
    small = model.clone(weights="int8")
    cases = {
        "float32": (model, params, None),
        "int8_cache": (model, params, "int8"),
        "int8_weights": (small, quantize(params), None),
    }
    logits, report = {}, {}
    for name, (kind, weights, dtype) in cases.items():
        state = start(kind, weights, Prompt(text), max_new_tokens=arguments.new, cache_dtype=dtype)
        logits[name] = np.asarray(state.logits)
        stores = (state.cache.k, state.cache.v, state.cache.k_scale, state.cache.v_scale)
        closed = cache_bytes(model, 4, state.cache.capacity, dtype)
        report[name] = {
            "weight_bytes": num_bytes(weights),
            "cache_bytes": num_bytes(stores),
            "cache_bytes_in_closed_form": closed,
        }
        error = logits[name] - logits["float32"]
        report[name]["logit_error"] = float(error.std() / logits["float32"].std())
    return report


def main() -> int:
    """Returns the exit code: 1 if the two do not generate the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="SmolLM2-135M")
    parser.add_argument("--depth", type=int, help="layers; the variant's by default")
    parser.add_argument("--prompt", type=int, default=640)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    # both thread pools are as large as the cores that the process may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.threads :])
    torch.set_num_threads(arguments.threads)
    fields = {} if arguments.depth is None else {"depth": arguments.depth}
    model = build_language_model(arguments.variant, **fields)
    params = random_parameters(model)
    with tempfile.TemporaryDirectory() as folder:
        spec = {"name": "language_model", "variant": arguments.variant, **fields}
        save_pretrained(folder, spec, params)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    params = jax.device_put(params)
    rows = [compare(model, params, theirs, batch, arguments) for batch in arguments.batch]
    for row in rows:
        print(json.dumps(row))
    memory = memory_and_error(model, params, arguments)
    print(json.dumps({"variant": arguments.variant, "rows": rows, "memory": memory}))
    return int(not all(row["tokens_equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
