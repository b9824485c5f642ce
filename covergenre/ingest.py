"""Catalog rows -> covers: what prepare and score both do with a row before they part ways.

Every row ends in exactly one of three ways: its cover's bytes, a reason why it is set aside, or
the earlier row that it repeats.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from covergenre import schema, shards, storage
from covergenre.covers import MAX_BYTES, CoverError, sha256
from covergenre.errors import StorageError

_FETCHES_AT_A_TIME = 8

# A plan is a catalog whose repeated rows know where their album's first cover is.
PLAN = pa.schema(
    [
        *schema.CATALOG,
        pa.field("first_cover", pa.string()),
        pa.field("first_source", pa.int32()),
        pa.field("first_source_row", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Source:
    """Where the image bytes of a catalog are, for rows that have them in a Parquet file."""

    files: tuple[str, ...] = ()
    image_column: str = "image"
    prepared: bool = False
    """Whether the files are a dataset's shards, which keep the hash of the source bytes."""


@dataclass(frozen=True)
class Cover:
    """The bytes of a row's cover."""

    data: bytes
    sha256: str
    """Of the source bytes, which prepare may have re-encoded since."""


@dataclass(frozen=True)
class Duplicate:
    """The row repeats an earlier one: same album, same cover."""

    first_row: int


Outcome = Cover | CoverError | Duplicate


def plan(catalog: pa.Table) -> pa.Table:
    """schema.CATALOG -> PLAN."""
    first = catalog["first_row"].combine_chunks()
    columns = {
        f"first_{name}": catalog[name].combine_chunks().take(first)
        for name in ("cover", "source", "source_row")
    }
    for name, column in columns.items():
        catalog = catalog.append_column(name, column)
    return catalog.cast(PLAN)


def plan_dataset(manifest: shards.Manifest, splits: Sequence[str]) -> tuple[pa.Table, Source]:
    """A prepared dataset's `splits` as a plan: rows are numbered in the order of its shards."""
    uris = [uri for split in splits for uri in manifest.shard_uris(split)]
    columns = ["album_id", "genres", "title", "artist", "split", "group"]
    parts: list[pa.Table] = []
    for source, uri in enumerate(uris):
        part = shards.read_table(uri, columns)
        rows = pa.array(range(part.num_rows), pa.int64())
        part = part.append_column("source_row", rows)
        parts.append(part.append_column("source", pa.array([source] * len(rows), pa.int32())))
    table = pa.concat_tables(parts)
    table = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    for field in PLAN:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(PLAN.names).cast(PLAN), Source(tuple(uris), prepared=True)


def first_rows(plan_rows: pa.Table) -> pa.Array:
    """Whether each row is the one that counts for its album: it has an id, and none before it."""
    return pc.and_(pc.is_valid(plan_rows["album_id"]), pc.is_null(plan_rows["first_row"]))


def load(plan_rows: pa.Table, source: Source) -> list[Outcome]:
    """The outcome of each of `plan_rows` (schema PLAN), in order. Reads covers, decodes none."""
    rows = plan_rows.to_pylist()
    wanted = [
        (row[f"{prefix}source"], row[f"{prefix}source_row"])
        for row in rows
        for prefix in ("", "first_")
        if row[f"{prefix}source"] is not None
    ]
    embedded = _embedded(wanted, source)

    def cover_of(row: dict[str, Any], prefix: str = "") -> Cover:
        at = row[f"{prefix}source"]
        if at is not None:
            found = embedded[at, row[f"{prefix}source_row"]]
            if found is None:
                raise CoverError("no_cover")
            return found
        path = row[f"{prefix}cover"]
        if path is None:
            raise CoverError("no_cover")
        return _fetch(str(path))

    def outcome(row: dict[str, Any]) -> Outcome:
        try:
            if row["album_id"] is None:
                raise CoverError("null_id")
            first_row = row["first_row"]
            if first_row is None:
                return cover_of(row)
            return _repeated(first_row, row, cover_of)
        except CoverError as error:
            return error

    with ThreadPoolExecutor(_FETCHES_AT_A_TIME) as pool:
        return list(pool.map(outcome, rows))


def _repeated(first_row: int, row: dict[str, Any], cover_of: Callable[..., Cover]) -> Outcome:
    if row["cover"] is not None and row["cover"] == row["first_cover"]:
        return Duplicate(first_row)
    mine = cover_of(row)
    try:
        first = cover_of(row, "first_")
    except CoverError as error:
        raise CoverError(
            "conflicting_cover", f"row {first_row} came first, with a cover that is {error.reason}"
        ) from error
    if mine.sha256 == first.sha256:
        return Duplicate(first_row)
    raise CoverError("conflicting_cover", f"row {first_row} came first")


def _fetch(path: str) -> Cover:
    try:
        with storage.open_input(path) as file:
            if file.size() > MAX_BYTES:  # before it fills the memory
                raise CoverError("file_too_large", f"{file.size():,} bytes, limit {MAX_BYTES:,}")
        data = storage.read_bytes(path)
    except StorageError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        raise CoverError("missing_file" if missing else "unreadable_file", str(error)) from error
    return Cover(data, sha256(data))


def _embedded(
    wanted: Sequence[tuple[int, int]], source: Source
) -> dict[tuple[int, int], Cover | None]:
    """Covers that lie in Parquet files, by (file, row of the file)."""
    out: dict[tuple[int, int], Cover | None] = {}
    columns = [source.image_column, *(["cover_sha256"] if source.prepared else [])]
    for at, run in _runs(sorted(set(wanted))):
        table = shards.read_rows(source.files[at], run.start, run.stop, columns)
        image = table[source.image_column].combine_chunks()
        if pa.types.is_struct(image.type):  # Hugging Face keeps {bytes, path}
            image = image.field("bytes")
        hashes = table["cover_sha256"].to_pylist() if source.prepared else [None] * len(run)
        for row, data, known in zip(run, image, hashes, strict=True):
            value = data.as_py()
            out[at, row] = None if value is None else Cover(value, known or sha256(value))
    return out


def _runs(places: Sequence[tuple[int, int]]) -> list[tuple[int, range]]:
    """Sorted (file, row) pairs as runs of consecutive rows."""
    runs: list[tuple[int, range]] = []
    for at, row in places:
        if runs and runs[-1][0] == at and runs[-1][1].stop == row:
            runs[-1] = (at, range(runs[-1][1].start, row + 1))
        else:
            runs.append((at, range(row, row + 1)))
    return runs
