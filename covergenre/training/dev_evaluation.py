"""Evaluation of the dev split after an epoch, by all ranks together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from covergenre.data.dataset import Manifest
from covergenre.metrics import multilabel_metrics
from covergenre.training.loader import Batch, BatchStream
from covergenre.training.ranks import Ranks

DEV_METRICS = (
    *("roc_auc_micro", "roc_auc_macro", "pr_auc_micro", "pr_auc_macro", "precision", "recall"),
    *("macro_genres", "genres_without_auc", "chance_standard_error", "better_than_chance"),
)
"""Metrics in the record of an epoch, with the prefix dev_."""


def evaluate_dev(
    stream: BatchStream,
    logits_of: Callable[[Batch], torch.Tensor],
    manifest: Manifest,
    ranks: Ranks,
) -> dict[str, Any]:
    """dev_loss and DEV_METRICS of the whole dev split, each album once; the same on every rank.

    logits_of: a batch -> logits in float32, [batch, genres]. Only dev_loss if the loss is not
    finite.
    """
    parts = ranks.gather(_evaluate_share(stream, logits_of, len(manifest.genres)))
    rows, scores, targets, losses = (np.concatenate(column) for column in zip(*parts, strict=True))
    if len(rows) != manifest.rows("dev") or len(np.unique(rows)) != len(rows):
        raise AssertionError(f"dev split: {len(rows)} rows evaluated, not each album once")
    loss = float(losses.mean())
    if not np.isfinite(loss):
        return {"dev_loss": loss}
    metrics = multilabel_metrics(targets, scores, manifest.genres.names)
    return {"dev_loss": loss, **{f"dev_{name}": metrics[name] for name in DEV_METRICS}}


def _evaluate_share(
    stream: BatchStream, logits_of: Callable[[Batch], torch.Tensor], num_genres: int
) -> tuple[Any, ...]:
    """(rows, scores, targets, losses) of this rank's albums, which may be none."""
    rows, losses = [np.empty(0, np.int64)], [np.empty(0)]
    scores, targets = ([np.empty((0, num_genres), np.float32)] for _ in range(2))
    for batch in stream.dev():
        logits = logits_of(batch)
        # From logits, because the scores of a diverged model round to 0 and 1.
        by_pair = functional.binary_cross_entropy_with_logits(
            logits.cpu().double(),
            torch.from_numpy(batch.targets.astype(np.float64)),
            reduction="none",
        )
        rows.append(batch.rows)
        scores.append(logits.sigmoid().cpu().numpy())
        targets.append(batch.targets)
        losses.append(by_pair.mean(1).numpy())
    return tuple(np.concatenate(column) for column in (rows, scores, targets, losses))
