"""Multi-label metrics, computed exactly with scikit-learn.

Micro averages are over all album-genre pairs, so common genres count more; macro averages are means
over genres. The paper uses Keras, whose metrics are micro by default; Oramas et al. report macro.
Neither is approximated with a fixed number of thresholds, as in Keras.

Only macro metrics show whether a model has learned anything from covers: always predicting the
share of albums with each genre gives a macro ROC AUC of 0.5, but good micro metrics.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covergenre.formatting import plural, shortened

_ONE_SIDED_5_PERCENT = 1.645
"""Quantile of the normal distribution: exceeded by chance in 5 % of all cases."""

Metrics = dict[str, Any]


def multilabel_metrics(
    truth: NDArray[Any], scores: NDArray[Any], genres: Sequence[str], threshold: float = 0.5
) -> Metrics:
    """Metrics of `scores` (0 to 1) against `truth` (0 or 1), both [albums, genres].

    Keys: albums, roc_auc_macro, roc_auc_micro, pr_auc_macro, pr_auc_micro (average precision),
    precision and recall (micro, at `threshold`), macro_genres, genres_without_auc,
    chance_standard_error, better_than_chance, and `genres`: the same for each genre, with its
    positives and prevalence. A genre without positive or without negative albums has AUCs of NaN,
    is left out of the macro means, and is listed in genres_without_auc; macro_genres is the number
    of the other genres.

    better_than_chance: whether roc_auc_macro is significantly above 0.5, by a one-sided test at the
    5 % level with chance_standard_error (see macro_auc_standard_error); None without macro means.
    """
    truth = np.asarray(truth) > 0.5
    scores = np.asarray(scores)
    if truth.shape != scores.shape or truth.shape[1] != len(genres):
        raise ValueError(f"truth {truth.shape}, scores {scores.shape}, {len(genres)} genres")
    decided = scores >= np.float32(threshold)

    per_genre: dict[str, dict[str, float]] = {}
    for j, name in enumerate(genres):
        positives = int(truth[:, j].sum())
        roc_auc, pr_auc = _areas(truth[:, j], scores[:, j])
        per_genre[name] = {
            "positives": positives,
            "prevalence": positives / len(truth) if len(truth) else math.nan,
            "roc_auc": roc_auc,
            "pr_auc": pr_auc,
            **_precision_recall(truth[:, j], decided[:, j]),
        }
    measured = [g for g, m in per_genre.items() if not math.isnan(m["roc_auc"])]
    used = [j for j, name in enumerate(genres) if name in measured]
    macro = _mean([per_genre[g]["roc_auc"] for g in measured])
    error = macro_auc_standard_error(truth[:, used], scores[:, used]) if used else math.nan
    roc_auc_micro, pr_auc_micro = _areas(truth.ravel(), scores.ravel())
    return {
        "albums": len(truth),
        "threshold": threshold,
        "roc_auc_macro": macro,
        "roc_auc_micro": roc_auc_micro,
        "pr_auc_macro": _mean([per_genre[g]["pr_auc"] for g in measured]),
        "pr_auc_micro": pr_auc_micro,
        **_precision_recall(truth, decided),
        "macro_genres": len(measured),
        "genres_without_auc": [g for g in genres if g not in measured],
        "chance_standard_error": error,
        "better_than_chance": (macro > 0.5 + _ONE_SIDED_5_PERCENT * error if measured else None),
        "genres": per_genre,
    }


def macro_auc_standard_error(truth: NDArray[np.bool_], scores: NDArray[Any]) -> float:
    """Standard error of the macro ROC AUC of scores that are independent of the genres.

    It is exact, also with ties and correlated genres, if all permutations of the rows of `scores`
    are equally likely. A genre's AUC is linear in the ranks of its positive albums (Mann & Whitney
    1947), and so is the mean over genres. Its variance is (n - 1) * sum(cov(truth) * cov(ranks)),
    as in Hoeffding's combinatorial central limit theorem (1951). For one genre with P positive and
    N negative albums and no ties, that is (P + N + 1) / (12 P N), as in the Mann-Whitney U test.
    Every genre must have positive and negative albums.
    """
    albums, genres = truth.shape
    positives = truth.sum(axis=0)
    ranks = np.stack([_midranks(column) for column in scores.T], axis=1)
    ranks /= positives * (albums - positives) * genres
    covariances = np.cov(truth.astype(float), rowvar=False) * np.cov(ranks, rowvar=False)
    return math.sqrt(max(0.0, (albums - 1) * float(covariances.sum())))


def _midranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Rank of each value, from 1; equal values get the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return ranks[which]


def dev_metrics(record: Mapping[str, Any]) -> Metrics:
    """The dev metrics in the record of a training epoch, without the prefix `dev_`."""
    return {key.removeprefix("dev_"): v for key, v in record.items() if key.startswith("dev_")}


def macro_over(metrics: Mapping[str, Any], most: int = 3) -> str:
    """The genres in the macro means: `6 genres`, or `5 of 6 genres, without Country`.

    Lists at most `most` of the genres left out. Empty if `metrics` has no `macro_genres`.
    """
    used = metrics.get("macro_genres")
    if used is None:
        return ""
    without = metrics["genres_without_auc"]
    if not without:
        return plural(used, "genre")
    names = shortened(without, most)
    return f"{used:,} of {plural(used + len(without), 'genre')}, without {names}"


def chance_warning(metrics: Mapping[str, Any], split: str) -> str:
    """A warning if the metrics are not better than chance (see multilabel_metrics), else empty."""
    auc, error = metrics["roc_auc_macro"], metrics.get("chance_standard_error")
    if metrics.get("macro_genres") == 0:
        return (
            f"cannot tell whether the model is better than chance: in the {split} split, each genre"
            " is in all albums or in none"
        )
    if auc is None or error is None or metrics["better_than_chance"]:
        return ""
    return (
        f"no better than chance on the {split} split: macro ROC AUC {auc:.3f}; random scores have"
        f" 0.5 with a standard error of {error:.3f}; micro metrics can still be high, because they"
        " reward predicting common genres"
    )


def base_rate_loss(positives: Sequence[int] | NDArray[Any], albums: int) -> float:
    """Binary cross-entropy of always predicting each genre's share of the albums.

    positives: number of albums with each genre. In nats, the mean over genres; no model can have a
    lower loss without using the covers.
    """
    share = np.asarray(positives, np.float64) / albums
    certain = (share == 0) | (share == 1)  # 0 log 0 is 0
    p = np.where(certain, 0.5, share)
    entropies = np.where(certain, 0.0, -p * np.log(p) - (1 - p) * np.log(1 - p))
    return float(entropies.mean())


def _areas(truth: NDArray[np.bool_], scores: NDArray[Any]) -> tuple[float, float]:
    """(ROC AUC, average precision); NaN if `truth` has no positives or no negatives."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if not 0 < truth.sum() < truth.size:
        return math.nan, math.nan
    return float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores))


def _precision_recall(truth: NDArray[np.bool_], decided: NDArray[np.bool_]) -> dict[str, float]:
    """As in Keras, precision is 0 without predicted labels, and recall is 0 without true ones."""
    hits = int((truth & decided).sum())
    predicted, actual = int(decided.sum()), int(truth.sum())
    return {
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / actual if actual else 0.0,
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def nan_to_none(value: Any) -> Any:
    """`value` with every NaN replaced by None, recursively: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
