"""score: label a catalog with a model; the ledger accounts for every row.

The plan numbers all rows of the catalog. An output part is a fixed number of consecutive rows. Its
rejected and duplicate rows are written first and its labels last, each in one atomic put under a
fixed name: OUT/part-<number>.parquet commits the part. A resumed run lists those names and scores
the other parts; the ledger is a sum over the counts in their footers, which _state/counts has in
fewer objects.

    OUT/part-*.parquet           schema.labels; the only .parquet files
    OUT/_rejected/part-*.jsonl   schema.REJECTED, of parts that have rejected rows
    OUT/_ledger.json
    OUT/_SUCCESS                 written last
    OUT/_state/                  plan, duplicates, counts of the parts, run record, lock

All other names begin with an underscore and have other extensions, so that readers of the directory
(DuckDB, polars, pandas, Spark, pyarrow, Delta) read only the labels.
"""

import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre import inference, schema
from covergenre.config import ScoreConfig
from covergenre.data import dataset
from covergenre.data.catalog import CatalogReader
from covergenre.data.covers import DatasetReader
from covergenre.data.http_proxies import check_proxies
from covergenre.data.plan import ROWS, Plan, RowReader, identity_of, open_plan, read_plan
from covergenre.data.rejected import write_duplicates, write_rejected
from covergenre.errors import LedgerError, RejectedError
from covergenre.inference import outcomes
from covergenre.inference.journal import BYTES, Journal
from covergenre.inference.parts import (
    default_part_rows,
    finished_parts,
    part_name,
    pending_ranges,
)
from covergenre.io import parquet, storage
from covergenre.models.bundle import Bundle, check_weights, read_bundle
from covergenre.progress import Progress
from covergenre.runs import output_dir
from covergenre.runs.stage_run import StageRun, stage_run

logger = logging.getLogger(__name__)

_PLAN = "_state/plan"
_DUPLICATES = "_state/duplicates"
_COUNTS = "_state/counts"
_REJECTED = "_rejected"
_LEDGER = "_ledger.json"
_SUCCESS = "_SUCCESS"
_COLUMNS = (*ROWS.names, "title", "artist", schema.ID)
_COUNTS_KEY = b"covergenre"
"""Key in a part's Parquet footer: its counts, as JSON."""
_FOOTER_THREADS = 32
_SPEED = ("covers_per_second", "workers", "seconds", "bottleneck")
"""Of the ledger: about the last run that scored rows."""


@dataclass(frozen=True)
class Labelled:
    """A finished run: the output directory and its ledger."""

    uri: str
    ledger: dict[str, Any]
    remark: str = ""

    def summary(self) -> str:
        """The text that the command prints at the end."""
        led = self.ledger
        lines = [
            f"labels {storage.join(self.uri, 'part-*.parquet')}{self.remark}",
            f"  {led['rows']:,} rows = {led['scored']:,} scored + {led['rejected']:,} rejected"
            f" + {led['duplicates']:,} duplicates",
        ]
        if led["rejected"]:
            share = led["rejected"] / (led["rows"] - led["duplicates"])
            lines.append(
                f"  rejected ({share:.1%}), listed in {storage.join(self.uri, _REJECTED)}:"
                f" {schema.counted_reasons(led['reasons'])}"
            )
        if led["rejected"] and not led["scored"]:
            lines.append("  warning: nothing was labeled: every row was rejected")
        # A rate of 0: too few covers to measure it.
        if led["covers_per_second"] and led["bottleneck"] and not self.remark:
            lines.append(f"  {led['covers_per_second']:,.1f} covers/s; {led['bottleneck']}")
        return "\n".join([*lines, *schema.reason_warnings(led["reasons"])])


def score(config: ScoreConfig, *, verbose: bool = False) -> Labelled:
    """Label with these settings. Raises UserError for an invalid setting or input, and LedgerError
    if rows were lost."""
    out = storage.absolute(config.out)
    with stage_run(
        "score",
        config,
        out,
        sources={"model directory": config.model, "catalog": config.catalog},
        read_inputs=lambda: _read_inputs(config),
        identify=lambda inputs: _identity(
            inputs[0], identity_of(inputs[1], read_plan(storage.join(out, _PLAN)))
        ),
        is_finished=lambda: storage.exists(storage.join(out, _SUCCESS)),
        verbose=verbose,
    ) as run:
        if run.is_finished:
            ledger = storage.read_json(storage.join(out, _LEDGER))
            _check_rejected(out, ledger, config.max_rejected)
            return Labelled(out, ledger, ": already labeled by the same command")
        bundle, reader = run.inputs
        plan = open_plan(
            storage.join(out, _PLAN), reader, reuse=output_dir.has_run_record(out)
        ).with_settings(config)
        check_proxies(plan.web_schemes)
        ledger = _score(out, config, bundle, plan, run)
        accounted = ledger["scored"] + ledger["rejected"] + ledger["duplicates"]
        if accounted != plan.rows:
            raise LedgerError(
                f"{out}: the catalog has {plan.rows:,} rows, but {accounted:,} are accounted for"
                f" (scored + rejected + duplicates); see {storage.join(out, _LEDGER)}; please"
                " report this bug"
            )
        _check_rejected(out, ledger, config.max_rejected)
        storage.put(storage.join(out, _SUCCESS), b"")
    return Labelled(out, ledger)


def _check_rejected(out: str, ledger: dict[str, Any], limit: float | None) -> None:
    """Raises RejectedError if more rows were rejected than `limit` allows.

    limit: the largest share; None: fewer than all. With None it is not an error either if all
    covers could be read but none is an image, because then their paths and access are correct.
    """
    rejected, tried = ledger["rejected"], ledger["rows"] - ledger["duplicates"]
    if not rejected or (rejected / tried <= limit if limit is not None else rejected < tried):
        return
    if limit is None and set(ledger["reasons"]) == {"not_an_image"}:
        return
    storage.delete_file(storage.join(out, _SUCCESS))  # of a command with a higher limit
    over = "all of them" if limit is None else f"over --max-rejected {limit:g}"
    sufficient = -(-rejected * 1000 // tried) / 1000  # rounded up
    raise RejectedError(
        f"{out}: {rejected:,} of {tried:,} rows were rejected ({rejected / tried:.1%}), {over}:"
        f" {schema.counted_reasons(ledger['reasons'])}; see {storage.join(out, _REJECTED)}; to"
        f" accept this, run the same command with --max-rejected {sufficient:g}; rows already"
        " scored are not scored again"
    )


def _read_inputs(config: ScoreConfig) -> tuple[Bundle, RowReader]:
    bundle = read_bundle(config.model)
    check_weights(bundle)
    uri = storage.absolute(config.catalog)
    if dataset.is_dataset(uri):
        manifest = dataset.read_manifest(uri)
        return bundle, DatasetReader(manifest, schema.SPLITS, _COLUMNS, config.carry)
    return bundle, CatalogReader(uri, config, _COLUMNS, config.carry)


def _identity(bundle: Bundle, catalog: str) -> dict[str, str]:
    """catalog: identity of the rows."""
    return {
        "catalog": catalog,
        "weights_id": bundle.weights_id,
        "decision_id": bundle.decision_id,
    }


def _score(
    out: str, config: ScoreConfig, bundle: Bundle, plan: Plan, run: StageRun[Any]
) -> dict[str, Any]:
    """Score the output parts that are not committed yet. Returns the ledger of all."""
    ledger_file, identity = storage.join(out, _LEDGER), _identity(bundle, plan.identity)
    part_rows = config.part_rows or default_part_rows(plan.rows)
    parts = -(-plan.rows // part_rows)
    done = finished_parts(out)
    ranges = pending_ranges(plan.rows, part_rows, done.parts)
    journal = Journal(storage.join(out, _COUNTS))
    total: Counter[str] = Counter()
    speed: dict[str, Any] = dict.fromkeys(_SPEED)
    if len(done):
        logger.info(f"score: {len(done):,} of {parts:,} output parts already exist")
        count_rows(out, journal.sum(done, total), total)
    if len(ranges):
        uris = {"--out": out, "model directory": bundle.uri, "the cover": plan.local_cover}
        write = partial(write_part, out, bundle)
        start_ray = partial(run.start_ray, uris)
        scoring = inference.Scoring(plan, ranges, bundle, write, config, start_ray)
        run.record(identity)
        with Progress("score", scoring.rows, "covers") as progress:
            for report in scoring:
                run.check_lock()
                progress.advance(report.rows)
                for _, counts in report.parts:
                    total.update(counts)
                journal.add(report.parts)
        journal.flush()
        speed = {
            "covers_per_second": round(progress.rate, 1),
            "workers": scoring.workers,
            "seconds": {name: round(value, 2) for name, value in scoring.seconds.items()},
            "bottleneck": scoring.bottleneck,
        }
    else:
        run.record(identity)
        if storage.exists(ledger_file):
            known = storage.read_json(ledger_file)
            speed = {name: known.get(name) for name in _SPEED}
    reasons = {name.partition(":")[2]: n for name, n in total.items() if ":" in name}
    ledger = {
        "rows": plan.rows,
        "scored": total["scored"],
        "rejected": total["rejected"],
        "duplicates": total["duplicates"],
        "reasons": dict(sorted(reasons.items())),
        "parts": parts,
        "parts_written": len(finished_parts(out)),
        "weights_id": bundle.weights_id,
        "decision_id": bundle.decision_id,
        "genres": list(bundle.genres.names),
        **speed,
    }
    storage.put_json(ledger_file, ledger)
    if ledger["parts_written"] != parts:
        written = ledger["parts_written"]
        raise LedgerError(
            f"{out}: has {written:,} of {parts:,} output parts; run the same command again"
        )
    return ledger


def count_rows(out: str, parts: NDArray[np.int64], total: Counter[str]) -> None:
    """Add to `total` the counts in the footers of committed parts."""

    def counts(part: int) -> dict[str, int]:
        uri = storage.join(out, f"{part_name(part)}.parquet")
        with storage.open_input(uri) as file, storage.translate_errors(uri, "read as Parquet"):
            metadata = parquet.opened(file).metadata.metadata
            found: dict[str, int] = json.loads(metadata[_COUNTS_KEY])
        return found

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        for found in pool.map(counts, parts.tolist()):
            total.update(found)


def write_part(
    out: str, bundle: Bundle, part: int, rows: pa.Table, scores: NDArray[np.float32]
) -> dict[str, int]:
    """Write an output part: rejected and duplicate rows first, labels last. Returns its counts.

    Called where it was scored, see inference.Scoring.
    """
    labels = outcomes.labels(rows, scores, bundle)
    rejected, duplicates = outcomes.rejected(rows), outcomes.duplicates(rows)
    name = part_name(part)
    write_rejected(storage.join(out, _REJECTED, f"{name}.jsonl"), rejected)
    write_duplicates(storage.join(out, _DUPLICATES, f"{name}.arrow"), duplicates)
    reasons = Counter(record["reason"] for record in rejected)
    counts = {
        "scored": labels.num_rows,
        "rejected": len(rejected),
        "duplicates": duplicates.num_rows,
        **{f"reason:{reason}": count for reason, count in sorted(reasons.items())},
    }
    data = dataset.to_parquet(labels, {_COUNTS_KEY.decode(): json.dumps(counts)})
    storage.put(storage.join(out, f"{name}.parquet"), data)
    return counts | {BYTES: data.size}
