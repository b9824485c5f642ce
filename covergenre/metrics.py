"""Arrays in, numbers out: exact multi-label metrics, by scikit-learn.

Micro: every album-genre pair is one decision, so common genres weigh more. Macro: the plain mean
over genres. The paper's numbers are Keras's, which are micro by default; Oramas et al. report
macro. Neither is binned into thresholds here, as Keras's AUC is: ties and all, they are exact.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Metrics = dict[str, Any]


def multilabel_metrics(
    truth: NDArray[Any], scores: NDArray[Any], genres: Sequence[str], threshold: float = 0.5
) -> Metrics:
    """Metrics of `scores` (0 to 1) against `truth` (0 or 1), both [albums, genres].

    Keys: albums, roc_auc_macro, roc_auc_micro, pr_auc_macro, pr_auc_micro (average precision),
    precision and recall (micro, at `threshold`), genres_without_auc, and `genres`: the same a
    genre, with its positives and prevalence. A genre with no positive or no negative album has no
    AUC: it is NaN, is left out of the macro means and named in genres_without_auc.
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
    return {
        "albums": len(truth),
        "threshold": threshold,
        "roc_auc_macro": _mean([per_genre[g]["roc_auc"] for g in measured]),
        "roc_auc_micro": float(roc_auc_score(truth.ravel(), scores.ravel())) if both else math.nan,
        "pr_auc_macro": _mean([per_genre[g]["pr_auc"] for g in measured]),
        "pr_auc_micro": (
            float(average_precision_score(truth.ravel(), scores.ravel())) if both else math.nan
        ),
        **_precision_recall(truth, decided),
        "genres_without_auc": [g for g in genres if g not in measured],
        "genres": per_genre,
    }


def _precision_recall(truth: NDArray[np.bool_], decided: NDArray[np.bool_]) -> dict[str, float]:
    """Precision is 0 where nothing was decided, recall 0 where nothing was true (Keras's rule)."""
    hits = int((truth & decided).sum())
    said, real = int(decided.sum()), int(truth.sum())
    return {"precision": hits / said if said else 0.0, "recall": hits / real if real else 0.0}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def nan_to_none(value: Any) -> Any:
    """`value` with NaN as None, all the way down: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
