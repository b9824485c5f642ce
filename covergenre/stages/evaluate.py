"""evaluate: measure a model on a split of a dataset, each album once.

OUT/part-*.parquet   schema.predictions: scores beside the true genres
OUT/_metrics.json    written last
OUT/_report/         genres.png, curves.png, covers.png
OUT/_state/          plan, run record, lock
"""

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre import inference, schema
from covergenre.config import EvaluateConfig
from covergenre.data import dataset
from covergenre.data.covers import DatasetReader
from covergenre.data.dataset import Manifest, read_manifest
from covergenre.data.genres import Genres
from covergenre.data.plan import ROWS, read_plan, write_plan
from covergenre.errors import DatasetError, LedgerError
from covergenre.formatting import decimal, plural
from covergenre.inference import outcomes
from covergenre.inference.parts import (
    default_part_rows,
    finished_parts,
    part_name,
    pending_ranges,
)
from covergenre.io import storage
from covergenre.metrics import (
    chance_warning,
    macro_over,
    multilabel_metrics,
    nan_to_none,
)
from covergenre.models.bundle import Bundle, check_genres, check_weights, read_bundle
from covergenre.progress import Progress
from covergenre.report import plots
from covergenre.runs.stage_run import StageRun, stage_run

logger = logging.getLogger(__name__)

_PLAN = "_state/plan"
_METRICS = "_metrics.json"
_PLOTS = tuple(f"_report/{name}.png" for name in ("genres", "curves", "covers"))
_SHEET_COVERS = 24

FloatArray = NDArray[np.float32]


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
        _score(out, config, bundle, manifest, run)
        return _measure(out, config, bundle, manifest)


def _read_inputs(config: EvaluateConfig) -> tuple[Bundle, Manifest]:
    bundle = read_bundle(config.model)
    check_weights(bundle)
    manifest = read_manifest(config.dataset)
    check_genres(bundle, manifest)
    manifest.require(config.split)
    return bundle, manifest


def _score(
    out: str, config: EvaluateConfig, bundle: Bundle, manifest: Manifest, run: StageRun[Any]
) -> None:
    """Score the output parts of the split that are not written yet."""
    rows = manifest.rows(config.split)
    ranges = pending_ranges(rows, default_part_rows(rows), finished_parts(out).parts)
    if not len(ranges):
        run.record()
        return
    plan = write_plan(storage.join(out, _PLAN), _reader(config, manifest))
    uris = {"--out": out, "model directory": bundle.uri, "dataset": manifest.uri}
    write = partial(_write_part, out, bundle, manifest.uri)
    start_ray = partial(run.start_ray, uris)
    scoring = inference.Scoring(plan, ranges, bundle, write, config, start_ray)
    run.record()
    with Progress("evaluate", scoring.rows, "covers") as progress:
        for report in scoring:
            run.check_lock()
            progress.advance(report.rows)
    if progress.rate and scoring.bottleneck:
        logger.info(f"{progress.rate:,.1f} covers/s; {scoring.bottleneck}")


def _reader(config: EvaluateConfig, manifest: Manifest) -> DatasetReader:
    columns = [*ROWS.names, "title", "artist"]
    return DatasetReader(manifest, [config.split], columns, carry=["genres"])


def _write_part(
    out: str, bundle: Bundle, dataset_uri: str, part: int, rows: pa.Table, scores: FloatArray
) -> dict[str, int]:
    """Write the predictions of a part. Called where they were scored, see inference.Scoring."""
    bad = rows["reason"].drop_null()
    if len(bad):
        raise DatasetError(
            f"{dataset_uri}: has a damaged cover ({bad[0]}); prepare it again", code="bad_cover"
        )
    carried = f"{schema.CARRIED}genres"
    labels = outcomes.labels(rows.drop_columns([carried]), scores, bundle)
    fields = schema.predictions()
    table = labels.append_column(fields.field("true_genres"), rows[carried]).cast(fields)
    storage.put(storage.join(out, f"{part_name(part)}.parquet"), dataset.to_parquet(table))
    return {"scored": table.num_rows}


def _predictions(out: str, genres: Genres) -> tuple[pa.Table, FloatArray]:
    """What all parts have, in order of row: (columns row and true_genres, scores [rows, genres])"""
    tables, scores = [], []
    for part in finished_parts(out).parts.tolist():
        uri = storage.join(out, f"{part_name(part)}.parquet")
        table = dataset.read_table(uri, ["row", "true_genres", "scores"])
        values = table["scores"].combine_chunks().items.to_numpy()
        scores.append(values.reshape(table.num_rows, len(genres)))
        tables.append(table.drop_columns(["scores"]))
    return pa.concat_tables(tables), np.concatenate(scores)


def _measure(out: str, config: EvaluateConfig, bundle: Bundle, manifest: Manifest) -> Evaluated:
    """Write the metrics and the plots of the predictions."""
    rows, scores = _predictions(out, bundle.genres)
    if rows["row"].to_pylist() != list(range(manifest.rows(config.split))):
        raise LedgerError(f"{out}: not every album was scored exactly once; please report this bug")
    true_genres = rows["true_genres"].combine_chunks()
    truth = bundle.genres.multi_hot(true_genres.to_pylist())
    metrics = _ids(bundle, manifest) | multilabel_metrics(truth, scores, bundle.genres.names)
    # Spread over the split: catalogs are often sorted by genre.
    plan = read_plan(storage.join(out, _PLAN))
    assert plan is not None  # written before the first part
    # As the dataset may have moved since then.
    plan = dataclasses.replace(plan, source=_reader(config, manifest).source())
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


def _ids(bundle: Bundle, manifest: Manifest) -> dict[str, Any]:
    """Identities of the model and the dataset."""
    return {"weights_id": bundle.weights_id, "dataset_id": manifest.dataset_id}
