# SPDX-License-Identifier: Apache-2.0
"""tools/bench as a program on four virtual devices, and the parts that need no program."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import llava_shapes_stage1, siglip_digits
from flax_vlm.program import Program, plain
from flax_vlm.tools import measurement, step_timing
from flax_vlm.tools.attention_labels import attention_of
from flax_vlm.tools.overrides import parse_changes, with_changes
from flax_vlm.training import profiling
from tests.integration.conftest import CONFIG, ROOT, TINY, overrides

# What a machine with jax, flax, optax and orbax alone lacks.
ABSENT = ("grain", "tensorflow_datasets", "tensorflow", "torch", "array_record", "sklearn",
          "matplotlib", "PIL", "tokenizers", "tensorboardX")  # fmt: skip
BARE = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv[0] = "bench"
runpy.run_module("flax_vlm.tools.bench", run_name="__main__")
"""
ALTERNATIVE = "model.image.attention_implementation=explicit,objective.pair_loss.form=sharded"


def bench(*flags, devices=4):
    env = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes longer than running here
    }
    tiny = overrides({**TINY, "batch_size": 8, "mesh.fsdp": 2})
    return subprocess.run(
        [sys.executable, "-c", BARE, "--config", CONFIG, *tiny, *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, **env},
    )  # fmt: skip


@pytest.fixture(scope="module")
def report():
    flags = ["--steps=5", "--warmup=1", "--vs", ALTERNATIVE]
    done = bench("--config.objective.pair_loss.name=softmax", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tiny():
    """The tiny config as plain dicts."""
    config = plain(siglip_digits.get_config())
    return with_changes(config, {**TINY, "mesh.fsdp": 2})


def test_a_bare_jax_machine_is_told_what_was_measured_and_on_what(report):
    assert (report["devices"], report["processes"], report["device"]) == (4, 1, "cpu")
    assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert report["loss"] == {"name": "softmax", "form": "dense"}
    assert report["towers"]["text"] == {"dtype": "float32", "remat": "none", "unroll": 1}
    assert report["versions"]["jax"] == jax.__version__
    assert report["compile_seconds"] > 0 and report["process_peak_bytes"] > 1e7
    assert report["peak_bytes_per_device"] == report["compiled_bytes_per_device"] > 0
    assert report["peak_bytes_source"].startswith("compiler")
    assert {"timed", "flops", "mfu", "spread"} <= report["conventions"].keys()


def test_figures_follow_from_the_median_step_time(report):
    for found in (report, *report["vs"].values()):
        seconds = found["step_seconds"]
        assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
        rate = found["batch_size"] / seconds["median"]
        assert found["examples_per_second"] == pytest.approx(rate)
        tflops = rate * found["flops_per_example"] / 1e12
        assert found["model_tflops"] == pytest.approx(tflops)
        assert found["model_tflops_per_device"] == pytest.approx(tflops / 4)
        matmul = found["matmul"]["tflops_per_device"]
        assert found["mfu_of_matmul"] == pytest.approx(tflops / 4 / matmul)
        assert found["matmul"]["dtype"] == "float32"


def test_without_a_published_peak_there_is_no_mfu(report):
    assert report["mfu"] is None and report["peak_tflops_per_device"] is None


def test_an_alternative_is_compared_round_by_round(report):
    found = report["vs"][ALTERNATIVE]
    assert (report["loss"]["form"], found["loss"]["form"]) == ("dense", "sharded")
    assert (found["rounds"], found["steps"], report["steps"]) == (3, 6, 6)
    slower, faster = found["step_seconds_ratio"], found["examples_per_second_ratio"]
    assert slower["p10"] <= slower["median"] <= slower["p90"]
    assert faster["median"] == pytest.approx(1 / slower["median"])


def test_ratios_compare_the_turns_of_a_round_and_count_a_larger_batch(tiny):
    larger = with_changes(tiny, {"batch_size": 48})
    programs = {measurement.GIVEN: tiny, "x": larger}
    found = {
        name: step_timing.Contender(Program.from_config(config), None, 0.0, 0.0, None, {})
        for name, config in programs.items()
    }
    # the machine is ten times slower in the second round: the ratio is not
    times = {measurement.GIVEN: np.array([[1.0, 3], [10, 30]]), "x": np.array([[2.0, 6], [60, 20]])}
    ratios = measurement._ratios(found, times, "x")
    assert ratios["step_seconds_ratio"] == {"median": 2.0, "p10": 2.0, "p90": 2.0}
    assert ratios["examples_per_second_ratio"]["median"] == 1.5 and ratios["rounds"] == 2


def test_two_forms_of_a_loss_start_from_the_same_value(report):
    again = report["vs"][ALTERNATIVE]["first_loss"]
    assert again == pytest.approx(report["first_loss"], rel=1e-5)
    assert np.isfinite(again) and again > 0


def test_the_attention_that_was_used_is_read_from_the_compiled_program(report):
    layers = [f"{x}/attention" for x in ("image/encoder/blocks", "image/pool")]
    text = "text/encoder/blocks/attention"
    assert report["attention"] == {layer: "xla" for layer in (*layers, text)}
    explicit = {layer: "explicit" for layer in layers}
    assert report["vs"][ALTERNATIVE]["attention"] == {**explicit, text: "xla"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective.pair_loss.from=dense", "its keys are ['any_cotangent', 'bidirectional',"),
        ("batchsize=3", "unknown key 'batchsize', config has ['batch_size',"),
        ("mesh.tensr=3", "unknown key 'tensr', config.mesh has ['data',"),
        ("model.image.unrol=3", "unrol"),
        ("modell.image.unroll=3", "unknown key 'modell', config has"),
        ("batch_size.x=3", "config.batch_size is a value, not a node"),
        ("batch_size=many", "config.batch_size must stay of type int, like 16, got 'many'"),
        ("steps=true", "config.steps must stay of type int"),
        ("ring", "one of ['dense', 'sharded'], got 'ring'"),
    ],
)
def test_a_wrong_alternative_is_an_error_that_says_what_there_is(tiny, change, message):
    with pytest.raises(ValueError) as error:
        Program.from_config(with_changes(tiny, parse_changes(change)))
    assert message in str(error.value)


def test_a_wrong_alternative_ends_the_program_without_a_traceback():
    done = bench("--vs", "mesh.tensr=3")
    assert done.returncode == 1 and "config.mesh has ['data'," in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_changes_reach_their_place_and_leave_the_config_alone(tiny):
    text = 'model.text.remat=full,optimizer.lr=1,optimizer.freeze=["image/.*","logit_scale"],seed=3'
    changed = with_changes(tiny, parse_changes(text))
    assert changed["model"]["text"]["remat"] == "full" and "remat" not in tiny["model"]["text"]
    assert (changed["seed"], tiny["seed"], changed["optimizer"]["lr"]) == (3, 0, 1)
    assert changed["optimizer"]["freeze"] == ["image/.*", "logit_scale"]
    assert changed["model"]["image"] == tiny["model"]["image"]
    assert with_changes({"model": {"name": "clip"}}, {"model.image.unroll": 2}) == {
        "model": {"name": "clip", "image": {"unroll": 2}}
    }


def test_synthetic_texts_end_where_their_mask_ends_and_no_two_are_the_same(tiny):
    program = Program.from_config(tiny)
    batch = step_timing.synthetic_batch(program)
    assert batch["image"].shape == (16, 16, 16, 3) and batch["image"].std() > 60
    lengths, vocabulary = batch["text_mask"].sum(1), program.objective.model.text.vocab_size
    assert len(set(lengths)) > 1 and lengths.max() <= 8
    for ids, length in zip(batch["text"], lengths, strict=True):
        assert ids[length - 1] == vocabulary - 1 and not ids[length:].any()
        assert (ids[: length - 1] > 0).all() and (ids[: length - 1] < vocabulary - 1).all()
    assert len(set(batch["text_id"])) == 16 and batch["example_mask"].all()


class Recorder:
    """Stands for a compiled step: the state counts, the log remembers who ran."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __call__(self, state, batch):
        self.log.append(self.name)
        return state + 1, {"state": state}


def contenders(names):
    log = []
    found = [
        step_timing.Contender(None, Recorder(name, log), 0.0, 0.0, np.zeros(()), {})
        for name in names
    ]
    return found, log


def test_alternatives_take_turns_and_the_order_turns_round():
    found, log = contenders("ABC")
    times = step_timing.time_in_turns(found, steps=3, steps_per_turn=1)
    assert "".join(log) == "AABBCC" + "CCBBAA" + "AABBCC"
    assert [x.shape for x in times] == [(3, 1)] * 3 and all((x > 0).all() for x in times)
    assert found[1].state == 6, "each step takes the state of the one before"


def test_one_contender_runs_its_steps_without_a_break():
    found, log = contenders("A")
    (times,) = step_timing.time_in_turns(found, steps=7)
    assert times.shape == (1, 7) and len(log) == 8


def test_labels_of_other_layers_and_of_other_words_do_not_count():
    params = {
        tower: {"blocks": {"attention": {"q": {"kernel": np.zeros(1)}}}}
        for tower in ("image", "text", "audio")
    }
    names = (
        "jit(f)/jvp()/image/blocks/attention/attention_xla/dot",
        "jit(f)/add;jit(f)/image/while/blocks/attention/attention_cudnn",  # two fused operations
        "jit(f)/text/blocks/attention/attention_splash/dot",
        "jit(f)/text/blocks/attention/attention_weights/dot",
        "blocks/attention/attention_explicit/dot",  # whose, it does not say
    )
    program = "\n".join(f'  d = f32[] dot(), metadata={{op_name="{name}"}}' for name in names)
    assert attention_of(program, params) == {
        "image/blocks/attention": "cudnn and xla",
        "text/blocks/attention": "splash",
        "audio/blocks/attention": "not seen",
    }


def test_mfu_is_against_the_published_peak_and_longer_names_win(tiny, monkeypatch):
    assert profiling.published_peak("TPU v5p slice") == 459e12
    assert profiling.published_peak("TPU v5 lite") == 197e12
    assert profiling.published_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert profiling.published_peak("cpu") is None
    monkeypatch.setattr(profiling, "published_peak", lambda kind: 2e12)
    monkeypatch.setattr(profiling, "measured_matmul_flops", lambda dtype: 5e11)
    found = measurement._flops(Program.from_config(tiny), seconds=0.5)
    assert found["peak_tflops_per_device"] == 2
    assert found["mfu"] == pytest.approx(found["model_tflops"] / 8 / 2)
    assert found["mfu_of_matmul"] == pytest.approx(4 * found["mfu"])


def test_a_matmul_is_measured_in_the_dtype_of_the_model(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        profiling, "measured_matmul_flops", lambda dtype: asked.append(dtype) or 1e12
    )
    changes = {f"model.{tower}.dtype": "bfloat16" for tower in ("image", "text")}
    measurement._flops(Program.from_config(with_changes(tiny, changes)), seconds=1.0)
    assert asked == ["bfloat16"]


def test_parts_without_layers_are_reported_as_far_as_they_go():
    program = Program.from_config(plain(llava_shapes_stage1.get_config()))
    towers = measurement._towers(program)
    assert towers["connector"] == {"dtype": "float32"}
    assert towers["language_model"] == {"dtype": "float32", "remat": "none", "unroll": 4}
    assert towers["image"]["unroll"] == 3


def test_a_frozen_tower_counts_its_forward_pass_alone(tiny):
    def flops(*freeze):
        changed = with_changes(tiny, {"optimizer.freeze": list(freeze)})
        return Program.from_config(changed).flops_per_example()

    image, text, whole = flops("text/.*", "logit.*"), flops("image/.*"), flops()
    both_forward = whole / 3
    assert image + text == pytest.approx(whole + both_forward)
    assert flops("image/encoder/.*") == whole, "a tower that is trained in part counts in full"
