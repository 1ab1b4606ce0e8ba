# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_vlm.evaluation.base import Predictor, embed_texts, predict_all
from tests.evaluation import fakes

BATCH = PartitionSpec(("data", "fsdp"))


def sharding(*shape):
    count = int(np.prod(shape))
    mesh = jax.make_mesh(
        shape,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:count],
    )
    return NamedSharding(mesh, BATCH)


SHARDINGS = [None, (1, 1, 1), (8, 1, 1), (2, 2, 2)]


def make_predictor(shape=None, predictions=fakes.PREDICTIONS, seed=0):
    where = None if shape is None else sharding(*shape)
    params = fakes.make_params(seed)
    if where is not None:
        params = jax.device_put(params, NamedSharding(where.mesh, PartitionSpec()))
    else:
        params = jax.device_put(params)
    return Predictor(predictions, params, {}, where)


def images(n, seed=1):
    return np.random.default_rng(seed).integers(
        0, 256, (n, fakes.SIDE, fakes.SIDE, 3), dtype=np.uint8
    )


@pytest.mark.parametrize("shape", SHARDINGS)
def test_any_number_of_rows_is_predicted_on_any_number_of_devices(shape):
    predictor = make_predictor(shape)
    for n in (5, 1, 8, 13, 3):
        batch = images(n, seed=n)
        expected = fakes.numpy_image_embedding(fakes.make_params(), batch)
        got = predictor("image_embedding", {"image": batch})
        assert isinstance(got, np.ndarray) and got.shape == (n, fakes.E)
        np.testing.assert_allclose(got, expected, atol=2e-5)


def counting_predictions():
    traces = []

    def image_embedding(params, extras, batch):
        traces.append(batch["image"].shape)
        return fakes.image_embedding(params, extras, batch)

    return {"image_embedding": image_embedding}, traces


def test_a_prediction_is_compiled_once_for_new_parameters_and_smaller_batches():
    predictions, traces = counting_predictions()
    predictor = make_predictor((8, 1, 1), predictions)
    predictor("image_embedding", {"image": images(13)})
    other = predictor.with_params(make_predictor((8, 1, 1), seed=1).params, {})
    for n in (2, 13, 16):
        got = other("image_embedding", {"image": images(n)})
        expected = fakes.numpy_image_embedding(fakes.make_params(1), images(n))
        np.testing.assert_allclose(got, expected, atol=2e-5)
    assert [shape[0] for shape in traces] == [16]
    other("image_embedding", {"image": images(17)})
    predictor("image_embedding", {"image": images(9)})
    assert [shape[0] for shape in traces] == [16, 24]


def test_a_batch_is_padded_to_the_smallest_compiled_size_that_holds_it():
    predictor = make_predictor(
        predictions={"rows": lambda p, e, b: 0 * b["label"] + b["label"].size}
    )
    used = [predictor("rows", {"label": np.zeros(n, np.int32)})[0] for n in (20, 9, 30, 25, 10, 21)]
    assert used == [20, 20, 30, 30, 20, 30]


def test_new_extras_change_the_prediction():
    predictor = make_predictor()
    extras = {"shift": jax.device_put(np.float32(3.0))}
    before = predictor("image_embedding", {"image": images(2)})
    after = predictor.with_params(predictor.params, extras)("image_embedding", {"image": images(2)})
    assert np.abs(after - before).max() > 0.1


def test_an_unknown_prediction_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown prediction 'image_embeding'.*'logits'.*did you"):
        make_predictor()("image_embeding", {"image": images(2)})


def test_a_batch_without_the_input_of_a_prediction_is_an_error():
    with pytest.raises(ValueError, match="'text_embedding' needs a batch with rows"):
        make_predictor()("text_embedding", {"image": images(2)})
    with pytest.raises(ValueError, match="'image_embedding' needs a batch with rows"):
        make_predictor()("image_embedding", {"image": images(0)})


@pytest.mark.parametrize("shape", [None, (4, 2, 1)])
def test_evaluation_makes_no_implicit_transfer(shape):
    predictor, dataset = make_predictor(shape), fakes.make_dataset()
    with jax.transfer_guard("disallow"):
        rows = predict_all(predictor, dataset, ["image_embedding", "text_embedding"], 7)
        texts = embed_texts(predictor, dataset.preprocess, ["a", "bc"], 7)
    assert len(rows["image_embedding"]) == 51 and texts.shape == (2, fakes.E)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("shape", [None, (8, 1, 1)])
def test_every_readable_example_is_predicted_once_and_in_order(shape, batch_size):
    dataset = fakes.make_dataset()
    rows = predict_all(
        make_predictor(shape), dataset, ["image_embedding", "text_embedding"], batch_size
    )
    good = [i for i in range(53) if i not in (7, 30)]
    examples = [dataset.source[i] for i in good]
    params, captions = fakes.make_params(), [e["caption"] for e in examples]
    assert rows["index"].tolist() == good
    assert rows["label"].tolist() == [e["label"] for e in examples]
    assert rows["text_id"].tolist() == [fakes.text_id(c) for c in captions]
    expected = fakes.numpy_image_embedding(params, [e["image"] for e in examples])
    np.testing.assert_allclose(rows["image_embedding"], expected, atol=2e-5)
    expected = fakes.numpy_text_embedding(params, captions)
    np.testing.assert_allclose(rows["text_embedding"], expected, atol=2e-5)


def test_an_evaluation_without_a_readable_example_is_an_error():
    broken = [{"image": None, "caption": "x"}] * 3
    for examples in (broken, []):
        with pytest.raises(ValueError, match=f"got none of {len(examples)}"):
            predict_all(make_predictor(), fakes.make_dataset(examples), ["image_embedding"], 2)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_texts_are_embedded_in_order_whatever_the_batch_size(batch_size):
    texts = [f"{'long ' * (i % 3)}text {i}" for i in range(11)]
    got = embed_texts(make_predictor((8, 1, 1)), fakes.Preprocess(), texts, batch_size)
    expected = fakes.numpy_text_embedding(fakes.make_params(), texts)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_texts_that_do_not_fit_the_context_are_named():
    with pytest.warns(
        UserWarning, match="1 of 2 texts are longer than the context of 6 tokens.*too"
    ):
        embed_texts(make_predictor(), fakes.Preprocess(text_length=6), ["fits", "too long"], 4)


def test_the_dataset_is_closed_after_the_last_batch_and_after_an_error():
    class Watched(fakes.Dataset):
        def ordered(self, **kwargs):
            self.batches = super().ordered(**kwargs)  # kept, or it would be closed by being freed
            return self.batches

    dataset = Watched(fakes.Source(fakes.make_examples()))
    predict_all(make_predictor(), dataset, ["image_embedding"], 20)
    assert dataset.batches.gi_frame is None  # closed
    with pytest.raises(ValueError, match="unknown prediction 'x'"):
        predict_all(make_predictor(), dataset, ["x"], 20)
    assert dataset.batches.gi_frame is None


def test_the_real_data_pipeline_keeps_the_order_and_the_mask():
    from flax_vlm.data import pipeline, text

    source = fakes.Source(fakes.make_examples()[:11])
    source.examples[3]["image"] = b"not an image"
    source.examples[7]["image"] = source.examples[1]["image"]
    tokenizer = text.byte_level()
    preprocess = pipeline.Preprocess((), (fakes.SIDE, fakes.SIDE), tokenizer, 40)
    rows = predict_all(
        make_predictor((4, 2, 1)), pipeline.Dataset(source, preprocess), ["image_embedding"], 4
    )
    good = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert rows["index"].tolist() == good
    images = [source[i]["image"] for i in good]
    expected = fakes.numpy_image_embedding(fakes.make_params(), images)
    np.testing.assert_allclose(rows["image_embedding"], expected, atol=2e-5)
    captions = [source[i]["caption"] for i in good]
    assert rows["text_id"].tolist() == [text.text_id(c) for c in captions]
