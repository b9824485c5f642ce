"""prepare: make a dataset from a catalog.

The driver plans the dataset (data/dataset_plan.py): row numbers, genres, splits and shards of
consecutive rows. A Ray task then makes a whole shard: it loads the covers, checks that each can be
decoded, and writes one Parquet file under a fixed name. The record of the shard in _state/shards/
is written last and commits it. A resumed run makes the shards that have no record.

    OUT/<split>/part-*.parquet   schema.DATASET; the only .parquet files
    OUT/_manifest.json           written last
    OUT/genres.json
    OUT/_rejected/part-*.jsonl   schema.REJECTED, of shards and parts of the plan with rejected rows
    OUT/_report/                 label_distribution.png, genres_by_split.png
    OUT/_state/                  plan, shard records, duplicates, run record, lock
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import PIL
import pyarrow as pa

from covergenre import __version__, schema
from covergenre.cluster import autoscaling, ray_runtime
from covergenre.cluster.workers import check_task_limit, log_pending_resources
from covergenre.config import PrepareConfig
from covergenre.data import covers, dataset, decoder_process, shards
from covergenre.data.covers import Cover, Duplicate
from covergenre.data.dataset import Manifest, Shard
from covergenre.data.dataset_plan import DatasetPlan, PrepareInputs, plan_dataset, read_inputs
from covergenre.data.genres import (
    split_table,
    split_warnings,
)
from covergenre.data.http_proxies import check_proxies
from covergenre.data.image_decoding import CoverError
from covergenre.data.plan import Plan, identity_of, read_plan
from covergenre.data.rejected import rejected_row, write_duplicates, write_rejected
from covergenre.data.shards import ShardRows
from covergenre.errors import CatalogError, LedgerError
from covergenre.io import storage
from covergenre.io.urls import redacted
from covergenre.progress import Progress
from covergenre.report import plots
from covergenre.runs import output_dir
from covergenre.runs.stage_run import stage_run

logger = logging.getLogger(__name__)

_PLAN = "_state/plan"
_RECORDS = "_state/shards"
_DUPLICATES = "_state/duplicates"
_REJECTED = "_rejected"
_PLOTS = ("_report/label_distribution.png", "_report/genres_by_split.png")
_RECORD_THREADS = 32
_TASK_RETRIES = 3
"""Of a task whose worker or machine was lost."""
_MAX_TASKS = 10_000
"""Running and waiting; an autoscaler may have no limit."""
_POLL_SECONDS = 0.2
_SHORT_RUN_SECONDS = 30.0
"""Of all tasks together."""
_SLICE_ROWS = 64
"""Rows whose source bytes, at most 25 MB each, are in memory at the same time."""


@dataclass(frozen=True)
class Prepared:
    """A finished dataset."""

    manifest: Manifest
    remark: str = ""
    bottleneck: str = ""
    """What took most of the time of this run, and what would help."""

    def summary(self) -> str:
        """The text that the command prints at the end."""
        m, counts = self.manifest, self.manifest.counts
        splits = ", ".join(f"{m.rows(split):,} {split}" for split in schema.SPLITS)
        lines = [
            f"dataset {m.uri} ({m.dataset_id}){self.remark}",
            f"  {counts['albums']:,} albums of {counts['rows']:,} rows: {splits}",
            f"  {len(m.genres)} genres: {', '.join(m.genres.names)}",
        ]
        if counts["duplicates"]:
            lines.append(f"  {counts['duplicates']:,} duplicate rows")
        if counts["rejected"]:
            reasons = schema.counted_reasons(counts["reasons"])
            folder = storage.join(m.uri, _REJECTED)
            lines.append(f"  {counts['rejected']:,} rejected, listed in {folder}: {reasons}")
        by_split, rows = counts["genres_by_split"], counts["splits"]
        lines += [f"  {line}" for line in split_table(by_split, rows)]
        lines += [f"  warning: {line}" for line in split_warnings(by_split, rows)]
        lines += schema.reason_warnings(counts["reasons"])
        if self.bottleneck:
            lines.append(f"  {self.bottleneck}")
        figures = (storage.join(m.uri, name) for name in _PLOTS)
        lines.append(f"  see {' and '.join(figures)}")
        return "\n".join(lines)


def prepare(config: PrepareConfig, *, verbose: bool = False) -> Prepared:
    """Make a dataset with these settings. Raises UserError for an invalid setting or input."""
    out = storage.absolute(config.out)

    def identify(inputs: PrepareInputs) -> dict[str, str]:
        plan = read_plan(storage.join(out, _PLAN))
        return inputs.identity(identity_of(inputs.reader, plan))

    with stage_run(
        "prepare",
        config,
        out,
        sources={"catalog": config.catalog},
        read_inputs=lambda: read_inputs(config),
        identify=identify,
        is_finished=lambda: dataset.is_dataset(out),
        verbose=verbose,
    ) as run:
        if run.is_finished:
            return Prepared(dataset.read_manifest(out), ": already prepared by the same command")
        planned = plan_dataset(
            storage.join(out, _PLAN), config, run.inputs, reuse=output_dir.has_run_record(out)
        )
        plan = planned.plan
        check_proxies(plan.web_schemes)
        run.start_ray({"--out": out, "the cover": plan.local_cover})
        check_task_limit(config.workers)
        run.record(run.inputs.identity(plan.identity))
        records = list(_make_shards(out, config, planned))
        _write_rejected(out, plan)
        rejected = Counter(planned.assignment.rejected)
        seconds: Counter[str] = Counter()
        for record in records:
            rejected.update(record["reasons"])
            seconds.update(record.get("seconds", {}))
        manifest = _finish(out, config, planned, records, rejected)
        return Prepared(manifest, bottleneck=_bottleneck(seconds))


def _bottleneck(seconds: Mapping[str, float]) -> str:
    """One line: what took most of the tasks' time, and the remedy. Empty for a short run, whose
    time is that of starting the tasks."""
    total = sum(seconds.values())
    if total < _SHORT_RUN_SECONDS:
        return ""
    slowest = max(seconds, key=lambda name: seconds[name])
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items())
    remedy = {
        "reading": "use a higher --download-concurrency, or a store that is nearer",
        "decoding": "more CPU cores would be faster",
        "writing": "a faster store would help",
    }
    return f"bottleneck: {slowest} ({shares}); {remedy[slowest]}"


def _make_shards(out: str, config: PrepareConfig, planned: DatasetPlan) -> Iterator[dict[str, Any]]:
    """Make the missing shards on the cluster. Yields the records of all shards, in any order."""
    every = planned.assignment.shards
    records = _read_records(out)
    if records:
        logger.info(f"prepare: {len(records):,} of {len(every):,} shards already exist")
        yield from records.values()
    pending = [shard for shard in every if _name(shard) not in records]
    if not pending:
        return
    max_side = None if config.keep_original else config.max_side
    progress_bar = Progress("prepare", sum(shard.rows for shard in pending), "rows")
    waiting = log_pending_resources("CPU", 1)
    with waiting, ray_runtime.unwrap_ray_errors(), progress_bar as progress:
        for record in _records(pending, out, planned.plan, max_side, config.workers):
            progress.advance(record["rows"])
            yield record


def _records(
    pending: list[ShardRows], out: str, plan: Plan, max_side: int | None, tasks: int | None
) -> Iterator[dict[str, Any]]:
    """Make these shards in Ray tasks; yields the record of each, in any order.

    tasks: how many may run at a time; None: as many as the cluster has CPUs, or can have.
    """
    import ray

    make: Any = ray.remote(_make_shard).options(num_cpus=1, max_retries=_TASK_RETRIES)
    # More than run at a time: the next are there at once, and an autoscaler sees that they wait.
    limit = tasks or int(min(2 * autoscaling.max_resources("CPU"), _MAX_TASKS))
    shards_left, plan_reference = iter(pending), ray.put(plan)
    running: list[Any] = []
    try:
        while True:
            for shard in islice(shards_left, limit - len(running)):
                running.append(make.remote(shard, out, plan_reference, max_side))
            if not running:
                return
            done, running = ray.wait(running, num_returns=len(running), timeout=_POLL_SECONDS)
            yield from ray.get(done)
    finally:
        for task in running:  # of a run that failed or was interrupted
            ray.cancel(task)


def _read_records(out: str) -> dict[str, dict[str, Any]]:
    """The records of finished shards, by name."""
    folder = storage.join(out, _RECORDS)
    files = sorted(storage.list_sizes(folder))
    with ThreadPoolExecutor(_RECORD_THREADS) as pool:
        found = pool.map(lambda file: storage.read_json(storage.join(folder, file)), files)
        return {file.removesuffix(".json"): r for file, r in zip(files, found, strict=True)}


def _name(shard: ShardRows) -> str:
    return f"part-{shard.split}-{shard.part:05d}"


def _make_shard(shard: ShardRows, out: str, plan: Plan, max_side: int | None) -> dict[str, Any]:
    """The task: write a shard, its rejected rows and its duplicates. Returns its record, and how
    many seconds it took."""
    seconds = dict.fromkeys(("reading", "decoding", "writing"), 0.0)
    began = time.perf_counter()

    def add_to(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name] += now - began
        began = now

    albums: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    duplicates: list[dict[str, Any]] = []
    rows = shards.read_shard(plan, shard)
    for part, outcomes in covers.load(rows, plan.source, _SLICE_ROWS):
        add_to("reading")
        for row, outcome in zip(part.to_pylist(), outcomes, strict=True):
            if isinstance(outcome, Duplicate):
                duplicates.append(row)
                continue
            try:
                albums.append(_album(row, outcome, max_side))
            except CoverError as error:
                rejected.append(rejected_row(row, error))
        add_to("decoding")
    stored = None
    if albums:
        table = pa.Table.from_pylist(albums, schema=schema.DATASET)
        path = f"{shard.split}/part-{shard.part:05d}.parquet"
        stored = asdict(dataset.write_shard(out, path, table))
    name = _name(shard)
    write_rejected(storage.join(out, _REJECTED, f"{name}.jsonl"), rejected)
    write_duplicates(
        storage.join(out, _DUPLICATES, f"{name}.arrow"),
        pa.Table.from_pylist(duplicates, schema=schema.DUPLICATES),
    )
    record = {
        "split": shard.split,
        "part": shard.part,
        "rows": shard.rows,
        "shard": stored,
        "duplicates": len(duplicates),
        "reasons": Counter(row["reason"] for row in rejected),
        "genres": Counter(genre for album in albums for genre in album["genres"]),
    }
    storage.put_json(storage.join(out, _RECORDS, f"{name}.json"), record)
    add_to("writing")
    return record | {"seconds": seconds}


def _album(
    row: dict[str, Any], outcome: Cover | CoverError, max_side: int | None
) -> dict[str, Any]:
    """A row of schema.DATASET. Raises CoverError."""
    if isinstance(outcome, CoverError):
        raise outcome
    image = decoder_process.validate_and_reencode(outcome.data, max_side)
    values = {name: row.get(name) for name in schema.DATASET.names}
    return values | {"image": image, "cover_sha256": outcome.sha256}


def _write_rejected(out: str, plan: Plan) -> None:
    """Write the rows that were rejected before their covers were read."""
    for start, rows in shards.read_rejected(plan):
        uri = storage.join(out, _REJECTED, f"part-plan-{start:012d}.jsonl")
        write_rejected(uri, rows.to_pylist())


def _finish(
    out: str,
    config: PrepareConfig,
    planned: DatasetPlan,
    records: Sequence[dict[str, Any]],
    rejected: Counter[str],
) -> Manifest:
    """Check the counts, and write the report and the manifest."""
    plan, selection = planned.plan, planned.selection
    records = sorted(records, key=lambda record: (record["split"], record["part"]))
    by_split = {
        split: tuple(Shard(**r["shard"]) for r in records if r["split"] == split and r["shard"])
        for split in schema.SPLITS
    }
    counts = _counts(planned, by_split, records, rejected)
    albums, duplicates = counts["albums"], counts["duplicates"]
    if plan.rows != albums + rejected.total() + duplicates:
        raise LedgerError(
            f"{out}: the catalog has {plan.rows:,} rows, but"
            f" {albums + rejected.total() + duplicates:,} are accounted for ({albums:,} albums +"
            f" {rejected.total():,} rejected + {duplicates:,} duplicates); please report this bug"
        )
    if albums == 0:
        storage.delete_directory(storage.join(out, _RECORDS))  # the same command tries all again
        reason, count = rejected.most_common(1)[0]
        raise CatalogError(
            f"{config.catalog}: no usable albums; {count:,} of {plan.rows:,} rows are rejected as"
            f" {reason} ({schema.REASONS[reason]}); see {storage.join(out, _REJECTED)}",
            code="no_albums",
        )
    names = set(selection.genres.names)
    figures = (
        plots.label_distribution(selection.counts, selection.labelled, names),
        plots.genres_by_split(counts["genres_by_split"], counts["splits"]),
    )
    for name, figure in zip(_PLOTS, figures, strict=True):
        storage.put(storage.join(out, name), figure)
    identity = dataset.dataset_id(selection.genres, by_split)
    manifest = Manifest(out, selection.genres, by_split, identity, counts)
    extra = {
        "catalog": {"identity": plan.identity, "uri": redacted(config.catalog)},
        "settings": config.saved(),
        "versions": {
            "covergenre": __version__,
            "pillow": PIL.__version__,
            "pyarrow": pa.__version__,
        },
    }
    dataset.write_manifest(manifest, extra)
    return manifest


def _counts(
    planned: DatasetPlan,
    by_split: dict[str, tuple[Shard, ...]],
    records: Sequence[dict[str, Any]],
    rejected: Counter[str],
) -> dict[str, Any]:
    """The counts in the manifest."""
    plan, selection = planned.plan, planned.selection
    splits = {split: sum(shard.rows for shard in part) for split, part in by_split.items()}
    genres: dict[str, Counter[str]] = {split: Counter() for split in schema.SPLITS}
    for record in records:
        genres[record["split"]].update(record["genres"])
    return {
        "rows": plan.rows,
        "source_rows": plan.summary["source_rows"],
        "albums": sum(splits.values()),
        "duplicates": sum(record["duplicates"] for record in records),
        "rejected": rejected.total(),
        "reasons": dict(sorted(rejected.items())),
        "splits": splits,
        "bytes": sum(shard.bytes for part in by_split.values() for shard in part),
        "labelled": selection.labelled,
        "raw_genres": selection.counts,
        "genres_by_split": {
            name: {split: genres[split][name] for split in schema.SPLITS}
            for name in selection.genres.names
        },
        "rows_without_group": planned.assignment.without_group,
    }
