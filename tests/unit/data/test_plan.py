"""The plan: all rows and all repeated ids, for any sizes of input parts."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rows import TableReader

from covergenre import schema
from covergenre.data import covers, plan, repeated_ids
from covergenre.data.covers import Source
from covergenre.data.plan import Plan, identity_of, open_plan, read_plan, write_plan
from covergenre.errors import StorageError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, row groups and ranges of a few rows, so that small tables have many."""
    monkeypatch.setattr(plan, "GROUP_ROWS", 5)
    monkeypatch.setattr(plan, "PART_ROWS", 20)
    monkeypatch.setattr(repeated_ids, "_RANGE_GROUPS", 3)
    monkeypatch.setattr(repeated_ids, "_BUCKETS", 3)


def some_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    ids = ["a", "b/../c", "d\ne", '"', "émoji 🎷", "x" * 10_000, None]
    ids += [f"album-{n}" for n in range(count)]
    return [
        {
            "row": row,
            "album_id": chance.choice(ids),
            "cover": chance.choice(["/1.jpg", "/2.jpg", "s3://b/3.jpg", None]),
            "source": (inside := chance.choice([None, None, 0])),
            "source_row": None if inside is None else row,
        }
        for row in range(count)
    ]


def cut(rows: list[dict[str, Any]], sizes: list[int]) -> list[pa.Table]:
    parts, at = [], 0
    for size in sizes:
        parts.append(pa.Table.from_pylist(rows[at : at + size], schema=plan.ROWS))
        at += size
    assert at == len(rows)
    return parts


def reader(parts: Iterable[pa.Table]) -> TableReader:
    return TableReader(parts, Source(image_column="picture"), {"made": "of this"})


def write(uri: Path, parts: list[pa.Table]) -> Plan:
    return write_plan(str(uri), reader(parts))


def expected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same by hand: the whole table in memory, a dictionary of ids."""
    met: dict[str, dict[str, Any]] = {}
    found = []
    for row in rows:
        first = met.get(row["album_id"]) if row["album_id"] is not None else None
        if first is None and row["album_id"] is not None:
            met[row["album_id"]] = row
        found.append(
            row
            | {
                "first_row": first and first["row"],
                "first_cover": first and first["cover"],
                "first_source": first and first["source"],
                "first_source_row": first and first["source_row"],
            }
        )
    return found


@pytest.mark.parametrize("count", [1, 4, 20, 21, 97])
def test_plan_has_all_rows_and_the_first_rows_of_repeated_ids(count: int, tmp_path: Path) -> None:
    for seed in range(3):
        rows = some_rows(count, seed)
        made = write(tmp_path / f"{seed}", cut(rows, [count]))
        assert made.rows == count
        assert made.read(0, count).to_pylist() == expected(rows)


def test_any_range_can_be_read(tmp_path: Path) -> None:
    rows = some_rows(63)
    made = write(tmp_path, cut(rows, [10, 0, 50, 3]))
    for start in range(0, 63, 7):
        for stop in {start + 1, min(start + 9, 63), 63}:
            assert made.read(start, stop).to_pylist() == expected(rows)[start:stop]
            assert covers.FIRST.names == made.read(start, stop).column_names[-4:]


def test_plan_without_repeated_ids(tmp_path: Path) -> None:
    rows = [{"row": n, "album_id": f"{n}", "cover": "/x.jpg"} for n in range(30)]
    made = write(tmp_path, cut([dict.fromkeys(plan.ROWS.names) | row for row in rows], [30]))
    assert made.read(0, 30)["first_row"].null_count == 30
    assert made.local_cover == "/x.jpg"


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    rows = some_rows(50)
    first = write(tmp_path / "1", cut(rows, [50]))
    assert write(tmp_path / "2", cut(rows, [1, 30, 19])).identity == first.identity
    assert identity_of(reader(cut(rows, [25, 25])), None) == first.identity
    for name, value in (("album_id", "other"), ("cover", "/other.jpg"), ("album_id", None)):
        changed = [dict(row) for row in rows]
        changed[31][name] = value
        assert identity_of(reader(cut(changed, [50])), None) != first.identity


def test_plan_is_read_as_written(tmp_path: Path) -> None:
    assert read_plan(str(tmp_path)) is None
    made = write(tmp_path, cut(some_rows(5), [5]))
    assert read_plan(str(tmp_path)) == made
    assert made.source.image_column == "picture" and made.key == {"made": "of this"}
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(StorageError, match=r"plan\.json"):
        read_plan(str(tmp_path))


def test_plan_is_reused_only_for_the_same_input(tmp_path: Path) -> None:
    made = write(tmp_path, cut(some_rows(5), [5]))
    same = reader(cut(some_rows(9), [9]))  # would be another plan, if it was read
    assert open_plan(str(tmp_path), same, reuse=False) == made
    assert identity_of(same, made) == made.identity
    other = TableReader(same.tables, key={"made": "of that"})
    assert open_plan(str(tmp_path), other, reuse=True) == made
    assert identity_of(other, made) != made.identity
    assert open_plan(str(tmp_path), other, reuse=False).rows == 9


def test_any_rows_can_be_taken(tmp_path: Path) -> None:
    rows = some_rows(63)
    made = write(tmp_path, cut(rows, [63]))
    for step in (1, 2, 7, 30):
        for start in (0, 5, 19, 20, 62):
            wanted = np.arange(start, 63, step)
            assert made.take(wanted).to_pylist() == [expected(rows)[row] for row in wanted]
    is_repeat = [row["first_row"] is not None for row in expected(rows)]
    assert made.is_repeat(3, 61).tolist() == is_repeat[3:61]
    assert list(made.ranges(3, 41)) == [(3, 20), (20, 40), (40, 41)]


def test_incomplete_plan_is_not_read(tmp_path: Path) -> None:
    def fails() -> Any:
        yield from cut(some_rows(45), [45])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(str(tmp_path), reader(fails()))
    assert list(tmp_path.glob("part-*")) and read_plan(str(tmp_path)) is None


def test_similar_ids_are_different(tmp_path: Path) -> None:
    ids = ["a", "A", "a ", "", "a\0", "a\0b", "á", "a\u0301"]
    rows = [dict.fromkeys(plan.ROWS.names) | {"row": n, "album_id": i} for n, i in enumerate(ids)]
    assert write(tmp_path, cut(rows, [len(ids)])).read(0, len(ids))["first_row"].null_count == 8


def test_columns_of_a_plan_are_columns_of_a_catalog() -> None:
    assert set(plan.ROWS.names) < set(schema.CATALOG.names)
