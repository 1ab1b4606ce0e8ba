# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from flax_vlm.evaluation import scores


def brute_force_rank(similarity, positives):
    """Sorts the targets, wrong ones first among equals, and looks for the first right one."""
    found = []
    for row, right in zip(similarity, positives, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        found.append(next(place for place, j in enumerate(order) if right[j]))
    return np.array(found)


def test_rank_counts_the_wrong_targets_before_the_best_right_one():
    similarity = np.array([[0.9, 0.5, 0.7, 0.1], [0.2, 0.8, 0.3, 0.4], [0.6, 0.1, 0.2, 0.3]])
    positives = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]], bool)
    assert scores.ranks(similarity, positives).tolist() == [1, 0, 3]
    assert scores.recall_at_k(np.array([1, 0, 3]), (1, 2, 4)) == {1: 1 / 3, 2: 2 / 3, 4: 1.0}


def test_a_right_target_never_pushes_another_right_target_down():
    similarity = np.array([[0.9, 0.8, 0.7, 0.75]])
    positives = np.array([[True, True, True, False]])
    assert scores.ranks(similarity, positives).tolist() == [0]
    positives = np.array([[False, True, True, True]])
    assert scores.ranks(similarity, positives).tolist() == [1]


def test_a_tie_with_a_wrong_target_is_lost():
    similarity = np.array([[0.5, 0.5, 0.4], [0.5, 0.5 - 4e-7, 0.4], [0.5, 0.5 - 4e-6, 0.4]])
    positives = np.array([[True, False, False]] * 3)
    assert scores.ranks(similarity, positives).tolist() == [1, 1, 0]
    assert scores.ranks(similarity, positives, tolerance=0).tolist() == [1, 0, 0]
    collapsed = np.zeros((3, 3))
    assert scores.ranks(collapsed, np.eye(3, dtype=bool)).tolist() == [2, 2, 2]


def test_ranks_equal_a_brute_force_sort():
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 6, (40, 23)) / 10  # many ties
    positives = rng.random((40, 23)) < 0.15
    positives[np.arange(40), rng.integers(0, 23, 40)] = True
    expected = brute_force_rank(similarity, positives)
    assert len(set(expected.tolist())) > 5
    np.testing.assert_array_equal(scores.ranks(similarity, positives), expected)


def test_a_query_without_a_right_target_is_an_error():
    with pytest.raises(ValueError, match=r"needs a right answer, queries \[1\] have none"):
        scores.ranks(np.zeros((2, 2)), np.array([[True, False], [False, False]]))


def test_nan_scores_win_nothing():
    rank = scores.ranks(np.full((2, 3), np.nan), np.eye(2, 3, dtype=bool))
    assert rank.tolist() == [2, 2]
    one_bad = np.array([[0.9, np.nan, 0.1]])
    assert scores.ranks(one_bad, np.array([[True, False, False]])).tolist() == [1]
    assert scores.label_ranks(np.full((1, 4), np.nan), np.array([2])).tolist() == [3]
    assert scores.two_choice(np.array([np.nan, 1.0]), np.array([0.0, np.nan])).tolist() == [0, 0]


def test_retrieval_ranks_do_not_depend_on_the_chunk_and_see_only_a_chunk():
    rng = np.random.default_rng(1)
    queries, targets = rng.normal(size=(37, 5)), rng.normal(size=(29, 5))
    query_ids, target_ids = rng.integers(0, 8, 37), np.arange(29) % 8
    seen = []

    def positives(s):
        seen.append(len(query_ids[s]))
        return query_ids[s, None] == target_ids[None]

    cosine = queries @ targets.T / np.linalg.norm(queries, axis=1)[:, None]
    cosine = cosine / np.linalg.norm(targets, axis=1)
    expected = brute_force_rank(cosine, query_ids[:, None] == target_ids[None])
    for chunk in (1, 10, 64):
        got = scores.retrieval_ranks(queries, targets, positives, chunk)
        np.testing.assert_array_equal(got, expected)
    assert max(seen[:37]) == 1 and seen[37:41] == [10, 10, 10, 7] and seen[41:] == [37]


def test_label_rank_is_lost_to_a_tie():
    values = np.array([[1.0, 3.0, 2.0], [2.0, 2.0, 1.0], [0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    labels = np.array([1, 0, 0, 2], np.int32)
    rank = scores.label_ranks(values, labels)
    assert rank.tolist() == [0, 1, 2, 2]
    assert scores.recall_at_k(rank, (1, 2, 3)) == {1: 0.25, 2: 0.5, 3: 1.0}
    assert scores.label_ranks(np.array([[1.0, 0.5]]), np.array([0]), tolerance=0.6).tolist() == [1]


def test_confusion_matrix_has_right_classes_in_its_rows():
    predicted, labels = np.array([0, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 2, 1, 2], np.int32)
    expected = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    assert scores.confusion_matrix(predicted, labels, 4).tolist() == expected


def test_mean_class_accuracy_weighs_classes_equally_and_skips_absent_ones():
    correct, labels = np.array([1, 1, 1, 0, 1], bool), np.array([0, 0, 0, 3, 3])
    assert scores.mean_class_accuracy(correct, labels) == (1.0 + 0.5) / 2


def test_wilson_interval_equals_published_values_and_solves_its_equation():
    low, high = scores.wilson_interval(8, 10)  # Brown, Cai & DasGupta's worked form; R: 0.49, 0.94
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    for bound in scores.wilson_interval(350, 360):
        # its ends lie z standard errors away: (p - bound)^2 = z^2 bound (1 - bound) / n
        left, right = (350 / 360 - bound) ** 2, 1.959964**2 * bound * (1 - bound) / 360
        assert abs(left - right) < 1e-12
    assert scores.wilson_interval(0, 0) == (0.0, 1.0)
    for n in range(1, 200):  # rounding must not push the ends out of 0..1
        low, high = scores.wilson_interval(0, n)[0], scores.wilson_interval(n, n)[1]
        assert 0 <= low < 1e-15 and 1 - 1e-15 < high <= 1


def test_two_choice_counts_a_tie_as_half():
    right = np.array([0.9, 0.2, 0.5, 0.5 + 4e-7, 0.5])
    wrong = np.array([0.1, 0.3, 0.5, 0.5, 0.5 + 4e-6])
    assert scores.two_choice(right, wrong).tolist() == [1, 0, 0.5, 0.5, 0]


def test_class_embeddings_normalise_then_average_then_normalise():
    # lengths 10 and 1: an average before normalising would lean to the first prompt
    prompts = np.array([[[10.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 5.0]]])
    got = scores.class_embeddings(prompts)
    np.testing.assert_allclose(got, [[0.5**0.5, 0.5**0.5], [0.0, 1.0]], atol=1e-15)


def test_cosines_do_not_depend_on_length():
    a, b = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32), np.array([[6.0, 8.0], [-4.0, 3.0]])
    np.testing.assert_allclose(scores.cosines(a, b), [[1, 0], [0, 0]], atol=1e-15)
