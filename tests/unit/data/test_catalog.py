"""Catalogs in every format, their errors, the genre map and the splits."""

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import Catalog, read_catalog

from covergenre.config import CatalogSettings, parse
from covergenre.data import parquet_reader, readers
from covergenre.data.catalog import CatalogReader
from covergenre.data.genre_map import apply_genre_map, load_genre_map
from covergenre.data.plan import identity_of
from covergenre.data.splits import SplitAssigner, split_key_hash
from covergenre.errors import CatalogError, ConfigError, StorageError, UserError

MUMU = Path(__file__).parents[4] / "shared/data/mumu/MuMu_dataset_single-label.csv"
MUMU_HEADER = "amazon_id,album_mbid,MSD_track_id,recording_mbid,artist_mbid,genres"


def read(path: Path | str, **options: Any) -> Catalog:
    return read_catalog(path, CatalogSettings(**options))


def column(catalog: Catalog, name: str) -> list[Any]:
    values: list[Any] = catalog.table.column(name).to_pylist()
    return values


def fails(
    action: Callable[[], object], kind: type[UserError], *parts: str, code: str | None = None
) -> None:
    """`action` raises one line that has all of `parts`: files, lines, flags, values."""
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert code is None or caught.value.code == code
    for part in parts:
        assert part in text, text


def read_fails(path: Path | str, *parts: str, code: str | None = None, **options: Any) -> None:
    fails(lambda: read(path, **options), CatalogError, *parts, code=code)


Write = Callable[[str, str | bytes], Path]


# CSV


def test_csv(write: Write, tmp_path: Path) -> None:
    path = write(
        "labels.csv",
        "\ufeffalbum_id,cover,genres,title,artist,year\n"
        '007,a.jpg,Rock| Pop ||Rock,"Two\nlines, ""quoted""",X,1999\n'
        ",./b.jpg,,,,\n"
        "9,/abs/c.jpg,Jazz,,,\n"
        "10,s3://bucket/d.jpg, | ,,,\n"
        "11,,Folk,,,\n",
    )
    catalog = read(path)
    assert column(catalog, "row") == [0, 1, 2, 3, 4]
    assert column(catalog, "album_id") == ["007", None, "9", "10", "11"]
    assert column(catalog, "cover") == [
        f"{tmp_path}/a.jpg",
        f"{tmp_path}/b.jpg",
        "/abs/c.jpg",
        "s3://bucket/d.jpg",
        None,
    ]
    assert column(catalog, "genres") == [["Rock", "Pop"], [], ["Jazz"], [], ["Folk"]]
    assert column(catalog, "title") == ['Two\nlines, "quoted"', None, None, None, None]
    for name in ("source", "source_row", "split", "group"):
        assert column(catalog, name) == [None] * 5
    assert catalog.files == ()
    assert catalog.source_rows == 5
    assert catalog.notes == ()


def test_tsv_and_gzip(write: Write) -> None:
    text = "album_id\tcover\tgenres\n1\ta.jpg\tA|B\n"
    for path in (write("x.tsv", text), write("x.tsv.gz", gzip.compress(text.encode()))):
        assert column(read(path), "genres") == [["A", "B"]]
    assert column(read(write("x.txt", text), format="tsv"), "album_id") == ["1"]


def test_names_of_columns_and_separator_can_be_set(write: Write, tmp_path: Path) -> None:
    path = write("x.csv", 'asin,file,tags\nB1,a.jpg,"Folk, World;Pop"\n')
    (tmp_path / "images").mkdir()
    catalog = read(
        path,
        id_column="asin",
        cover_column="file",
        genres_column="tags",
        genres_separator=";",
        covers=f"{tmp_path}/images/",
    )
    assert column(catalog, "album_id") == ["B1"]
    assert column(catalog, "cover") == [f"{tmp_path}/images/a.jpg"]
    assert column(catalog, "genres") == [["Folk, World", "Pop"]]


def test_covers_of_a_relative_path_are_absolute(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("x.csv", "album_id,cover\n1,a.jpg\n")
    monkeypatch.chdir(tmp_path)
    assert column(read("x.csv"), "cover") == [f"{tmp_path}/a.jpg"]


@pytest.mark.parametrize(
    ("body", "line", "code"),
    [
        ("1,a.jpg,Rock\n2,b.jpg\n", "line 3: 2 columns", "columns"),
        ("1,a.jpg,Rock\n\n2,b.jpg,Pop,more\n", "line 4: 4 columns", "columns"),
        ('1,"a\nb",Rock\n2,b.jpg\n', "line 4: 2 columns", "columns"),
        ('1,a.jpg,Rock\n2,"b.jpg,Pop\n3,c.jpg,Jazz\n', "line 3", "quote"),
    ],
)
def test_error_has_the_malformed_line(write: Write, body: str, line: str, code: str) -> None:
    read_fails(write("x.csv", "album_id,cover,genres\n" + body), "x.csv", line, code=code)


@pytest.mark.parametrize("end", ["", "\n"])
def test_unclosed_quote_is_an_error(write: Write, end: str) -> None:
    # Arrow alone reads these four lines as two rows and says nothing.
    text = 'album_id,cover,title\n1,a.jpg,"One\n2,b.jpg,"Two\n3,c.jpg,Three' + end
    read_fails(write("x.csv", text), "x.csv, line 2", code="quote")
    text = 'album_id,cover,title\n1,a.jpg,One\n2,b.jpg,"Two\n3,c.jpg,Three' + end
    read_fails(write("x.csv", text), "x.csv, line 3", code="quote")


def test_lines_are_counted_across_blocks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 512)
    rows = [f'{i},"covers\n/{i}.jpg",G{i % 7}|G{i % 3}' for i in range(500)]
    path = write("x.csv", "album_id,cover,genres\n" + "\n\n".join(rows))
    catalog = read(path)
    assert column(catalog, "album_id") == [str(i) for i in range(500)]
    assert column(catalog, "genres")[8] == ["G1", "G2"]
    path.write_text(path.read_text().replace("\n\n300,", "\n\n300,extra,"))
    read_fails(path, f"x.csv, line {2 + 300 * 3}: 4 columns")


def test_error_has_the_line_of_invalid_utf8(write: Write) -> None:
    path = write("x.csv", b"album_id,cover,artist\n1,a.jpg,Bj\xc3\xb6rk\n2,b.jpg,Bj\xf6rk\n")
    read_fails(path, "x.csv, line 3", "iconv", code="encoding")
    read_fails(write("x.csv", "album_id,cover\n1,2\n".encode("utf-16")), "line 1", code="encoding")


def test_truncated_gzip_is_an_error(write: Write) -> None:
    packed = gzip.compress(b"album_id,cover\n" + b"1,a.jpg\n" * 9)
    read_fails(write("y.csv.gz", packed[:-12]), "y.csv.gz", code="unreadable")


# Columns that are missing


def test_error_of_a_missing_column_has_the_flag(write: Write, tmp_path: Path) -> None:
    path = write("labels.csv", "album_id,cover,genre\n1,a.jpg,Rock\n")
    read_fails(
        path,
        f"no column 'album' in {path}; did you mean 'album_id'? (--id-column)",
        id_column="album",
    )
    read_fails(
        path, f"--covers {tmp_path}/none", code="no_covers_directory", covers=f"{tmp_path}/none"
    )
    fails(lambda: read(path, covers="gs://x"), StorageError, "gs:// is not supported")
    read_fails(
        write("semi.csv", "album_id;cover\n1;a.jpg\n"), "semi.csv", "semicolons", code="separator"
    )
    read_fails(path, "'covr'", "did you mean 'cover'?", code="no_column", cover_column="covr")
    read_fails(path, "'tags'", "--genres-column", code="no_column", genres_column="tags")
    read_fails(path, "'art'", "--artist-column", code="no_column", artist_column="art")
    read_fails(
        path, "labels.csv", "--image-column", code="image_column_format", image_column="bytes"
    )
    assert read(path).notes == (
        f"no row has genres: no column 'genres' in {path}; did you mean 'genre'? (--genres-column)",
    )
    path = write("y.csv", "album_id,file\n1,a.jpg\n")
    read_fails(path, "'cover'", "--cover-column", code="no_column")
    twice = write("z.csv", "album_id,cover,cover\n1,a.jpg,b.jpg\n")
    read_fails(twice, "z.csv", "'cover'", code="duplicate_column")


def test_column_may_be_missing_from_some_files(write: Write, tmp_path: Path) -> None:
    write("a.csv", "album_id,cover\n1,a.jpg\n")
    write("b.csv", "album_id,cover,who\n2,b.jpg,X\n")
    assert column(read(tmp_path, artist_column="who"), "artist") == [None, "X"]
    read_fails(tmp_path, "'whom'", str(tmp_path), code="no_column", artist_column="whom")


def test_invalid_settings() -> None:
    def given(**flags: str) -> Callable[[], object]:
        return lambda: parse(CatalogSettings, flags)

    fails(given(format="cvs"), ConfigError, "'cvs'", "did you mean 'csv'?")
    fails(given(genres_separator=""), ConfigError, "--genres-separator")


@pytest.mark.parametrize("content", ["", "album_id,cover\n", "\n\n"])
def test_catalog_without_rows_is_an_error(write: Write, content: str) -> None:
    path = write("x.csv", content)
    read_fails(path, str(path), code="no_rows")
    read_fails(write("x.jsonl", "\n"), "x.jsonl", code="no_rows")


# Files, folders, patterns


def test_files_of_a_directory_are_read_in_order_of_names(write: Write, tmp_path: Path) -> None:
    for name in ("b.csv", "a/x.CSV", "_SUCCESS.csv", ".hidden/x.csv", "a/_tmp/x.csv", "c.jpg"):
        write(name, f"album_id,cover\n{name},a.jpg\n")
    write("c.csv.gz", gzip.compress(b"album_id,cover\nc,c.jpg\n"))
    catalog = read(tmp_path)
    assert column(catalog, "album_id") == ["a/x.CSV", "b.csv", "c"]
    assert column(catalog, "cover")[0] == f"{tmp_path}/a/a.jpg"
    assert catalog == read(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.csv", ["p1.csv", "p2.csv"]),
        ("p?.csv", ["p1.csv", "p2.csv"]),
        ("p[2-9].csv", ["p2.csv"]),
        ("p[!2].csv", ["p1.csv"]),
        ("**/*.csv", ["deep/er/p4.csv", "deep/p3.csv", "p1.csv", "p2.csv"]),
        ("deep/**", ["deep/er/p4.csv", "deep/p3.csv"]),
        ("de*/p*", ["deep/p3.csv"]),
        ("[odd].csv", ["[odd].csv"]),
    ],
)
def test_patterns(write: Write, tmp_path: Path, pattern: str, found: list[str]) -> None:
    for name in ("p1.csv", "p2.csv", "deep/p3.csv", "deep/er/p4.csv", "p5.jpg"):
        write(name, f"album_id,cover\n{name},a.jpg\n")
    if pattern == "[odd].csv":
        write(pattern, f"album_id,cover\n{pattern},a.jpg\n")
    assert column(read(f"{tmp_path}/{pattern}"), "album_id") == found


def test_missing_files_and_unknown_formats(write: Write, tmp_path: Path) -> None:
    fails(lambda: read(tmp_path / "no.csv"), StorageError, "no.csv")
    fails(lambda: read(tmp_path / "no/*.csv"), StorageError, f"{tmp_path}/no")
    read_fails(write("x.txt", "?"), "x.txt", ".csv", "--format", code="unknown_format")
    read_fails(tmp_path, str(tmp_path), ".parquet", code="no_files")
    read_fails(tmp_path / "*.csv", "*.csv", code="no_files")
    write("a.csv", "album_id,cover\n1,a.jpg\n")
    read_fails(tmp_path, ".jsonl, .ndjson", code="no_files", format="jsonl")
    write("b.jsonl", '{"album_id": 2, "cover": "b.jpg"}\n')
    read_fails(tmp_path, "1 csv, 1 jsonl", "--format", code="mixed_formats")
    assert column(read(tmp_path, format="jsonl"), "album_id") == ["2"]


# JSON Lines


def test_jsonl(write: Write, tmp_path: Path) -> None:
    lines = [
        {"album_id": "007", "cover": "a.jpg", "genres": ["Rock", " Rock", None, "a|b"]},
        {"album_id": 8, "cover": "b.jpg", "genres": "Rock|Pop", "title": 1999},
        {"album_id": 9.0, "cover": "", "genres": None, "title": "2020-01-01"},
        {"album_id": 12345678901234567890, "genres": [], "title": float("nan"), "more": {}},
        {"album_id": None},
        {},
    ]
    text = "\ufeff" + "\n\n".join(map(json.dumps, lines))
    catalog = read(write("x.jsonl", text))
    assert column(catalog, "album_id") == ["007", "8", "9", "12345678901234567890", None, None]
    assert column(catalog, "cover") == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg", *[None] * 4]
    assert column(catalog, "genres") == [["Rock", "a|b"], ["Rock", "Pop"], [], [], [], []]
    assert column(catalog, "title") == [None, "1999", "2020-01-01", None, None, None]
    packed = write("x.ndjson.gz", gzip.compress(text.encode()))
    assert read(packed) == catalog


def test_jsonl_in_chunks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_CHUNK_ROWS", 4)
    path = write("x.jsonl", "".join(f'{{"album_id": {i}, "cover": "c"}}\n' for i in range(11)))
    assert column(read(path), "album_id") == [str(i) for i in range(11)]


@pytest.mark.parametrize(
    ("line", "code", "column"),
    [
        ('{"album_id": 1', "invalid_json", ""),
        ('{"album_id": 1},', "invalid_json", ""),
        ('{"album_id": 1}{"album_id": 2}', "invalid_json", ""),
        ('{"album_id": "\\ud800"}', "invalid_json", "'album_id'"),
        ("[" * 100_000, "invalid_json", ""),
        ("null", "not_an_object", ""),
        ("[1]", "not_an_object", ""),
        ('{"album_id": true}', "value_type", "'album_id'"),
        ('{"album_id": {"$oid": "x"}}', "value_type", "'album_id'"),
        ('{"cover": [1]}', "value_type", "'cover'"),
        ('{"album_id": 1, "album_id": 2}', "invalid_json", "'album_id'"),
        ('{"genres": 5}', "value_type", "'genres'"),
        ('{"genres": ["a", 5]}', "value_type", "'genres'"),
        (b'{"album_id": "\xf6"}', "encoding", ""),
    ],
)
def test_error_has_the_line_of_invalid_json(
    write: Write, line: str | bytes, code: str, column: str
) -> None:
    line = line.encode() if isinstance(line, str) else line
    path = write("x.jsonl", b'{"album_id": 1, "cover": "a.jpg"}\n\n' + line + b"\n")
    read_fails(path, "x.jsonl, line 3", column, code=code)


def test_jsonl_without_ids_is_an_error(write: Write) -> None:
    path = write("x.jsonl", '{"id": 1, "cover": "a.jpg"}\n')
    read_fails(path, "'album_id'", "--id-column", code="no_column")


# Parquet


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_parquet_with_covers(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "x.parquet",
        {
            "album_id": pa.array([7, 8, None]),
            "cover": pa.array(["a.jpg", "", None]).dictionary_encode(),
            "genres": pa.array([["A", " A ", None, "B"], None, []], pa.large_list(pa.string())),
            "title": pa.array(["t", "", None], pa.large_string()),
            "artist": pa.array([1.0, None, float("nan")]),
            "group": pa.array([0.5, None, 2.0]),
            "split": pa.nulls(3),
        },
    )
    catalog = read(path)
    assert column(catalog, "album_id") == ["7", "8", None]
    assert column(catalog, "cover") == [f"{tmp_path}/a.jpg", None, None]
    assert column(catalog, "genres") == [["A", "B"], [], []]
    assert column(catalog, "title") == ["t", None, None]
    assert column(catalog, "artist") == ["1", None, None]
    assert column(catalog, "group") == ["0.5", None, "2"]
    assert column(catalog, "split") == [None] * 3


BYTES = pa.array([b"x", None, b"z"])
STRUCT = pa.array([{"bytes": b"x", "path": "p"}, {"bytes": None, "path": "p"}, None])


@pytest.mark.parametrize(
    ("image", "nulls"), [(BYTES, 1), (BYTES.cast(pa.large_binary()), 1), (STRUCT, 2)]
)
def test_parquet_with_images(tmp_path: Path, image: pa.Array, nulls: int) -> None:
    ids = pa.array(["1", "2", "3"])
    covers = pa.array(["a.jpg"] * 3)
    genres = pa.array(["A|B", "", None])
    first = write_parquet(tmp_path / "a.parquet", {"album_id": ids, "cover": covers})
    second = write_parquet(
        tmp_path / "b.parquet",
        {"album_id": ids, "picture": image, "cover": covers, "genres": genres},
    )
    third = write_parquet(tmp_path / "c.parquet", {"album_id": ids, "picture": image})
    catalog = read(third, image_column="picture")
    assert column(catalog, "source") == [0, 0, 0]
    read_fails(tmp_path, str(first), "'picture'", code="no_column", image_column="picture")
    first.unlink()
    catalog = read(tmp_path, image_column="picture")
    assert catalog.files == (str(second), str(third))
    assert catalog.image_column == "picture"
    # a row without bytes has its cover at the path
    own = [str(tmp_path / "p"), str(tmp_path / "p"), None] if image is STRUCT else [None] * 3
    assert column(catalog, "cover") == [str(tmp_path / "a.jpg")] * 3 + own
    assert column(catalog, "source") == [0, 0, 0, 1, 1, 1]
    assert column(catalog, "source_row") == [0, 1, 2, 0, 1, 2]
    assert column(catalog, "genres") == [["A", "B"], [], [], [], [], []]
    assert catalog.notes == (f"{2 * nulls} rows have no bytes in the column 'picture'",)


def test_paths_are_used_if_all_images_are_null(tmp_path: Path) -> None:
    columns = {"album_id": pa.array(["1"]), "image": pa.nulls(1, pa.binary())}
    assert column(read(write_parquet(tmp_path / "a.parquet", columns)), "source") == [0]
    columns["cover"] = pa.array(["a.jpg"])
    catalog = read(write_parquet(tmp_path / "b.parquet", columns))
    assert column(catalog, "cover") == [f"{tmp_path}/a.jpg"]
    assert catalog.files == ()


def test_wrong_types_of_parquet_columns(write: Write, tmp_path: Path) -> None:
    ids = pa.array(["1"])
    path = write_parquet(tmp_path / "a.parquet", {"album_id": ids, "image": pa.array(["a.jpg"])})
    read_fails(path, "'image'", "a.parquet", "string", "--cover-column image", code="image_type")
    assert column(read(path, cover_column="image"), "cover") == [f"{tmp_path}/a.jpg"]
    path = write_parquet(tmp_path / "b.parquet", {"album_id": ids})
    read_fails(path, "'cover'", "b.parquet", "--cover-column", code="no_column")
    covers = {"album_id": ids, "cover": pa.array(["a.jpg"])}
    path = write_parquet(tmp_path / "c.parquet", covers)
    read_fails(path, "'pic'", code="no_column", image_column="pic")
    path = write_parquet(tmp_path / "d.parquet", covers | {"genres": pa.array([[1]])})
    read_fails(path, "'genres'", "d.parquet", "list<", code="column_type")
    path = write_parquet(tmp_path / "e.parquet", covers | {"name": pa.array([{"en": "x"}])})
    read_fails(
        path, "column 'name' in", "e.parquet", "struct", code="column_type", title_column="name"
    )
    path = write_parquet(tmp_path / "g.parquet", {"album_id": pa.array([b"\xff"]), "cover": ids})
    read_fails(path, "'album_id'", "binary", "UTF-8", code="column_type")
    read_fails(write("f.parquet", b"PAR1 not really"), "f.parquet", code="unreadable")


# Identity and key


def identity(path: Path | str, **options: Any) -> str:
    return identity_of(CatalogReader(str(path), CatalogSettings(**options)), None)


def test_identity_is_of_the_content(write: Write, tmp_path: Path) -> None:
    text = "album_id,cover,genres,title\n1,a.jpg,A|B,\n2,b.jpg,,x\n"
    first = identity(write("x.csv", text))
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert identity(write("same.csv", text.replace("1,a", '"1",a'))) == first
    changes = [("2,b", "3,b"), ("A|B", "AB"), ("A|B", "B|A"), (",x", ","), ("a.jpg", "a.png")]
    found = {identity(write("other.csv", text.replace(*change))) for change in changes}
    assert len(found | {first}) == len(changes) + 1
    ids = pa.array(["1", "2"])
    path = write_parquet(tmp_path / "x.parquet", {"album_id": ids, "image": pa.array([b"x", b"y"])})
    first = identity(path)
    write_parquet(path, {"album_id": ids, "image": pa.array([b"x", b"y" * 999])})
    assert identity(path) != first


def test_identity_does_not_depend_on_chunks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(f"{i},c{i % 9}.jpg,{'A|B' * (i % 2)}\n" for i in range(300))
    path = write("x.csv", "album_id,cover,genres\n" + rows)
    first = identity(path)
    monkeypatch.setattr(readers, "_CSV_BLOCK_BYTES", 256)
    assert read(path).table.column("album_id").num_chunks > 1
    assert identity(path) == first


def test_key_changes_with_files_and_settings(write: Write, tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return json.dumps(CatalogReader(str(path), CatalogSettings(**options)).key)

    path = write("x.csv", "album_id,cover\n1,a.jpg\n")
    first = key()
    assert key() == key(download_concurrency=3, contact="me@example.org") == first
    others = {key(id_column="cover"), key(missing_values=()), key(covers=str(tmp_path))}
    write("x.csv", "album_id,cover\n1,a.jpg\n2,b.jpg\n")
    assert len({first, key(), *others}) == 5


def test_catalog_can_be_read_again(write: Write) -> None:
    reader = CatalogReader(str(write("x.csv", "album_id,cover\n1,a.jpg\n")), CatalogSettings())
    first = list(reader.parts())
    assert list(reader.parts()) == first
    assert reader.summary()["source_rows"] == 1 and len(reader.summary()["notes"]) == 1


# MuMu


def test_mumu_songs_become_albums(write: Write, tmp_path: Path) -> None:
    path = write(
        "songs.csv",
        f"{MUMU_HEADER}\n"
        'B1,m,t,r,,"Pop,Dance & Electronic"\n'
        "B2,m,t,r,art2,\n"
        ",m,t,r,,Jazz\n"
        'B1,m,t,r,art1,"Rock, Pop"\n'
        ",m,t,r,,Folk\n"
        "B1,m,t,r,art3,Rock\n",
    )
    catalog = read(path)
    assert column(catalog, "row") == [0, 1, 2, 3]
    assert column(catalog, "album_id") == ["B1", "B2", None, None]
    assert column(catalog, "genres") == [
        ["Pop", "Dance & Electronic", "Rock"],
        [],
        ["Jazz"],
        ["Folk"],
    ]
    assert column(catalog, "artist") == ["art1", "art2", None, None]
    assert column(catalog, "cover") == [f"{tmp_path}/B1.jpg", f"{tmp_path}/B2.jpg", None, None]
    assert catalog.source_rows == 6
    assert catalog.notes == ("6 songs make 4 albums",)
    assert column(read(path, format="mumu", covers="s3://b/c"), "cover")[0] == "s3://b/c/B1.jpg"
    assert column(read(path, genres_separator="|"), "genres")[2] == ["Jazz"]
    assert column(read(path, genres_separator="|"), "genres")[0][0] == "Pop,Dance & Electronic"


def test_mumu_errors(write: Write) -> None:
    path = write("x.csv", "album_id,cover\n1,a.jpg\n")
    read_fails(path, "'amazon_id'", "x.csv", "--format", code="no_column", format="mumu")
    path = write("y.csv", f"{MUMU_HEADER}\n")
    read_fails(path, "y.csv", code="no_rows")
    read_fails(write("z.csv", ""), "z.csv", code="no_rows", format="mumu")
    fails(lambda: read(path, title_column="x"), ConfigError, "--title-column", code="mumu_columns")


@pytest.mark.skipif(not MUMU.exists(), reason="the MuMu label file is not here")
def test_the_real_mumu_file() -> None:
    catalog = read(MUMU)
    assert catalog.source_rows == 12_087
    assert catalog.table.num_rows == 2_321
    assert catalog.notes == ("12,087 songs make 2,321 albums",)
    assert len({genre for genres in column(catalog, "genres") for genre in genres}) == 16
    assert len(set(column(catalog, "artist"))) == 1_755
    assert len(set(column(catalog, "album_id"))) == 2_321


# The genre map


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", 'from,to\nRap,Hip Hop\n\n"Folk, World",Folk\nMisc,\nNo,80s\n'),
        ("m.csv", '\ufeff Rap , Hip Hop \n"Folk, World",Folk\nMisc,\nNo,80s'),
        ("m.tsv", "Rap\tHip Hop\nFolk, World\tFolk\nMisc\t\nNo\t80s\n"),
        ("m.json", '{"Rap": "Hip Hop",\n\t"Folk, World": "Folk", "Misc": null, "No": "80s"}'),
        ("m.yaml", "Rap: Hip Hop\nFolk, World: Folk\nMisc:\nNo: 80s\n"),
        ("m.yml", "# mine\nRap: Hip Hop\n'Folk, World': Folk\nMisc: ''\nNo: 80s\n"),
    ],
)
def test_load_genre_map(write: Write, name: str, text: str) -> None:
    expected = {"Rap": "Hip Hop", "Folk, World": "Folk", "Misc": None, "No": "80s"}
    assert load_genre_map(str(write(name, text))) == expected


@pytest.mark.parametrize(
    ("name", "text", "code", "facts"),
    [
        ("m.csv", "a,b\nRock\n", "columns", ["line 2:"]),
        ("m.csv", "a,b\n\nc,d,e\n", "columns", ["line 3:"]),
        ("m.csv", "a,b\n,d\n", "empty_name", ["line 2:", "'d'"]),
        ("m.csv", "a,b\nc,d\na,e\n", "conflict", ["line 3:", "'a'", "'b'"]),
        ("m.csv", 'a,b\n"c,d\n', "invalid", ["line 2:"]),
        ("m.csv", b"a,\xf6\n", "encoding", []),
        ("m.csv", "a,[b]\n", "brackets", ["line 1:", "'[b]'"]),
        ("m.json", '{"a": "b",\n"c"}', "invalid", ["line 2"]),
        ("m.json", "[]", "not_a_mapping", ["line 1:"]),
        ("m.json", '{"a": "b",\n"c": []}', "value_type", ["line 2:", "'c'"]),
        ("m.json", '{"a": "b",\n"\\u0063": 5}', "value_type", ["'c'"]),
        ("m.json", '{"a": "b",\n"a": null}', "conflict", ["'a'", "'b'"]),
        ("m.yaml", "a: b\nc: [d]\n", "value_type", ["line 2:"]),
        ("m.yaml", "a: b\nc: 'd\n", "invalid", ["line 3:"]),
        ("m.yaml", "a: b\nc: \x00\n", "invalid", []),
        ("m.yaml", "- a\n", "not_a_mapping", ["line 1:"]),
        ("m.yaml", "", "not_a_mapping", ["line 1:"]),
        ("m.yaml", "a: b\na: c\n", "conflict", ["line 2:", "'a'", "'b'"]),
        ("m.txt", "a,b", "format", [".csv", ".yaml"]),
    ],
)
def test_error_of_a_genre_map(
    write: Write, name: str, text: str | bytes, code: str, facts: list[str]
) -> None:
    path = str(write(name, text))
    fails(lambda: load_genre_map(path), ConfigError, path, *facts, code=code)


def test_apply_genre_map(write: Write) -> None:
    genres = ["Rap|Rock", "Hip-Hop|Rap", "Misc", "", "Jazz|Misc|Rap", "Rap|Rock"]
    path = write("x.csv", "album_id,cover,genres\n" + "".join(f"1,c,{g}\n" for g in genres))
    mapping = {"Rap": "Hip Hop", "Hip-Hop": "Hip Hop", "Misc": None, "Zydeco": "Folk"}
    lists = read(path).table["genres"]
    renamed, used = apply_genre_map(lists, mapping)
    assert renamed.to_pylist() == [
        ["Hip Hop", "Rock"],
        ["Hip Hop"],
        [],
        [],
        ["Jazz", "Hip Hop"],
        ["Hip Hop", "Rock"],
    ]
    assert used == {"Rap": 4, "Hip-Hop": 1, "Misc": 2, "Zydeco": 0}
    sliced, _ = apply_genre_map(lists.slice(4), {"Jazz": "Swing"})
    assert sliced.to_pylist() == [["Swing", "Misc", "Rap"], ["Rap", "Rock"]]
    nulls = pa.chunked_array([[["a", None], None]], pa.list_(pa.string()))
    assert apply_genre_map(nulls, {})[0].to_pylist() == [["a"], []]


# Splits


def albums(count: int, **columns: list[str | None]) -> pa.Table:
    names = ("artist", "group", "split")
    return pa.table(
        {
            "row": pa.array(range(count)),
            "album_id": [f"B{i}" for i in range(count)],
            **{name: pa.array(columns.get(name, [None] * count), pa.string()) for name in names},
        }
    )


@dataclass
class Assigned:
    split: pa.Array
    group: pa.Array
    without_group: int


def assign_splits(table: pa.Table, **settings: Any) -> Assigned:
    """The whole table as one part; every row has to have a valid split."""
    assigner = SplitAssigner(**settings)
    split, group = assigner.assign(table)
    assigner.require(table, split)
    assigner.check()
    return Assigned(split, group, assigner.without_group)


def test_split_key_hash() -> None:
    assert split_key_hash("B0018ZB6ZO") == pytest.approx(0.5, abs=0.5)
    assert split_key_hash("a") == split_key_hash("a", 0) != split_key_hash("a", 1)
    hashes = [split_key_hash(str(i)) for i in range(10_000)]
    assert 0 <= min(hashes) < 0.001
    assert 0.999 < max(hashes) < 1
    assert sum(hashes) / len(hashes) == pytest.approx(0.5, abs=0.01)


def test_split_of_a_key_does_not_change_between_versions() -> None:
    # Another value would move the albums of existing datasets.
    assert split_key_hash("a") == 0.6170009362330672


def test_splits_have_the_requested_fractions() -> None:
    split = assign_splits(albums(20_000), group_by="album_id", split_from="hash")
    assert split.group.null_count == 20_000
    assert split.without_group == 0
    for name, share in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
        assert split.split.to_pylist().count(name) / 20_000 == pytest.approx(share, abs=0.01)
    other = assign_splits(albums(50), group_by="album_id", split_from="hash", seed=1)
    assert other.split != split.split.slice(0, 50)
    whole = assign_splits(
        albums(99), group_by="album_id", split_from="hash", fractions=(0.0, 1.0, 0.0)
    )
    assert set(whole.split.to_pylist()) == {"dev"}


@pytest.mark.parametrize("group_by", ["album_id", "artist", "group"])
def test_splits_do_not_depend_on_other_albums(group_by: str) -> None:
    names: list[str | None] = [None if i % 5 == 0 else f"x{i % 40}" for i in range(400)]
    table = albums(400, artist=names, group=names)
    whole = assign_splits(table, group_by=group_by, split_from="hash")
    for part in (table.slice(0, 7), table.slice(100, 250), table.take(list(range(399, -1, -3)))):
        alone = assign_splits(part, group_by=group_by, split_from="hash")
        rows = part.column("row").combine_chunks()
        assert alone.split == whole.split.take(rows)
        assert alone.group == whole.group.take(rows)


def test_albums_of_an_artist_share_a_split() -> None:
    # The third has a combining accent.
    spellings = ["Bj\u00f6rk", " bj\u00d6RK\t", "Bjo\u0308rk", "The  Band", "the band", " ", None]
    names = [spellings[i % 7] for i in range(700)]
    assigned = assign_splits(albums(700, artist=names), group_by="artist", split_from="hash")
    assert assigned.group.to_pylist()[:7] == [*["bj\u00f6rk"] * 3, *["the band"] * 2, None, None]
    assert assigned.without_group == 200
    splits = assigned.split.to_pylist()
    for artist in ("bj\u00f6rk", "the band"):
        rows = [i for i, key in enumerate(assigned.group.to_pylist()) if key == artist]
        assert len({splits[i] for i in rows}) == 1
    # Albums without an artist are assigned by their ids.
    assert {splits[i] for i in range(6, 700, 7)} == {"train", "dev", "test"}


def test_groups_are_case_sensitive() -> None:
    table = albums(3, group=["A", " A ", "a"])
    assigned = assign_splits(table, group_by="group", split_from="hash")
    assert assigned.group.to_pylist() == ["A", "A", "a"]
    assert assigned.without_group == 0


def test_splits_of_the_catalog() -> None:
    given: list[str | None] = ["train", "Training", "val", "valid", "validation", "dev", " TEST"]
    assigned = assign_splits(albums(7, split=given), group_by="album_id", split_from="catalog")
    assert assigned.split.to_pylist() == [*["train"] * 2, *["dev"] * 4, "test"]
    table = albums(5, split=["train", "test", "holdout", None, "x"]).slice(1)
    fails(
        lambda: assign_splits(table, group_by="album_id", split_from="catalog"),
        CatalogError,
        "3 rows",
        "row 2",
        "'holdout'",
        code="invalid_split",
    )
    fails(
        lambda: assign_splits(albums(1), group_by="album_id", split_from="catalog"),
        CatalogError,
        "1 row has",
        "row 0",
        "missing",
        code="invalid_split",
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"group_by": "artists"}, "group_by 'artists' is unknown; did you mean 'artist'?"),
        ({"split_from": "column"}, "split_from 'column' is unknown"),
        ({"fractions": (0.8, 0.1, 0.2)}, "(0.8, 0.1, 0.2)"),
        ({"fractions": (1.1, -0.1, 0.0)}, "(1.1, -0.1, 0.0)"),
    ],
)
def test_invalid_arguments_of_split_assigner(change: dict[str, Any], part: str) -> None:
    arguments: dict[str, Any] = {"group_by": "artist", "split_from": "hash", **change}
    fails(lambda: assign_splits(albums(1), **arguments), ConfigError, part)


def test_large_row_group_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"album_id": pa.array("123"), "image": BYTES})
    assert read(file).table.num_rows == 3
    monkeypatch.setattr(parquet_reader, "_ROW_GROUP_BYTES", 10)
    read_fails(file, str(file), "row_group_size=1000", code="row_group_too_large")
