# SPDX-License-Identifier: Apache-2.0
"""LLaMA, Mistral, Qwen2, Qwen3, Gemma and Gemma 2 give the numbers of transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flax_vlm.convert import FAMILIES
from flax_vlm.convert.loading import load_pretrained, read_spec
from flax_vlm.convert.rules import expand
from flax_vlm.convert.saving import find_family, save_pretrained
from flax_vlm.models.language_model import build_language_model
from flax_vlm.models.language_model_sizes import PRESETS
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.nn import rotary
from flax_vlm.trees import named_leaves, num_parameters
from tests.parity.language_models import (
    CASES,
    SIZE,
    THETA,
    case,
    gradients,
    inputs,
    make,
    reference,
)
from tests.parity.reference import TOLERANCE, build_changed, error, save, swapped


def compiled(function):
    """jit with half the compile time: these programs run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"})


def logits_of(module, params, ids, mask):
    return np.asarray(compiled(module.apply)({"params": params}, ids, mask).logits)


@pytest.mark.parametrize("name", list(CASES))
def test_logits_and_gradients_are_those_of_transformers(name):
    model, folder, loaded = case(name)
    ids, mask = inputs()
    module = build_changed(loaded.spec)
    labels = np.random.default_rng(4).integers(0, SIZE["vocab_size"], ids.shape)

    def loss(params):  # of training: mean negative log likelihood of the real tokens
        logits = module.apply({"params": params}, ids, mask).logits
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        return -(chosen[..., 0] * mask).sum() / mask.sum(), logits

    ours, logits = compiled(jax.grad(loss, has_aux=True))(loaded.params)
    real = torch.from_numpy(mask)
    expected = reference(model, ids, mask)[real]
    assert error(logits[mask], expected) <= TOLERANCE
    labels = torch.from_numpy(labels)[real]
    theirs = gradients(model, folder, torch.nn.functional.cross_entropy(expected, labels))
    for path, leaf in named_leaves(theirs).items():
        reference_gradient, largest = np.asarray(leaf), float(jnp.abs(leaf).max())
        gap = np.abs(named_leaves(ours)[path] - reference_gradient).max()
        # gradients are below 1: the tolerance is taken of the largest of each leaf besides
        assert gap <= TOLERANCE and gap <= 50 * TOLERANCE * largest, (path, gap, largest)


WRONG = {
    "epsilon": ("llama", dict(norm_eps=0.05)),
    "theta": ("llama", dict(rope_theta=90.0)),
    "gelu for silu": ("llama with biases", dict(activation="gelu_tanh")),
    "window too short": ("mistral", dict(window=2)),
    "window too long": ("mistral", dict(window=4)),
    "window in every layer": ("qwen2", dict(window_pattern="s")),
    "no window": ("qwen2", dict(window=None)),
    "silu in Gemma": ("gemma", dict(activation="silu")),
    "scales without one": ("gemma", dict(norm_plus_one=False)),
    "embeddings as they are": ("gemma", dict(embedding_scale=False)),
    "no cap in the attention": ("gemma2", dict(attention_cap=None)),
    "no cap on the logits": ("gemma2", dict(logit_cap=None)),
    "scale of the head's width": ("gemma2", dict(attention_scale=None)),
    "windows exchanged": ("gemma2", dict(window_pattern="fs")),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_every_wrong_choice_breaks_the_parity(name):
    which, change = WRONG[name]
    model, _, loaded = case(which)
    ids, mask = inputs()
    logits = logits_of(build_changed(loaded.spec, **change), loaded.params, ids, mask)
    with torch.no_grad():
        expected = reference(model, ids, mask)[torch.from_numpy(mask)]
    assert error(logits[mask], expected) > 50 * TOLERANCE


def test_interleaved_pairs_break_the_parity(monkeypatch):
    model, _, loaded = case("llama")
    ids, mask = inputs()
    real = rotary.rotary1d
    monkeypatch.setattr(
        "flax_vlm.models.language_model.rotary1d",
        lambda *x: rotary.Rotary(real(*x).cos, real(*x).sin, halves=False),
    )
    logits = logits_of(build_changed(loaded.spec), loaded.params, ids, mask)
    with torch.no_grad():
        expected = reference(model, ids, mask)[torch.from_numpy(mask)]
    assert error(logits[mask], expected) > 50 * TOLERANCE


@pytest.mark.parametrize(
    "name, pair",
    [
        ("llama", ("gate_proj", "up_proj")),
        ("llama", ("input_layernorm", "post_attention_layernorm")),
        ("qwen3", ("q_norm", "k_norm")),
        ("gemma2", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("gemma2", ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    ],
)
def test_exchanged_tensors_break_the_parity(name, pair, tmp_path):
    model = case(name)[0]
    folder = save(model, tmp_path)
    swapped(folder, pair)
    loaded = load_pretrained(folder)
    ids, mask = inputs()
    logits = logits_of(build_changed(loaded.spec), loaded.params, ids, mask)
    with torch.no_grad():
        expected = reference(model, ids, mask)[torch.from_numpy(mask)]
    assert error(logits[mask], expected) > 1e-2


@pytest.mark.parametrize("name", list(CASES))
def test_there_and_back_gives_the_same_bits(name, tmp_path):
    model, folder, loaded = case(name)
    model_type = save_pretrained(
        tmp_path, loaded.spec, loaded.params, model_type=model.config.model_type
    )
    assert model_type == loaded.model_type
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_spec(tmp_path) == (model_type, loaded.spec)
    left, right = model.config.to_dict(), again.config.to_dict()
    keys = set(SIZE) | set(CASES[name][1]) | {"rope_parameters"}
    keys -= {"pad_token_id", "bos_token_id", "eos_token_id"}
    assert {k: left.get(k) for k in keys} == {k: right.get(k) for k in keys}


def test_a_model_finds_the_family_that_can_hold_it():
    found = {}
    for name in CASES:
        spec = case(name)[2].spec
        module = build_changed(spec)
        found[name] = find_family(module, parameter_shapes(module))[0]
    assert found == {
        "llama": "llama",
        "llama with biases": "llama",
        "mistral": "mistral",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "gemma": "gemma",
        "gemma2": "gemma2",
    }


SCALINGS = {
    "linear": dict(factor=3.0),
    "llama3": dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "yarn, all set": dict(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=20,
        beta_fast=3.0,
        beta_slow=0.5,
        attention_factor=1.7,
    ),
    "yarn, two scales": dict(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        mscale=0.7,
        mscale_all_dim=1.3,
    ),
    "dynamic": dict(factor=3.0),
}


def scaled_config(name, **more):
    scaling = {"rope_type": name, **SCALINGS[name]}
    size = {**SIZE, "head_dim": 12, "num_key_value_heads": 2, **more}
    return hf.LlamaConfig(**size, rope_parameters={**scaling, "rope_theta": THETA})


@pytest.mark.parametrize("name", list(SCALINGS))
def test_frequencies_of_every_scaling_are_those_of_transformers(name):
    config = scaled_config(name)
    theirs = LlamaRotaryEmbedding(config)
    spec = FAMILIES["llama"].read(config.to_dict(), {})
    module = build_changed(spec)
    length = 100 if name == "dynamic" else 10  # tokens; the context is 64
    positions = torch.arange(length)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    frequencies = module.rope_scaling.frequencies(THETA, 12, jnp.asarray(length))
    ours = rotary.rotary1d(
        jnp.asarray(positions.numpy(), jnp.int32), frequencies, module.rope_scaling.attention_factor
    )
    assert error(ours.cos, cos) <= TOLERANCE and error(ours.sin, sin) <= TOLERANCE
    plain = rotary.rotary1d(
        jnp.asarray(positions.numpy(), jnp.int32),
        jnp.asarray(THETA ** (-np.arange(0, 12, 2) / 12), jnp.float32),
    )
    assert error(plain.cos, cos) > 1e-2


@pytest.mark.parametrize("name", ["dynamic", "yarn"])
def test_logits_beyond_the_trained_context_are_those_of_transformers(name, tmp_path):
    scaling = dict(SCALINGS[name], rope_type=name, rope_theta=THETA)
    if name == "yarn":
        scaling["original_max_position_embeddings"] = 4
    model = make("Llama", num_key_value_heads=2, max_position_embeddings=4, rope_parameters=scaling)
    loaded = load_pretrained(save(model, tmp_path))
    ids, mask = inputs()
    logits = logits_of(build_changed(loaded.spec), loaded.params, ids, mask)
    with torch.no_grad():
        expected = reference(model, ids, mask)[torch.from_numpy(mask)]
    assert error(logits[mask], expected) <= TOLERANCE


@pytest.mark.parametrize("name", list(SCALINGS))
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_both_generations_of_configs_say_the_same(name, key):
    config = scaled_config(name).to_dict()
    new = FAMILIES["llama"].read(config, {})
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = {key: parameters.pop("rope_type"), **parameters}
    assert FAMILIES["llama"].read(config, {}) == new
    assert new["rope_theta"] == THETA


@pytest.mark.parametrize(
    "parameters, message",
    [
        (dict(rope_type="longrope", factor=2.0), "unknown rope_type.*longrope.*choose one of"),
        (dict(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(full_attention=dict(rope_type="default")), "differ between layers"),
    ],
)
def test_rotary_embeddings_that_are_not_here_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["llama"].read({"rope_parameters": parameters}, {})


def test_partial_configs_take_the_defaults_of_their_class():
    vicuna = dict(max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064)
    spec = FAMILIES["llama"].read(vicuna, {})
    preset = dict(PRESETS["Llama-2-7b"], vocab_size=32064)
    assert {key: spec[key] for key in preset} == preset
    for model_type, kind in dict(
        llama="Llama",
        mistral="Mistral",
        qwen2="Qwen2",
        qwen3="Qwen3",
        gemma="Gemma",
        gemma2="Gemma2",
    ).items():
        whole = getattr(hf, f"{kind}Config")().to_dict()
        assert FAMILIES[model_type].read({}, {}) == FAMILIES[model_type].read(whole, {}), model_type


def test_gelu_of_the_first_gemma_configs_means_its_tanh_form():
    assert FAMILIES["gemma"].read({"hidden_act": "gelu"}, {})["activation"] == "gelu_tanh"
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        FAMILIES["gemma2"].read({"use_bidirectional_attention": True}, {})


def test_a_tied_output_that_is_stored_must_equal_the_embedding(tmp_path):
    folder = save(case("gemma")[0], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_pretrained(folder)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight must equal model.embed_tokens.weight"):
        load_pretrained(folder)


def test_old_buffers_and_files_of_the_bare_decoder_are_read(tmp_path):
    _, folder, loaded = case("gemma")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = load_pretrained(tmp_path)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.params, loaded.params)))


@pytest.mark.parametrize("name", list(PRESETS))
def test_names_and_shapes_of_full_size_models_are_those_of_transformers(name):
    module = build_language_model(name)
    shapes = parameter_shapes(module)
    model_type, config = find_family(module, shapes)
    config = json.loads(json.dumps(config))
    with torch.device("meta"):
        theirs = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config))
    leaves = {path: leaf.shape for path, leaf in named_leaves(shapes).items()}
    ours = {e.tensor: e.shape for e in expand(FAMILIES[model_type].rules(module), leaves)}
    expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert ours == expected
    assert num_parameters(shapes) == sum(p.numel() for p in theirs.parameters())
