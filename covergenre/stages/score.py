"""score: a MODEL labels a catalog, and proves that no row was lost.

First every row of the catalog gets a number: the plan. A unit is a run of consecutive rows. Its
rejected and duplicate rows are written first and its labels last, each in one atomic put under a
fixed name, so labels/part-<unit>.parquet is the unit's commit. A run that is taken up again lists
those names and does the other units; the ledger is a sum over their footers.

    LABELS/labels/part-*.parquet      schema.labels
    LABELS/rejected/part-*.parquet    schema.REJECTED
    LABELS/ledger.json  LABELS/_SUCCESS
    LABELS/_state/                    the plan, duplicates, whose run this is, who is at work
"""

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from covergenre import inference, schema
from covergenre.cluster import ray_runtime
from covergenre.cluster.workers import log_pending_resources, place_workers
from covergenre.config import ScoreConfig
from covergenre.data import covers, dataset
from covergenre.data.catalog import catalog_stamps, scan_catalog
from covergenre.data.covers import Source
from covergenre.data.genres import over_threshold
from covergenre.data.http_proxies import check_proxies
from covergenre.data.plan import ROWS, Plan, identify, read_plan, write_plan
from covergenre.errors import LedgerError, RejectedError
from covergenre.inference import Scored
from covergenre.io import parquet, storage
from covergenre.models.bundle import Bundle, check_weights, read_bundle
from covergenre.progress import Progress
from covergenre.runs import output_dir
from covergenre.runs.lock import OutputLock
from covergenre.runs.stage_run import check_reachable

logger = logging.getLogger(__name__)

_PLAN = "_state/plan"
_LEDGER = "ledger.json"
_SUCCESS = "_SUCCESS"
_FOOTER = b"covergenre"
_FOOTERS_AT_A_TIME = 32


@dataclass(frozen=True)
class Labelled:
    """A finished run: its ledger, and where it lies."""

    uri: str
    ledger: dict[str, Any]
    remark: str = ""

    def summary(self) -> str:
        """What the user is told at the end."""
        led = self.ledger
        lines = [
            f"labels {storage.join(self.uri, 'labels')}{self.remark}",
            f"  {led['rows']:,} rows = {led['scored']:,} scored + {led['rejected']:,} rejected"
            f" + {led['duplicates']:,} duplicates",
        ]
        if led["rejected"]:
            share = led["rejected"] / (led["rows"] - led["duplicates"])
            lines.append(
                f"  rejected ({share:.1%}), with reasons, in {self.uri}/rejected:"
                f" {schema.counted_reasons(led['reasons'])}"
            )
        if led["rejected"] and not led["scored"]:
            lines.append("  warning: nothing was labelled: every row was rejected")
        return "\n".join([*lines, *schema.reason_warnings(led["reasons"])])


def score(config: ScoreConfig, *, verbose: bool = False) -> Labelled:
    """Label as `config` says. Raises UserError for a user's mistake, LedgerError for ours."""
    out = storage.absolute(config.out)
    output_dir.check_not_inside(out, {"MODEL": config.model, "catalog": config.catalog})
    bundle = read_bundle(config.model)
    check_weights(bundle)
    rows = _open(config)
    output_dir.check_available(out)
    if output_dir.has_run_record(out):  # refuse another run before anything of this one is touched
        _claim(out, config, bundle, _identity(rows, read_plan(storage.join(out, _PLAN))))
    if storage.exists(storage.join(out, _SUCCESS)):
        ledger = storage.read_json(storage.join(out, _LEDGER))
        _check_rejected(out, ledger, config.max_rejected)
        return Labelled(out, ledger, ": already labelled by this same command")
    with OutputLock(out) as lock:
        plan = _plan(out, config, bundle, rows)
        ledger = _score(out, config, bundle, plan, lock, verbose=verbose)
    accounted = ledger["scored"] + ledger["rejected"] + ledger["duplicates"]
    if accounted != plan.rows:
        raise LedgerError(
            f"{out}: {plan.rows:,} rows went in and {accounted:,} came out; see ledger.json"
        )
    _check_rejected(out, ledger, config.max_rejected)
    storage.put(storage.join(out, _SUCCESS), b"")
    return Labelled(out, ledger)


def _check_rejected(out: str, ledger: dict[str, Any], limit: float | None) -> None:
    """Raises RejectedError where more rows were rejected than `limit`.

    limit: a share; None: fewer than all. Covers that were read, and not one of which is an image,
    are no error then: neither the paths nor the access to them are at fault.
    """
    rejected, tried = ledger["rejected"], ledger["rows"] - ledger["duplicates"]
    if rejected <= (limit * tried if limit is not None else tried - 1):
        return
    if limit is None and set(ledger["reasons"]) == {"not_an_image"}:
        return
    storage.delete_file(storage.join(out, _SUCCESS))  # of a command with a higher limit
    over = "all of them" if limit is None else f"over --max-rejected {limit:g}"
    raise RejectedError(
        f"{out}: {rejected:,} of {tried:,} rows were rejected ({rejected / tried:.1%}), {over}:"
        f" {schema.counted_reasons(ledger['reasons'])}; see {storage.join(out, 'rejected')}; to"
        " accept it, run the same command with a higher --max-rejected: nothing is scored again"
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of the catalog, not yet read."""

    key: dict[str, Any]
    """The same key, the same rows."""
    read: Callable[[], tuple[Iterator[pa.Table], Callable[[], Source]]]
    """Gives parts of schema.CATALOG and, after these, where image bytes are."""
    identity: str | None = None
    """Of their content, where it is known without reading."""


def _open(config: ScoreConfig) -> _Rows:
    place = storage.absolute(config.catalog)
    if dataset.is_dataset(place):
        manifest = dataset.read_manifest(place)

        def shards_of() -> tuple[Iterator[pa.Table], Callable[[], Source]]:
            parts, source = covers.dataset_parts(manifest, schema.SPLITS)
            return parts, lambda: source

        identity = manifest.dataset_id
        return _Rows({"dataset_id": identity}, shards_of, identity)

    def scan() -> tuple[Iterator[pa.Table], Callable[[], Source]]:
        scan = scan_catalog(place, config, ROWS.names)
        return scan.parts, lambda: Source(tuple(scan.files), scan.image_column)

    stamps = catalog_stamps(place, config)
    return _Rows({"settings": config.fingerprint(), "files": stamps}, scan)


def _identity(rows: _Rows, plan: Plan | None) -> str:
    if rows.identity is not None:
        return rows.identity
    if plan is not None and plan.key == rows.key:
        return plan.identity
    logger.info("score: reading the catalog, to see whether it is the same as before")
    return identify(*rows.read())


def _claim(out: str, config: ScoreConfig, bundle: Bundle, identity: str) -> None:
    inputs = {
        "catalog": identity,
        "weights_id": bundle.weights_id,
        "decision_id": bundle.decision_id,
    }
    output_dir.write_run_record(out, output_dir.run_record("score", config, inputs), config)


def _plan(out: str, config: ScoreConfig, bundle: Bundle, rows: _Rows) -> Plan:
    """The plan of this run: as it was left there, or made now. The place is this run's then."""
    uri = storage.join(out, _PLAN)
    plan = read_plan(uri)
    if plan is None or not (output_dir.has_run_record(out) or plan.key == rows.key):
        parts, source = rows.read()
        with Progress("catalog", None, "rows") as progress:
            plan = write_plan(uri, _counted(parts, progress), source, rows.key)
    _claim(out, config, bundle, rows.identity or plan.identity)
    check_proxies(plan.web_schemes)
    source_now = dataclasses.replace(
        plan.source,
        download_concurrency=config.download_concurrency,
        allow_private=config.allow_private_addresses,
        contact=config.contact,
    )
    return dataclasses.replace(plan, source=source_now)


def _counted(parts: Iterable[pa.Table], progress: Progress) -> Iterator[pa.Table]:
    for part in parts:
        yield part
        progress.advance(part.num_rows)


def _score(
    out: str, config: ScoreConfig, bundle: Bundle, plan: Plan, lock: OutputLock, *, verbose: bool
) -> dict[str, Any]:
    """Do the units that are not done yet, on Ray; the ledger of all."""
    ledger_file = storage.join(out, _LEDGER)
    every = np.arange(-(-plan.rows // config.unit_rows))
    done = finished_units(out)
    pending = np.setdiff1d(every, done, assume_unique=True)
    starts = pending * config.unit_rows
    units = np.stack([pending, starts, np.minimum(starts + config.unit_rows, plan.rows)], axis=1)
    total: Counter[str] = Counter()
    speed: dict[str, float | None] = {"covers_per_second": None, "workers": None}
    if len(done):
        logger.info(f"score: {len(done):,} of {len(every):,} units were done before")
        count_rows(out, done, total)
    if len(pending):
        ray_runtime.start_ray(verbose=verbose)
        reached = {"--out": out, "MODEL": bundle.uri, "the cover": plan.local_cover}
        check_reachable(reached, config.shared_filesystem)
        workers = place_workers(config.workers, config.device, config.cpus_per_worker)
        rows = int((units[:, 2] - units[:, 1]).sum())
        with (
            log_pending_resources(*workers.required_resource),
            Progress("score", rows, "covers") as progress,
        ):
            batches = inference.score_plan(
                plan, units, bundle, batch_size=config.batch_size, workers=workers
            )
            for unit, parts in _whole_units(batches, units, progress):
                lock.check()
                total.update(_commit(out, unit, parts, bundle))
            speed = {"covers_per_second": round(progress.rate, 1), "workers": workers.count}
    elif storage.exists(ledger_file):
        known = storage.read_json(ledger_file)
        speed = {name: known.get(name) for name in speed}
    reasons = {name.partition(":")[2]: n for name, n in total.items() if ":" in name}
    ledger = {
        "rows": plan.rows,
        "scored": total["scored"],
        "rejected": total["rejected"],
        "duplicates": total["duplicates"],
        "reasons": dict(sorted(reasons.items())),
        "units": len(every),
        "units_written": len(finished_units(out)),
        "weights_id": bundle.weights_id,
        "decision_id": bundle.decision_id,
        "genres": list(bundle.genres.names),
        **speed,
    }
    storage.put_json(ledger_file, ledger)
    if ledger["units_written"] != len(every):
        raise LedgerError(f"{out}: {len(every):,} units, {ledger['units_written']:,} are there")
    return ledger


def finished_units(out: str) -> NDArray[np.int64]:
    """Numbers of the units whose last object is there."""
    names = storage.list_sizes(storage.join(out, "labels"))
    found = (re.fullmatch(r"part-([0-9]{8,})\.parquet", name) for name in names)
    return np.array(sorted(int(match[1]) for match in found if match), np.int64)


def count_rows(out: str, units: NDArray[np.int64], total: Counter[str]) -> None:
    """Add what those units hold; nothing is counted that was not written."""

    def counts(unit: int) -> dict[str, int]:
        uri = storage.join(out, "labels", _part(unit))
        with storage.open_input(uri) as file, storage.translate_errors(uri, "read as Parquet"):
            found: dict[str, int] = json.loads(parquet.opened(file).metadata.metadata[_FOOTER])
        return found

    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME) as pool:
        for found in pool.map(counts, units.tolist()):
            total.update(found)


def _part(unit: int) -> str:
    return f"part-{unit:08d}.parquet"


def _whole_units(
    batches: Iterable[Scored], units: NDArray[np.int64], progress: Progress
) -> Iterator[tuple[int, list[Scored]]]:
    """Gather batches, which come in any order, until all rows of a unit are there."""
    sizes = {unit: stop - start for unit, start, stop in units.tolist()}
    parts: dict[int, list[Scored]] = {}
    have: Counter[int] = Counter()
    for batch in batches:
        parts.setdefault(batch.unit, []).append(batch)
        have[batch.unit] += batch.outcomes.num_rows
        progress.advance(batch.outcomes.num_rows)
        if have[batch.unit] == sizes[batch.unit]:
            unit = parts.pop(batch.unit)
            yield batch.unit, sorted(unit, key=lambda part: part.outcomes["row"][0].as_py())
    if parts:
        raise LedgerError(f"{len(parts)} units came back incomplete; run the same command again")


def _commit(out: str, unit: int, parts: list[Scored], bundle: Bundle) -> dict[str, int]:
    """Write a unit: what is not labelled first, the labels last. Gives its counts."""
    outcomes = pa.concat_tables([part.outcomes for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    rejected = outcomes.filter(pc.is_valid(outcomes["reason"]))
    duplicates = outcomes.filter(pc.is_valid(outcomes["first_row"]))
    scored = outcomes.filter(pc.is_valid(outcomes["cover_sha256"]))
    for folder, table, fields in (
        ("rejected", rejected, schema.REJECTED),
        ("_state/duplicates", duplicates, schema.DUPLICATES),
    ):
        # Empty or not: a unit that is done again must leave nothing of the time before.
        data = dataset.to_parquet(table.select(fields.names).cast(fields))
        storage.put(storage.join(out, folder, _part(unit)), data)
    counts = {
        "scored": scored.num_rows,
        "rejected": rejected.num_rows,
        "duplicates": duplicates.num_rows,
    }
    reasons = Counter(rejected["reason"].to_pylist())
    counts |= {f"reason:{reason}": count for reason, count in sorted(reasons.items())}
    data = dataset.to_parquet(
        _labels(scored, scores, bundle), {_FOOTER.decode(): json.dumps(counts)}
    )
    storage.put(storage.join(out, "labels", _part(unit)), data)
    return counts


def _labels(scored: pa.Table, scores: Any, bundle: Bundle) -> pa.Table:
    names = list(bundle.genres.names)
    columns = [pa.array(np.ascontiguousarray(scores[:, j])) for j in range(len(names))]
    n = scored.num_rows
    return pa.table(
        [
            scored["album_id"],
            scored["row"],
            scored["cover_sha256"],
            pa.array(
                over_threshold(scores, bundle.genres, bundle.thresholds), pa.list_(pa.string())
            ),
            pa.StructArray.from_arrays(columns, names=names),
            pa.array([bundle.weights_id] * n, pa.string()),
            pa.array([bundle.decision_id] * n, pa.string()),
        ],
        schema=schema.labels(names),
    )
