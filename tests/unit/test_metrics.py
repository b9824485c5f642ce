"""Metrics compared with scikit-learn and with values computed by hand."""

import itertools
import json
import math

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from covergenre.metrics import (
    base_rate_loss,
    chance_warning,
    macro_auc_standard_error,
    macro_over,
    multilabel_metrics,
    nan_to_none,
)

NAMES = ("Folk", "Jazz", "Rock")


def random_case(seed: int, albums: int = 40, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(truth, scores); every genre has positives and negatives."""
    rng = np.random.default_rng(seed)
    truth = rng.random((albums, 3)) < (0.1, 0.4, 0.7)
    truth[0], truth[1] = True, False
    scores = np.clip(rng.random((albums, 3)) * 0.7 + truth * 0.2, 0, 1).astype(np.float32)
    return truth.astype(np.float32), scores.round(1) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_those_of_scikit_learn(seed: int, ties: bool) -> None:
    truth, scores = random_case(seed, ties=ties)
    found = multilabel_metrics(truth, scores, NAMES, threshold=0.6)
    for average in ("macro", "micro"):
        auc = roc_auc_score(truth, scores, average=average)
        assert found[f"roc_auc_{average}"] == pytest.approx(auc, abs=1e-12)
        precision = average_precision_score(truth, scores, average=average)
        assert found[f"pr_auc_{average}"] == pytest.approx(precision, abs=1e-12)
    decided = scores >= np.float32(0.6)
    assert found["precision"] == pytest.approx(precision_score(truth, decided, average="micro"))
    assert found["recall"] == pytest.approx(recall_score(truth, decided, average="micro"))
    for j, name in enumerate(NAMES):
        genre = found["genres"][name]
        assert genre["positives"] == truth[:, j].sum()
        assert genre["prevalence"] == pytest.approx(truth[:, j].mean())
        assert genre["roc_auc"] == pytest.approx(roc_auc_score(truth[:, j], scores[:, j]))
        area = average_precision_score(truth[:, j], scores[:, j])
        assert genre["pr_auc"] == pytest.approx(area)
        precision = precision_score(truth[:, j], decided[:, j], zero_division=0)
        assert genre["precision"] == pytest.approx(precision)
        assert genre["recall"] == pytest.approx(recall_score(truth[:, j], decided[:, j]))
    assert found["albums"] == 40
    assert found["threshold"] == 0.6
    assert found["genres_without_auc"] == []


def test_micro_precision_and_recall_by_hand() -> None:
    truth = [[1, 0, 1], [0, 1, 0]]
    scores = [[0.9, 0.6, 0.1], [0.2, 0.5, 0.3]]
    found = multilabel_metrics(np.array(truth), np.array(scores, np.float32), NAMES)
    assert found["precision"] == pytest.approx(2 / 3)  # predicted: 0.9, 0.6, 0.5; correct: 0.9, 0.5
    assert found["recall"] == pytest.approx(2 / 3)  # true: 0.9, 0.1, 0.5; predicted: 0.9, 0.5
    by_genre = {name: (m["precision"], m["recall"]) for name, m in found["genres"].items()}
    assert by_genre == {"Folk": (1.0, 1.0), "Jazz": (0.5, 1.0), "Rock": (0.0, 0.0)}


def test_every_small_truth_table_by_hand() -> None:
    """One genre, three albums: ROC AUC is the share of (positive, negative) pairs in order."""
    for truth in itertools.product((0, 1), repeat=3):
        for scores in itertools.product((0.25, 0.5, 0.75), repeat=3):
            found = multilabel_metrics(
                np.array(truth)[:, None], np.array(scores, np.float32)[:, None], ["A"]
            )
            pairs = [
                1.0 if p > n else 0.5 if p == n else 0.0
                for t, p in zip(truth, scores, strict=True)
                for u, n in zip(truth, scores, strict=True)
                if t and not u
            ]
            if pairs:
                assert found["roc_auc_macro"] == pytest.approx(sum(pairs) / len(pairs))
                assert found["genres_without_auc"] == []
            else:
                assert math.isnan(found["roc_auc_macro"])
                assert found["genres_without_auc"] == ["A"]
            hits = sum(bool(t) and s >= 0.5 for t, s in zip(truth, scores, strict=True))
            predicted = sum(s >= 0.5 for s in scores)
            assert found["precision"] == pytest.approx(hits / predicted if predicted else 0)
            assert found["recall"] == pytest.approx(hits / sum(truth) if sum(truth) else 0)


@pytest.mark.parametrize("fill", [0, 1])
def test_genre_in_all_or_no_albums_is_left_out_of_macro_means(fill: int) -> None:
    truth, scores = random_case(1)
    truth[:, 1] = fill
    found = multilabel_metrics(truth, scores, NAMES)
    assert found["genres_without_auc"] == ["Jazz"]
    assert found["macro_genres"] == 2
    assert macro_over(found) == "2 of 3 genres, without Jazz"
    assert math.isnan(found["genres"]["Jazz"]["roc_auc"])
    assert math.isnan(found["genres"]["Jazz"]["pr_auc"])
    assert found["genres"]["Jazz"]["positives"] == fill * 40
    rest = multilabel_metrics(truth[:, [0, 2]], scores[:, [0, 2]], ["Folk", "Rock"])
    assert found["roc_auc_macro"] == rest["roc_auc_macro"]
    assert found["pr_auc_macro"] == rest["pr_auc_macro"]
    # Micro metrics include the genre.
    assert found["roc_auc_micro"] == pytest.approx(roc_auc_score(truth.ravel(), scores.ravel()))


@pytest.mark.parametrize("albums", [0, 1, 4])
@pytest.mark.parametrize("fill", [0, 1])
def test_aucs_are_nan_without_positive_and_negative_albums(albums: int, fill: int) -> None:
    truth = np.full((albums, 3), fill)
    found = multilabel_metrics(truth, np.zeros((albums, 3), np.float32), NAMES)
    for key in ("roc_auc_macro", "roc_auc_micro", "pr_auc_macro", "pr_auc_micro"):
        assert math.isnan(found[key])
    assert found["genres_without_auc"] == list(NAMES)
    assert (found["macro_genres"], found["better_than_chance"]) == (0, None)
    assert macro_over(found) == "0 of 3 genres, without Folk, Jazz and Rock"
    for metrics in (found, nan_to_none(found)):
        assert "dev split" in chance_warning(metrics, "dev")
    assert (found["precision"], found["recall"], found["albums"]) == (0.0, 0.0, albums)
    text = json.dumps(nan_to_none(found), allow_nan=False)
    assert json.loads(text)["roc_auc_macro"] is None


def test_mismatched_shapes_are_an_error() -> None:
    for truth, scores, names in (
        ((4, 3), (4, 2), NAMES),
        ((4, 3), (3, 3), NAMES),
        ((4, 3), (4, 3), NAMES[:2]),
    ):
        with pytest.raises(ValueError):
            multilabel_metrics(np.zeros(truth), np.zeros(scores), names)


def test_nan_to_none_is_recursive() -> None:
    nan = math.nan
    value = {"a": nan, "b": [1.5, nan, {"c": nan}], "d": (nan, "nan"), "e": None, "f": 0, "g": True}
    assert nan_to_none(value) == {
        "a": None,
        "b": [1.5, None, {"c": None}],
        "d": [None, "nan"],
        "e": None,
        "f": 0,
        "g": True,
    }
    assert nan_to_none(np.float64("nan")) is None
    assert nan_to_none(math.inf) == math.inf


def test_standard_error_of_one_genre_is_that_of_the_mann_whitney_test() -> None:
    for positives, negatives in ((1, 1), (3, 7), (20, 5)):
        truth = np.arange(positives + negatives)[:, None] < positives
        scores = np.random.default_rng(0).permutation(len(truth))[:, None]
        expected = math.sqrt((positives + negatives + 1) / (12 * positives * negatives))
        assert macro_auc_standard_error(truth, scores) == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True])
def test_standard_error_is_the_deviation_over_all_permutations_of_the_albums(ties: bool) -> None:
    """The genres are correlated, in the labels and in the scores."""
    truth = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1]]) > 0
    scores = np.array([[5, 4, 1], [4, 5, 2], [1, 1, 6], [2, 0, 3], [6, 6, 0], [3, 2, 4]])
    scores = scores // 3 if ties else scores
    permuted = scores[list(itertools.permutations(range(6)))]  # permutation, album, genre
    ahead, behind = permuted[:, :, None], permuted[:, None]
    wins = (ahead > behind) + 0.5 * (ahead == behind)
    pairs = truth[:, None] & ~truth  # of a positive and a negative album
    aucs = ((wins * pairs).sum((1, 2)) / pairs.sum((0, 1))).mean(axis=1)
    assert aucs[0] == pytest.approx(roc_auc_score(truth, scores, average="macro"))
    assert np.mean(aucs) == pytest.approx(0.5)
    assert macro_auc_standard_error(truth, scores) == pytest.approx(np.std(aucs))


def test_base_rates_as_scores_are_not_better_than_chance() -> None:
    truth, _ = random_case(0, albums=400)
    found = multilabel_metrics(truth, np.tile(truth.mean(axis=0), (400, 1)), NAMES)
    assert found["roc_auc_micro"] > 0.7
    assert found["roc_auc_macro"] == 0.5
    assert found["better_than_chance"] is False
    warning = chance_warning(found, "dev")
    assert "dev split" in warning and "0.500" in warning


@pytest.mark.parametrize("seed", range(5))
def test_scores_correlated_with_the_genres_are_better_than_chance(seed: int) -> None:
    truth, scores = random_case(seed, albums=200)
    found = multilabel_metrics(truth, scores, NAMES)
    assert found["better_than_chance"] is True
    assert chance_warning(found, "dev") == ""
    worse = multilabel_metrics(truth, 1 - scores, NAMES)
    assert worse["better_than_chance"] is False


def test_random_scores_are_better_than_chance_in_5_percent_of_cases() -> None:
    rng = np.random.default_rng(0)
    truth, _ = random_case(0)
    passed = 0
    for _ in range(80):
        # One random number per album, so that the scores of all genres are correlated.
        scores = rng.random((40, 1)) + 0.1 * rng.random((40, 3))
        passed += multilabel_metrics(truth, scores, NAMES)["better_than_chance"]
    assert 1 <= passed <= 8


def test_macro_over_lists_the_genres_left_out() -> None:
    assert macro_over({"macro_genres": 6, "genres_without_auc": []}) == "6 genres"
    assert macro_over({"macro_genres": 1, "genres_without_auc": []}) == "1 genre"
    many = {"macro_genres": 2, "genres_without_auc": list("ABCDE")}
    assert macro_over(many) == "2 of 7 genres, without A, B, C and 2 more"
    assert macro_over(many, most=5) == "2 of 7 genres, without A, B, C, D and E"


def test_metrics_of_an_older_version_may_lack_keys() -> None:
    assert macro_over({"roc_auc_macro": 0.5}) == ""
    assert chance_warning({"roc_auc_macro": 0.5}, "dev") == ""


def test_base_rate_loss_is_the_mean_entropy_of_the_shares() -> None:
    assert base_rate_loss(np.array([5, 5]), 10) == pytest.approx(math.log(2))
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert base_rate_loss(np.array([1, 3, 2]), 4) == pytest.approx((2 * quarter + math.log(2)) / 3)
    assert base_rate_loss(np.array([0, 4]), 4) == 0  # genres of all or no albums are certain
