"""Which albums train, which tune, which test: decided by a hash of each album's own key.

The split of an album depends on its key and the seed alone, never on the other albums, so a
catalog may grow and no album moves from one split to another.
"""

import hashlib
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from covergenre.errors import CatalogError, ConfigError, did_you_mean
from covergenre.schema import SPLITS

GROUP_BY = ("album_id", "artist", "group")
SPLIT_FROM = ("hash", "catalog")

# What other people call the three splits.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}


@dataclass(frozen=True)
class SplitAssignment:
    """Columns beside the table that was split."""

    split: pa.Array  # "train", "dev" or "test"; null only where hashing and album_id is null
    group: pa.Array  # the key shared by albums that belong together; null: the album alone
    alone: int  # albums without a value in the column that was to keep them together


def split_key_hash(key: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone, evenly spread over keys."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    # 53 bits are what a float holds: with all 64 the largest would be rounded up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def assign_splits(
    table: pa.Table,
    *,
    group_by: str,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    split_from: str,
) -> SplitAssignment:
    """Give every row of `table` (one row an album) its split.

    Args:
        group_by: "album_id" (each album alone), "artist" or "group": albums with an equal value
            share a split. Artists are equal whatever their case and spacing. An album without a
            value stands alone, under its album_id.
        fractions: expected shares of train, dev and test; they add up to 1.
        seed: another seed is another split.
        split_from: "hash", or "catalog": the table's `split` column as it is. Nothing keeps the
            groups of a catalog's own splits together; `group` is given so that one can look.

    Raises:
        ConfigError: an argument is out of range.
        CatalogError: `split_from` is "catalog" and a row has no usable split.
    """
    _check("group_by", group_by, GROUP_BY)
    _check("split_from", split_from, SPLIT_FROM)
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ConfigError(f"split fractions {fractions} must add up to 1, none below 0")
    group, alone = _groups(table, group_by)
    if split_from == "catalog":
        split = _catalog_splits(table)
    else:
        edges = (fractions[0], fractions[0] + fractions[1])

        def split_of(key: str) -> str:
            return SPLITS[bisect_right(edges, split_key_hash(key, seed))]

        split = _map_distinct(pc.coalesce(group, table.column("album_id")), split_of)
    return SplitAssignment(split.combine_chunks(), group.combine_chunks(), alone)


def _check(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name} {value!r} is unknown{did_you_mean(value, valid)}")


def _groups(table: pa.Table, group_by: str) -> tuple[pa.ChunkedArray, int]:
    if group_by == "album_id":
        nothing = pa.nulls(table.num_rows, pa.string())
        return pa.chunked_array([nothing]), 0
    normalise = _artist_key if group_by == "artist" else _group_key
    group = _map_distinct(table.column(group_by), normalise)
    return group, int(group.null_count)


def _artist_key(name: str) -> str | None:
    # NFC: an accent written as a character of its own makes no other artist.
    return " ".join(unicodedata.normalize("NFC", name).casefold().split()) or None


def _group_key(value: str) -> str | None:
    return value.strip() or None


def _catalog_splits(table: pa.Table) -> pa.ChunkedArray:
    values = table.column("split")
    split = _map_distinct(values, lambda value: SPLIT_NAMES.get(value.strip().casefold()))
    if split.null_count:
        first = pc.index(split.is_null(), True).as_py()
        raise CatalogError(
            f"{split.null_count:,} rows have no usable split, the first is row "
            f"{table.column('row')[first]} with {values[first].as_py()!r}; "
            "use train, dev or test, or --split-from hash"
        )
    return split


def _map_distinct(
    column: pa.ChunkedArray, function: Callable[[str], str | None]
) -> pa.ChunkedArray:
    """`function` of every text in the column, called once for each distinct text."""
    encoded = column.dictionary_encode()
    # All chunks share one dictionary.
    values = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    results = pa.array([function(value) for value in values], pa.string())
    return pa.chunked_array(
        [results.take(chunk.indices) for chunk in encoded.chunks], type=pa.string()
    )
