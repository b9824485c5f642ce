"""The dataset on disk: Parquet shards by split, and the manifest.

DATASET/train/part-00000.parquet   rows of schema.DATASET, in catalog order
DATASET/dev/...  DATASET/test/...
DATASET/genres.json                the vocabulary, sorted
DATASET/_manifest.json             counts, sizes, hashes, settings, versions; written last

Only shards have the extension .parquet, so that DuckDB, polars, pandas, Spark and pyarrow read only
the rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covergenre import schema
from covergenre.data.genres import Genres
from covergenre.errors import DatasetError
from covergenre.io import parquet, storage

FORMAT_VERSION = 3
MANIFEST = "_manifest.json"
ROW_GROUP_ROWS = 256
"""Rows of a row group, and of a task of evaluate or score."""
ROW_GROUP_BYTES = 48 * 2**20
"""Under 64 MiB, with space for the other columns and one more cover."""
_LARGE_GROUP_BYTES = 64 * 2**20
_BUFFER_BYTES = 8 * 2**20
_STREAMED_ROWS = 64
TABLE_GROUP_ROWS = 8192
"""Rows of a row group in tables without covers: labels, plans."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a dataset."""

    path: str
    """Relative to the dataset's directory."""
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a dataset."""

    uri: str
    genres: Genres
    shards: dict[str, tuple[Shard, ...]]
    """By split, in catalog order."""
    dataset_id: str
    counts: dict[str, Any]

    def rows(self, split: str) -> int:
        """Number of albums of `split`."""
        return sum(shard.rows for shard in self.shards[split])

    def shard_uris(self, split: str) -> list[str]:
        """URIs of the shards of `split`, in order."""
        return [storage.join(self.uri, shard.path) for shard in self.shards[split]]

    def genre_counts(self, split: str) -> list[int]:
        """Number of albums of `split` with each genre, in the order of `genres`."""
        by_split = self.counts["genres_by_split"]
        return [by_split[genre][split] for genre in self.genres.names]

    def require(self, split: str) -> None:
        """Raises DatasetError if `split` has no album."""
        if self.rows(split) == 0:
            raise DatasetError(
                f"{self.uri}: the {split} split is empty; prepare more albums, or change"
                " --split-fractions",
                code="empty_split",
            )


def dataset_id(genres: Genres, shards: dict[str, tuple[Shard, ...]]) -> str:
    """Hash of a dataset's content: its genres and its shards."""
    text = [genres.digest] + [s.sha256 for split in schema.SPLITS for s in shards[split]]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def write_manifest(manifest: Manifest, extra: dict[str, Any]) -> None:
    """Write genres.json and, last, _manifest.json, which makes the directory a dataset."""
    storage.put_json(storage.join(manifest.uri, "genres.json"), list(manifest.genres.names))
    value = {
        "format_version": FORMAT_VERSION,
        "dataset_id": manifest.dataset_id,
        "genres": list(manifest.genres.names),
        "counts": manifest.counts,
        "shards": {
            split: [asdict(shard) for shard in shards] for split, shards in manifest.shards.items()
        },
        **extra,
    }
    storage.put_json(storage.join(manifest.uri, MANIFEST), value)


def is_dataset(uri: str) -> bool:
    """Whether `uri` is the directory of a finished dataset."""
    return storage.is_directory(uri) and storage.exists(storage.join(uri, MANIFEST))


def read_manifest(uri: str) -> Manifest:
    """The manifest of the dataset at `uri`. Raises DatasetError if it is not a dataset."""
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise DatasetError(f"{uri}: no such dataset; check the path", code="not_found")
    path = storage.join(uri, MANIFEST)
    if not storage.exists(path):
        raise DatasetError(
            f"{uri}: not a dataset (no {MANIFEST}); make one with `covergenre prepare`",
            code="no_manifest",
        )
    value = storage.read_json(path)
    try:
        if value["format_version"] != FORMAT_VERSION:
            raise DatasetError(
                f"{path}: format version {value['format_version']} is not supported, only"
                f" version {FORMAT_VERSION}; prepare the dataset again",
                code="format_version",
            )
        return Manifest(
            uri=uri,
            genres=Genres(tuple(value["genres"])),
            shards={
                split: tuple(Shard(**shard) for shard in value["shards"][split])
                for split in schema.SPLITS
            },
            dataset_id=value["dataset_id"],
            counts=value["counts"],
        )
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{path}: not a valid manifest ({error}); prepare the dataset again",
            code="invalid_manifest",
        ) from error


def to_parquet(table: pa.Table, metadata: dict[str, str] | None = None) -> pa.Buffer:
    """`table` as Parquet, in row groups of bounded size; equal rows give equal bytes."""
    if metadata:
        table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    # Covers are compressed already: snappy is fast on them and compresses the other columns.
    with pq.ParquetWriter(sink, table.schema, compression="snappy") as writer:
        for start, stop in _row_groups(table):
            writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
    return sink.getvalue()


def _row_groups(table: pa.Table) -> Iterable[tuple[int, int]]:
    if "image" not in table.column_names:
        for start in range(0, table.num_rows, TABLE_GROUP_ROWS):
            yield start, min(start + TABLE_GROUP_ROWS, table.num_rows)
        return
    sizes = pa.compute.binary_length(table["image"]).to_pylist()
    start, group_bytes = 0, 0
    for row, size in enumerate(sizes):
        if row > start and (row - start == ROW_GROUP_ROWS or group_bytes + size > ROW_GROUP_BYTES):
            yield start, row
            start, group_bytes = row, 0
        group_bytes += size
    if start < len(sizes):
        yield start, len(sizes)


def write_shard(root: str, path: str, table: pa.Table) -> Shard:
    """Write rows of schema.DATASET to `path` below `root`, atomically."""
    data = to_parquet(table)
    storage.put(storage.join(root, path), data)
    return Shard(path, table.num_rows, data.size, hashlib.sha256(data).hexdigest())


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of the Parquet file `uri`."""
    with storage.open_input(uri) as file, storage.translate_errors(uri, "read as Parquet"):
        return parquet.opened(file).read(columns=columns)


@lru_cache(maxsize=16)
def _open(uri: str, stat: storage.FileStat, buffered: bool) -> pq.ParquetFile:
    # A worker reads many parts of one file; its footer is read again only if the file changes.
    # With a buffer, a column of a row group is read in pieces instead of as a whole.
    settings = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False} if buffered else {}
    return parquet.opened(storage.open_input(uri), **settings)


def open_parquet(uri: str, buffered: bool = False) -> pq.ParquetFile:
    """The Parquet file `uri`, kept open for later reads."""
    return _open(uri, storage.stat(uri), buffered=buffered)


def row_group_rows(uri: str) -> list[int]:
    """Rows of each row group of the Parquet file `uri`."""
    with storage.translate_errors(uri, "read as Parquet"):
        metadata = open_parquet(uri).metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def read_rows(uri: str, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows `start` to `stop` of the Parquet file `uri`; reads only the row groups they are in."""
    with storage.translate_errors(uri, "read as Parquet"):
        file = open_parquet(uri)
        first_row = 0
        groups: list[int] = []
        skipped = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first_row + rows <= start:
                skipped = first_row + rows
            elif first_row < stop:
                groups.append(group)
            first_row += rows
        table = file.read_row_groups(groups, columns=columns, use_threads=False)
        return table.slice(start - skipped, stop - start)


def stream_rows(uri: str, rows: Sequence[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """`rows` (ascending) of the Parquet file `uri`, a few at a time; reads each row group once.

    Large row groups, as other tools write them, are never in memory as a whole.
    """
    wanted = np.asarray(rows, np.int64)
    with storage.translate_errors(uri, "read as Parquet"):
        metadata = open_parquet(uri).metadata
        ends = np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])
        for group in np.unique(np.searchsorted(ends, wanted, "right")):
            group_rows = metadata.row_group(int(group))
            start = int(ends[group]) - group_rows.num_rows
            here = wanted[(wanted >= start) & (wanted < ends[group])]
            file = open_parquet(uri, buffered=group_rows.total_byte_size > _LARGE_GROUP_BYTES)
            for batch in file.iter_batches(
                _STREAMED_ROWS, row_groups=[int(group)], columns=list(columns), use_threads=False
            ):
                stop = start + batch.num_rows
                inside = here[(here >= start) & (here < stop)] - start
                if len(inside):
                    yield batch.take(pa.array(inside))
                if stop > here[-1]:
                    break
                start = stop
