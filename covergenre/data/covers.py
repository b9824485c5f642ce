"""Loading the covers of catalog rows, for prepare and score.

Every row has exactly one outcome: the bytes of its cover, the reason why it is rejected, or the
earlier row of which it is a duplicate.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from covergenre import schema
from covergenre.data import dataset, http
from covergenre.data.image_decoding import MAX_BYTES, CoverError, sha256
from covergenre.errors import DatasetError, StorageError, did_you_mean
from covergenre.io import storage
from covergenre.io.urls import redacted

# Columns of a row whose album_id an earlier row has: that row's number and cover.
FIRST = pa.schema(
    [
        pa.field("first_row", pa.int64()),
        pa.field("first_cover", pa.string()),
        pa.field("first_source", pa.int32()),
        pa.field("first_source_row", pa.int64()),
    ]
)
LOADED_COLUMNS = ("row", "album_id", "cover", "source", "source_row", *FIRST.names)
"""Columns that `load` reads."""
PLAN = pa.schema([*schema.CATALOG, *FIRST])


@dataclass(frozen=True)
class Source:
    """The Parquet files with image bytes, and how other covers are loaded."""

    files: tuple[str, ...] = ()
    image_column: str = "image"
    prepared: bool = False
    """Whether the files are shards of a dataset; these have hashes of the source bytes."""
    download_concurrency: int = 16
    """Covers that one task downloads at a time (from each host, with http)."""
    allow_private: bool = False
    """Whether http covers may be in private networks."""
    contact: str | None = None
    """URL or mail address for the User-Agent header of http requests."""


@dataclass(frozen=True)
class Cover:
    """The encoded bytes of a row's cover."""

    data: bytes
    sha256: str
    """Of the source bytes; prepare may have re-encoded `data`."""


@dataclass(frozen=True)
class Duplicate:
    """The row has the album_id and the cover of an earlier row."""

    first_row: int


Outcome = Cover | CoverError | Duplicate


class DatasetReader:
    """The rows of splits of a prepared dataset, in the order of its shards; see plan.RowReader.

    columns: those of PLAN to read. carry: columns of schema.DATASET to add, with the prefix
    CARRIED.
    """

    def __init__(
        self,
        manifest: dataset.Manifest,
        splits: Sequence[str],
        columns: Sequence[str] = tuple(PLAN.names),
        carry: Sequence[str] = (),
    ) -> None:
        for name in carry:
            if name not in schema.DATASET.names or name == "image":
                names = [column for column in schema.DATASET.names if column != "image"]
                raise DatasetError(
                    f"--carry {name}: no such column in the dataset{did_you_mean(name, names)}",
                    code="no_column",
                )
        self._uris = [uri for split in splits for uri in manifest.shard_uris(split)]
        self._columns = [name for name in PLAN.names if name in columns]
        self._carry = carry
        self.key: dict[str, Any] = {
            "dataset_id": manifest.dataset_id,
            "splits": list(splits),
            "columns": [*self._columns, *carry],
        }
        self.identity: str | None = manifest.dataset_id

    def parts(self) -> Iterator[pa.Table]:
        """One table per shard."""
        rows = 0
        names = dict.fromkeys(["album_id", *self._columns, *self._carry])
        stored = [name for name in names if name in schema.DATASET.names]
        fields = pa.schema([PLAN.field(name) for name in self._columns])
        for source, uri in enumerate(self._uris):
            table = dataset.read_table(uri, stored)
            count = table.num_rows
            columns = {
                **{name: pa.nulls(count, PLAN.field(name).type) for name in self._columns},
                **{name: table[name] for name in self._columns if name in stored},
                "row": pa.array(range(rows, rows + count), pa.int64()),
                "source": pa.array([source] * count, pa.int32()),
                "source_row": pa.array(range(count), pa.int64()),
            }
            part = pa.table({name: columns[name] for name in self._columns}).cast(fields)
            for name in self._carry:
                part = part.append_column(f"{schema.CARRIED}{name}", table[name])
            rows += count
            yield part

    def source(self) -> Source:
        """The images are in the shards."""
        return Source(tuple(self._uris), prepared=True)

    def summary(self) -> dict[str, Any]:
        """Empty."""
        return {}


def local_cover(rows: pa.Table) -> str | None:
    """The path of a cover on this machine's disk; None if no row has one."""
    covers = rows["cover"].filter(pc.is_null(rows["source"])).drop_null()
    elsewhere = pc.match_substring_regex(covers, r"(?i)^(data:|[a-z][a-z0-9+.-]+://)")
    is_file = pc.match_substring_regex(covers, "(?i)^file:/")
    local = covers.filter(pc.or_(is_file, pc.invert(elsewhere)))
    return local[0].as_py() if len(local) else None


def web_schemes(rows: pa.Table) -> list[str]:
    """Which of "http" and "https" are schemes of covers."""
    return [
        scheme
        for scheme in ("http", "https")
        if pc.any(pc.match_substring_regex(rows["cover"], f"(?i)^{scheme}://")).as_py()
    ]


def load(
    plan_rows: pa.Table, source: Source, slice_rows: int
) -> Iterator[tuple[pa.Table, list[Outcome]]]:
    """`plan_rows` in slices, each with the outcomes of its rows. Does not decode covers.

    plan_rows: columns LOADED_COLUMNS, and others. The covers of a slice are loaded when the
    iterator reaches it: no more than one slice is in memory.
    """
    own = _embedded(_sources(plan_rows), source)
    for start in range(0, plan_rows.num_rows, slice_rows):
        part = plan_rows.slice(start, slice_rows)
        yield part, _outcomes(part, source, own)


def _sources(plan_rows: pa.Table, prefix: str = "") -> list[tuple[int, int]]:
    """(file, row of the file) of the rows that have their cover in a Parquet file."""
    columns = plan_rows.select([f"{prefix}source", f"{prefix}source_row"]).drop_null()
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def _outcomes(
    plan_rows: pa.Table, source: Source, own_covers: Iterator[Cover | None]
) -> list[Outcome]:
    rows = plan_rows.to_pylist()
    own = {row["row"]: next(own_covers) for row in rows if row["source"] is not None}
    positions = sorted(set(_sources(plan_rows, "first_")))
    firsts = dict(zip(positions, _embedded(positions, source), strict=True))

    def cover_of(row: dict[str, Any]) -> Cover:
        return own.get(row["row"]) or fetch(row["cover"], source)

    def first_cover_of(row: dict[str, Any]) -> Cover:
        position = (row["first_source"], row["first_source_row"])
        return firsts.get(position) or fetch(row["first_cover"], source)

    def outcome(row: dict[str, Any]) -> Outcome:
        try:
            if row["album_id"] is None:
                raise CoverError("null_id")
            if row["first_row"] is None:
                return cover_of(row)
            return _repeated(row, cover_of, first_cover_of)
        except CoverError as error:
            return error

    with ThreadPoolExecutor(source.download_concurrency) as pool:
        return list(pool.map(outcome, rows))


def _repeated(
    row: dict[str, Any],
    cover_of: Callable[[dict[str, Any]], Cover],
    first_cover_of: Callable[[dict[str, Any]], Cover],
) -> Outcome:
    first_row = row["first_row"]
    in_files = row["source"] is not None or row["first_source"] is not None
    if not in_files and row["cover"] is not None and row["cover"] == row["first_cover"]:
        return Duplicate(first_row)
    mine = cover_of(row)
    try:
        first = first_cover_of(row)
    except CoverError as error:
        raise CoverError(
            "conflicting_cover",
            f"the cover of row {first_row}, the first with this id, is rejected: {error.reason}",
        ) from error
    if mine.sha256 == first.sha256:
        return Duplicate(first_row)
    raise CoverError(
        "conflicting_cover", f"row {first_row}, the first with this id, has another cover"
    )


_WINDOWS_PATH = re.compile(r"(?:\A|/)(?:[A-Za-z]:[\\/]|\\\\)")
"""A drive or a network share, at the start or after the directory it was joined to."""
_MAYBE_ELSEWHERE = ("missing_file", "access_denied")
"""S3 denies access to missing keys without permission to list."""


def fetch(path: str | None, source: Source) -> Cover:
    """The bytes at a path or URL. Raises CoverError."""
    if path is None:
        raise CoverError("no_cover")
    try:
        return _fetch_exactly(path, source)
    except CoverError as error:
        as_posix = _without_backslashes(path)
        if error.reason not in _MAYBE_ELSEWHERE:
            raise
        if as_posix != path:
            try:
                return _fetch_exactly(as_posix, source)
            except CoverError as other:
                if other.reason not in _MAYBE_ELSEWHERE:
                    raise
        if _WINDOWS_PATH.search(path):
            hint = "a Windows path; write it relative to the catalog or --covers"
            raise CoverError(error.reason, f"{error.detail}; {hint}") from error
        raise


def _without_backslashes(path: str) -> str:
    """`path` with / for each backslash, except in the query of a URL."""
    end = len(path)
    if http.is_web(path):
        end = next((match.start() for match in re.finditer(r"[?#]", path)), end)
    if "\\" not in path[:end]:
        return path
    # S3 does not resolve `./`
    return re.sub(r"/(\./)+", "/", path[:end].replace("\\", "/")) + path[end:]


def _fetch_exactly(path: str, source: Source) -> Cover:
    if http.is_data(path):
        data = http.data_cover(path)
        return Cover(data, sha256(data))
    if http.is_web(path):
        get = http.web_covers(source.download_concurrency, source.allow_private, source.contact)
        data = get(path)
        return Cover(data, sha256(data))
    if (scheme := storage.scheme(path)) not in ("", "file", "s3"):
        raise CoverError(
            "unsupported_scheme",
            f"{redacted(path)}: {scheme}:// is not supported; copy covers to a directory or s3://",
        )
    try:
        with storage.open_input(path) as file, storage.translate_errors(path, "read"):
            if file.size() > MAX_BYTES:  # before reading it
                raise CoverError("file_too_large", f"{file.size():,} bytes, limit {MAX_BYTES:,}")
            data = bytes(file.read())
    except StorageError as error:
        raise CoverError(_reason(path, error), str(error)) from error
    return Cover(data, sha256(data))


def _reason(path: str, error: StorageError) -> str:
    if error.code == "not_found":
        return "missing_file"
    if error.code == "access_denied":
        return "access_denied"
    return "fetch_failed" if storage.scheme(path) == "s3" else "unreadable_file"


def _embedded(positions: Sequence[tuple[int, int]], source: Source) -> Iterator[Cover | None]:
    """The covers at (file, row of the file), in that order; None if the row has no bytes."""
    columns = [source.image_column, *(["cover_sha256"] if source.prepared else [])]
    for at, rows in _ascending(positions):
        for batch in dataset.stream_rows(source.files[at], rows, columns):
            image = batch.column(source.image_column)
            if pa.types.is_struct(image.type):  # Hugging Face's {bytes, path}
                image = image.field("bytes")
            known = batch.column("cover_sha256").to_pylist() if source.prepared else []
            for data, digest in zip_longest(image.to_pylist(), known):
                yield None if data is None else Cover(data, digest or sha256(data))


def _ascending(positions: Sequence[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """`positions` as runs of ascending rows of one file."""
    runs: list[tuple[int, list[int]]] = []
    for at, row in positions:
        if runs and runs[-1][0] == at and runs[-1][1][-1] < row:
            runs[-1][1].append(row)
        else:
            runs.append((at, [row]))
    return runs
