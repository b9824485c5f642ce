"""evaluate: measure a model on a split of a dataset, each album once.

OUT/part-*.parquet   schema.predictions: scores beside the true genres
OUT/_metrics.json    written last
OUT/_report/         genres.png, curves.png, covers.png
OUT/_state/          plan, run record, lock
"""

import csv
import io
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre import inference, schema
from covergenre.cluster.workers import Workers, choose_workers, log_pending_resources
from covergenre.config import EvaluateConfig
from covergenre.data import dataset
from covergenre.data.covers import DatasetReader
from covergenre.data.dataset import Manifest, read_manifest
from covergenre.data.plan import ROWS, write_plan
from covergenre.errors import DatasetError, LedgerError
from covergenre.formatting import decimal, plural
from covergenre.inference import outcomes
from covergenre.io import storage
from covergenre.metrics import (
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
_METRICS = "_metrics.json"
_PLOTS = tuple(f"_report/{name}.png" for name in ("genres", "curves", "covers"))
_SHEET_COVERS = 24
_PART_ROWS = 65_536


@dataclass(frozen=True)
class Evaluated:
    """The output directory and the metrics."""

    uri: str
    split: str
    metrics: dict[str, Any]
    remark: str = ""

    def summary(self) -> str:
        """The text that the command prints at the end."""
        m = self.metrics

        def shown(name: str) -> str:
            return decimal(m[name], 4)

        lines = [
            f"metrics {storage.join(self.uri, _METRICS)}{self.remark}",
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
        plots = ", ".join(storage.join(self.uri, name) for name in _PLOTS)
        return "\n".join([*lines, f"  see {plots}"])


def evaluate(config: EvaluateConfig, *, verbose: bool = False) -> Evaluated:
    """Measure a model. Raises UserError for an invalid setting or input."""
    out = storage.absolute(config.out)
    metrics_file = storage.join(out, _METRICS)
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
            remark = ": already measured by the same command"
            return Evaluated(out, config.split, storage.read_json(metrics_file), remark)
        bundle, manifest = run.inputs
        run.start_ray({"--out": out, "model directory": bundle.uri, "dataset": manifest.uri})
        workers = choose_workers(config.workers, config.device, config.cpus_per_worker)
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
    reader = DatasetReader(manifest, [config.split], [*ROWS.names, "title", "artist"])
    plan = write_plan(storage.join(out, _PLAN), reader)
    pieces = []
    with (
        log_pending_resources(*workers.required_resource),
        Progress("evaluate", plan.rows, "covers") as progress,
    ):
        for piece in inference.score_plan(
            plan,
            np.array([[0, 0, plan.rows]]),
            bundle,
            batch_size=config.batch_size,
            workers=workers,
        ):
            bad = piece.outcomes["reason"].drop_null()
            if len(bad):
                raise DatasetError(
                    f"{manifest.uri}: has a damaged cover ({bad[0]}); prepare it again",
                    code="bad_cover",
                )
            pieces.append(piece)
            progress.advance(piece.outcomes.num_rows)
    rows, scores = outcomes.concatenate(pieces)
    if rows["row"].to_pylist() != list(range(plan.rows)):
        raise LedgerError(
            f"{out}: not every one of {plural(plan.rows, 'album')} was scored exactly once; please"
            " report this bug"
        )
    labelled = DatasetReader(manifest, [config.split], ["genres"])
    true_genres = pa.concat_tables(labelled.parts())["genres"]
    truth = bundle.genres.multi_hot(true_genres.to_pylist())
    metrics = _ids(bundle, manifest) | multilabel_metrics(truth, scores, bundle.genres.names)
    _write_predictions(out, bundle, rows, scores, true_genres)
    # Spread over the split: catalogs are often sorted by genre.
    shown = np.unique(np.linspace(0, plan.rows - 1, _SHEET_COVERS, dtype=np.int64)).tolist()
    sheet = plots.contact_sheet(
        inference.decoded(plan, shown, bundle.preprocessing),
        [true_genres[row].as_py() for row in shown],
        [dict(zip(bundle.genres.names, scores[row].tolist(), strict=True)) for row in shown],
    )
    bars = plots.genre_bars(metrics["genres"])
    curves = plots.curves(truth > 0.5, scores, bundle.genres.names)
    for name, plot in zip(_PLOTS, (bars, curves, sheet), strict=True):
        storage.put(storage.join(out, name), plot)
    storage.put_json(storage.join(out, _METRICS), nan_to_none(metrics))
    return Evaluated(out, config.split, nan_to_none(metrics))


def _write_predictions(
    out: str,
    bundle: Bundle,
    rows: pa.Table,
    scores: NDArray[np.float32],
    true_genres: pa.ChunkedArray,
) -> None:
    for part, start in enumerate(range(0, rows.num_rows, _PART_ROWS)):
        stop = start + _PART_ROWS
        labels = outcomes.labels(rows.slice(start, _PART_ROWS), scores[start:stop], bundle)
        fields = schema.predictions()
        table = labels.append_column(
            fields.field("true_genres"), true_genres.slice(start, _PART_ROWS)
        )
        storage.put(
            storage.join(out, f"part-{part:08d}.parquet"), dataset.to_parquet(table.cast(fields))
        )


def _check_genres(bundle: Bundle, manifest: Manifest) -> None:
    if bundle.genres != manifest.genres:
        extra = set(bundle.genres.names) ^ set(manifest.genres.names)
        names = io.StringIO()
        csv.writer(names, lineterminator="").writerow(bundle.genres.names)
        raise DatasetError(
            f"{manifest.uri}: genres differ from those of {bundle.uri}"
            f" ({', '.join(sorted(extra)[:5])}); prepare it with --genres"
            f" {shlex.quote(names.getvalue())}",
            code="other_genres",
        )


def _ids(bundle: Bundle, manifest: Manifest) -> dict[str, Any]:
    """Identities of the model and the dataset."""
    return {"weights_id": bundle.weights_id, "dataset_id": manifest.dataset_id}
