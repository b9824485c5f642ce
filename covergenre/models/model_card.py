"""The model card, README.md of a model directory: what to know before using the model."""

import re
from typing import Any

from covergenre import __version__
from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest
from covergenre.formatting import decimal, plural
from covergenre.metrics import chance_warning, dev_metrics, macro_over
from covergenre.models.bundle import Bundle
from covergenre.registry import model_spec

_METRICS = (
    ("pr_auc_micro", "PR AUC, micro"),
    ("pr_auc_macro", "PR AUC, macro"),
    ("roc_auc_micro", "ROC AUC, micro"),
    ("roc_auc_macro", "ROC AUC, macro"),
    ("precision", "precision at 0.5, micro"),
    ("recall", "recall at 0.5, micro"),
)


def model_card(
    config: TrainConfig, manifest: Manifest, best: dict[str, Any], epochs: int, origin: str
) -> str:
    """Markdown. best: the record of the best epoch."""
    dev = dev_metrics(best)
    figures = "\n".join(f"| {label} | {decimal(dev[name], 4)} |" for name, label in _METRICS)
    warning = chance_warning(dev, "dev")
    warning = f"**{warning[0].upper()}{warning[1:]}.**\n\n" if warning else ""
    without = [_plain(name) for name in dev["genres_without_auc"]]
    over = macro_over(dev | {"genres_without_auc": without}, most=len(without))
    reason = (
        " (a genre that no dev album has, or that all of them have, has no AUC)" if without else ""
    )
    splits = ", ".join(f"{manifest.rows(s):,} {s}" for s in manifest.shards)
    return f"""# {config.model}: an album's genres from its cover

Made by covergenre {__version__}. Given a cover, it gives a score from 0 to 1 for each of
{plural(len(manifest.genres), "genre")}; an album may have several.

    covergenre score THIS_FOLDER CATALOG --out LABELS

## What it is
- Model: {config.model} ({model_spec(config.model).about}).
- Backbone: {origin} weights, freeze {config.freeze}. Head: new.
- Trained on dataset `{manifest.dataset_id}` ({splits} albums).
- {plural(config.epochs or 0, "epoch")} at most, {epochs} done, batch {config.batch_size}, Adam at
  {config.learning_rate:g} ({config.schedule}), L2 {config.l2:g}, augmentation {config.augment},
  {config.precision}, seed {config.seed}.
- This is epoch {best["epoch"]}, the best by micro PR AUC over all genres on the dev split.

## How good it is
On the dev split. The epoch was selected on it, so these metrics are slightly too high; run
`covergenre evaluate` on the test split for unbiased ones.

{warning}| metric | dev |
|---|---|
{figures}

Micro counts every album-genre pair as one decision; macro is the plain mean over
{over}{reason}.

## Genres
{", ".join(map(_plain, manifest.genres.names))}

## Limits
- A cover contains limited information about the music: scores are estimates.
- It knows the genres and the kind of covers it was trained on, and repeats their biases.
- The thresholds in decision.json are 0.5 for every genre and were not tuned.
- Pretrained weights and training covers may have separate licenses.
"""


def quantized_card(bundle: Bundle, metrics: dict[str, Any]) -> str:
    """Markdown, of an int8 model. bundle: the model that was quantized."""
    int8, source = (decimal(metrics[f"{of}roc_auc_macro"], 4) for of in ("", "source_"))
    return f"""# {bundle.model}, int8: an album's genres from its cover

Made by covergenre {__version__} from the model `{bundle.uri}` (weights_id `{bundle.weights_id}`,
{bundle.precision}), whose README.md says how it was trained.

    covergenre score THIS_FOLDER CATALOG --out LABELS

## What it is
- Precision: **int8**. Weights and activations are 8-bit integers: faster on CPUs, for scores only.
- It runs on CPUs and needs covergenre's extra `int8` (OpenVINO) on every machine that runs it.

## How good it is
On {plural(metrics["covers"], "cover")} of the dev split, with which it was calibrated; run
`covergenre evaluate` on the test split with both models for unbiased metrics.

| | int8 | source model |
|---|---|---|
| ROC AUC, macro | {int8} | {source} |

Scores differ from those of the source model by {metrics["mean_score_difference"]:.4f} on average,
and by {metrics["max_score_difference"]:.4f} at most.
"""


def _plain(name: str) -> str:
    """A name from a catalog, escaped for Markdown: no links, HTML or line breaks."""
    return re.sub(r"([\\`*_\[\]<>&|~#!])", r"\\\1", " ".join(name.split()))
