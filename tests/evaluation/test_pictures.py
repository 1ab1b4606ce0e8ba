# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.patches import Rectangle
from PIL import Image

from flax_vlm.evaluation import pictures


def some_images(n, height=12, width=9, channels=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, channels), dtype=np.uint8) for _ in range(n)]


def texts_of(figure):
    return [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text()]


def check_png(figure, path):
    pictures.save_figure(figure, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        expected = np.round(figure.get_size_inches() * pictures.DPI)
        assert np.abs(np.array(image.size) - expected).max() <= 1
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 5  # something was drawn
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_wrong_predictions_are_red_and_tell_the_truth(tmp_path):
    figure = pictures.prediction_grid(
        some_images(5),
        ["cat", "dog", r"$\frac$ bill", "owl", "eel"],
        ["cat", "cow", r"$\x$", "owl", "eel"],
        title=r"61 % & $\frac$",
        columns=3,
    )
    assert len(figure.axes) == 5
    for n, axes in enumerate(figure.axes):
        wrong = n in (1, 2)
        edge = axes.spines["left"].get_edgecolor()
        assert same_color(edge, pictures.WRONG) == wrong
        assert same_color(axes.texts[0].get_color(), pictures.WRONG) == wrong
        assert len(axes.texts) == 1 + wrong
    red, green, blue = (int(pictures.WRONG[i : i + 2], 16) for i in (1, 3, 5))
    assert red > 180 and max(green, blue) < 80
    shown = [[t.get_text() for t in axes.texts] for axes in figure.axes]
    assert shown[1] == ["dog", "true: cow"] and shown[2] == [r"$\frac$ bill", r"true: $\x$"]
    assert r"61 % & $\frac$" in texts_of(figure) and "red: wrong, 2 of the 5 shown" in texts_of(
        figure
    )
    check_png(figure, tmp_path / "predictions.png")


def test_grid_images_keep_their_order_and_do_not_overlap():
    images = some_images(7)
    figure = pictures.prediction_grid(images, ["a"] * 7, ["a"] * 7, columns=3)
    boxes = [axes.get_position() for axes in figure.axes]
    for axes, image in zip(figure.axes, images, strict=True):
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), image)
    assert boxes[0].x1 < boxes[1].x0 < boxes[2].x0 and boxes[0].y0 > boxes[3].y1
    assert boxes[3].y0 > boxes[6].y1 and boxes[6].y0 > 0 and boxes[2].x1 < 1


def test_similarity_matrix_has_captions_as_lines_and_images_as_columns(tmp_path):
    images, captions = some_images(4, channels=1), ["one", "a $2 coin", r"three $\x$"]
    similarity = np.arange(12.0).reshape(4, 3) / 10 - 0.5  # [images, captions]
    figure = pictures.similarity_matrix(images, captions, similarity, title=r"cosines $\frac$")
    axes = figure.axes[0]
    np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), similarity.T)
    assert [t.get_text() for t in axes.get_yticklabels()] == captions
    assert len(axes.images) == 1 + 4
    for n, image in enumerate(axes.images[1:]):  # the thumbnail of image n is above column n
        left, right, bottom, top = image.get_extent()
        assert left < n < right and top < bottom < -0.5
        np.testing.assert_array_equal(np.asarray(image.get_array())[..., :1], images[n])
    cells = {t.get_position(): t.get_text() for t in axes.texts}
    assert cells[(3, 1)] == "0.50" and cells[(0, 1)] == "−0.40" and len(cells) == 12
    check_png(figure, tmp_path / "similarity.png")


def framed(figure):
    found = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert all(same_color(p.get_edgecolor(), pictures.FRAME) for p in found)
    return sorted((p.get_x() + 0.5, p.get_y() + 0.5) for p in found)


def test_true_pairs_are_framed():
    images, captions = some_images(3), ["a", "b"]
    figure = pictures.similarity_matrix(images, captions, np.zeros((3, 2)))
    assert framed(figure) == [(0, 0), (1, 1)]
    positives = np.array([[True, False], [True, False], [False, True]])  # [images, captions]
    figure = pictures.similarity_matrix(images, captions, np.zeros((3, 2)), positives=positives)
    assert framed(figure) == [(0, 0), (1, 0), (2, 1)]


def training_rows(n=100, **more):
    rows = [
        {"step": s, "loss": 100.0 / s + 1, "learning_rate": 1e-3 * s / n} for s in range(1, n + 1)
    ]
    for s in (20, 60, 100):
        accuracy = s / 200
        rows.append(
            {
                "step": s,
                "eval/zero_shot/accuracy": accuracy,
                "eval/zero_shot/accuracy_low": accuracy - 0.1,
                "eval/zero_shot/accuracy_high": accuracy + 0.1,
                "eval/zero_shot/examples": 360,
                "eval/retrieval/i2t@1": accuracy / 2,
            }
        )
    return rows


def test_training_curve_shows_loss_headline_metrics_and_learning_rate(tmp_path):
    figure = pictures.training_curve(training_rows(), title=r"run $\x$")
    loss, evaluation, rate = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), 100.0 / np.arange(1, 101) + 1)
    assert loss.get_yscale() == "log" and len(loss.lines) == 2
    labels = [line.get_label() for line in evaluation.lines]
    assert labels == ["zero shot accuracy  50.0 %", "retrieval i2t@1  25.0 %"]
    assert evaluation.lines[0].get_xdata().tolist() == [20, 60, 100]
    assert evaluation.lines[0].get_ydata().tolist() == [0.1, 0.3, 0.5]
    assert len(evaluation.collections) == 1  # the interval of the accuracy
    assert rate.lines[0].get_ydata()[-1] == 1e-3
    check_png(figure, tmp_path / "training.png")


def test_the_smoothed_loss_is_not_shifted_and_survives_a_bad_step():
    rows = [{"step": s, "loss": 3.0 + 2 * s} for s in range(1, 101)]
    rows[40]["loss"] = float("nan")
    figure = pictures.training_curve(rows)
    raw, smooth = figure.axes[0].lines
    assert len(raw.get_xdata()) == 99 and 41 not in raw.get_xdata()
    away = np.abs(smooth.get_xdata() - 41) > 4
    np.testing.assert_allclose(smooth.get_ydata()[away], raw.get_ydata()[away])
    assert len(figure.axes) == 2  # no panel without evaluations


def test_training_curve_of_chosen_metrics_and_of_an_empty_run():
    figure = pictures.training_curve(training_rows(), metrics=["eval/retrieval/i2t@1", "missing"])
    assert [line.get_label() for line in figure.axes[1].lines] == ["retrieval i2t@1  25.0 %"]
    assert len(pictures.training_curve([]).axes) == 2


def test_attention_lights_up_the_patch_that_is_attended_to(tmp_path):
    image = np.full((20, 30, 3), 90, np.uint8)
    maps = np.zeros((2, 4, 6))
    maps[0, 1, 4], maps[1, 3, 0] = 0.7, 0.001
    figure = pictures.attention_map(image, maps, ["head 1", r"$\head$"], title=r"pooling $\x$")
    assert [axes.get_title() for axes in figure.axes] == ["image", "head 1", r"$\head$"]
    for axes, (y, x) in zip(figure.axes[1:], ((1, 4), (3, 0)), strict=True):
        shown = np.asarray(axes.images[0].get_array()).astype(float)
        height, width = shown.shape[0] // 4, shown.shape[1] // 6
        warmth = (shown[..., 0] - shown[..., 2]).reshape(4, height, 6, width).mean((1, 3))
        assert np.unravel_index(warmth.argmax(), warmth.shape) == (y, x)
        assert warmth[y, x] > 60 and abs(np.median(warmth)) < 15
    check_png(figure, tmp_path / "attention.png")


def test_attention_maps_without_names_are_an_error():
    with pytest.raises(ValueError, match=r"\[n, h, w\] with n names, got \(4, 6\), 1 names"):
        pictures.attention_map(some_images(1)[0], np.ones((4, 6)), ["a"])


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    figure = pictures.training_curve([])

    def fail(temporary, **_):
        temporary.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        pictures.save_figure(figure, path)
    assert path.read_bytes() == b"old"


def test_pictures_do_not_touch_pyplot():
    code = "import sys, flax_vlm.evaluation; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
