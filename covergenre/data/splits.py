"""Assigns albums to train, dev and test by a hash of their keys.

The split of an album depends only on its key and the seed, never on other albums: a catalog can
grow without moving an album to another split.
"""

import hashlib
import math
import unicodedata
from bisect import bisect_right

import pyarrow as pa
import pyarrow.compute as pc

from covergenre.data.genre_lists import map_distinct
from covergenre.errors import CatalogError, ConfigError, did_you_mean
from covergenre.schema import SPLITS

GROUP_BY = ("album_id", "artist", "group")
SPLIT_FROM = ("hash", "catalog")

# Names of the splits in catalogs.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}


def split_key_hash(key: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends only on `key` and `seed`, uniformly distributed over keys."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    # A float has 53 bits: the largest 64-bit integer would be rounded up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


class SplitAssigner:
    """Assigns a split to every row of a catalog, part by part.

    Args:
        group_by: "album_id" (each album on its own), "artist" or "group": albums with an equal
            value get the same split. Artists are compared without case and spacing. An album
            without a value is assigned by its album_id.
        fractions: expected fractions of train, dev and test; they sum to 1.
        seed: another seed gives another split.
        split_from: "hash", or "catalog" to use the catalog's `split` column. The groups of a
            catalog's splits are not kept together; the column `group` shows whether they are.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        group_by: str,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        split_from: str,
    ) -> None:
        _check("group_by", group_by, GROUP_BY)
        _check("split_from", split_from, SPLIT_FROM)
        if min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
            raise ConfigError(f"split fractions {fractions}: must be at least 0 and sum to 1")
        self._group_by = group_by
        self._edges = (fractions[0], fractions[0] + fractions[1])
        self._seed = seed
        self._own = split_from == "catalog"
        self._invalid = 0
        self._first_invalid = ""
        self.without_group = 0
        """Albums without a value in the column of `group_by`, so far."""

    def assign(self, rows: pa.Table) -> tuple[pa.Array, pa.Array]:
        """(split, group) of `rows`, columns of schema.CATALOG.

        split: "train", "dev" or "test"; null where the split comes from a hash and album_id is
        null, or where the split of the catalog is not valid (see `check`).
        group: the key shared by albums that belong together; null: the album alone.
        """
        group = self._groups(rows)
        if self._own:
            split = map_distinct(rows["split"], _split_name, pa.string())
        else:
            key = pc.coalesce(group, rows["album_id"])
            split = map_distinct(key, self._split_of, pa.string())
        return split.combine_chunks(), group.combine_chunks()

    def require(self, rows: pa.Table, split: pa.Array) -> None:
        """Count the `rows` whose `split` is null, for `check`."""
        nulls = pc.indices_nonzero(split.is_null())
        if len(nulls) and not self._invalid:
            first = nulls[0].as_py()
            value = rows["split"][first].as_py()
            shown = "missing" if value is None else repr(value)
            self._first_invalid = f"row {rows['row'][first]} (value: {shown})"
        self._invalid += len(nulls)

    def check(self) -> None:
        """Raises CatalogError if a row that needs a split has no valid one."""
        if self._invalid:
            have = "row has" if self._invalid == 1 else "rows have"
            raise CatalogError(
                f"{self._invalid:,} {have} no valid split; the first is {self._first_invalid}; set"
                " the split to train, dev or test, or use --split-from hash",
                code="invalid_split",
            )

    def _split_of(self, key: str) -> str:
        return SPLITS[bisect_right(self._edges, split_key_hash(key, self._seed))]

    def _groups(self, rows: pa.Table) -> pa.ChunkedArray:
        if self._group_by == "album_id":
            return pa.chunked_array([pa.nulls(rows.num_rows, pa.string())])
        normalize = _artist_key if self._group_by == "artist" else _group_key
        group = map_distinct(rows[self._group_by], normalize, pa.string())
        self.without_group += group.null_count
        return group


def _check(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name} {value!r} is unknown{did_you_mean(value, valid)}")


def _artist_key(name: str) -> str | None:
    # NFC: a combining accent does not make another artist.
    return " ".join(unicodedata.normalize("NFC", name).casefold().split()) or None


def _group_key(value: str) -> str | None:
    return value.strip() or None


def _split_name(value: str) -> str | None:
    return SPLIT_NAMES.get(value.strip().casefold())
