"""evaluate: a MODEL is measured on a split of a dataset, every album once."""

import csv
import io
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from covergenre import inference, schema
from covergenre.cluster.workers import Workers, log_pending_resources, place_workers
from covergenre.config import EvaluateConfig
from covergenre.data import covers, dataset
from covergenre.data.dataset import Manifest, read_manifest
from covergenre.data.plan import write_plan
from covergenre.errors import DatasetError, LedgerError
from covergenre.formatting import plural
from covergenre.io import storage
from covergenre.metrics import (
    Metrics,
    chance_warning,
    macro_over,
    multilabel_metrics,
    nan_to_none,
)
from covergenre.models.bundle import Bundle, check_weights, read_bundle
from covergenre.progress import Progress
from covergenre.report import plots
from covergenre.runs.stage_run import stage_run

_PLAN = "_state/plan"
_SHEET_COVERS = 24
_PICTURES = ("genres.png", "curves.png", "covers.png")


@dataclass(frozen=True)
class Evaluated:
    """Metrics, and where they were written."""

    uri: str
    split: str
    metrics: dict[str, Any]
    remark: str = ""

    def summary(self) -> str:
        """What the user is told at the end."""
        m = self.metrics

        def shown(name: str) -> str:
            return "n/a" if m[name] is None else f"{m[name]:.4f}"

        lines = [
            f"metrics {storage.join(self.uri, 'metrics.json')}{self.remark}",
            f"  {plural(m['albums'], 'album')} of the {self.split} split",
            f"  ROC AUC {shown('roc_auc_macro')} macro, {shown('roc_auc_micro')} micro;"
            f" PR AUC {shown('pr_auc_macro')} macro, {shown('pr_auc_micro')} micro;"
            f" at 0.5 precision {shown('precision')}, recall {shown('recall')} (micro)",
        ]
        if over := macro_over(m):
            why = " (no album or every album has it)" if m["genres_without_auc"] else ""
            lines.append(f"  macro over {over}{why}")
        if warning := chance_warning(m, self.split):
            lines.append(f"  {warning}")
        pictures = ", ".join(storage.join(self.uri, name) for name in _PICTURES)
        return "\n".join([*lines, f"  see {pictures}"])


def evaluate(config: EvaluateConfig, *, verbose: bool = False) -> Evaluated:
    """Measure as `config` says. Raises UserError for a user's mistake."""
    out = storage.absolute(config.out)
    metrics_file = storage.join(out, "metrics.json")
    with stage_run(
        "evaluate",
        config,
        out,
        sources={"model directory": config.model, "dataset": config.dataset},
        read_inputs=lambda: _read_inputs(config),
        identify=lambda inputs: _ids(*inputs),
        is_finished=lambda: storage.exists(metrics_file),
        verbose=verbose,
    ) as run:
        if run.is_finished:
            remark = ": already measured by this same command"
            return Evaluated(out, config.split, storage.read_json(metrics_file), remark)
        bundle, manifest = run.inputs
        run.start_ray({"--out": out, "model directory": bundle.uri, "dataset": manifest.uri})
        workers = place_workers(config.workers, config.device, config.cpus_per_worker)
        run.record()
        return _evaluate(out, config, bundle, manifest, workers)


def _read_inputs(config: EvaluateConfig) -> tuple[Bundle, Manifest]:
    bundle = read_bundle(config.model)
    check_weights(bundle)
    manifest = read_manifest(config.dataset)
    _check_genres(bundle, manifest)
    manifest.require(config.split)
    return bundle, manifest


def _evaluate(
    out: str,
    config: EvaluateConfig,
    bundle: Bundle,
    manifest: Manifest,
    workers: Workers,
) -> Evaluated:
    parts, source = covers.dataset_parts(manifest, [config.split])
    table = pa.concat_tables(parts)
    plan = write_plan(storage.join(out, _PLAN), [table], lambda: source, {})
    rows = plan.rows
    scores = np.empty((rows, len(bundle.genres)), np.float32)
    times_scored = np.zeros(rows, np.int64)
    with (
        log_pending_resources(*workers.required_resource),
        Progress("evaluate", rows, "covers") as progress,
    ):
        for part in inference.score_plan(
            plan,
            np.array([[0, 0, rows]]),
            bundle,
            batch_size=config.batch_size,
            workers=workers,
        ):
            bad = part.outcomes["reason"].drop_null()
            if len(bad):
                raise DatasetError(f"{manifest.uri}: a cover is {bad[0]}; prepare it again")
            at = part.outcomes["row"].to_numpy()
            scores[at] = part.scores
            np.add.at(times_scored, at, 1)
            progress.advance(len(at))
    if (times_scored != 1).any():
        wrong = int((times_scored != 1).sum())
        raise LedgerError(
            f"{wrong:,} of {plural(rows, 'album')} not scored exactly once: a defect of covergenre"
        )

    albums = table["genres"].to_pylist()
    truth = bundle.genres.multi_hot(albums)
    metrics = _ids(bundle, manifest) | multilabel_metrics(truth, scores, bundle.genres.names)
    _write(out, bundle, table, truth, scores, metrics)
    # Spread over the split: a catalog is often sorted by genre.
    shown = np.unique(np.linspace(0, rows - 1, _SHEET_COVERS, dtype=np.int64))
    sheet = plots.contact_sheet(
        inference.pixels_of(table.take(shown), source, bundle.preprocessing),
        [albums[row] for row in shown],
        [dict(zip(bundle.genres.names, scores[row].tolist(), strict=True)) for row in shown],
    )
    storage.put(storage.join(out, "covers.png"), sheet)
    storage.put_json(storage.join(out, "metrics.json"), nan_to_none(metrics))
    return Evaluated(out, config.split, nan_to_none(metrics))


def _check_genres(bundle: Bundle, manifest: Manifest) -> None:
    if bundle.genres != manifest.genres:
        extra = set(bundle.genres.names) ^ set(manifest.genres.names)
        names = io.StringIO()
        csv.writer(names, lineterminator="").writerow(bundle.genres.names)
        raise DatasetError(
            f"{manifest.uri}: its genres are not those of {bundle.uri} (differ:"
            f" {', '.join(sorted(extra)[:5])}); prepare it with --genres"
            f" {shlex.quote(names.getvalue())}"
        )


def _ids(bundle: Bundle, manifest: Manifest) -> dict[str, Any]:
    """What was measured, and on what, by content."""
    return {"weights_id": bundle.weights_id, "dataset_id": manifest.dataset_id}


def _write(
    out: str, bundle: Bundle, albums: pa.Table, truth: Any, scores: Any, metrics: Metrics
) -> None:
    names = bundle.genres.names
    columns = [pa.array(scores[:, j]) for j in range(len(names))]
    table = pa.table(
        [
            albums["album_id"],
            albums["row"],
            albums["genres"],
            pa.StructArray.from_arrays(columns, names=list(names)),
        ],
        schema=schema.predictions(list(names)),
    )
    storage.put(storage.join(out, "predictions.parquet"), dataset.to_parquet(table))
    storage.put(storage.join(out, "genres.png"), plots.genre_bars(metrics["genres"]))
    storage.put(storage.join(out, "curves.png"), plots.curves(truth > 0.5, scores, names))
