"""prepare: a catalog becomes a dataset.

The driver reads the catalog's table (no cover), chooses genres and splits, and cuts each split
into shards of consecutive rows. A Ray task then makes a whole shard: it fetches its covers,
proves that each decodes, and writes one Parquet file under a fixed name. What it wrote it records
last, in _state/shards/, and a run that is taken up again makes the shards without a record.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from covergenre import __version__, schema
from covergenre.cluster import ray_runtime
from covergenre.cluster.workers import check_task_limit, log_pending_resources
from covergenre.config import PrepareConfig
from covergenre.data import covers, dataset, decoder_process
from covergenre.data.catalog import Catalog, read_catalog
from covergenre.data.covers import Cover, Source
from covergenre.data.dataset import Manifest, Shard
from covergenre.data.genre_map import apply_genre_map, load_genre_map
from covergenre.data.genres import (
    Genres,
    Selection,
    keep_albums,
    name_warnings,
    select,
    split_table,
    split_warnings,
)
from covergenre.data.http_proxies import check_proxies
from covergenre.data.image_decoding import CoverError
from covergenre.data.splits import SplitAssignment, assign_splits
from covergenre.errors import CatalogError, ConfigError, LedgerError
from covergenre.io import storage
from covergenre.io.urls import redacted
from covergenre.progress import Progress
from covergenre.report import plots
from covergenre.runs import output_dir
from covergenre.runs.lock import OutputLock
from covergenre.runs.stage_run import check_reachable

logger = logging.getLogger(__name__)

_PLAN = "_state/plan.parquet"
_DONE = "_state/shards"
_PICTURES = ("label_distribution.png", "genres_by_split.png")
_RECORDS_AT_A_TIME = 32
_SLICE_ROWS = 64  # whose source bytes, 25 MB each at most, are held at once


@dataclass(frozen=True)
class Prepared:
    """A finished dataset."""

    manifest: Manifest
    remark: str = ""

    def summary(self) -> str:
        """What the user is told at the end."""
        m, counts = self.manifest, self.manifest.counts
        splits = ", ".join(f"{m.rows(split):,} {split}" for split in schema.SPLITS)
        lines = [
            f"dataset {m.uri} ({m.dataset_id}){self.remark}",
            f"  {counts['albums']:,} albums of {counts['rows']:,} rows: {splits}",
            f"  {len(m.genres)} genres: {', '.join(m.genres.names)}",
        ]
        if counts["duplicates"]:
            lines.append(f"  {counts['duplicates']:,} rows repeat an earlier one")
        if counts["rejected"]:
            why = schema.counted_reasons(counts["reasons"])
            lines.append(f"  {counts['rejected']:,} rejected, see {m.uri}/rejected: {why}")
        by_split, rows = counts["genres_by_split"], counts["splits"]
        lines += [f"  {line}" for line in split_table(by_split, rows)]
        lines += [f"  warning: {line}" for line in split_warnings(by_split, rows)]
        lines += schema.reason_warnings(counts["reasons"])
        pictures = (storage.join(m.uri, name) for name in _PICTURES)
        lines.append(f"  see {' and '.join(pictures)}")
        return "\n".join(lines)


def prepare(config: PrepareConfig, *, verbose: bool = False) -> Prepared:
    """Validate and pack as `config` says. Raises UserError for a user's mistake."""
    out = storage.absolute(config.out)
    output_dir.check_not_inside(out, {"catalog": config.catalog})
    catalog = read_catalog(storage.absolute(config.catalog), config)
    inputs = {"catalog": catalog.fingerprint}
    table, genre_map = catalog.table, None
    if config.genre_map:
        genre_map = load_genre_map(storage.absolute(config.genre_map))
        table, used = apply_genre_map(table, genre_map)
        inputs["genre_map"] = hashlib.sha256(json.dumps(genre_map).encode()).hexdigest()
        unused = [name for name, rows in used.items() if not rows]
        logger.info(
            f"genre map: {len(used) - len(unused)} of {len(used)} names occur in the catalog"
            + (f"; not: {', '.join(unused[:5])}" if unused else "")
        )
    for note in catalog.notes:
        logger.info(note)
    plan = covers.plan(table)
    first = covers.first_rows(plan).to_pylist()
    albums = [
        g if is_first else [] for g, is_first in zip(plan["genres"].to_pylist(), first, strict=True)
    ]
    selection = select(
        albums,
        top=config.top_genres,
        min_share=config.min_share,
        explicit=config.genres,
    )
    for warning in name_warnings(selection.counts):
        logger.info(f"warning: {warning}")
    chosen = keep_albums(albums, selection.kept, config.genre_match == "all")
    reasons = _reasons(plan, first, chosen)
    wanted = [is_first and r is None for is_first, r in zip(first, reasons, strict=True)]
    assigned = _splits(plan, config, wanted)
    output_dir.write_run_record(out, output_dir.run_record("prepare", config, inputs), config)
    if dataset.is_dataset(out):
        return Prepared(dataset.read_manifest(out), ": already prepared by this same command")

    check_proxies(covers.web_schemes(plan))
    source = Source(
        catalog.files,
        catalog.image_column,
        download_concurrency=config.download_concurrency,
        allow_private=config.allow_private_addresses,
        contact=config.contact,
    )
    with OutputLock(out):
        if dataset.is_dataset(out):  # since we looked
            return Prepared(dataset.read_manifest(out))
        ray_runtime.start_ray(verbose=verbose)
        check_task_limit(config.workers)
        _check_shared(out, source, plan, config)
        jobs, aside = _cut(reasons, assigned, config.shard_rows)
        table = _with_splits(plan, assigned)
        storage.put(storage.join(out, _PLAN), dataset.to_parquet(table))
        done = list(_pack(out, config, jobs, source, selection.kept))
        rejected = Counter({reason: len(rows) for reason, rows in aside.items()})
        _write_aside(out, plan, aside)
        for result in done:
            rejected.update(result["reasons"])
        manifest = _finish(out, config, catalog, selection, assigned, done, rejected, len(plan))
    return Prepared(manifest)


def _check_shared(out: str, source: Source, plan: pa.Table, config: PrepareConfig) -> None:
    local = [file for file in source.files if not storage.is_uri(file)]
    local += [cover] if (cover := covers.local_cover(plan)) else []
    reached = {"--out": out, "the cover": next(iter(local), None)}
    check_reachable(reached, config.shared_filesystem)


def _reasons(plan: pa.Table, first: list[bool], chosen: list[str | None]) -> list[str | None]:
    """Why each row is set aside before its cover is read, or None.

    `chosen` judges albums by their genres; a repeated row is judged later, by its cover.
    """
    null_id = pc.is_null(plan["album_id"]).to_pylist()
    return [
        "null_id" if no_id else reason if is_first else None
        for no_id, is_first, reason in zip(null_id, first, chosen, strict=True)
    ]


def _splits(plan: pa.Table, config: PrepareConfig, used: list[bool]) -> SplitAssignment:
    has_own = pc.any(pc.is_valid(plan["split"])).as_py()
    if has_own and config.split_from == "auto" and config.group_by != "album_id":
        raise ConfigError(
            f"--group-by {config.group_by}: the catalog has a split of its own; say which counts:"
            " --split-from hash or --split-from catalog"
        )
    own = config.split_from == "catalog" or (config.split_from == "auto" and bool(has_own))
    if own and not has_own:
        raise ConfigError("--split-from catalog: the catalog has no split (--split-column)")
    if config.group_by != "album_id" and not own:
        column = plan[config.group_by]
        if column.null_count == len(column):
            raise ConfigError(
                f"--group-by {config.group_by}: the catalog names none (--{config.group_by}-column)"
            )
    # Rows that are set aside anyway need no valid split of their own.
    split = pc.if_else(pa.array(used), plan["split"].combine_chunks(), "train") if own else None
    table = plan if split is None else _replaced(plan, "split", split)
    assigned = assign_splits(
        table,
        group_by=config.group_by,
        fractions=config.split_fractions,
        seed=config.split_seed,
        split_from="catalog" if own else "hash",
    )
    if own:
        logger.info("splits: the catalog's own")
    elif config.group_by != "album_id":
        logger.info(
            f"splits: by {config.group_by}; {assigned.alone:,} albums name none and count alone"
        )
    return assigned


def _replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(name), column)


def _with_splits(plan: pa.Table, assigned: SplitAssignment) -> pa.Table:
    return _replaced(_replaced(plan, "split", assigned.split), "group", assigned.group)


def _cut(
    reasons: list[str | None], assigned: SplitAssignment, shard_rows: int
) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """(a job a shard, rows set aside by reason). A shard's rows are in catalog order."""
    aside: dict[str, list[int]] = {}
    by_split: dict[str, list[int]] = {split: [] for split in schema.SPLITS}
    for row, (reason, split) in enumerate(zip(reasons, assigned.split.to_pylist(), strict=True)):
        if reason is None:
            by_split[split].append(row)
        else:
            aside.setdefault(reason, []).append(row)
    jobs = [
        {"split": split, "part": part, "rows": rows[start : start + shard_rows]}
        for split, rows in by_split.items()
        for part, start in enumerate(range(0, len(rows), shard_rows))
    ]
    return jobs, aside


def _pack(
    out: str, config: PrepareConfig, jobs: list[dict[str, Any]], source: Source, kept: Genres
) -> Iterator[dict[str, Any]]:
    """Make the shards on the cluster that are not made yet; what each job wrote, in any order."""
    import ray.data
    from ray.data import TaskPoolStrategy

    done = _records(out)
    if done:
        logger.info(f"prepare: {len(done):,} of {len(jobs):,} shards were made before")
        yield from done.values()
    jobs = [job for job in jobs if _part(job) not in done]
    if not jobs:
        return
    max_side = None if config.keep_original else config.max_side
    work = partial(_pack_shards, out=out, source=source, kept=kept, max_side=max_side)
    rows = [{"job": json.dumps(job)} for job in jobs]
    with ray_runtime.data_context():
        planned = ray.data.from_items(rows, override_num_blocks=len(jobs))
    packed = planned.map_batches(
        work,
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=min(len(jobs), config.workers)) if config.workers else None,
    )
    blocks: Iterable[Any] = packed.iter_batches(batch_size=None, batch_format="pyarrow")
    total = sum(len(job["rows"]) for job in jobs)
    pending, shown = log_pending_resources("CPU", 1), Progress("prepare", total, "rows")
    with pending, ray_runtime.unwrap_ray_errors(), shown as progress:
        for block in blocks:
            for line in block["done"].to_pylist():
                result = json.loads(line)
                progress.advance(result["rows"])
                yield result


def _records(out: str) -> dict[str, dict[str, Any]]:
    """What the shards that are made hold: name -> what `_pack_shard` gave."""
    folder = storage.join(out, _DONE)
    names = sorted(storage.list_sizes(folder))
    with ThreadPoolExecutor(_RECORDS_AT_A_TIME) as pool:
        found = pool.map(lambda name: storage.read_json(storage.join(folder, name)), names)
        return dict(zip(names, found, strict=True))


def _part(job: dict[str, Any]) -> str:
    return f"{job['split']}-{job['part']:05d}.json"


def _pack_shards(
    jobs: pa.Table, out: str, source: Source, kept: Genres, max_side: int | None
) -> Iterator[pa.Table]:
    for line in jobs["job"].to_pylist():
        job = json.loads(line)
        yield pa.table({"done": [json.dumps(_pack_shard(job, out, source, kept, max_side))]})


def _pack_shard(
    job: dict[str, Any], out: str, source: Source, kept: Genres, max_side: int | None
) -> dict[str, Any]:
    """Write one shard, and the rows of it that are set aside or repeat others."""
    rows = np.array(job["rows"], np.int64)
    plan = dataset.read_rows(storage.join(out, _PLAN), int(rows[0]), int(rows[-1]) + 1)
    plan = plan.take(rows - rows[0])
    names = set(kept.names)
    albums: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    duplicates: list[dict[str, Any]] = []
    loaded = (
        pair
        for part, outcomes in covers.load(plan, source, _SLICE_ROWS)
        for pair in zip(part.to_pylist(), outcomes, strict=True)
    )
    for row, outcome in loaded:
        if isinstance(outcome, Cover):
            try:
                image = decoder_process.validate_and_reencode(outcome.data, max_side)
            except CoverError as error:
                rejected.append(rejection(row, error))
                continue
            genres = [genre for genre in row["genres"] if genre in names]
            fields = {"image": image, "cover_sha256": outcome.sha256, "genres": genres}
            albums.append({name: row.get(name) for name in schema.DATASET.names} | fields)
        elif isinstance(outcome, CoverError):
            rejected.append(rejection(row, outcome))
        else:
            duplicates.append({**row, "first_row": outcome.first_row})
    part = f"part-{job['split']}-{job['part']:05d}.parquet"
    shard = None
    if albums:
        path = f"{job['split']}/part-{job['part']:05d}.parquet"
        table = pa.Table.from_pylist(albums, schema=schema.DATASET)
        shard = dataset.write_shard(out, path, table)
    for folder, records, fields_of in (
        ("rejected", rejected, schema.REJECTED),
        ("_state/duplicates", duplicates, schema.DUPLICATES),
    ):
        # Empty or not: a run that is done again must leave nothing of the one before.
        table = pa.Table.from_pylist(records, schema=fields_of)
        storage.put(storage.join(out, folder, part), dataset.to_parquet(table))
    done = {
        "split": job["split"],
        "part": job["part"],
        "rows": len(rows),
        "shard": shard and vars(shard),
        "duplicates": len(duplicates),
        "reasons": Counter(record["reason"] for record in rejected),
        "genres": Counter(genre for album in albums for genre in album["genres"]),
    }
    storage.put_json(storage.join(out, _DONE, _part(job)), done)
    return done


def rejection(row: dict[str, Any], error: CoverError) -> dict[str, Any]:
    """A row of schema.REJECTED."""
    return {
        "album_id": row["album_id"],
        "row": row["row"],
        "cover": row["cover"] and redacted(row["cover"]),
        "reason": error.reason,
        "detail": error.detail or None,
    }


def _write_aside(out: str, plan: pa.Table, aside: dict[str, list[int]]) -> None:
    """The rows that were set aside before their covers were read."""
    tables = []
    for reason, rows in aside.items():
        part = plan.select(["album_id", "row", "cover"]).take(pa.array(rows, pa.int64()))
        shown = [cover and redacted(cover) for cover in part["cover"].to_pylist()]
        part = _replaced(part, "cover", pa.array(shown, pa.string()))
        part = part.append_column("reason", pa.array([reason] * len(rows)))
        tables.append(part.append_column("detail", pa.nulls(len(rows), pa.string())))
    if tables:
        table = pa.concat_tables(tables).cast(schema.REJECTED)
        storage.put(storage.join(out, "rejected/part-plan.parquet"), dataset.to_parquet(table))


def _finish(
    out: str,
    config: PrepareConfig,
    catalog: Catalog,
    selection: Selection,
    assigned: SplitAssignment,
    done: list[dict[str, Any]],
    rejected: Counter[str],
    rows: int,
) -> Manifest:
    done = sorted(done, key=lambda result: (result["split"], result["part"]))
    by_split = {
        split: tuple(Shard(**r["shard"]) for r in done if r["split"] == split and r["shard"])
        for split in schema.SPLITS
    }
    albums = sum(shard.rows for part in by_split.values() for shard in part)
    duplicates = sum(result["duplicates"] for result in done)
    if rows != albums + rejected.total() + duplicates:
        raise LedgerError(
            f"{rows} rows went in; {albums} albums + {rejected.total()} rejected + {duplicates}"
            " duplicates came out"
        )
    if albums == 0:
        storage.delete_directory(storage.join(out, _DONE))  # the same command looks at each again
        most, n = rejected.most_common(1)[0]
        raise CatalogError(
            f"{config.catalog}: no album can be used; {n:,} of {rows:,} rows: {most}"
            f" ({schema.REASONS[most]}); see {storage.join(out, 'rejected')}"
        )
    kept = selection.kept
    in_split: dict[str, Counter[str]] = {split: Counter() for split in schema.SPLITS}
    for result in done:
        in_split[result["split"]].update(result["genres"])
    genres_by_split = {g: {s: in_split[s][g] for s in schema.SPLITS} for g in kept.names}
    counts = {
        "rows": rows,
        "source_rows": catalog.source_rows,
        "albums": albums,
        "duplicates": duplicates,
        "rejected": rejected.total(),
        "reasons": dict(sorted(rejected.items())),
        "splits": {split: sum(s.rows for s in part) for split, part in by_split.items()},
        "bytes": sum(s.bytes for part in by_split.values() for s in part),
        "labelled": selection.albums,
        "raw_genres": selection.counts,
        "genres_by_split": genres_by_split,
        "albums_without_group": assigned.alone,
    }
    manifest = Manifest(out, kept, by_split, dataset.dataset_id(kept, by_split), counts)
    picture = plots.label_distribution(selection.counts, selection.albums, set(kept.names))
    storage.put(storage.join(out, _PICTURES[0]), picture)
    picture = plots.genres_by_split(genres_by_split, counts["splits"])
    storage.put(storage.join(out, _PICTURES[1]), picture)
    extra = {
        "catalog": {"fingerprint": catalog.fingerprint, "place": redacted(config.catalog)},
        "settings": config.saved(),
        "versions": {
            "covergenre": __version__,
            "pillow": PIL.__version__,
            "pyarrow": pa.__version__,
        },
    }
    dataset.write_manifest(manifest, extra)
    return manifest
