"""prepare: makes a dataset from a catalog.

The driver writes the plan, which numbers the rows of the catalog, selects genres, assigns splits
and cuts each split into shards of consecutive rows, in memory that does not grow with the catalog.
A Ray task then makes a whole shard: it loads the covers, validates that each can be decoded, and
writes one Parquet file under a fixed name. Its record in _state/shards/ is written last and commits
the shard. A resumed run makes the shards that have no record.

    OUT/<split>/part-*.parquet   schema.DATASET; the only .parquet files
    OUT/_manifest.json           written last
    OUT/genres.json
    OUT/_rejected/part-*.jsonl   schema.REJECTED, of shards and parts of the plan with rejected rows
    OUT/_report/                 label_distribution.png, genres_by_split.png
    OUT/_state/                  plan, shard records, duplicates, run record, lock
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import PIL
import pyarrow as pa

from covergenre import __version__, schema
from covergenre.cluster import ray_runtime
from covergenre.cluster.workers import check_task_limit, log_pending_resources
from covergenre.config import PrepareConfig
from covergenre.data import covers, dataset, decoder_process, shards
from covergenre.data.catalog import CatalogReader
from covergenre.data.covers import Cover, Duplicate
from covergenre.data.dataset import Manifest, Shard
from covergenre.data.genre_map import load_genre_map
from covergenre.data.genres import (
    Selection,
    name_warnings,
    select,
    split_table,
    split_warnings,
)
from covergenre.data.http_proxies import check_proxies
from covergenre.data.image_decoding import CoverError
from covergenre.data.plan import Plan, identity_of, open_plan, read_plan
from covergenre.data.rejected import rejected_row, write_duplicates, write_rejected
from covergenre.data.shards import Assignment, PlanCounts, ShardRows
from covergenre.data.splits import SplitAssigner
from covergenre.errors import CatalogError, ConfigError, LedgerError
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
_SLICE_ROWS = 64
"""Rows whose source bytes, at most 25 MB each, are in memory at the same time."""


@dataclass(frozen=True)
class Prepared:
    """A finished dataset."""

    manifest: Manifest
    remark: str = ""

    def summary(self) -> str:
        """The result as lines of text for the user."""
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
        pictures = (storage.join(m.uri, name) for name in _PLOTS)
        lines.append(f"  see {' and '.join(pictures)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DatasetPlan:
    """All decisions about a dataset that need no cover."""

    plan: Plan
    selection: Selection
    assignment: Assignment


@dataclass(frozen=True)
class PrepareInputs:
    """The catalog, not read yet, and the genre map."""

    reader: CatalogReader
    genre_map: dict[str, str | None]

    def identity(self, catalog_identity: str) -> dict[str, str]:
        """For the run record."""
        identity = {"catalog": catalog_identity}
        if self.genre_map:
            text = json.dumps(self.genre_map)
            identity["genre_map"] = hashlib.sha256(text.encode()).hexdigest()
        return identity


def prepare(config: PrepareConfig, *, verbose: bool = False) -> Prepared:
    """Make a dataset as `config` says. Raises UserError for a mistake of the user's."""
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
        planned = plan_dataset(out, config, run.inputs)
        plan = planned.plan
        check_proxies(plan.web_schemes)
        run.start_ray({"--out": out, "the cover": plan.local_cover})
        check_task_limit(config.workers)
        run.record(run.inputs.identity(plan.identity))
        records = list(_make_shards(out, config, planned))
        _write_rejected(out, plan)
        rejected = Counter(planned.assignment.rejected)
        for record in records:
            rejected.update(record["reasons"])
        return Prepared(_finish(out, config, planned, records, rejected))


def read_inputs(config: PrepareConfig) -> PrepareInputs:
    """Find the files of the catalog, and read the genre map."""
    genre_map = load_genre_map(storage.absolute(config.genre_map)) if config.genre_map else {}
    return PrepareInputs(CatalogReader(config.catalog, config), genre_map)


def plan_dataset(out: str, config: PrepareConfig, inputs: PrepareInputs) -> DatasetPlan:
    """Plan the dataset at `out`: read the catalog, select genres, assign splits, cut shards.

    Memory does not grow with the catalog.
    """
    genre_map = inputs.genre_map
    reuse = output_dir.has_run_record(out)
    plan = open_plan(storage.join(out, _PLAN), inputs.reader, reuse=reuse)
    for note in plan.summary["notes"]:
        logger.info(note)
    counts = shards.count_rows(plan, genre_map)
    if genre_map:
        unused = [name for name, rows in counts.mapped.items() if not rows]
        logger.info(
            f"genre map: {len(genre_map) - len(unused)} of {len(genre_map)} names occur in the"
            f" catalog{'; not: ' if unused else ''}{', '.join(unused[:5])}"
        )
    selection = select(
        counts.genres,
        counts.labelled,
        top=config.top_genres,
        min_share=config.min_share,
        explicit=config.genres,
    )
    for warning in name_warnings(selection.counts):
        logger.warning(f"warning: {warning}")
    split_from = _split_source(config, counts)
    assignment = shards.assign_rows(
        plan,
        genre_map=genre_map,
        selected=selection.genres,
        require_all=config.genre_match == "all",
        splits=SplitAssigner(
            group_by=config.group_by,
            fractions=config.split_fractions,
            seed=config.split_seed,
            split_from=split_from,
        ),
        shard_rows=config.shard_rows,
    )
    if split_from == "catalog":
        logger.info("splits: the catalog's own")
    elif config.group_by != "album_id":
        logger.info(
            f"splits: by {config.group_by}; {assignment.without_group:,} rows have none and are"
            " assigned by album_id"
        )
    return DatasetPlan(plan.with_settings(config), selection, assignment)


def _split_source(config: PrepareConfig, counts: PlanCounts) -> str:
    """ "hash" or "catalog". Raises ConfigError where the settings do not fit the catalog."""
    has_own = counts.values["split"] > 0
    if has_own and config.split_from == "auto" and config.group_by != "album_id":
        raise ConfigError(
            f"--group-by {config.group_by}: the catalog has a split column; choose with"
            " --split-from hash or --split-from catalog",
            code="ambiguous_split",
        )
    if config.split_from == "catalog" or (config.split_from == "auto" and has_own):
        if not has_own:
            raise ConfigError(
                "--split-from catalog: the catalog has no splits (--split-column)",
                code="no_catalog_split",
            )
        return "catalog"
    if config.group_by != "album_id" and not counts.values[config.group_by]:
        raise ConfigError(
            f"--group-by {config.group_by}: the column has no values in the catalog"
            f" (--{config.group_by}-column)",
            code="no_group",
        )
    return "hash"


def _make_shards(out: str, config: PrepareConfig, planned: DatasetPlan) -> Iterator[dict[str, Any]]:
    """Make the missing shards on the cluster; the records of all shards, in any order."""
    import ray.data
    from ray.data import TaskPoolStrategy

    every = planned.assignment.shards
    records = _read_records(out)
    if records:
        logger.info(f"prepare: {len(records):,} of {len(every):,} shards exist already")
        yield from records.values()
    pending = [shard for shard in every if _name(shard) not in records]
    if not pending:
        return
    max_side = None if config.keep_original else config.max_side
    work = partial(_make_some, out=out, plan=planned.plan, max_side=max_side)
    tasks = [{"shard": json.dumps(asdict(shard))} for shard in pending]
    with ray_runtime.data_context():
        task_rows = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    limit = min(len(tasks), config.workers) if config.workers else None
    made = task_rows.map_batches(
        work,
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=limit) if limit else None,
    )
    blocks: Iterable[Any] = made.iter_batches(batch_size=None, batch_format="pyarrow")
    total = sum(shard.rows for shard in pending)
    progress_bar = Progress("prepare", total, "rows")
    waiting = log_pending_resources("CPU", 1)
    with waiting, ray_runtime.unwrap_ray_errors(), progress_bar as progress:
        for block in blocks:
            for line in block["record"].to_pylist():
                record = json.loads(line)
                progress.advance(record["rows"])
                yield record


def _read_records(out: str) -> dict[str, dict[str, Any]]:
    """The records of the shards that exist, by name."""
    folder = storage.join(out, _RECORDS)
    files = sorted(storage.list_sizes(folder))
    with ThreadPoolExecutor(_RECORD_THREADS) as pool:
        found = pool.map(lambda file: storage.read_json(storage.join(folder, file)), files)
        return {file.removesuffix(".json"): r for file, r in zip(files, found, strict=True)}


def _name(shard: ShardRows) -> str:
    return f"part-{shard.split}-{shard.part:05d}"


def _make_some(batch: pa.Table, out: str, plan: Plan, max_side: int | None) -> Iterator[pa.Table]:
    for line in batch["shard"].to_pylist():
        record = _make_shard(ShardRows(**json.loads(line)), out, plan, max_side)
        yield pa.table({"record": [json.dumps(record)]})


def _make_shard(shard: ShardRows, out: str, plan: Plan, max_side: int | None) -> dict[str, Any]:
    """Write one shard, its rejected rows and its duplicates. Returns its record."""
    albums: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    duplicates: list[dict[str, Any]] = []
    rows = shards.read_shard(plan, shard)
    for part, outcomes in covers.load(rows, plan.source, _SLICE_ROWS):
        for row, outcome in zip(part.to_pylist(), outcomes, strict=True):
            if isinstance(outcome, Duplicate):
                duplicates.append(row)
                continue
            try:
                albums.append(_album(row, outcome, max_side))
            except CoverError as error:
                rejected.append(rejected_row(row, error))
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
    return record


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
    albums = sum(shard.rows for part in by_split.values() for shard in part)
    duplicates = sum(record["duplicates"] for record in records)
    if plan.rows != albums + rejected.total() + duplicates:
        raise LedgerError(
            f"{out}: {plan.rows} rows went in; {albums} albums + {rejected.total()} rejected +"
            f" {duplicates} duplicates came out"
        )
    if albums == 0:
        storage.delete_directory(storage.join(out, _RECORDS))  # the same command tries all again
        reason, count = rejected.most_common(1)[0]
        raise CatalogError(
            f"{config.catalog}: no album can be used; {count:,} of {plan.rows:,} rows are rejected"
            f" as {reason} ({schema.REASONS[reason]}); see {storage.join(out, _REJECTED)}",
            code="no_albums",
        )
    names = selection.genres.names
    in_split: dict[str, Counter[str]] = {split: Counter() for split in schema.SPLITS}
    for record in records:
        in_split[record["split"]].update(record["genres"])
    genres_by_split = {g: {s: in_split[s][g] for s in schema.SPLITS} for g in names}
    counts = {
        "rows": plan.rows,
        "source_rows": plan.summary["source_rows"],
        "albums": albums,
        "duplicates": duplicates,
        "rejected": rejected.total(),
        "reasons": dict(sorted(rejected.items())),
        "splits": {split: sum(s.rows for s in part) for split, part in by_split.items()},
        "bytes": sum(s.bytes for part in by_split.values() for s in part),
        "labelled": selection.labelled,
        "raw_genres": selection.counts,
        "genres_by_split": genres_by_split,
        "rows_without_group": planned.assignment.without_group,
    }
    identity = dataset.dataset_id(selection.genres, by_split)
    manifest = Manifest(out, selection.genres, by_split, identity, counts)
    pictures = (
        plots.label_distribution(selection.counts, selection.labelled, set(names)),
        plots.genres_by_split(genres_by_split, counts["splits"]),
    )
    for name, picture in zip(_PLOTS, pictures, strict=True):
        storage.put(storage.join(out, name), picture)
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
