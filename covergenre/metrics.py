"""Exact multi-label metrics of arrays, computed with scikit-learn.

Micro: every album-genre pair is one decision, so common genres weigh more. Macro: the mean over
genres. The paper uses Keras, whose metrics are micro by default; Oramas et al. report macro. Both
are exact here, also with ties, not approximated with a fixed number of thresholds as in Keras.

Only macro metrics show whether a model has learned anything from covers: predicting for every
album the share of albums with each genre has a macro ROC AUC of 0.5, but good micro metrics.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covergenre.formatting import plural, shortened

_ONE_SIDED_5_PERCENT = 1.645
"""Standard errors above chance that a macro ROC AUC without skill exceeds one time in twenty."""

Metrics = dict[str, Any]


def multilabel_metrics(
    truth: NDArray[Any], scores: NDArray[Any], genres: Sequence[str], threshold: float = 0.5
) -> Metrics:
    """Metrics of `scores` (0 to 1) against `truth` (0 or 1), both [albums, genres].

    Keys: albums, roc_auc_macro, roc_auc_micro, pr_auc_macro, pr_auc_micro (average precision),
    precision and recall (micro, at `threshold`), macro_genres, genres_without_auc,
    chance_standard_error, better_than_chance, and `genres`: the same for each genre, with its
    positives and prevalence. A genre with no positive or no negative album has no AUC: it is NaN,
    is left out of the macro means and named in genres_without_auc; macro_genres counts the others.

    better_than_chance: whether roc_auc_macro is significantly above 0.5, by a one-sided test at the
    5 % level with chance_standard_error (see macro_auc_standard_error). None: no genre has an AUC.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = np.asarray(truth) > 0.5
    scores = np.asarray(scores)
    if truth.shape != scores.shape or truth.shape[1] != len(genres):
        raise ValueError(f"truth {truth.shape}, scores {scores.shape}, {len(genres)} genres")
    decided = scores >= np.float32(threshold)

    per_genre: dict[str, dict[str, float]] = {}
    for j, name in enumerate(genres):
        positives = int(truth[:, j].sum())
        defined = 0 < positives < len(truth)
        per_genre[name] = {
            "positives": positives,
            "prevalence": positives / len(truth) if len(truth) else math.nan,
            "roc_auc": float(roc_auc_score(truth[:, j], scores[:, j])) if defined else math.nan,
            "pr_auc": (
                float(average_precision_score(truth[:, j], scores[:, j])) if defined else math.nan
            ),
            **_precision_recall(truth[:, j], decided[:, j]),
        }
    measured = [g for g, m in per_genre.items() if not math.isnan(m["roc_auc"])]
    both = 0 < truth.sum() < truth.size
    used = [j for j, name in enumerate(genres) if name in measured]
    macro = _mean([per_genre[g]["roc_auc"] for g in measured])
    error = macro_auc_standard_error(truth[:, used], scores[:, used]) if used else math.nan
    return {
        "albums": len(truth),
        "threshold": threshold,
        "roc_auc_macro": macro,
        "roc_auc_micro": float(roc_auc_score(truth.ravel(), scores.ravel())) if both else math.nan,
        "pr_auc_macro": _mean([per_genre[g]["pr_auc"] for g in measured]),
        "pr_auc_micro": (
            float(average_precision_score(truth.ravel(), scores.ravel())) if both else math.nan
        ),
        **_precision_recall(truth, decided),
        "macro_genres": len(measured),
        "genres_without_auc": [g for g in genres if g not in measured],
        "chance_standard_error": error,
        "better_than_chance": (macro > 0.5 + _ONE_SIDED_5_PERCENT * error if measured else None),
        "genres": per_genre,
    }


def macro_auc_standard_error(truth: NDArray[np.bool_], scores: NDArray[Any]) -> float:
    """Standard error of the macro ROC AUC of scores that are independent of the genres.

    That is, if every permutation of the rows of `scores` were equally likely. A genre's AUC is
    linear in the ranks of its positive albums (Mann & Whitney 1947), and so is the mean of several,
    whose variance is that of Hoeffding's combinatorial central limit theorem (1951),
    (n - 1) * sum(cov(truth) * cov(ranks)): exact, with ties and with genres that depend on each
    other. For one genre with P positive and N negative albums, and no ties, it is the
    (P + N + 1) / (12 P N) of the Mann-Whitney U test. Every genre must have both.
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
    """Metrics of the dev split in a training epoch's record, without the prefix `dev_`."""
    return {key.removeprefix("dev_"): v for key, v in record.items() if key.startswith("dev_")}


def macro_over(metrics: Mapping[str, Any], most: int = 3) -> str:
    """Genres that the macro means are over: `6 genres`, or `5 of 6 genres, without Country`.

    At most `most` of the names left out are listed. Empty if `metrics` has no `macro_genres`.
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
    """A warning if `metrics` of `split` are no better than chance, else empty.

    See multilabel_metrics for the test.
    """
    auc, error = metrics["roc_auc_macro"], metrics.get("chance_standard_error")
    if metrics.get("macro_genres") == 0:
        return (
            f"the {split} split cannot show whether the model is better than chance: it has no"
            " genre that some albums have and others do not"
        )
    if auc is None or error is None or metrics["better_than_chance"]:
        return ""
    return (
        f"no better than chance on the {split} split: macro ROC AUC {auc:.3f}, where random scores"
        f" have 0.5 with a standard error of {error:.3f}; micro metrics can still look good: they"
        " reward knowing which genres are common"
    )


def base_rate_loss(positives: Sequence[int] | NDArray[Any], albums: int) -> float:
    """Binary cross-entropy of always predicting each genre's share of the albums.

    positives: albums that have each genre, of `albums`. The mean over genres of the entropy of
    their shares, in nats; the least that a model that does not look at covers can reach.
    """
    share = np.asarray(positives, np.float64) / albums
    certain = (share == 0) | (share == 1)  # 0 log 0 is 0
    p = np.where(certain, 0.5, share)
    entropies = np.where(certain, 0.0, -p * np.log(p) - (1 - p) * np.log(1 - p))
    return float(entropies.mean())


def _precision_recall(truth: NDArray[np.bool_], decided: NDArray[np.bool_]) -> dict[str, float]:
    """Precision is 0 if nothing was predicted, recall 0 if nothing is true (as in Keras)."""
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
