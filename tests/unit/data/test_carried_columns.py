"""Columns that a plan keeps as the catalog has them: the id in its own type, and --carry."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covergenre.config import CatalogSettings
from covergenre.data.catalog import CatalogReader
from covergenre.data.plan import ROWS, identity_of, write_plan
from covergenre.errors import CatalogError, ConfigError
from covergenre.schema import CARRIED, ID

COLUMNS = (*ROWS.names, "title", ID)


def planned(uri: Path | str, plan: Path, *carry: str, **options: Any) -> pa.Table:
    made = write_plan(
        str(plan), CatalogReader(str(uri), CatalogSettings(**options), COLUMNS, carry)
    )
    return made.read(0, made.rows)


def parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({**columns, "cover": ["x.jpg"] * rows}), path)


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    day = datetime.date(2020, 1, 2)
    parquet(
        tmp_path / "c.parquet",
        album_id=pa.array([7, None, 7], pa.int32()),
        day=[day, None, day],
        year=pa.array([1999, 2000, None], pa.int16()),
        tags=[["a"], None, []],
        kind=pa.array(["LP", "EP", None]).dictionary_encode(),
        nothing=pa.nulls(3),
    )
    names = ("day", "year", "tags", "kind", "nothing")
    rows = planned(tmp_path / "c.parquet", tmp_path / "plan", *names)
    assert rows.schema.field(ID).type == pa.int32()
    assert rows[ID].to_pylist() == [7, None, 7]
    assert rows["album_id"].to_pylist() == ["7", None, "7"]
    assert rows["first_row"].to_pylist() == [None, None, 0]
    types = [rows.schema.field(f"{CARRIED}{name}").type for name in names]
    assert types == [pa.date32(), pa.int16(), pa.list_(pa.string()), pa.string(), pa.string()]
    assert rows[f"{CARRIED}tags"].to_pylist() == [["a"], None, []]
    assert rows[f"{CARRIED}kind"].to_pylist() == ["LP", "EP", None]


@pytest.mark.parametrize(
    ("second", "type_"),
    [
        (pa.array(["x", None]), pa.string()),
        (pa.array([1.5, None]), pa.string()),
        (pa.array([2**40, None]), pa.int64()),
        (pa.nulls(2), pa.int32()),
    ],
    ids=["text", "float", "wider", "null"],
)
def test_ids_of_several_types_are_text_unless_all_are_integers(
    second: pa.Array, type_: pa.DataType, tmp_path: Path
) -> None:
    parquet(tmp_path / "c/1.parquet", album_id=pa.array([1, 2], pa.int32()))
    parquet(tmp_path / "c/2.parquet", album_id=second)
    rows = planned(tmp_path / "c", tmp_path / "plan")
    assert rows.schema.field(ID).type == type_
    assert [value and str(value) for value in rows[ID].to_pylist()] == rows["album_id"].to_pylist()


def test_csv_columns_are_text(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("album_id,cover,year,title\n07,a.jpg,1999,T\n8,b.jpg,,\n")
    rows = planned(tmp_path / "c.csv", tmp_path / "plan", "year", "cover")
    assert rows[ID].to_pylist() == ["07", "8"]
    assert rows[f"{CARRIED}year"].to_pylist() == ["1999", None]
    assert rows[f"{CARRIED}cover"].to_pylist() == ["a.jpg", "b.jpg"]
    assert rows["title"].to_pylist() == ["T", None]


def test_json_numbers_stay_numbers_and_lists_become_json(tmp_path: Path) -> None:
    records = [
        {"album_id": 1, "cover": "a", "year": 1999, "price": 1, "new": True, "tags": ["é"]},
        {"album_id": 2, "cover": "b", "year": None, "price": 2.5, "tags": {"a": 1}},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    names = ("year", "price", "new", "tags")
    rows = planned(tmp_path / "c.jsonl", tmp_path / "plan", *names)
    assert rows.schema.field(ID).type == pa.int64()
    types = [rows.schema.field(f"{CARRIED}{name}").type for name in names]
    assert types == [pa.int64(), pa.float64(), pa.bool_(), pa.string()]
    assert [json.loads(x) for x in rows[f"{CARRIED}tags"].to_pylist()] == [["é"], {"a": 1}]


def test_file_without_the_column_has_nulls(tmp_path: Path) -> None:
    parquet(tmp_path / "c/1.parquet", album_id=[1])
    parquet(tmp_path / "c/2.parquet", album_id=[2], year=[1999])
    rows = planned(tmp_path / "c", tmp_path / "plan", "year")
    assert rows[f"{CARRIED}year"].to_pylist() == [None, 1999]


def test_column_that_no_file_has_is_an_error(tmp_path: Path) -> None:
    parquet(tmp_path / "c.parquet", album_id=[1], year=[1999])
    with pytest.raises(CatalogError, match=r"--carry yaer.*c.parquet.*'year'") as caught:
        planned(tmp_path / "c.parquet", tmp_path / "plan", "yaer")
    assert caught.value.code == "no_column"


def test_images_cannot_be_carried(tmp_path: Path) -> None:
    parquet(tmp_path / "c.parquet", album_id=[1], image=[b"jpeg"])
    with pytest.raises(CatalogError) as caught:
        planned(tmp_path / "c.parquet", tmp_path / "plan", "image")
    assert caught.value.code == "image_column"


def test_mumu_files_have_nothing_to_carry(tmp_path: Path) -> None:
    header = "amazon_id,album_mbid,MSD_track_id,recording_mbid,artist_mbid,genres"
    (tmp_path / "c.csv").write_text(f"{header}\na,b,c,d,e,Pop\n")
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path / "c.csv", tmp_path / "plan", "album_mbid")
    assert caught.value.code == "mumu_columns"


def test_lists_in_one_file_and_text_in_another_are_an_error(tmp_path: Path) -> None:
    parquet(tmp_path / "c/1.parquet", album_id=[1], tags=[["a"]])
    parquet(tmp_path / "c/2.parquet", album_id=[2], tags=["a"])
    with pytest.raises(CatalogError) as caught:
        planned(tmp_path / "c", tmp_path / "plan", "tags")
    assert caught.value.code == "mixed_types"


def test_identity_covers_carried_values_and_types(tmp_path: Path) -> None:
    def identity(**columns: Any) -> str:
        parquet(tmp_path / "c.parquet", album_id=[1, 2], **columns)
        reader = CatalogReader(str(tmp_path / "c.parquet"), CatalogSettings(), COLUMNS, ["x"])
        return identity_of(reader, None)

    kinds = [[1, 2], [1, 3], [1, None], [1, 0], [1.0, 2.0], ["1", "2"], [[1], [2]], [True, None]]
    found = {identity(x=values) for values in kinds}
    assert len(found) == len(kinds)
    assert identity(x=[1, 2]) in found
