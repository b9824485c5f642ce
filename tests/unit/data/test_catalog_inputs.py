"""Catalogs as other tools write them: their types, their files, and what is wrong with them."""

import base64
import csv
import gzip
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import Catalog, read_catalog

from covergenre.config import CatalogSettings, PrepareConfig, parse
from covergenre.data import readers
from covergenre.data.genre_map import load_genre_map
from covergenre.errors import CatalogError


def read(path: Path | str, **options: Any) -> Catalog:
    return read_catalog(path, CatalogSettings(**options))


def column(catalog: Catalog, name: str) -> list[Any]:
    values: list[Any] = catalog.table.column(name).to_pylist()
    return values


def error_of(path: Path | str, code: str, **options: Any) -> str:
    """The message of the CatalogError with this code, one line."""
    with pytest.raises(CatalogError) as caught:
        read(path, **options)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


Write = Callable[[str, str | bytes], Path]


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


# Genres


def test_lists_written_as_text_are_read_from_every_format(write: Write, tmp_path: Path) -> None:
    lists = ["['rock', 'pop']", "[]", '["r&b"]', "['a' 'b']", "{c,d}"]
    expected = [["rock", "pop"], [], ["r&b"], ["a", "b"], ["c", "d"]]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["album_id", "cover", "genres"], *(["i", "c", x] for x in lists)]
        )
    assert column(read(tmp_path / "x.csv"), "genres") == expected
    columns = {"album_id": list("abcde"), "cover": list("abcde"), "genres": lists}
    assert column(read(parquet(tmp_path / "x.parquet", columns)), "genres") == expected
    write("x.jsonl", '{"album_id": 1, "cover": "a", "genres": "[\'rock\', \'pop\']"}\n')
    assert column(read(tmp_path / "x.jsonl"), "genres") == expected[:1]


def test_error_of_a_genre_list_has_file_and_row(write: Write, tmp_path: Path) -> None:
    path = write("x.csv", "album_id,cover,genres\n1,a,Rock\n2,b,\"[['a'],['b']]\"\n")
    assert error_of(path, "genres").startswith(f"{path}, row 1: 'genres': \"[['a'],['b']]\"")
    path = write("y.csv", "album_id,cover,genres\n1,a,Rock [Live]\n")
    assert f"{path}, row 0" in error_of(path, "genres")
    columns = {"album_id": ["1"], "cover": ["a"], "genres": [["Rock", "[x]"]]}
    path = parquet(tmp_path / "z.parquet", columns)
    assert f"{path}, row 0" in error_of(path, "genres")
    path = write("x.jsonl", '{"album_id": 1, "cover": "a", "genres": "[a,,b]"}\n')
    assert "x.jsonl, line 1: 'genres'" in error_of(path, "genres")


def test_missing_values_of_every_column(write: Write) -> None:
    path = write(
        "x.csv",
        "album_id,cover,genres,artist\nnan,a.jpg,nan,N/A\nb,NULL,None|Rock,<NA>\nc,c.jpg,,null\n",
    )
    catalog = read(path)
    assert column(catalog, "album_id") == [None, "b", "c"]
    assert column(catalog, "cover")[1] is None
    assert column(catalog, "genres") == [[], ["Rock"], []]
    assert column(catalog, "artist") == [None] * 3
    catalog = read(path, missing_values=("nan",))
    assert column(catalog, "genres") == [[], ["None", "Rock"], []]
    assert column(catalog, "artist") == ["N/A", "<NA>", "null"]


def test_missing_values_can_be_set() -> None:
    assert parse(CatalogSettings, {"missing_values": "nan, -"}).missing_values == ("nan", "-")
    assert parse(CatalogSettings, {"missing_values": ""}).missing_values == ()


def test_unicode_forms_of_a_name_are_one_genre(write: Write, tmp_path: Path) -> None:
    rows = ["Mu\u0301sica", "M\u00fasica", "M\u00fasica\u200b", "\ufeffM\u00fasica "]
    path = write("x.csv", "album_id,cover,genres\n" + "".join(f"{g},a,{g}\n" for g in rows))
    assert column(read(path), "genres") == [["M\u00fasica"]] * 4
    given = parse(PrepareConfig, {"catalog": "x", "out": "y", "genres": "Mu\u0301sica"})
    assert given.genres == ("M\u00fasica",)
    renamed = load_genre_map(str(write("m.csv", "Mu\u0301sica\u200b,Mu\u0301sica!\n")))
    assert renamed == {"M\u00fasica": "M\u00fasica!"}


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.string(), 2),
        pa.list_view(pa.string()),
        pa.large_list_view(pa.large_string()),
        pa.large_list(pa.string()),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
    ],
)
def test_all_list_types_are_lists_of_genres(type_: pa.DataType, tmp_path: Path) -> None:
    genres = pa.array([["a", "b"], None, ["c", None]], type_)
    columns = {"album_id": list("123"), "cover": list("123"), "genres": genres}
    path = parquet(tmp_path / "x.parquet", columns)
    assert column(read(path), "genres") == [["a", "b"], [], ["c"]]


def test_nan_is_an_empty_list(write: Write) -> None:
    path = write(
        "x.jsonl",
        '{"album_id": 1, "cover": "a", "genres": NaN}\n'
        '{"album_id": 2, "cover": NaN, "genres": ["a", NaN]}\n',
    )
    assert column(read(path), "genres") == [[], ["a"]]


# Ids and optional columns


def test_ids_of_simple_types_are_read_as_text(tmp_path: Path) -> None:
    one = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
    types = {
        "uuid": (pa.array([one.bytes, None], pa.uuid()), str(one)),
        "decimal": (pa.array([Decimal("12"), None], pa.decimal128(10, 0)), "12"),
        "decimal_scale": (pa.array([Decimal("12.00"), None], pa.decimal128(10, 2)), "12"),
        "decimal_part": (pa.array([Decimal("12.50"), None], pa.decimal256(40, 2)), "12.5"),
        "decimal_zero": (pa.array([Decimal("100"), None], pa.decimal128(10, 1)), "100"),
        "float": (pa.array([7.0, None]), "7"),
        "binary": (pa.array([b"abc", None]), "abc"),
    }
    for name, (ids, expected) in types.items():
        path = parquet(tmp_path / f"{name}.parquet", {"album_id": ids, "cover": ["a", "b"]})
        assert column(read(path), "album_id") == [expected, None], name


def test_uuid_in_parquet_without_arrow_schema(tmp_path: Path) -> None:
    one = uuid.uuid4()
    table = pa.table({"album_id": pa.array([one.bytes], pa.uuid()), "cover": ["a"]})
    pq.write_table(table, tmp_path / "x.parquet", store_schema=False)  # as DuckDB does
    assert column(read(tmp_path / "x.parquet"), "album_id") == [str(one)]


def test_optional_column_of_another_type_is_ignored_with_a_note(
    write: Write, tmp_path: Path
) -> None:
    columns = {
        "album_id": ["1"],
        "cover": ["a"],
        "artist": [["X", "Y"]],
        "title": [{"main": "t"}],
    }
    path = parquet(tmp_path / "x.parquet", columns)
    lines = '{"album_id": 1, "cover": "a", "artist": ["X"], "title": {"main": "t"}}\n'
    for file in (path, write("x.jsonl", lines)):
        catalog = read(file)
        assert column(catalog, "artist") == column(catalog, "title") == [None]
        notes = " ".join(catalog.notes)
        assert "'artist' is ignored" in notes and "'title' is ignored" in notes
        grouped = PrepareConfig(catalog=str(file), out="x", group_by="artist")
        with pytest.raises(CatalogError, match="'artist'"):
            read_catalog(str(file), grouped)


def test_duplicate_columns_are_an_error_if_used(tmp_path: Path) -> None:
    arrays = [pa.array(["1"]), pa.array(["a"]), pa.array(["2"]), pa.array([1]), pa.array([2])]
    names = ["album_id", "cover", "album_id", "x", "x"]
    pq.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "x.parquet")
    assert "'album_id'" in error_of(tmp_path / "x.parquet", "duplicate_column")
    other = pa.Table.from_arrays([*arrays[:2], *arrays[3:]], [*names[:2], "x", "x"])
    pq.write_table(other, tmp_path / "y.parquet")
    assert column(read(tmp_path / "y.parquet"), "album_id") == ["1"]


# Extension types


def extension(name: str, data: list[bytes]) -> tuple[pa.Field, pa.Array]:
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": ""}
    return pa.field("extra", pa.binary(), metadata=metadata), pa.array(data, pa.binary())


def with_column(path: Path, name: str, field: pa.Field, values: pa.Array) -> Path:
    table = pa.table({"album_id": ["1"], "cover": ["a"]})
    if name in table.column_names:
        table = table.drop_columns([name])
    pq.write_table(table.append_column(field.with_name(name), values), path)
    return path


def test_extension_types_of_unused_columns_are_ignored(tmp_path: Path) -> None:
    for name in ("arrow.opaque", "geoarrow.wkb", "pandas.period", "ray.data.arrow_pickled_object"):
        path = with_column(tmp_path / f"{name}.parquet", "extra", *extension(name, [b"x"]))
        assert column(read(path), "album_id") == ["1"], name
    table = pa.table({"album_id": ["1"], "cover": ["a"], "raw": pa.array(['{"a": 1}'], pa.json_())})
    pq.write_table(table, tmp_path / "json.parquet")
    assert column(read(tmp_path / "json.parquet"), "album_id") == ["1"]


def test_code_of_registered_extension_types_is_not_called(tmp_path: Path) -> None:
    class Noisy(pa.ExtensionType):  # type: ignore[misc]
        made = 0

        def __init__(self) -> None:
            super().__init__(pa.binary(), "covergenre.test.noisy")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, data: bytes) -> "Noisy":
            cls.made += 1
            return cls()

    table = pa.table({"album_id": ["1"], "cover": ["a"]})
    noisy = pa.ExtensionArray.from_storage(Noisy(), pa.array([b"x"]))
    pq.write_table(table.append_column("noisy", noisy), tmp_path / "x.parquet")
    pa.register_extension_type(Noisy())
    try:
        pq.read_schema(tmp_path / "x.parquet")
        assert Noisy.made > 0  # what reading it as usual does
        before = Noisy.made
        assert column(read(tmp_path / "x.parquet"), "album_id") == ["1"]
        assert Noisy.made == before
    finally:
        pa.unregister_extension_type("covergenre.test.noisy")


def test_canonical_extension_type_is_read_as_its_storage_type(tmp_path: Path) -> None:
    genres = pa.array(['["a", "b"]'], pa.json_())
    table = pa.table({"album_id": ["1"], "cover": ["a"], "genres": genres})
    pq.write_table(table, tmp_path / "x.parquet")
    assert column(read(tmp_path / "x.parquet"), "genres") == [["a", "b"]]


def test_other_extension_types_are_an_error_if_used(tmp_path: Path) -> None:
    field, values = extension("ray.data.arrow_pickled_object", [b"x"])
    path = with_column(tmp_path / "x.parquet", "cover", field, values)
    found = error_of(path, "extension_type")
    assert "'cover'" in found and "ray.data.arrow_pickled_object" in found


# Covers


def test_image_bytes_in_the_column_cover(tmp_path: Path) -> None:
    image = base64.b64decode("iVBORw0KGgo=")
    columns = {"album_id": ["1", "2"], "cover": pa.array([None, image])}
    catalog = read(parquet(tmp_path / "x.parquet", columns))
    assert catalog.image_column == "cover" and column(catalog, "source") == [0, 0]
    assert column(catalog, "cover") == [None, None]
    columns["cover"] = pa.array([b"a.jpg", None])  # text that its writer did not declare as such
    catalog = read(parquet(tmp_path / "y.parquet", columns))
    assert column(catalog, "cover") == [f"{tmp_path}/a.jpg", None]
    structs = pa.array([{"bytes": image, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}])
    catalog = read(parquet(tmp_path / "z.parquet", columns | {"cover": structs}))
    assert catalog.image_column == "cover"
    assert column(catalog, "cover") == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]
    parquet(tmp_path / "mixed/a.parquet", columns | {"cover": structs})
    parquet(tmp_path / "mixed/b.parquet", {"album_id": ["3"], "image": pa.array([image])})
    assert "'image'" in error_of(tmp_path / "mixed", "image_columns")


@pytest.mark.parametrize("bytes_type", [pa.binary(), pa.null()])
def test_hugging_face_image_without_bytes_is_read_from_its_path(
    bytes_type: pa.DataType, tmp_path: Path
) -> None:
    type_ = pa.struct([("bytes", bytes_type), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "/b.jpg"}], type_)
    for name in ("image", "cover"):
        path = parquet(tmp_path / f"{name}.parquet", {"album_id": ["1", "2"], name: images})
        assert column(read(path), "cover") == [f"{tmp_path}/a.jpg", "/b.jpg"]


def test_white_space_around_a_path_is_removed(write: Write, tmp_path: Path) -> None:
    path = write(
        "x.csv",
        'album_id,cover\n1, a.jpg\n2,"b.jpg\n"\n3," https://h/c.jpg\t"\n4,"  "\n5,"\u00a0d.jpg"\n',
    )
    assert column(read(path), "cover") == [
        f"{tmp_path}/a.jpg",
        f"{tmp_path}/b.jpg",
        "https://h/c.jpg",
        None,
        f"{tmp_path}/d.jpg",
    ]


def test_absolute_covers_are_not_joined_to_a_directory(write: Write) -> None:
    covers = ["data:image/png;base64,aGk=", "DATA:,x", "gs://x/a.jpg", "file:/a.jpg"]
    lines = "".join(f'{n},"{cover}"\n' for n, cover in enumerate(covers))
    assert column(read(write("x.csv", "album_id,cover\n" + lines)), "cover") == covers


# Partitioned folders


def test_hive_partitions_are_columns(write: Write, tmp_path: Path) -> None:
    for split in ("train", "test"):
        columns = {"album_id": [split], "cover": ["a"]}
        parquet(tmp_path / f"p/split={split}/genre=R%26B/x.parquet", columns)
    catalog = read(tmp_path / "p", genres_column="genre")
    assert column(catalog, "split") == ["test", "train"]
    assert column(catalog, "genres") == [["R&B"]] * 2
    write("c/artist=__HIVE_DEFAULT_PARTITION__/x.csv", "album_id,cover\n1,a\n")
    write("c/artist=A%2FB/x.csv", "album_id,cover,artist\n1,a,other\n")
    assert column(read(tmp_path / "c"), "artist") == ["A/B", None]
    write("j/split=dev/x.jsonl", '{"album_id": 1, "cover": "a"}\n')
    write("j/split=dev/empty.jsonl", "")
    assert column(read(f"{tmp_path}/j/*/*.jsonl"), "split") == ["dev"]


# Text files


def test_quoted_line_ends_are_kept_across_blocks(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 64)
    for padding in range(64):
        text = f'album_id,cover,title\r\n1,{"x" * padding},"A\r\nB"\r\n2,b,"C\rD\nE"\r\n'
        assert column(read(write("x.csv", text)), "title") == ["A\r\nB", "C\rD\nE"], padding


@pytest.mark.parametrize("newline", ["", "\n"])
def test_size_limit_of_a_value_does_not_depend_on_other_rows(
    newline: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 1024)
    monkeypatch.setattr(readers, "_ROW_BYTES", 20_000)
    limit = csv.field_size_limit()

    def text(size: int) -> str:
        rows = [f'{n},c,"t{newline}"' for n in range(300)]
        return "album_id,cover,title\n" + "\n".join([*rows, f"x,c,{'v' * size}", *rows]) + "\n"

    catalog = read(write("x.csv", text(19_000)))
    assert column(catalog, "title")[300] == "v" * 19_000
    assert catalog.table.num_rows == 601
    error_of(write("x.csv", text(100_000)), "row_too_long")
    assert csv.field_size_limit() == limit


def test_zero_padding_after_gzip_is_ignored(write: Write) -> None:
    packed = gzip.compress(b"album_id,cover\n1,a\n") + gzip.compress(b"2,b\n") + b"\0" * 700
    assert column(read(write("x.csv.gz", packed)), "album_id") == ["1", "2"]


def test_gzip_is_detected_by_content(write: Write) -> None:
    packed = gzip.compress(b"album_id,cover\n1,a\n")
    assert column(read(write("x.csv", packed)), "album_id") == ["1"]
    assert column(read(write("y.csv.gz", "album_id,cover\n2,a\n")), "album_id") == ["2"]


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (b"PK\x03\x04xxxxxxxx", "other_format", "zip"),
        (b"PAR1xxxxPAR1", "other_format", "--format parquet"),
        (b"\x28\xb5\x2f\xfdxxxxxx", "other_format", "zstd"),
        (b"album_id\tcover\n1\ta\n", "separator", "--format tsv"),
        (b"album_id|cover\n1|a\n", "separator", "vertical bars"),
    ],
)
def test_error_has_the_format_of_a_file_that_is_not_csv(
    write: Write, content: bytes, code: str, part: str
) -> None:
    assert part in error_of(write("x.csv", content), code)


def test_tsv_with_commas_is_an_error(write: Write) -> None:
    assert "--format csv" in error_of(write("x.tsv", "album_id,cover\n1,a\n"), "separator")


@pytest.mark.parametrize("text", ['[{"album_id": 1}]', '[\n  {"album_id": 1}\n]', "[", " [ {\n"])
def test_json_array_is_an_error(write: Write, text: str) -> None:
    assert "jq" in error_of(write("x.jsonl", text), "json_array")


def test_json_that_is_not_json_lines_is_an_error(write: Write) -> None:
    assert "line 1" in error_of(write("x.jsonl", '{\n "album_id": 1\n}\n'), "json_lines")
    assert "jq" in error_of(write("x.json", "[]"), "unknown_format")
    assert "CSV" in error_of(write("x.xlsx", "PK"), "unknown_format")


def test_size_of_a_line_is_limited(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_ROW_BYTES", 2**20)
    for name in ("x.csv", "x.jsonl"):
        assert "line 1" in error_of(write(name, b"x" * (3 * 2**20)), "row_too_long")


def test_unused_columns_may_have_invalid_utf8(write: Write) -> None:
    for body in (b"1,a,\xf6\n", b'1,a,\xf6\n2,"b\n",x\n'):
        path = write("x.csv", b"album_id,cover,notes\n" + body)
        assert column(read(path), "album_id")[0] == "1"
        path = write("y.csv", b"album_id,cover,title\n" + body)
        assert "y.csv, line 2" in error_of(path, "encoding")
    path = write("x.jsonl", b'{"album_id": 1, "cover": "a", "notes": "\xf6\\ud800"}\n')
    assert column(read(path), "album_id") == ["1"]
    path = write("y.jsonl", b'{"album_id": 1, "cover": "a", "title": "\xf6"}\n')
    assert "y.jsonl, line 1" in error_of(path, "encoding")


def test_invalid_utf8_in_a_text_column_of_parquet_is_an_error(tmp_path: Path) -> None:
    ids = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    path = parquet(tmp_path / "x.parquet", {"album_id": ids, "cover": ["a"]})
    assert "x.parquet" in error_of(path, "unreadable")
