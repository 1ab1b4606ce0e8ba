# SPDX-License-Identifier: Apache-2.0
"""LLaVA, LLaVA-NeXT and LLaVA-OneVision give the numbers of transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from flax_vlm.convert.loading import load_pretrained, read_spec
from flax_vlm.convert.saving import save_pretrained
from flax_vlm.objectives import build_objective
from flax_vlm.trees import named_leaves
from tests.parity.llava_models import CASES, case, inputs
from tests.parity.reference import TOLERANCE, build_changed, error, load


def compiled(function):
    """jit with half the compile time: these programs run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"})


def logits(module, params, ours):
    text, images, mask, index = ours
    function = compiled(lambda p, *x: module.apply({"params": p}, *x[:3], visual_index=x[3]).logits)
    return np.asarray(function(params, text, images, mask, index))


def reference(name, **changes):
    model, theirs = case(name)[0], inputs(name)[0] | changes
    with torch.no_grad():
        return model(**theirs).logits


@pytest.mark.parametrize("name", list(CASES))
def test_logits_are_those_of_transformers_and_the_image_matters(name):
    _, _, loaded = case(name)
    theirs, ours = inputs(name)
    real = torch.from_numpy(ours[2])
    expected = reference(name)[real]
    found = logits(build_changed(loaded.spec), loaded.params, ours)[ours[2]]
    assert error(found, expected) <= TOLERANCE
    changed = reference(name, pixel_values=2 * theirs["pixel_values"])[real]
    assert float((changed - expected).abs().max()) > 0.05


def test_gradients_are_those_of_transformers():
    model, folder, loaded = case("llava")
    theirs, (text, images, mask, index) = inputs("llava")
    module = build_changed(loaded.spec)
    labels = np.random.default_rng(3).integers(0, 100, text.shape)

    def loss(params):
        out = module.apply({"params": params}, text, images, mask, visual_index=index)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[..., None], axis=-1)
        return -(chosen[..., 0] * mask).sum() / mask.sum()

    ours = named_leaves(compiled(jax.grad(loss))(loaded.params))
    model.zero_grad()
    real = torch.from_numpy(mask)
    target = torch.from_numpy(labels)[real]
    torch.nn.functional.cross_entropy(model(**theirs).logits[real], target).backward()
    # what nothing uses has no gradient there and zero here
    values = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    gradients = type(model)(model.config)
    with torch.no_grad():
        for n, p in gradients.named_parameters():
            p.copy_(values[n])
    gradients.save_pretrained(folder / "gradients")
    for path, leaf in named_leaves(load_pretrained(folder / "gradients").params).items():
        assert np.abs(np.asarray(leaf) - ours[path]).max() <= TOLERANCE, path


@pytest.mark.parametrize("name", ["llava", "llava, SigLIP, Qwen2"])
def test_greedy_generation_is_that_of_transformers_for_rows_padded_on_the_left(name):
    model, _, loaded = case(name)
    theirs, (text, images, mask, _) = inputs(name)
    with torch.no_grad():
        expected = model.generate(**theirs, max_new_tokens=8, do_sample=False, eos_token_id=999)
    spec = {"name": "next_token", "max_new_tokens": 8}
    objective = build_objective(loaded.spec, spec)
    batch = {"text": text, "text_mask": mask, "images": images}
    found = compiled(objective.predictions["generate"])(loaded.params, {}, batch)
    np.testing.assert_array_equal(found, expected[:, text.shape[1] :])
    assert len(np.unique(found)) > 4


WRONG = {
    "the layer after": ("llava", dict(feature_layer=3)),
    "the class token kept": ("llava, class token kept, Gemma", dict(keep_prefix=False)),
    "the encoder's last norm": ("llava, SigLIP, Qwen2", dict(feature_layer=None)),
    "gelu of the projector": ("llava", dict(connector={"name": "mlp", "activation": "gelu_tanh"})),
    "gelu of the encoder": ("llava", dict(image__activation="gelu_erf")),
    "epsilon of the encoder": ("llava, odd grid, Mistral", dict(image__norm_eps=1e-5)),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_every_wrong_choice_breaks_the_parity(name):
    which, change = WRONG[name]
    _, _, loaded = case(which)
    _, ours = inputs(which)
    module = build_changed(loaded.spec, **change)
    text, images, mask, index = ours
    if name == "the class token kept":  # one token fewer is there: the last is asked for twice
        index = np.minimum(index, 3)
    found = logits(module, loaded.params, (text, images, mask, index))[mask]
    assert error(found, reference(which)[torch.from_numpy(mask)]) > 5 * TOLERANCE


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_visual_tokens_in_another_order_break_the_parity(name):
    _, _, loaded = case(name)
    text, images, mask, index = inputs(name)[1]
    last = index.max()
    for wrong in (np.where(index == last, 0, index), np.where(index == 1, 2, index)):
        found = logits(build_changed(loaded.spec), loaded.params, (text, images, mask, wrong))
        assert error(found[mask], reference(name)[torch.from_numpy(mask)]) > 50 * TOLERANCE


def test_large_activations_keep_their_digits(tmp_path):
    model, folder, _ = case("llava")
    tensors = load_file(folder / "model.safetensors")
    key = next(k for k in tensors if k.endswith("position_embedding.weight"))
    tensors[key] += 300
    model.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shifted = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    theirs, ours = inputs("llava")
    module, variables, _ = load(tmp_path)
    with torch.no_grad():
        expected = shifted(**theirs).logits.numpy()[ours[2]]
    found = logits(module, variables["params"], ours)[ours[2]]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", list(CASES))
def test_there_and_back_gives_the_same_bits(name, tmp_path):
    model, _, loaded = case(name)
    save_pretrained(tmp_path, loaded.spec, loaded.params, model_type=model.config.model_type)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs, back = dict(model.named_parameters()), dict(again.named_parameters())
    assert theirs.keys() == back.keys()
    for key, value in theirs.items():
        assert torch.equal(value, back[key]), key
    with torch.no_grad():  # the config means the same, too
        if name not in ("llava_next", "llava_onevision"):  # whose grids are the processor's here
            found = again(**inputs(name)[0]).logits
            np.testing.assert_array_equal(found.numpy(), reference(name).numpy())


def original(name):
    """Returns a tensor's name in the original repository."""
    for theirs, ours in (
        ("vision_tower.", "model.vision_tower.vision_tower."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("language_model.model.", "model."),
        ("language_model.lm_head", "lm_head"),
    ):
        if name.startswith(theirs):
            return name.replace(theirs, ours, 1)
    raise AssertionError(name)


def in_memory(name):
    """Returns a tensor's name in transformers since 4.52."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def from_a_config(name):
    """Returns a tensor's name as transformers 5 writes it for a model made from a config."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


DIALECTS = {"original": original, "in memory": in_memory, "from a config": from_a_config}


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_every_dialect_loads_to_the_same_parameters(dialect, tmp_path):
    _, _, loaded = case("llava")
    save_pretrained(tmp_path / "hub", loaded.spec, loaded.params, model_type="llava")
    hub = load_file(tmp_path / "hub/model.safetensors")
    assert "vision_tower.vision_model.pre_layrnorm.weight" in hub
    assert "language_model.model.norm.weight" in hub
    (tmp_path / "config.json").write_text((tmp_path / "hub/config.json").read_text())
    renamed = {DIALECTS[dialect](name): value for name, value in hub.items()}
    assert renamed.keys() != hub.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    for path, leaf in named_leaves(load_pretrained(tmp_path).params).items():
        np.testing.assert_array_equal(leaf, named_leaves(loaded.params)[path])


def test_the_original_config_means_what_the_hubs_does(tmp_path):
    text = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40)
    text |= dict(num_attention_heads=40, num_key_value_heads=40, rms_norm_eps=1e-5)
    text |= dict(vocab_size=32000, max_position_embeddings=4096)
    original = {
        **{"model_type": "llava", "mm_projector_type": "mlp2x_gelu", **text},
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    hub = {"model_type": "llava", "text_config": {"model_type": "llama", **text}}
    specs = []
    for n, config in enumerate((original, hub)):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
        specs.append(read_spec(folder)[1])
    assert specs[0] == specs[1]
    assert specs[0]["feature_layer"] == 23 and specs[0]["image"]["width"] == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vision_feature_layer=[-2, -5]), "vision_feature_layer must be one number"),
        (dict(vision_feature_layer=-9), "vision_feature_layer must be one of 3 layers"),
        (dict(vision_feature_select_strategy="cls"), 'is "default" or "full"'),
        (dict(vision_config={"model_type": "vit"}), "unknown model_type of the vision_config"),
        (dict(text_config={"model_type": "opt"}), "unknown model_type of the text_config"),
        (dict(mm_vision_tower="a/b"), "unknown mm_vision_tower 'a/b'"),
    ],
)
def test_configs_that_are_not_supported_say_what_is(change, message, tmp_path):
    folder = case("llava")[1]
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_spec(tmp_path)
