"""Shards and the manifest: the dataset on disk."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from covergenre import schema
from covergenre.data import dataset
from covergenre.data.dataset import Manifest, Shard
from covergenre.data.genres import Genres
from covergenre.data.rejected import write_duplicates, write_rejected
from covergenre.errors import DatasetError, StorageError
from covergenre.io import storage


def albums(sizes: list[int], first: int = 0) -> pa.Table:
    """Rows of schema.DATASET with images of these sizes in bytes."""
    rows = [
        {
            "album_id": f"album-{row}",
            "row": row,
            "image": bytes([row % 251]) * size,
            "cover_sha256": f"{row:064x}",
            "genres": ["Jazz", "Rock"][: row % 3],
            "group": None if row % 2 else "band",
            "split": "train",
            "title": f"Title {row}",
            "artist": None,
        }
        for row, size in enumerate(sizes, first)
    ]
    return pa.Table.from_pylist(rows, schema=schema.DATASET)


def groups(data: pa.Buffer) -> list[int]:
    """Rows of each row group."""
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def write(path: Path, table: pa.Table) -> str:
    path.write_bytes(dataset.to_parquet(table))
    return str(path)


# Parquet


def test_equal_rows_give_equal_bytes() -> None:
    table = albums([10] * 20)
    data = dataset.to_parquet(table)
    again = pa.concat_tables([albums([10] * 7), albums([10] * 13, first=7)])
    assert again["image"].num_chunks == 2
    assert dataset.to_parquet(again).equals(data)
    assert dataset.to_parquet(albums([0] * 3 + [10] * 20).slice(3)).size != 0
    assert not dataset.to_parquet(albums([10] * 21)).equals(data)


def test_slice_is_written_as_its_rows() -> None:
    whole = albums([10] * 20)
    taken = pa.Table.from_pylist(whole.slice(5, 9).to_pylist(), schema=schema.DATASET)
    assert dataset.to_parquet(whole.slice(5, 9)).equals(dataset.to_parquet(taken))


@pytest.mark.parametrize("table", [albums([]), albums([3]), albums([0, 5, 0]), albums([1] * 600)])
def test_table_is_read_as_written(table: pa.Table, tmp_path: Path) -> None:
    again = dataset.read_table(write(tmp_path / "x.parquet", table))
    assert again.schema.equals(schema.DATASET)
    assert again.to_pylist() == table.to_pylist()
    columns = dataset.read_table(str(tmp_path / "x.parquet"), ["row", "genres"])
    assert columns.column_names == ["row", "genres"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, []), (1, [1]), (255, [255]), (256, [256]), (257, [256, 1]), (600, [256, 256, 88])],
)
def test_a_row_group_has_at_most_256_covers(rows: int, expected: list[int]) -> None:
    assert groups(dataset.to_parquet(albums([1] * rows))) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([40, 40, 20, 1], [3, 1]),  # exactly full is not too full
        ([40, 40, 21, 1], [2, 2]),
        ([100, 100, 100], [1, 1, 1]),
        ([1, 100, 1], [1, 1, 1]),
        ([500, 1, 500], [1, 1, 1]),  # a single cover may be larger than the limit
        ([0, 0, 100, 0, 1], [4, 1]),
        ([10] * 25, [10, 10, 5]),
    ],
)
def test_a_row_group_has_bounded_bytes(
    sizes: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "ROW_GROUP_BYTES", 100)
    data = dataset.to_parquet(albums(sizes))
    assert groups(data) == expected
    assert pq.read_table(pa.BufferReader(data))["row"].to_pylist() == list(range(len(sizes)))


def test_row_groups_are_bounded_in_rows_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ROW_GROUP_BYTES", 100)
    monkeypatch.setattr(dataset, "ROW_GROUP_ROWS", 4)
    assert groups(dataset.to_parquet(albums([40, 40, 30] + [1] * 10))) == [2, 4, 4, 3]


@pytest.mark.parametrize(("rows", "expected"), [(0, []), (3, [3]), (4, [4]), (9, [4, 4, 1])])
def test_row_groups_of_tables_without_covers(
    rows: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that needs 256 rows must not read a million."""
    monkeypatch.setattr(dataset, "TABLE_GROUP_ROWS", 4)
    table = pa.table({"row": pa.array(range(rows), pa.int64())})
    data = dataset.to_parquet(table)
    assert groups(data) == expected
    assert pq.read_table(pa.BufferReader(data)).equals(table)


def test_metadata_is_in_the_footer() -> None:
    data = dataset.to_parquet(pa.table({"row": [1, 2]}), {"covergenre": '{"rows": 2}'})
    assert pq.read_metadata(pa.BufferReader(data)).metadata[b"covergenre"] == b'{"rows": 2}'
    empty = dataset.to_parquet(albums([]).drop_columns(["image"]), {"covergenre": "{}"})
    assert pq.read_metadata(pa.BufferReader(empty)).metadata[b"covergenre"] == b"{}"


def test_any_range_of_rows_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ROW_GROUP_ROWS", 3)
    table = albums([2] * 11)
    uri = write(tmp_path / "x.parquet", table)
    assert groups(pa.py_buffer((tmp_path / "x.parquet").read_bytes())) == [3, 3, 3, 2]
    for start in range(13):
        for stop in range(start, 14):
            part = dataset.read_rows(uri, start, stop, ["row", "image"])
            assert part.column_names == ["row", "image"]
            assert part["row"].to_pylist() == list(range(11))[start:stop]
            assert part["image"].to_pylist() == table["image"].to_pylist()[start:stop]
    assert dataset.read_rows(uri, 2, 5).to_pylist() == table.slice(2, 3).to_pylist()


def test_only_the_needed_row_groups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "ROW_GROUP_ROWS", 3)
    uri = write(tmp_path / "x.parquet", albums([2] * 11))
    read: list[list[int]] = []
    dataset.read_rows(uri, 0, 1)
    file = dataset._open(uri, storage.stat(uri), buffered=False)
    inner = file.read_row_groups

    def spied(wanted: list[int], **options: Any) -> pa.Table:
        read.append(wanted)
        return inner(wanted, **options)

    monkeypatch.setattr(file, "read_row_groups", spied)
    for start, stop in ((0, 3), (2, 4), (3, 9), (9, 10), (10, 11), (11, 12), (5, 5)):
        dataset.read_rows(uri, start, stop)
    assert read[:6] == [[0], [0, 1], [1, 2], [3], [3], []]


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    """The workers of a notebook outlive a dataset that is prepared again."""
    uri = str(tmp_path / "x.parquet")
    for first in (0, 100):
        table = albums([2] * 3, first=first)
        storage.put(uri, dataset.to_parquet(table))
        os.utime(uri, ns=(first, first))  # different mtimes
        assert dataset.read_rows(uri, 0, 3).to_pylist() == table.to_pylist()
    os.unlink(uri)
    with pytest.raises(StorageError) as caught:
        dataset.read_rows(uri, 0, 3)
    assert caught.value.code == "not_found"


def test_missing_shard_is_an_error(tmp_path: Path) -> None:
    for action in (dataset.read_table, lambda uri: dataset.read_rows(uri, 0, 1)):
        with pytest.raises(StorageError, match=r"none\.parquet") as caught:
            action(str(tmp_path / "none.parquet"))
        assert caught.value.code == "not_found"


# The directory


def test_other_tools_read_the_directory_as_the_rows_of_the_dataset(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    manifest = make_dataset(root)
    dataset.write_manifest(manifest, {})
    rejected = {"row": 8, "album_id": "x", "cover": None, "reason": "no_cover", "detail": None}
    write_rejected(f"{root}/_rejected/part-train-00000.jsonl", [rejected])
    duplicates = pa.table({"album_id": ["y"], "row": [9], "first_row": [0]})
    write_duplicates(f"{root}/_state/duplicates/part-train-00000.arrow", duplicates)
    storage.put(f"{root}/_report/genres_by_split.png", b"not parquet")
    found = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    data = [path for path in found if path.suffix == ".parquet"]
    assert len(data) == 4 and {path.parts[0] for path in data} == set(schema.SPLITS)
    others = {path.parts[0] for path in found if path not in data} - {"genres.json"}
    assert all(name.startswith("_") for name in others)
    ids = sorted(f"album-{row}" for rows in (5, 2, 1) for row in range(rows))
    splits = [ds.dataset(root / split, format="parquet") for split in schema.SPLITS]
    assert sorted(ds.dataset(splits).to_table()["album_id"].to_pylist()) == ids
    assert (
        sorted(pd.concat(pd.read_parquet(root / split) for split in schema.SPLITS)["album_id"])
        == ids
    )
    query = f"select album_id from read_parquet('{root}/**/*.parquet')"
    table = duckdb.execute(query).fetchall()
    assert sorted(album_id for (album_id,) in table) == ids
    assert sorted(pl.read_parquet(root / "**/*.parquet")["album_id"].to_list()) == ids
    query = f"select reason from read_json('{root}/_rejected/*.jsonl')"
    assert duckdb.execute(query).fetchall() == [("no_cover",)]


# The manifest


def make_dataset(
    root: Path, counts: tuple[int, int, int] = (5, 2, 1), shard_rows: int = 3
) -> Manifest:
    """A small dataset, written as prepare writes it."""
    found: dict[str, tuple[Shard, ...]] = {}
    for split, rows in zip(schema.SPLITS, counts, strict=True):
        found[split] = tuple(
            dataset.write_shard(
                str(root),
                f"{split}/part-{part:05d}.parquet",
                albums([4] * min(shard_rows, rows - start), first=start),
            )
            for part, start in enumerate(range(0, rows, shard_rows))
        )
    genres = Genres(("Jazz", "Rock"))
    identity = dataset.dataset_id(genres, found)
    return Manifest(str(root), genres, found, identity, {"rows": sum(counts)})


def test_manifest_is_read_as_written(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    assert not dataset.is_dataset(str(tmp_path))
    dataset.write_manifest(manifest, {"settings": {"top_genres": 2}})
    assert dataset.is_dataset(str(tmp_path))
    assert dataset.read_manifest(str(tmp_path)) == manifest
    assert dataset.read_manifest(f"{tmp_path}/") == manifest
    assert json.loads((tmp_path / "genres.json").read_text()) == ["Jazz", "Rock"]
    assert json.loads((tmp_path / "_manifest.json").read_text())["settings"] == {"top_genres": 2}


def test_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(storage, "put", lambda uri, data: written.append(storage.name(uri)))
    dataset.write_manifest(Manifest(str(tmp_path), Genres(("A",)), {}, "id", {}), {})
    assert written == ["genres.json", "_manifest.json"]


def test_rows_and_uris_of_a_manifest(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, (5, 2, 0))
    assert [manifest.rows(split) for split in schema.SPLITS] == [5, 2, 0]
    assert manifest.shard_uris("train") == [
        f"{tmp_path}/train/part-00000.parquet",
        f"{tmp_path}/train/part-00001.parquet",
    ]
    assert [dataset.read_table(uri).num_rows for uri in manifest.shard_uris("train")] == [3, 2]
    for split in ("train", "dev"):
        manifest.require(split)
    with pytest.raises(DatasetError) as caught:
        manifest.require("test")
    assert caught.value.code == "empty_split"


def test_shard_has_size_and_hash_of_its_file(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    for shard in manifest.shards["train"]:
        data = (tmp_path / shard.path).read_bytes()
        assert shard.bytes == len(data)
        assert shard.sha256 == hashlib.sha256(data).hexdigest()


def test_dataset_id_is_of_the_content(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "a")
    same = make_dataset(tmp_path / "elsewhere")
    assert same.dataset_id == manifest.dataset_id
    genres, found = manifest.genres, manifest.shards
    first = found["train"][0]
    changed = found | {"train": (replace(first, sha256="0" * 64), *found["train"][1:])}
    fewer = found | {"train": found["train"][:1]}
    swapped = found | {"train": found["train"][::-1]}
    ids = [
        manifest.dataset_id,
        dataset.dataset_id(Genres(("Jazz", "Pop")), found),
        *(dataset.dataset_id(genres, other) for other in (changed, fewer, swapped)),
    ]
    assert len(set(ids)) == len(ids)


def refused(uri: Path | str, *parts: str, code: str) -> None:
    """read_manifest raises one line with the URI and all of `parts`."""
    with pytest.raises(DatasetError) as caught:
        dataset.read_manifest(str(uri))
    text = str(caught.value)
    assert "\n" not in text and str(uri) in text and caught.value.code == code
    for part in parts:
        assert part in text


def test_other_paths_are_not_datasets(tmp_path: Path) -> None:
    refused(tmp_path / "none", code="not_found")
    refused(tmp_path, "_manifest.json", code="no_manifest")
    (tmp_path / "file").write_bytes(b"x")
    refused(tmp_path / "file", code="no_manifest")
    for name in ("none", "", "file"):
        assert not dataset.is_dataset(str(tmp_path / name))


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        *[
            (lambda v, key=key: v.pop(key), key)
            for key in ("format_version", "dataset_id", "genres", "counts", "shards")
        ],
        (lambda v: v.update(format_version=1), "version 3"),
        (lambda v: v["shards"].pop("dev"), "dev"),
        (lambda v: v["shards"]["train"][0].pop("rows"), "rows"),
        (lambda v: v["shards"]["train"][0].update(colour=1), "colour"),
        (lambda v: v.update(genres=["Rock", "Jazz"]), "sorted"),
        (lambda v: v.update(shards=[]), "_manifest.json"),
        (lambda v: v.update(shards=None), "_manifest.json"),
    ],
)
def test_invalid_manifest_is_an_error(change: Change, part: str, tmp_path: Path) -> None:
    dataset.write_manifest(make_dataset(tmp_path), {})
    path = tmp_path / "_manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(DatasetError) as caught:
        dataset.read_manifest(str(tmp_path))
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_other_json_is_not_a_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / "_manifest.json").write_text(text)
    refused(tmp_path, "_manifest.json", code="invalid_manifest")


def test_manifest_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "_manifest.json").write_text("{")
    with pytest.raises(StorageError) as caught:
        dataset.read_manifest(str(tmp_path))
    assert caught.value.code == "invalid_json"
