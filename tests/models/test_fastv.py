# SPDX-License-Identifier: Apache-2.0
"""FastV against a model in which dropped tokens are there but hidden, cached and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.build import build
from flax_vlm.models import MODELS
from flax_vlm.models.beam_search import beam_search
from flax_vlm.models.fastv import check_room, prune
from flax_vlm.models.generate import generate, read_prefix, start
from flax_vlm.models.language_model import build_language_model
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.models.prompts import Prompt
from flax_vlm.models.quantization import quantize
from flax_vlm.nn.decoder import distances, positions_of
from flax_vlm.nn.rotary import rotary1d
from flax_vlm.trees import num_bytes
from tests.models.test_llava import SPEC
from tests.nn import oracle

VOCAB, NEW, LENGTH = 30, 4, 12
MODEL = build_language_model(
    vocab_size=VOCAB,
    width=16,
    depth=4,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    window=7,
    window_pattern="fs",
    qk_norm=True,
)
PARAMS = oracle.randomize(parameter_shapes(MODEL), scale=0.4)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, LENGTH, 16)).astype(np.float32)
# left padding; six visual tokens each, at different places
MASK = np.arange(LENGTH)[None] >= np.array([0, 3, 1])[:, None]
VISUAL = np.zeros((3, LENGTH), bool)
VISUAL[0, 1:7], VISUAL[1, 3:9], VISUAL[2, [1, 2, 3, 6, 7, 8]] = True, True, True


def prompt(**changes):
    return Prompt(**{"embeddings": X, "mask": MASK, "visual": VISUAL} | changes)


def hidden_model(x, mask, visual, read, layer, drop):
    """Returns (logits [B, S, V], dropped [B, S]): later layers do not see the dropped tokens.

    read: how many tokens of x are the prompt, whose last one ranks."""
    blocks = MODEL._make_blocks(1, parent=None)
    positions = positions_of(jnp.asarray(mask))
    rotary = rotary1d(positions, MODEL.rope_scaling.frequencies(MODEL.rope_theta, 6, 1))
    dropped, x = np.zeros(mask.shape, bool), jnp.asarray(x)
    for n in range(MODEL.depth):
        params = jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], PARAMS["blocks"])
        window = jnp.asarray(MODEL.layer_windows()[n : n + 1])
        visible = jnp.asarray(mask & ~dropped)[:, None, None]
        given = (jnp.arange(1), window, visible, distances(positions, positions), rotary)
        (state, _), sown = blocks.apply(
            {"params": params}, (x, None), *given, mutable=["intermediates"]
        )
        x = state[0]
        if n == layer - 1:
            weights = sown["intermediates"]["attention"]["attention_weights"][0][0]
            seen = np.asarray(weights).mean(1)[:, read - 1]
            for row in range(len(x)):
                # of those that a window hides, the later ones go first
                places = np.flatnonzero(visual[row])
                ranked = sorted(places, key=lambda s, r=row: (seen[r, s], -s))
                dropped[row, ranked[:drop]] = True
    tokens = MODEL.apply({"params": PARAMS}, x, method=lambda m, x: m.logits(m.norm(x)))
    return np.asarray(tokens), dropped


def decode(model, cache=None, params=PARAMS, **options):
    def run(params):
        return model.apply({"params": params}, X, MASK, cache=cache, **options, method="decode")

    return jax.jit(run)(params)


def test_pruning_nothing_equals_the_plain_model_exactly():
    assert prune(MODEL, 2, 0) is MODEL
    model = prune(MODEL, 2, 3)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, parameter_shapes(model), PARAMS)
    assert all(jax.tree.leaves(same))
    plain, _ = decode(MODEL)
    text, _ = decode(model)  # a text without visual tokens is read whole, whatever is pruned
    np.testing.assert_array_equal(text, plain)
    words = generate(model, PARAMS, prompt(visual=None), max_new_tokens=NEW)
    expected = generate(MODEL, PARAMS, prompt(), max_new_tokens=NEW)
    np.testing.assert_array_equal(words.tokens, expected.tokens)
    np.testing.assert_allclose(words.logits, expected.logits, atol=2e-5)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("drop", [1, 4, 6])
def test_a_prompt_gets_the_logits_of_a_model_that_hides_what_is_dropped(layer, drop):
    expected, dropped = hidden_model(X, MASK, VISUAL, LENGTH, layer, drop)
    model = prune(MODEL, layer, drop)
    tokens, _ = decode(model, visual=VISUAL)
    logits = MODEL.apply({"params": PARAMS}, tokens, method="logits")
    left = MASK & ~dropped
    limit = 2e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(logits)[left], expected[left], atol=limit)
    assert np.all(np.asarray(tokens)[dropped] == 0)
    plain = MODEL.apply({"params": PARAMS}, X, MASK, method="decode")[0]
    whole = MODEL.apply({"params": PARAMS}, plain, method="logits")
    assert np.abs(np.asarray(whole)[:, -1] - expected[:, -1]).max() > 1e-3  # it matters


@pytest.mark.parametrize("drop", [2, 5])
def test_generation_goes_on_from_both_caches_as_if_nothing_were_cached(drop):
    model = prune(MODEL, 2, drop)
    state = generate(model, PARAMS, prompt(), max_new_tokens=NEW)
    words = MODEL.apply({"params": PARAMS}, state.tokens, method="embed")
    more = np.ones((3, NEW), bool)
    whole, _ = hidden_model(
        np.concatenate([X, words], 1),
        np.concatenate([MASK, more], 1),
        np.concatenate([VISUAL, ~more], 1),
        LENGTH,
        2,
        drop,
    )
    limit = 2e-5 * max(1, np.abs(whole).max())
    np.testing.assert_allclose(state.logits, whole[:, -1], atol=limit)
    np.testing.assert_array_equal(state.tokens, whole[:, LENGTH - 1 : -1].argmax(-1))


def test_neighbours_and_more_padding_change_nothing():
    model = prune(MODEL, 2, 4)
    together = generate(model, PARAMS, prompt(), max_new_tokens=NEW)
    for row in range(3):
        one = slice(row, row + 1)
        pad = [(0, 0), (5, 0)]
        alone = Prompt(
            embeddings=np.pad(X[one], [*pad, (0, 0)]),
            mask=np.pad(MASK[one], pad),
            visual=np.pad(VISUAL[one], pad),
        )
        found = generate(model, PARAMS, alone, max_new_tokens=NEW)
        np.testing.assert_array_equal(found.tokens, together.tokens[one])
        np.testing.assert_allclose(found.logits, together.logits[one], atol=2e-5)


def test_a_row_without_visual_tokens_drops_padding_and_no_text():
    visual = VISUAL.copy()
    visual[1] = False
    tokens, _ = decode(prune(MODEL, 2, 3), visual=visual)
    lost = np.all(np.asarray(tokens) == 0, axis=-1)
    assert lost.sum(1).tolist() == [3, 3, 3]
    np.testing.assert_array_equal(lost[1], ~MASK[1])
    np.testing.assert_array_equal(lost[[0, 2]] & ~VISUAL[[0, 2]], False)
    check_room(prune(MODEL, 2, 3), visual, MASK)
    with pytest.raises(
        ValueError, match=r"drops 4.*rows \[1\] have \[0\] visual.*\[3\] of padding"
    ):
        check_room(prune(MODEL, 2, 4), visual, MASK)
    visual[1, 3] = True  # its only one would be lost
    with pytest.raises(ValueError, match=r"rows \[1\] have \[1\] visual"):
        check_room(prune(MODEL, 2, 3), visual, MASK)


def test_later_layers_have_a_shorter_cache():
    model = prune(MODEL, 1, 5)
    cache = start(model, PARAMS, prompt(), max_new_tokens=NEW).cache
    assert cache.first.k.shape == (1, 3, LENGTH + NEW, 2, 6)
    assert cache.rest.k.shape == (3, 3, LENGTH + NEW - 5, 2, 6)
    plain = start(MODEL, PARAMS, prompt(), max_new_tokens=NEW).cache
    sizes = [num_bytes((c.k, c.v)) for c in (cache.first, cache.rest, plain)]
    assert sizes[0] + sizes[1] == sizes[2] * (16 + 3 * 11) / (4 * 16)


def test_a_pruned_image_is_read_once_for_several_questions():
    model = prune(MODEL, 2, 4)
    image = Prompt(embeddings=X[:1, :8], visual=VISUAL[:1, :8])
    prefix = read_prefix(model, PARAMS, image)
    questions = RNG.integers(1, VOCAB, (2, 3)).astype(np.int32)
    asked = generate(model, PARAMS, Prompt(questions, prefix=prefix), max_new_tokens=NEW)
    words = np.asarray(MODEL.apply({"params": PARAMS}, questions, method="embed"))
    words = np.concatenate([np.repeat(X[:1, :8], 2, 0), words], 1)
    visual = np.pad(np.repeat(VISUAL[:1, :8], 2, 0), [(0, 0), (0, 3)])
    expected, _ = hidden_model(words, np.ones((2, 11), bool), visual, 8, 2, 4)
    np.testing.assert_array_equal(asked.tokens[:, 0], expected[:, -1].argmax(-1))
    first = start(model, PARAMS, Prompt(questions, prefix=prefix), max_new_tokens=NEW)
    np.testing.assert_allclose(first.logits, expected[:, -1], atol=2e-5 * np.abs(expected).max())


def test_an_image_behind_a_prefix_of_text_is_pruned_by_its_own_attention():
    model = prune(MODEL, 2, 4)
    system = RNG.integers(1, VOCAB, (1, 5)).astype(np.int32)
    prefix = read_prefix(model, PARAMS, Prompt(system))
    asked = Prompt(embeddings=X[:1], visual=VISUAL[:1], prefix=prefix)
    found = start(model, PARAMS, asked, max_new_tokens=NEW)
    words = np.asarray(MODEL.apply({"params": PARAMS}, system, method="embed"))
    whole, visual = np.concatenate([words, X[:1]], 1), np.pad(VISUAL[:1], [(0, 0), (5, 0)])
    expected, _ = hidden_model(whole, np.ones((1, 17), bool), visual, 17, 2, 4)
    np.testing.assert_allclose(found.logits, expected[:, -1], atol=2e-5 * np.abs(expected).max())


def test_beams_and_int8_go_through_both_caches():
    model = prune(MODEL, 2, 4)
    greedy = generate(model, PARAMS, prompt(), max_new_tokens=NEW)
    one = beam_search(model, PARAMS, prompt(), num_beams=1, max_new_tokens=NEW)
    np.testing.assert_array_equal(np.asarray(one.tokens)[:, :NEW].reshape(3, NEW), greedy.tokens)
    small = model.clone(weights="int8")
    found = start(small, quantize(PARAMS), prompt(), max_new_tokens=NEW, cache_dtype="int8")
    assert found.cache.rest.k.dtype == jnp.int8
    exact = start(model, PARAMS, prompt(), max_new_tokens=NEW).logits
    assert 0 < np.abs(found.logits - exact).max() < 0.2 * np.abs(exact).max()


def test_llava_prunes_by_one_line_of_its_config():
    model = build(MODELS, SPEC | {"pruning": {"layer": 1, "keep": 1}}, "model")
    assert (model.language_model.prune_layer, model.language_model.prune_tokens) == (1, 3)
    plain = build(MODELS, SPEC, "model")
    shapes = parameter_shapes(plain)
    assert jax.tree.map(lambda a, b: a.shape == b.shape, shapes, parameter_shapes(model))
    with pytest.raises(ValueError, match="keeps between 0 and 4 visual tokens.*got 5"):
        build(MODELS, SPEC | {"pruning": {"layer": 1, "keep": 5}}, "model")


def test_impossible_prunings_are_refused():
    with pytest.raises(ValueError, match=r"after 1\.\.3 layers.*prune_layer 4"):
        decode(prune(MODEL, 4, 1))
    with pytest.raises(ValueError, match="drops 12 visual tokens of one prompt.*got 12 tokens"):
        decode(prune(MODEL, 2, 12), visual=VISUAL)
    with pytest.raises(ValueError, match="got packed texts"):
        decode(prune(MODEL, 2, 1), visual=VISUAL, segments=np.zeros((3, LENGTH), np.int32))
