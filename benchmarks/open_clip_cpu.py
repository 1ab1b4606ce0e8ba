# SPDX-License-Identifier: Apache-2.0
"""CPU time of a training step: flax_vlm against open_clip, the same model, batch and work.

    pip install -e '.[bench]'
    python benchmarks/open_clip_cpu.py --model clip_b32 --batch 16

Both run in this process, in turns, on the same cores (see flax_vlm/tools/step_timing.py); what is
compared is the ratio of their times in each round, since the machine may do other things too. Wall
time is what a user waits for. Processor time is reported beside it: with `--threads 1` it is the
steadier one on a busy machine; several threads wait for each other by spinning, which it counts.

A step is the forward pass of both towers, open_clip's own loss or ours, the backward pass and
AdamW, in float32, at the full text length. open_clip gets images that are float and normalised
already and runs as its training does by default (no torch.compile; `--fused` takes torch's fused
AdamW). Ours is the step of train.py: it normalises uint8 images, and checks every gradient for NaN.
Weights are random on both sides: the same architecture and parameter count, not the same numbers.

open_clip imports torchvision for its image transforms, which nothing here calls. Where torchvision
is missing, or does not match torch, a stand-in without content takes its place.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.metadata
import json
import os
import sys
import time
import types
from typing import Any

# (open_clip's name, ours): the same architectures
MODELS = {
    "clip_b32": ("ViT-B-32-quickgelu", {"name": "clip", "variant": "B/32"}),
    "siglip_b16": ("ViT-B-16-SigLIP", {"name": "siglip", "variant": "B/16"}),
}
LENGTH = {"clip": 77, "siglip": 64}
LOSS = {"clip": "softmax", "siglip": "sigmoid"}


class _Name(type):
    """A class of which every attribute is its own name: enough for tables made on import."""

    def __getattr__(cls, name: str) -> str:
        return name


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder:
    """Finds torchvision and everything below it, as modules without content."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        """Leaves the module empty."""


def provide_torchvision() -> str:
    """Returns "installed", or "stand-in" having put one where torchvision cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())
        return "stand-in"
    return "installed"


class OpenClip:
    """open_clip's training step with the interface of step_timing.Contender."""

    def __init__(self, name: str, batch: dict[str, Any], *, fused: bool):
        import open_clip
        import torch

        self.model = open_clip.create_model(name).train()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        has_bias = getattr(self.model, "logit_bias", None) is not None
        self.loss = open_clip.loss.SigLipLoss() if has_bias else open_clip.ClipLoss()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=fused or None
        )
        image = (batch["image"] / 255.0 - 0.5) / 0.5  # [B, H, W, C]
        self.image = torch.tensor(image.transpose(0, 3, 1, 2), dtype=torch.float32)
        self.text = torch.tensor(batch["text"], dtype=torch.int64)

    def step(self) -> float:
        """Returns the loss before the update."""
        self.optimizer.zero_grad()
        loss = self.loss(*self.model(self.image, self.text))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def time_steps(self, count: int) -> list[float]:
        """Returns the seconds of `count` steps, having run one more before them."""
        seconds = []
        for _ in range(count + 1):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
        return seconds[1:]


class WithCpuTime:
    """A contender that also keeps the processor seconds of each turn, per step."""

    def __init__(self, contender: Any):
        self.contender = contender
        self.seconds: list[float] = []

    def time_steps(self, count: int) -> list[float]:
        """Returns what the contender returns; its untimed step counts here."""
        start = time.process_time()
        times = self.contender.time_steps(count)
        self.seconds.append((time.process_time() - start) / (count + 1))
        return times


def our_config(model: dict[str, Any], batch: int) -> dict[str, Any]:
    """Returns the config of the same training step here."""
    from configs.defaults import defaults
    from flax_vlm.program import plain

    config = plain(defaults())
    config["batch_size"] = batch
    config["data"]["text"]["length"] = LENGTH[model["name"]]
    config["model"] = model
    config["objective"] = {
        "name": "contrastive",
        "pair_loss": {"name": LOSS[model["name"]]},
    }
    config["optimizer"] = {"name": "adamw", "lr": 1e-4, "weight_decay": 0.1}
    return config


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the report."""
    import jax
    import numpy as np
    import torch

    from flax_vlm import trees
    from flax_vlm.program import Program
    from flax_vlm.tools.overrides import parse_changes, with_changes
    from flax_vlm.tools.step_timing import Contender, spread, synthetic_batch, time_in_turns

    torch.set_num_threads(arguments.threads)
    theirs_name, model = MODELS[arguments.model]
    config = our_config(model, arguments.batch)
    for change in arguments.change:
        config = with_changes(config, parse_changes(change))
    program = Program.from_config(config, devices=jax.devices("cpu")[:1])
    theirs = OpenClip(theirs_name, synthetic_batch(program), fused=arguments.fused)
    ours = Contender.build(program)
    losses = [theirs.step(), ours.warm_up(1) or ours.first_loss]
    load = os.getloadavg()[0]
    clocks = [WithCpuTime(theirs), WithCpuTime(ours)]
    times = time_in_turns(clocks, arguments.steps)
    cpu = [np.array(clock.seconds) for clock in clocks]
    ratio = times[1].sum(1) / times[0].sum(1)
    return {
        "model": arguments.model,
        "batch": arguments.batch,
        "text_length": LENGTH[model["name"]],
        "threads": arguments.threads,
        "changes": arguments.change,
        "fused_adamw": arguments.fused,
        "torchvision": arguments.torchvision,
        "parameters": {
            "open_clip": theirs.parameters,
            "flax_vlm": trees.num_parameters(program.shapes.params),
        },
        "first_loss": dict(zip(("open_clip", "flax_vlm"), losses, strict=True)),
        "step_seconds": {"open_clip": spread(times[0]), "flax_vlm": spread(times[1])},
        "cpu_seconds": {"open_clip": spread(cpu[0]), "flax_vlm": spread(cpu[1])},
        "rounds": len(ratio),
        "flax_vlm_over_open_clip": {"wall": spread(ratio), "cpu": spread(cpu[1] / cpu[0])},
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "flax", "torch", "open_clip_torch")
        },
    }


def main() -> int:
    """Returns the exit code: 1 if the two models are not the same size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="clip_b32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16, help="timed, of each")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--change", action="append", default=[], help="PATH=VALUE of our config")
    arguments = parser.parse_args()
    # both thread pools are as large as the cores that the process may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.threads :])
    arguments.torchvision = provide_torchvision()
    report = compare(arguments)
    medians = {name: found["median"] for name, found in report["step_seconds"].items()}
    print(f"{arguments.model}, batch {arguments.batch}, parameters {report['parameters']}")
    print(f"median seconds of a step: {medians}")
    for clock, ratio in report["flax_vlm_over_open_clip"].items():
        print(
            f"flax_vlm / open_clip, {clock} time: {ratio['median']:.3f} ({ratio['p10']:.3f} to "
            f"{ratio['p90']:.3f}, {report['rounds']} rounds)"
        )
    print(json.dumps(report))
    return int(len(set(report["parameters"].values())) != 1)


if __name__ == "__main__":
    sys.exit(main())
