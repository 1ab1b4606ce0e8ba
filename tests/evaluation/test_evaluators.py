# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from flax_vlm.build import build
from flax_vlm.evaluation import EVALUATORS, scores
from flax_vlm.evaluation.zero_shot import ZeroShot, canonicalize
from tests.evaluation import fakes

TEMPLATES = ("{}", "a photo of a {}.", "many {} here")
CONFIGS = {
    "zero_shot": {"name": "zero_shot", "templates": TEMPLATES},
    "retrieval": {"name": "retrieval", "ks": (4, 10, 25)},
    "two_choice": {"name": "two_choice"},
    "classification": {"name": "classification"},
}


def make_evaluator(name, dataset=None, batch_size=16, **changes):
    dataset = fakes.make_dataset() if dataset is None else dataset
    spec = {**CONFIGS[name], **changes}
    return build(EVALUATORS, spec, "evaluator", dataset=dataset, batch_size=batch_size)


def make_predictor(devices=1, params=None):
    from flax_vlm.evaluation.base import Predictor

    mesh = jax.make_mesh(
        (devices, 1, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )
    params = fakes.make_params() if params is None else params
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return Predictor(fakes.PREDICTIONS, params, {}, rows)


def readable(with_label=False, with_swap=False):
    examples = [e for e in fakes.make_examples() if e["image"] is not None]
    examples = [e for e in examples if not with_label or e["label"] >= 0]
    return [e for e in examples if not with_swap or e["meta"].get("swapped")]


def image_embeddings(examples):
    return fakes.numpy_image_embedding(fakes.make_params(), [e["image"] for e in examples])


def text_embeddings(texts):
    return fakes.numpy_text_embedding(fakes.make_params(), texts)


def expected_zero_shot():
    examples = readable(with_label=True)
    classes = []
    for name in ("zero", "one_hole", "two", "three", "four"):
        mean = text_embeddings([t.replace("{}", name) for t in TEMPLATES]).mean(0)
        classes.append(mean / np.linalg.norm(mean))
    predicted = (image_embeddings(examples) @ np.array(classes).T).argmax(1)
    return predicted == [e["label"] for e in examples]


def expected_recall(queries, targets, captions, k):
    hits = []
    for caption, row in zip(captions, queries @ targets.T, strict=True):
        right = np.array([c == caption for c in captions])
        wrong_before = np.sum(row[~right] >= row[right].max() - 1e-6)
        hits.append(wrong_before < k)
    return np.mean(hits)


def test_zero_shot_equals_a_brute_force_computation():
    metrics = make_evaluator("zero_shot").run(make_predictor(), None)
    correct = expected_zero_shot()
    assert 0 < correct.mean() < 1
    assert metrics["examples"] == len(correct) == 41
    assert metrics["accuracy"] == correct.mean()
    interval = scores.wilson_interval(correct.sum(), len(correct))
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == interval
    assert metrics["accuracy_top5"] == 1.0
    labels = np.array([e["label"] for e in readable(with_label=True)])
    means = [correct[labels == c].mean() for c in range(5)]
    np.testing.assert_allclose(metrics["mean_class_accuracy"], np.mean(means), rtol=1e-12)


def test_retrieval_equals_a_brute_force_computation():
    metrics = make_evaluator("retrieval").run(make_predictor(), None)
    examples = readable()
    captions = [e["caption"] for e in examples]
    image, text = image_embeddings(examples), text_embeddings(captions)
    for k in (4, 10, 25):
        assert metrics[f"i2t@{k}"] == expected_recall(image, text, captions, k)
        assert metrics[f"t2i@{k}"] == expected_recall(text, image, captions, k)
    assert 0 < metrics["i2t@4"] < metrics["i2t@10"] < 1
    assert metrics["i2t@10"] != metrics["t2i@10"]
    assert metrics["examples"] == 51


def test_two_choice_equals_a_brute_force_computation():
    metrics = make_evaluator("two_choice").run(make_predictor(), None)
    examples = readable(with_swap=True)
    image = image_embeddings(examples)
    right = (image * text_embeddings([e["caption"] for e in examples])).sum(1)
    wrong = (image * text_embeddings([e["meta"]["swapped"] for e in examples])).sum(1)
    assert metrics["accuracy"] == np.mean(right > wrong)
    assert 0 < metrics["accuracy"] < 1
    assert metrics["examples"] == 51
    assert metrics["examples_with_swap"] == len(examples) < 30
    interval = scores.wilson_interval(np.sum(right > wrong), len(examples))
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == interval


def test_classification_equals_a_brute_force_computation():
    metrics = make_evaluator("classification").run(make_predictor(), None)
    examples = readable(with_label=True)
    pixels = np.stack([e["image"] for e in examples]).reshape(len(examples), -1) / 255 - 0.5
    predicted = (pixels @ fakes.make_params()["classes"]).argmax(1)
    correct = predicted == [e["label"] for e in examples]
    assert metrics["accuracy"] == correct.mean() and 0 < correct.mean() < 1
    assert metrics["examples"] == 41


@pytest.mark.parametrize("name", CONFIGS)
def test_batch_size_devices_and_order_change_no_digit(name):
    reference = make_evaluator(name).run(make_predictor(), None)
    order = np.random.default_rng(3).permutation(53)
    examples = fakes.make_examples()
    shuffled = fakes.make_dataset([examples[i] for i in order])
    for devices in (1, 8):
        predictor = make_predictor(devices)
        for batch_size in (1, 7, 64):
            for dataset in (None, shuffled):
                evaluator = make_evaluator(name, dataset, batch_size)
                assert evaluator.run(predictor, None) == reference


def test_a_model_that_is_right_gets_full_marks_and_a_collapsed_one_none():
    examples = [
        {"image": np.full((4, 4, 3), 0, np.uint8), "caption": "a", "meta": {"swapped": "b"}},
        {"image": np.full((4, 4, 3), 255, np.uint8), "caption": "b", "meta": {"swapped": "a"}},
    ]
    for i, example in enumerate(examples):
        example["label"] = i
        example["image"][0, 0, 0] = 255 - 255 * i  # the first pixel tells them apart
    examples.append({**examples[0]})
    params = jax.tree.map(np.zeros_like, fakes.make_params())
    params["image"][0, 0], params["image"][1, 1] = 1, 1
    params["text"][ord("a"), 0], params["text"][ord("b"), 1] = 1, 1
    dataset = fakes.make_dataset(examples)
    names = {"class_names": ("a", "b"), "templates": "name"}
    run = {
        "zero_shot": make_evaluator("zero_shot", dataset, **names),
        "retrieval": make_evaluator("retrieval", dataset, ks=[1]),
        "two_choice": make_evaluator("two_choice", dataset),
    }
    good = {name: e.run(make_predictor(params=params), None) for name, e in run.items()}
    assert good["zero_shot"]["accuracy"] == good["two_choice"]["accuracy"] == 1
    assert good["retrieval"]["i2t@1"] == good["retrieval"]["t2i@1"] == 1
    params["image"][:], params["text"][:] = 0, 1
    predictor = make_predictor(params=params)
    extras = {"shift": jax.device_put(np.float32(1))}  # all embeddings are equal now
    predictor = predictor.with_params(predictor.params, extras)
    flat = {name: e.run(predictor, None) for name, e in run.items()}
    assert flat["zero_shot"]["accuracy"] == 0 and flat["two_choice"]["accuracy"] == 0.5
    assert flat["retrieval"]["i2t@1"] == flat["retrieval"]["t2i@1"] == 0


def test_prompts_combine_every_class_with_every_template():
    evaluator = make_evaluator("zero_shot", templates=["{}", "The_{}, drawn!"])
    assert evaluator.prompts()[1] == ["one_hole", "The_one_hole, drawn!"]
    assert evaluator.prompts()[2] == ["two", "The_two, drawn!"]  # the first of two synonyms
    assert len(evaluator.prompts()) == 5
    evaluator = make_evaluator("zero_shot", templates=["The_{}, drawn!"], canonicalize=True)
    assert evaluator.prompts()[1] == ["the one hole drawn"]


def test_canonical_text_is_lower_case_without_punctuation():
    assert canonicalize("  A_Photo of\ta 'Cat'!  (small) ") == "a photo of a cat small"


def test_the_default_templates_are_the_eight_of_big_vision():
    prompts = ZeroShot(fakes.make_dataset()).prompts()[3]
    assert len(prompts) == 8 and prompts[0] == "itap of a three." and prompts[-1] == "three"


@pytest.mark.parametrize("templates", [["no name"], ["{} and {}"], []])
def test_templates_without_exactly_one_place_for_the_name_are_an_error(templates):
    with pytest.raises(ValueError, match="templates need one '{}' each"):
        make_evaluator("zero_shot", templates=templates)


def test_wrong_names_in_a_config_list_the_choices():
    with pytest.raises(ValueError, match="unknown set of templates 'clip'.*clip_best"):
        make_evaluator("zero_shot", templates="clip")
    with pytest.raises(ValueError, match="unknown key .*'template'.*templates"):
        make_evaluator("zero_shot", template="name")


def test_data_that_cannot_be_measured_is_an_error_that_says_why():
    examples = readable()[:4]
    bare = [{"image": e["image"], "caption": e["caption"]} for e in examples]
    predictor = make_predictor()
    with pytest.raises(ValueError, match="accuracy needs examples with a label, got none"):
        make_evaluator("classification", fakes.make_dataset(bare)).run(predictor, None)
    with pytest.raises(ValueError, match=r"needs examples with meta\['swapped'\], got none of 4"):
        make_evaluator("two_choice", fakes.make_dataset(bare)).run(predictor, None)
    with pytest.raises(ValueError, match="below the number of classes 2, got 4"):
        make_evaluator("zero_shot", class_names=("a", "b")).run(predictor, None)
    nameless = fakes.Dataset(fakes.Source(examples))
    with pytest.raises(ValueError, match="zero_shot needs class names, the dataset has none"):
        make_evaluator("zero_shot", nameless)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("zero_shot", ["predictions.png", "similarity.png"]),
        ("classification", ["predictions.png"]),
        ("retrieval", ["similarity.png"]),
        ("two_choice", []),
    ],
)
def test_an_evaluator_writes_its_pictures_and_nothing_else(name, files, tmp_path):
    folder = tmp_path / "new" / name
    with_pictures = make_evaluator(name).run(make_predictor(), folder)
    assert with_pictures == make_evaluator(name).run(make_predictor(), None)
    written = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    assert written == files
    for file in files:
        with Image.open(folder / file) as image:
            image.verify()


def test_pictures_show_the_examples_that_were_measured(tmp_path, monkeypatch):
    from flax_vlm.evaluation import pictures

    calls = []

    def keep(images, *args, **kwargs):
        calls.append((images, *args))
        return make(images, *args, **kwargs)

    make = pictures.prediction_grid
    monkeypatch.setattr(pictures, "prediction_grid", keep)
    make_evaluator("zero_shot", num_pictures=50).run(make_predictor(), tmp_path)
    images, predicted, actual = calls[0]
    examples, correct = readable(with_label=True), expected_zero_shot()
    names = ("zero", "one_hole", "two", "three", "four")
    assert [names.index(a) for a in actual] == [e["label"] for e in examples]
    assert all(np.array_equal(i, e["image"]) for i, e in zip(images, examples, strict=True))
    assert [p == a for p, a in zip(predicted, actual, strict=True)] == correct.tolist()


def test_the_similarity_picture_shows_pairs_with_different_captions(tmp_path, monkeypatch):
    from flax_vlm.evaluation import pictures

    calls = []

    def keep(*args, **kwargs):
        calls.append(args)
        return make(*args, **kwargs)

    make = pictures.similarity_matrix
    monkeypatch.setattr(pictures, "similarity_matrix", keep)
    make_evaluator("retrieval", num_pictures=8).run(make_predictor(), tmp_path)
    images, captions, similarity = calls[0]
    assert len(images) == len(set(captions)) == 8
    for image, caption in zip(images, captions, strict=True):
        assert any(e["caption"] == caption and np.all(e["image"] == image) for e in readable())
    params = fakes.make_params()
    expected = fakes.numpy_image_embedding(params, images) @ text_embeddings(captions).T
    np.testing.assert_allclose(similarity, expected, atol=2e-5)
