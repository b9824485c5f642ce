"""Assigns the rows of a plan to shards of a dataset, or rejects them unread.

    PLAN/assigned-00000000.arrow   ASSIGNED, for each row of the plan's file of that number

Two passes over the plan: the first counts the genres, the second decides about every row. Memory
does not grow with the number of rows.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from covergenre import schema
from covergenre.data.genre_lists import GENRES, join_lists, make_lists, map_distinct, split_joined
from covergenre.data.genre_map import apply_genre_map
from covergenre.data.genres import Genres, unselected_reason
from covergenre.data.plan import Plan
from covergenre.data.splits import SplitAssigner
from covergenre.io.urls import redacted

_FILES = "assigned"
ASSIGNED = pa.schema(
    [
        pa.field("reason", pa.string()),  # why the row is rejected before its cover is read
        pa.field("split", pa.string()),  # null: rejected
        pa.field("group", pa.string()),
        pa.field("genres", GENRES),  # the selected ones
    ]
)


@dataclass(frozen=True)
class PlanCounts:
    """Counts over the rows of a plan."""

    genres: Counter[str]
    """Albums of each genre, after the genre map."""
    labelled: int
    """Albums with at least one genre."""
    mapped: Counter[str]
    """Rows with each raw name of the genre map."""
    values: Counter[str]
    """Values that are not null in the columns artist, group and split."""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard: those of `split` from `start` to `stop` in the plan."""

    split: str
    part: int
    """Number of the shard in its split, from 0."""
    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Assignment:
    """The shards of a plan, and the counts of its rejected rows."""

    shards: tuple[ShardRows, ...]
    rejected: Counter[str]
    """Rows that are rejected before their covers are read, by reason."""
    without_group: int
    """Rows without a value in the column of --group-by."""


def count_rows(plan: Plan, genre_map: Mapping[str, str | None]) -> PlanCounts:
    """Count genres and values. Of rows with one album_id, genres count with the first only."""
    genres: Counter[str] = Counter()
    mapped = Counter(dict.fromkeys(genre_map, 0))
    values: Counter[str] = Counter()
    labelled = 0
    for start, stop in plan.ranges():
        rows = plan.read_rows(start, stop)
        lists = rows["genres"]
        if genre_map:
            lists, counts = apply_genre_map(lists, genre_map)
            mapped.update(counts)
        lists = lists.filter(_is_first(plan, rows, start, stop))
        labelled += pc.sum(pc.greater(pc.list_value_length(lists), 0)).as_py() or 0
        for entry in pc.value_counts(pc.list_flatten(lists)).to_pylist():
            genres[entry["values"]] += entry["counts"]
        for name in ("artist", "group", "split"):
            values[name] += len(rows) - rows[name].null_count
    return PlanCounts(genres, labelled, mapped, values)


def assign_rows(
    plan: Plan,
    *,
    genre_map: Mapping[str, str | None],
    selected: Genres,
    require_all: bool,
    splits: SplitAssigner,
    shard_rows: int,
) -> Assignment:
    """Assign or reject every row of `plan`, and write the result to the directory of the plan.

    A shard has `shard_rows` consecutive rows of its split, in catalog order. Of rows with one
    album_id, only the first needs selected genres; the others are compared by their covers later.
    Raises CatalogError if a row has no valid split.
    """
    names = frozenset(selected.names)
    cutters = {split: _ShardCutter(shard_rows) for split in schema.SPLITS}
    rejected: Counter[str] = Counter()

    def reason_of(genres: str) -> str | None:
        return unselected_reason(split_joined(genres), names, require_all=require_all)

    def selected_of(genres: str) -> list[str]:
        return [genre for genre in split_joined(genres) if genre in names]

    for start, stop in plan.ranges():
        rows = plan.read_rows(start, stop)
        genres = rows["genres"]
        if genre_map:
            genres, _ = apply_genre_map(genres, genre_map)
        texts = join_lists(genres)
        is_first = _is_first(plan, rows, start, stop)
        reason = map_distinct(texts, reason_of, pa.string(), null="unlabelled")
        reason = pc.if_else(is_first, reason, None)
        reason = pc.if_else(pc.is_null(rows["album_id"]), "null_id", reason).combine_chunks()
        is_used = pc.is_null(reason)
        split, group = splits.assign(rows)
        must_be_valid = pc.and_(is_used, is_first)  # later rows of an album need no split
        splits.require(rows.filter(must_be_valid), split.filter(must_be_valid))
        split = pc.if_else(is_used, pc.fill_null(split, schema.SPLITS[0]), None)
        for name, cutter in cutters.items():
            cutter.add(start + _indices(pc.equal(split, name)))
        rejected.update(reason.drop_null().to_pylist())
        columns = [reason, split, group, make_lists(texts, selected_of)]
        plan.write_columns(_FILES, start, pa.table(columns, ASSIGNED))
    splits.check()
    shards = [shard for split, cutter in cutters.items() for shard in cutter.shards(split)]
    return Assignment(tuple(shards), rejected, splits.without_group)


def read_shard(plan: Plan, shard: ShardRows) -> pa.Table:
    """The rows of a shard: columns of the plan with covers.FIRST, split, group and genres as
    assigned."""
    parts = []
    for start, stop in plan.ranges(shard.start, shard.stop):
        assigned = plan.read_columns(_FILES, start, stop, ASSIGNED)
        indices = _indices(pc.equal(assigned["split"], shard.split))
        if len(indices):
            rows = plan.take(start + indices)
            assigned = assigned.take(pa.array(indices))
            for name in ("split", "group", "genres"):
                rows = rows.set_column(rows.column_names.index(name), name, assigned[name])
            parts.append(rows)
    return pa.concat_tables(parts).combine_chunks()


def read_rejected(plan: Plan) -> Iterator[tuple[int, pa.Table]]:
    """(start, schema.REJECTED) of the ranges of the plan with rows that were rejected unread."""
    for start, stop in plan.ranges():
        assigned = plan.read_columns(_FILES, start, stop, ASSIGNED)
        indices = pa.array(_indices(pc.is_valid(assigned["reason"])))
        if len(indices):
            rows = plan.read_rows(start, stop).take(indices)
            columns = {
                "album_id": rows["album_id"],
                "row": rows["row"],
                "cover": map_distinct(rows["cover"], redacted, pa.string()),
                "reason": assigned["reason"].take(indices),
                "detail": pa.nulls(len(indices), pa.string()),
            }
            yield start, pa.table(columns, schema.REJECTED)


def _is_first(plan: Plan, rows: pa.Table, start: int, stop: int) -> pa.Array:
    """Whether each row is the first with its album_id."""
    has_id = pc.is_valid(rows["album_id"]).combine_chunks()
    return pc.and_(has_id, pa.array(~plan.is_repeat(start, stop)))


def _indices(mask: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Where the mask is true; null is false."""
    return np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False))


class _ShardCutter:
    """Cuts the rows of one split into shards."""

    def __init__(self, shard_rows: int) -> None:
        self._shard_rows = shard_rows
        self._rows = 0
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._last_stop = 0

    def add(self, rows: NDArray[np.int64]) -> None:
        """Add the next rows, given as ascending row numbers."""
        if not len(rows):
            return
        index = (self._rows + np.arange(len(rows))) % self._shard_rows
        self._starts += rows[index == 0].tolist()
        self._stops += (rows[index == self._shard_rows - 1] + 1).tolist()
        self._last_stop = int(rows[-1]) + 1
        self._rows += len(rows)

    def shards(self, split: str) -> Iterator[ShardRows]:
        """All shards; the last one may have fewer rows."""
        stops = [*self._stops, self._last_stop][: len(self._starts)]
        for part, (start, stop) in enumerate(zip(self._starts, stops, strict=True)):
            rows = min(self._shard_rows, self._rows - part * self._shard_rows)
            yield ShardRows(split, part, start, stop, rows)
