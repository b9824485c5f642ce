"""Shards: every row of a plan is in one shard or rejected, as one table in memory would say."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rows import TableReader, plan_table

from covergenre import schema
from covergenre.data import plan as plan_module
from covergenre.data import repeated_ids
from covergenre.data.genres import Genres, unselected_reason
from covergenre.data.plan import Plan, write_plan
from covergenre.data.shards import (
    Assignment,
    assign_rows,
    count_rows,
    read_rejected,
    read_shard,
)
from covergenre.data.splits import SplitAssigner
from covergenre.errors import CatalogError

SELECTED = Genres(("Jazz", "Rock"))
GENRES = [["Jazz"], ["Rock", "Pop"], ["Pop"], [], ["Jazz", "Rock"]]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "GROUP_ROWS", 5)
    monkeypatch.setattr(plan_module, "PART_ROWS", 20)
    monkeypatch.setattr(repeated_ids, "_RANGE_GROUPS", 2)


def some_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a catalog: repeated ids, rows without one, albums with and without genres."""
    chance = random.Random(seed)
    ids = [f"album-{n}" for n in range(count)] + [None] * (count // 10 + 1)
    first: dict[str, int] = {}
    rows = []
    for row in range(count):
        album_id = chance.choice(ids)
        rows.append(
            {
                "album_id": album_id,
                "cover": f"https://user:secret@h/{row}.jpg",
                "genres": chance.choice(GENRES),
                "artist": chance.choice(["A", " a", "B", None]),
                "split": chance.choice(["train", "valid", "TEST"]),
                "first_row": None if album_id is None else first.get(album_id),
            }
        )
        if album_id is not None:
            first.setdefault(album_id, row)
    return rows


def planned(rows: list[dict[str, Any]], uri: Path) -> Plan:
    table = plan_table(rows).select(schema.CATALOG.names)
    return write_plan(str(uri), TableReader([table]))


def assigned(plan: Plan, split_from: str = "catalog", **settings: Any) -> Assignment:
    defaults: dict[str, Any] = {
        "genre_map": {},
        "selected": SELECTED,
        "require_all": False,
        "splits": SplitAssigner(group_by="artist", split_from=split_from),
        "shard_rows": 7,
    }
    return assign_rows(plan, **(defaults | settings))


@pytest.mark.parametrize("count", [1, 19, 20, 21, 97])
@pytest.mark.parametrize("split_from", ["catalog", "hash"])
def test_every_row_is_in_one_shard_or_rejected(count: int, split_from: str, tmp_path: Path) -> None:
    rows = some_rows(count, count)
    plan = planned(rows, tmp_path)
    found = assigned(plan, split_from)
    shards = [(shard, read_shard(plan, shard).to_pylist()) for shard in found.shards]
    rejected = [row for _, table in read_rejected(plan) for row in table.to_pylist()]
    in_shards = [row["row"] for _, table in shards for row in table]
    assert sorted([*in_shards, *(row["row"] for row in rejected)]) == list(range(count))
    assert Counter(row["reason"] for row in rejected) == found.rejected
    reasons = {row["row"]: row["reason"] for row in rejected}
    for number, row in enumerate(rows):
        expected = None
        if row["album_id"] is None:
            expected = "null_id"
        elif row["first_row"] is None:
            expected = unselected_reason(row["genres"], SELECTED.names, require_all=False)
        assert reasons.get(number) == expected


def test_shards_are_consecutive_rows_of_their_split_in_catalog_order(tmp_path: Path) -> None:
    rows = some_rows(97)
    plan = planned(rows, tmp_path)
    for split in schema.SPLITS:
        shards = [shard for shard in assigned(plan).shards if shard.split == split]
        assert [shard.part for shard in shards] == list(range(len(shards)))
        tables = [read_shard(plan, shard) for shard in shards]
        assert [table.num_rows for table in tables] == [shard.rows for shard in shards]
        assert {shard.rows for shard in shards[:-1]} <= {7}
        numbers = [row for table in tables for row in table["row"].to_pylist()]
        assert numbers == sorted(numbers)
        assert {row["split"] for table in tables for row in table.to_pylist()} <= {split}


def test_rows_of_a_shard_are_the_catalogs_with_selected_genres_and_group(tmp_path: Path) -> None:
    rows = some_rows(60)
    plan = planned(rows, tmp_path)
    expected = plan_table(rows).to_pylist()
    for shard in assigned(plan).shards:
        for row in read_shard(plan, shard).to_pylist():
            own = expected[row["row"]]
            assert row["genres"] == [genre for genre in own["genres"] if genre in SELECTED.names]
            assert row["group"] == (own["artist"] and own["artist"].strip().casefold())
            for name in ("album_id", "cover", "artist", "first_row", "first_cover"):
                assert row[name] == own[name]


def test_assignment_does_not_depend_on_the_sizes_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows(97)
    plan = planned(rows, tmp_path / "small")
    small = assigned(plan, "hash")
    tables = [read_shard(plan, shard) for shard in small.shards]
    monkeypatch.setattr(plan_module, "PART_ROWS", 1000)
    plan = planned(rows, tmp_path / "large")
    assert assigned(plan, "hash") == small
    assert [read_shard(plan, shard) for shard in small.shards] == tables


def test_genres_count_once_for_each_album(tmp_path: Path) -> None:
    rows = some_rows(97)
    counts = count_rows(planned(rows, tmp_path), {"Pop": "Jazz", "Folk": "Rock"})
    first = [row for row in rows if row["album_id"] is not None and row["first_row"] is None]
    expected = Counter(
        genre
        for row in first
        for genre in {"Jazz" if genre == "Pop" else genre for genre in row["genres"]}
    )
    assert counts.genres == expected
    assert counts.labelled == sum(bool(row["genres"]) for row in first)
    pop = sum("Pop" in row["genres"] for row in rows)
    assert counts.mapped == {"Pop": pop, "Folk": 0}
    assert counts.values["artist"] == sum(row["artist"] is not None for row in rows)
    assert counts.values["group"] == 0 and counts.values["split"] == 97


def test_genre_map_is_applied(tmp_path: Path) -> None:
    rows = [{"album_id": "a", "genres": ["Pop", "Rock"]}, {"album_id": "b", "genres": ["Folk"]}]
    plan = planned(rows, tmp_path)
    mapping = {"Pop": "Jazz", "Folk": None}
    (shard,) = assigned(plan, "hash", genre_map=mapping).shards
    assert read_shard(plan, shard)["genres"].to_pylist() == [["Jazz", "Rock"]]
    ((_, rejected),) = read_rejected(plan)
    assert rejected["reason"].to_pylist() == ["unlabelled"]


def test_albums_with_other_genres_are_rejected_if_all_must_be_selected(tmp_path: Path) -> None:
    rows = [{"album_id": str(n), "genres": genres} for n, genres in enumerate(GENRES)]
    found = assigned(planned(rows, tmp_path), "hash", require_all=True)
    assert found.rejected == {"genre_not_selected": 1, "no_selected_genre": 1, "unlabelled": 1}


def test_only_albums_that_are_used_need_a_valid_split(tmp_path: Path) -> None:
    unused: list[dict[str, Any]] = [
        {"album_id": None, "genres": ["Jazz"], "split": "x"},
        {"album_id": "a", "genres": ["Pop"], "split": None},
        {"album_id": "b", "genres": ["Jazz"], "split": "dev"},
        {"album_id": "b", "genres": [], "split": "x", "first_row": 2},
    ]
    found = assigned(planned(unused, tmp_path / "1"))
    assert sorted((shard.split, shard.rows) for shard in found.shards) == [("dev", 1), ("train", 1)]
    bad = [{"album_id": str(n), "genres": ["Jazz"], "split": "holdout"} for n in range(30)]
    with pytest.raises(CatalogError) as caught:
        assigned(planned(unused + bad, tmp_path / "2"))
    assert caught.value.code == "invalid_split"
    assert all(fact in str(caught.value) for fact in ("30 rows", "row 4", "'holdout'"))


def test_covers_of_rejected_rows_are_shown_without_passwords(tmp_path: Path) -> None:
    plan = planned([{"album_id": "a", "genres": [], "cover": "https://u:secret@h/1.jpg"}], tmp_path)
    assigned(plan, "hash")
    ((start, rejected),) = read_rejected(plan)
    assert start == 0 and rejected.schema.equals(schema.REJECTED)
    assert "secret" not in str(rejected["cover"]) and "h/1.jpg" in str(rejected["cover"])


def test_schema_of_a_shard_has_the_columns_of_a_dataset(tmp_path: Path) -> None:
    plan = planned([{"album_id": "a", "genres": ["Jazz"]}], tmp_path)
    (shard,) = assigned(plan, "hash").shards
    table: pa.Table = read_shard(plan, shard)
    assert set(schema.DATASET.names) - set(table.column_names) == {"image", "cover_sha256"}
