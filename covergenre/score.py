"""score: a MODEL labels a catalog, and proves that no row was lost.

First every row of the catalog gets a number: the plan. A unit is a run of consecutive rows. Its
rejected and duplicate rows are written first and its labels last, each in one atomic put under a
fixed name, so labels/part-<unit>.parquet is the unit's commit. A run that is taken up again lists
those names and does the other units; the ledger is a sum over their footers.

    LABELS/labels/part-*.parquet      schema.labels
    LABELS/rejected/part-*.parquet    schema.REJECTED
    LABELS/ledger.json  LABELS/_SUCCESS
    LABELS/_state/                    the plan, duplicates, and whose run this is
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from covergenre import ingest, places, predict, runtime, schema, shards, storage
from covergenre.bundle import Bundle, check_weights, read_bundle
from covergenre.catalog import read_catalog
from covergenre.config import ScoreConfig
from covergenre.errors import LedgerError
from covergenre.genres import over_threshold
from covergenre.ingest import Source
from covergenre.predict import Scored
from covergenre.progress import Progress, say

_PLAN = "_state/plan.parquet"
_FOOTER = b"covergenre"


@dataclass(frozen=True)
class Labelled:
    """A finished run: its ledger, and where it lies."""

    uri: str
    ledger: dict[str, Any]
    remark: str = ""

    def account(self) -> str:
        """What the user is told at the end."""
        led = self.ledger
        lines = [
            f"labels {storage.join(self.uri, 'labels')}{self.remark}",
            f"  {led['rows']:,} rows = {led['scored']:,} scored + {led['rejected']:,} rejected"
            f" + {led['duplicates']:,} duplicates",
        ]
        if led["rejected"]:
            why = ", ".join(f"{n:,} {reason}" for reason, n in led["reasons"].items())
            lines.append(f"  rejected, with reasons, in {self.uri}/rejected: {why}")
        return "\n".join(lines)


def score(config: ScoreConfig, *, verbose: bool = False) -> Labelled:
    """Label as `config` says. Raises UserError for a user's mistake, LedgerError for ours."""
    out = storage.absolute(config.out)
    bundle = read_bundle(config.model)
    check_weights(bundle)
    plan, source, identity = _plan(config)
    inputs = {
        "catalog": identity,
        "weights_id": bundle.weights_id,
        "decision_id": bundle.decision_id,
    }
    places.claim(out, "score", config, inputs)
    ledger_file = storage.join(out, "ledger.json")
    if storage.exists(storage.join(out, "_SUCCESS")):
        remark = ": already labelled by this same command"
        return Labelled(out, storage.read_json(ledger_file), remark)

    runtime.start_ray(verbose=verbose)
    reached = {"--out": out, "MODEL": bundle.uri, "the cover": ingest.local_cover(plan, source)}
    places.check_shared(reached, config.shared_filesystem)
    workers = runtime.place_workers(config.workers, config.device, config.cpus_per_worker)
    rows = plan.num_rows
    plan_uri = storage.join(out, _PLAN)
    if not storage.exists(plan_uri):
        storage.put(plan_uri, shards.to_parquet(plan))
    units = [
        (unit, start, min(start + config.unit_rows, rows))
        for unit, start in enumerate(range(0, rows, config.unit_rows))
    ]
    committed = set(storage.list_sizes(storage.join(out, "labels")))
    pending = [u for u in units if _part(u[0]) not in committed]
    if len(pending) < len(units):
        say(f"score: {len(units) - len(pending):,} of {len(units):,} units were done before")
    rate = None
    if pending:
        todo = sum(stop - start for _, start, stop in pending)
        with runtime.waiting_said(workers), Progress("score", todo, "covers") as progress:
            batches = predict.score_plan(
                plan_uri,
                pending,
                source,
                bundle.uri,
                bundle.preprocessing,
                batch_size=config.batch_size,
                workers=workers,
            )
            sizes = {unit: stop - start for unit, start, stop in pending}
            for unit, parts in _whole_units(batches, sizes, progress):
                _commit(out, unit, parts, bundle)
            rate = round(progress.rate, 1)
    ledger = _ledger(out, rows, len(units), bundle)
    ledger |= {"covers_per_second": rate, "workers": workers.count}
    storage.put_json(ledger_file, ledger)
    accounted = ledger["scored"] + ledger["rejected"] + ledger["duplicates"]
    if accounted != rows:
        raise LedgerError(
            f"{out}: {rows:,} rows went in and {accounted:,} came out; see ledger.json"
        )
    storage.put(storage.join(out, "_SUCCESS"), b"")
    return Labelled(out, ledger)


def _plan(config: ScoreConfig) -> tuple[pa.Table, Source, str]:
    """(plan, where image bytes are, identity of the content)"""
    place = storage.absolute(config.catalog)
    if shards.is_dataset(place):
        manifest = shards.read_manifest(place)
        table, source = ingest.plan_dataset(manifest, schema.SPLITS)
        return table, source, manifest.dataset_id
    catalog = read_catalog(place, config)
    for note in catalog.notes:
        say(note)
    source = Source(
        catalog.files,
        catalog.image_column,
        fetches=config.fetches,
        allow_private=config.allow_private_addresses,
    )
    return ingest.plan(catalog.table), source, catalog.fingerprint


def _part(unit: int) -> str:
    return f"part-{unit:08d}.parquet"


def _whole_units(
    batches: Iterator[Scored], sizes: dict[int, int], progress: Progress
) -> Iterator[tuple[int, list[Scored]]]:
    """Gather batches, which come in any order, until all rows of a unit are there."""
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


def _commit(out: str, unit: int, parts: list[Scored], bundle: Bundle) -> None:
    """Write a unit: what is not labelled first, the labels last."""
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
        data = shards.to_parquet(table.select(fields.names).cast(fields))
        storage.put(storage.join(out, folder, _part(unit)), data)
    counts = {
        "rows": outcomes.num_rows,
        "scored": scored.num_rows,
        "rejected": rejected.num_rows,
        "duplicates": duplicates.num_rows,
        "reasons": dict(sorted(Counter(rejected["reason"].to_pylist()).items())),
    }
    data = shards.to_parquet(
        _labels(scored, scores, bundle), {_FOOTER.decode(): json.dumps(counts)}
    )
    storage.put(storage.join(out, "labels", _part(unit)), data)


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


def _ledger(out: str, rows: int, units: int, bundle: Bundle) -> dict[str, Any]:
    """The sum over the footers of all units; nothing is counted that was not written."""
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    folder = storage.join(out, "labels")
    written = storage.list_sizes(folder)
    names = [_part(unit) for unit in range(units) if _part(unit) in written]
    for name in names:
        with storage.open_input(storage.join(folder, name)) as file:
            counts = json.loads(pq.read_metadata(file).metadata[_FOOTER])
        reasons.update(counts.pop("reasons"))
        total.update(counts)
    return {
        "rows": rows,
        "scored": total["scored"],
        "rejected": total["rejected"],
        "duplicates": total["duplicates"],
        "reasons": dict(sorted(reasons.items())),
        "units": units,
        "units_written": len(names),
        "weights_id": bundle.weights_id,
        "decision_id": bundle.decision_id,
        "genres": list(bundle.genres.names),
    }
