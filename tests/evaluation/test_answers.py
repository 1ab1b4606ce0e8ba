# SPDX-License-Identifier: Apache-2.0
import collections
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from flax_vlm.build import build
from flax_vlm.evaluation import EVALUATORS, pictures, scores
from flax_vlm.evaluation.answers import normalize_answer
from flax_vlm.evaluation.base import Predictor
from tests.evaluation import fake_questions, fakes


def make_evaluator(examples=None, batch_size=16, **fields):
    dataset = fake_questions.make_dataset(examples)
    spec = {"name": "answers", **fields}
    return build(EVALUATORS, spec, "evaluator", dataset=dataset, batch_size=batch_size)


def make_predictor(devices=1):
    mesh = jax.make_mesh(
        (devices, 1, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )
    params = jax.device_put(fakes.make_params(), NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return Predictor(fake_questions.PREDICTIONS, params, {}, rows)


def readable():
    examples = fake_questions.make_questions()
    return [e for e in examples if not e["images"] or e["images"][0] is not None]


def accepted(example):
    answers = example["meta"].get("answers") or [example["conversation"][-1]["content"]]
    return [answer.lower() for answer in answers]


def test_accuracy_and_majority_equal_a_brute_force_computation():
    metrics = make_evaluator().run(make_predictor(), None)
    kinds = collections.defaultdict(list)
    for example in readable():
        kinds[example["meta"].get("kind", "other")].append(example)
    right = {
        kind: [fake_questions.said(e).lower().strip(".") in accepted(e) for e in members]
        for kind, members in kinds.items()
    }
    best = {
        kind: max(
            sum(word in accepted(e) for e in members)
            for word in ("1", "2", "3", "4", "yes", "no", "red", "blue", "green", "purple")
        )
        for kind, members in kinds.items()
    }
    total = sum(map(sum, right.values()))
    assert len(kinds) == 4 and 0 < total < 46
    expected = {"accuracy": total / 46, "majority": sum(best.values()) / 46, "examples": 46}
    for kind, members in kinds.items():
        expected[f"{kind}/accuracy"] = np.mean(right[kind])
        expected[f"{kind}/majority"] = best[kind] / len(members)
        expected[f"{kind}/examples"] = len(members)
    low, high = scores.wilson_interval(total, 46)
    assert metrics == pytest.approx({**expected, "accuracy_low": low, "accuracy_high": high})


def test_batch_size_and_devices_change_no_digit():
    reference = make_evaluator().run(make_predictor(), None)
    for devices in (1, 8):
        for batch_size in (1, 7, 64):
            evaluator = make_evaluator(batch_size=batch_size)
            assert evaluator.run(make_predictor(devices), None) == reference


def test_the_answers_are_saved_as_they_were_written(tmp_path):
    metrics = make_evaluator(num_pictures=5).run(make_predictor(), tmp_path / "new")
    rows = [json.loads(line) for line in (tmp_path / "new" / "answers.jsonl").open()]
    examples = fake_questions.make_questions()
    assert [row["index"] for row in rows] == [i for i in range(47) if i != 6]
    assert np.mean([row["correct"] for row in rows]) == metrics["accuracy"]
    for row in rows:
        example = examples[row["index"]]
        assert row["prediction"] == fake_questions.said(example)
        assert row["kind"] == example["meta"].get("kind", "other")
        assert row["answer"] == (
            example["meta"].get("answers") or example["conversation"][-1]["content"]
        )
    assert rows[1]["question"] == "how many cubes in number 1?"  # the marker is no word
    assert rows[5]["question"] == "how many cubes in number 5?"  # the last turn of the user
    with Image.open(tmp_path / "new" / "answers.png") as image:
        image.verify()


def test_the_answers_of_another_run_stand_beside_those_to_the_same_questions(tmp_path):
    make_evaluator(num_pictures=0).run(make_predictor(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        row["correct"] = n % 3 == 0  # a run that was right elsewhere
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = make_evaluator(beside={"blind": str(file)}).run(make_predictor(), None)
    alone = make_evaluator().run(make_predictor(), None)
    assert {key: metrics[key] for key in alone} == alone
    assert metrics["blind"] == np.mean([row["correct"] for row in rows]) != metrics["accuracy"]
    for kind in {row["kind"] for row in rows}:
        theirs = [row["correct"] for row in rows if row["kind"] == kind]
        assert metrics[f"{kind}/blind"] == np.mean(theirs), kind


def test_answers_to_other_questions_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="beside must name .* found no file .*none.jsonl"):
        make_evaluator(beside={"blind": str(tmp_path / "none.jsonl")})
    make_evaluator(num_pictures=0).run(make_predictor(), tmp_path)
    file = tmp_path / "answers.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]))
    with pytest.raises(
        ValueError,
        match=f"has {len(lines) - 1}, here are {len(lines)}, and {len(lines) - 1} of them",
    ):
        make_evaluator(beside={"blind": str(file)}).run(make_predictor(), None)
    file.write_text("\n".join([lines[0].replace('"index": 0', '"index": 1'), *lines[1:]]))
    with pytest.raises(ValueError, match=f"and {len(lines) - 1} of them are the same"):
        make_evaluator(beside={"blind": str(file)}).run(make_predictor(), None)


def test_the_picture_shows_the_images_that_were_asked_about(tmp_path, monkeypatch):
    shown = {}

    def keep(images, questions, predicted, actual, correct, **kwargs):
        shown.update(images=images, questions=questions, predicted=predicted, correct=correct)
        return make(images, questions, predicted, actual, correct, **kwargs)

    make = pictures.question_grid
    monkeypatch.setattr(pictures, "question_grid", keep)
    make_evaluator(num_pictures=50).run(make_predictor(), tmp_path)
    examples = [e for e in readable() if e["images"]]  # a question without an image has no picture
    assert len(shown["images"]) == len(examples) == 45
    for image, predicted, example in zip(
        shown["images"], shown["predicted"], examples, strict=True
    ):
        assert np.array_equal(image, example["images"][0])
        assert predicted == fake_questions.said(example)
    assert any(shown["correct"]) and not all(shown["correct"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        (" TWO  red\tcubes\n", "two red cubes"),
        ('"3"', "3"),
        ("3.5 m", "3.5 m"),
        ("(-3%).", "-3%"),
        ("mother-in-law", "mother-in-law"),
        ("...", ""),
    ],
)
def test_normalisation_forgives_case_space_and_punctuation_at_the_ends(text, expected):
    assert normalize_answer(text) == expected


def test_nothing_is_never_a_right_answer():
    examples = fake_questions.make_questions(4)
    for example in examples:
        example["meta"], example["conversation"][-1]["content"] = {}, "!"
    predictor = make_predictor()
    silent = {"generate": lambda params, extras, batch: batch["text"][:, :3] * 0}
    quiet = Predictor(silent, predictor.params, {}, predictor.batch_sharding)
    assert make_evaluator(examples).run(quiet, None)["accuracy"] == 0


def test_an_example_without_an_answer_is_an_error_that_names_it():
    examples = fake_questions.make_questions(5)
    examples[2]["conversation"] = examples[2]["conversation"][:1]
    with pytest.raises(ValueError, match=r"example 2 must have an answer.*got \['user'\]"):
        make_evaluator(examples).run(make_predictor(), None)


def run(name, folder=None):
    dataset = fake_questions.DATASETS[name]()
    evaluator = build(EVALUATORS, {"name": name}, "evaluator", dataset=dataset, batch_size=16)
    examples = [e for e in dataset.source.examples if not e["images"] or e["images"][0] is not None]
    return evaluator.run(make_predictor(), folder), examples


def test_vqa_accuracy_of_a_run_equals_a_brute_force_computation(tmp_path):
    metrics, examples = run("vqa", tmp_path)
    expected = []
    for example in examples:
        said = {"Yes.": "yes", "Red": "red"}.get(fake_questions.said(example))
        said = said or fake_questions.said(example)
        votes = [{"one": "1"}.get(a, a) for a in example["meta"]["answers"]]
        left_out = [votes[:i] + votes[i + 1 :] for i in range(10)]
        expected.append(np.mean([min(nine.count(said) / 3, 1) for nine in left_out]))
    assert metrics["vqa_accuracy"] == pytest.approx(np.mean(expected)) and 0 < np.mean(expected) < 1
    kinds = np.array([e["meta"].get("kind", "other") for e in examples])
    of_kind = np.mean(np.array(expected)[kinds == "yes_no"])
    assert metrics["yes_no/vqa_accuracy"] == pytest.approx(of_kind)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert [row["correct"] for row in rows] == pytest.approx(expected)


def test_pope_counts_the_yeses_of_the_model():
    metrics, examples = run("pope")
    said = np.array([fake_questions.said(e) == "Yes." for e in examples])
    true = np.array([e["conversation"][-1]["content"] == "yes" for e in examples])
    assert said.mean() != true.mean()
    assert metrics["yes_ratio"] == said.mean() == metrics["yes_no/yes_ratio"]
    assert metrics["f1"] == pytest.approx(2 * (said & true).sum() / (said.sum() + true.sum()))
    with pytest.raises(ValueError, match="pope needs questions whose answer is yes or no"):
        evaluator = build(
            EVALUATORS, {"name": "pope"}, "evaluator", dataset=fake_questions.make_dataset()
        )
        evaluator.run(make_predictor(), None)


def test_a_choice_that_cannot_be_read_is_wrong_and_counted():
    metrics, examples = run("multiple_choice")
    right, failures, closed = [], 0, 0
    for example in examples:
        said, options = fake_questions.said(example), example["meta"].get("options")
        if not options:
            right.append(said.lower().strip(".") in accepted(example))
            continue
        letter = {"3": "A", "Red": "C"}.get(said)
        closed, failures = closed + 1, failures + (letter is None)
        right.append(letter == example["meta"]["answers"][0])
    assert 0 < failures < closed < len(examples)
    assert metrics["parse_failures"] == failures / closed
    assert metrics["accuracy"] == pytest.approx(np.mean(right))
