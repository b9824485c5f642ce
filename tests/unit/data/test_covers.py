"""Loading the covers of catalog rows: every outcome of a row."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import plan_table, read_catalog

from covergenre import schema
from covergenre.config import CatalogSettings
from covergenre.data import covers, dataset
from covergenre.data.covers import Cover, DatasetReader, Outcome, Source
from covergenre.data.dataset import Manifest
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import CoverError, sha256
from covergenre.io import storage


def load(plan: pa.Table, source: Source | None = None, slice_rows: int = 3) -> list[Outcome]:
    found = []
    for start, (part, of_part) in enumerate(covers.load(plan, source or Source(), slice_rows)):
        assert part.equals(plan.slice(start * slice_rows, slice_rows))
        assert len(of_part) == part.num_rows
        found += of_part
    return found


def outcomes(*rows: dict[str, Any], source: Source | None = None) -> list[Outcome]:
    return load(plan_table(rows), source)


def shown(outcome: Outcome) -> object:
    """The bytes of a cover, the reason of an error, (the first row,) of a duplicate."""
    if isinstance(outcome, Cover):
        assert outcome.sha256 == sha256(outcome.data)
        return outcome.data
    if isinstance(outcome, CoverError):
        assert outcome.reason in schema.REASONS
        return outcome.reason
    return (outcome.first_row,)


@pytest.fixture
def cover_files(tmp_path: Path) -> dict[str, str]:
    """Paths by name: two equal covers, another one, an empty file, a directory, missing files."""
    for name, data in (("a", b"AAA"), ("copy-of-a", b"AAA"), ("b", b"BBB"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    names = ("a", "copy-of-a", "b", "empty", "folder", "missing", "missing-too")
    return {name: str(tmp_path / name) for name in names}


def test_load_of_no_rows() -> None:
    assert load(plan_table([])) == []


# One row


def test_every_outcome_of_a_row(cover_files: dict[str, str]) -> None:
    rows = {
        "a": b"AAA",
        "b": b"BBB",
        "empty": b"",  # rejected when it is decoded, like all invalid images
        "missing": "missing_file",
        "folder": "unreadable_file",
    }
    found = outcomes(*({"album_id": name, "cover": cover_files[name]} for name in rows))
    assert [shown(outcome) for outcome in found] == list(rows.values())
    (no_cover, no_id, neither) = outcomes({"album_id": "x"}, {"cover": cover_files["a"]}, {})
    assert [shown(no_cover), shown(no_id), shown(neither)] == ["no_cover", "null_id", "null_id"]


@pytest.mark.parametrize(
    "cover",
    ["http://[::1/x.jpg", "gs://bucket/x.jpg", "/a\0b", "/" + "x" * 300, "/dev/null/x"],
    ids=["http", "gs", "nul", "long", "below-a-file"],
)
def test_invalid_path_affects_only_its_row(cover: str, cover_files: dict[str, str]) -> None:
    bad, good = outcomes(
        {"album_id": "x", "cover": cover}, {"album_id": "y", "cover": cover_files["a"]}
    )
    is_gs = cover.startswith("gs://")
    assert shown(bad) == ("unsupported_scheme" if is_gs else "unreadable_file")
    assert isinstance(bad, CoverError) and bad.detail.startswith(f"{cover}: ")
    assert shown(good) == b"AAA"


@pytest.mark.parametrize(
    "scheme", ["gs", "gcs", "az", "abfs", "abfss", "hdfs", "ftp", "hf", "ipfs", "GS", "x-y+z.1"]
)
def test_cover_with_an_unsupported_scheme(scheme: str) -> None:
    (outcome,) = outcomes({"album_id": "x", "cover": f"{scheme}://user:hidden@bucket/x.jpg"})
    assert isinstance(outcome, CoverError)
    assert outcome.reason == "unsupported_scheme"
    assert f"{scheme.lower()}://" in outcome.detail
    assert "hidden" not in outcome.detail


def test_pipes_and_devices_are_rejected_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for cover, kind in (
        (str(tmp_path / "pipe"), "a pipe"),
        (str(tmp_path / "link"), "a pipe"),
        ("/dev/zero", "a device"),
        (str(tmp_path), "a directory"),
    ):
        (outcome,) = outcomes({"album_id": "x", "cover": cover})
        assert isinstance(outcome, CoverError)
        assert outcome.reason == "unreadable_file"
        assert kind in outcome.detail


def test_file_uri_is_read_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "a b#c.jpg").write_bytes(b"AAA")
    cover_files = [
        f"file://{tmp_path}/a%20b%23c.jpg",
        f"file://localhost{tmp_path}/a b#c.jpg",
        f"FILE:{tmp_path}/a%20b%23c.jpg",
        "file://elsewhere/a.jpg",
        f"file://{tmp_path}/missing.jpg",
    ]
    found = outcomes(*({"album_id": str(n), "cover": c} for n, c in enumerate(cover_files)))
    assert list(map(shown, found)) == [*[b"AAA"] * 3, "unreadable_file", "missing_file"]


def test_data_uri_is_decoded_and_not_copied_to_messages(tmp_path: Path) -> None:
    catalog_file = tmp_path / "c.csv"
    bad = "data:image/jpeg;base64," + "*" * 20_000
    lines = ['a,"data:image/jpeg;base64,QUFB"', 'b,"DATA:,BBB"', f'c,"{bad}"']
    catalog_file.write_text("\n".join(["album_id,cover", *lines]))
    plan = plan_table(read_catalog(catalog_file, CatalogSettings()).table.to_pylist())
    *good, rejected = load(plan)
    assert list(map(shown, good)) == [b"AAA", b"BBB"]
    assert isinstance(rejected, CoverError)
    assert rejected.reason == "unreadable_file" and len(rejected.detail) < 200
    assert covers.local_cover(plan) is None


@pytest.mark.parametrize("storage_kind", ["local", "s3"])
def test_backslashes_are_read_as_slashes_if_the_path_is_missing(
    storage_kind: str, tmp_path: Path, s3: str
) -> None:
    base = str(tmp_path) if storage_kind == "local" else f"{s3}/windows"
    for name in ("covers/1.jpg", "covers/2\\.jpg", "3\\x.jpg", "3/x.jpg"):
        storage.put(f"{base}/{name}", name.encode())
    wanted = {
        r"covers\1.jpg": b"covers/1.jpg",
        r".\covers\1.jpg": b"covers/1.jpg",
        r"covers/2\.jpg": rb"covers/2\.jpg",
        r"3\x.jpg": rb"3\x.jpg",  # the literal path has precedence
        r"covers\missing.jpg": "missing_file",
    }
    found = outcomes(*({"album_id": c, "cover": f"{base}/{c}"} for c in wanted))
    assert list(map(shown, found)) == list(wanted.values())


@pytest.mark.parametrize("cover", [r"C:\x\y.jpg", "C:/x/y.jpg", r"\\server\share\y.jpg"])
def test_detail_of_an_absolute_windows_path(cover: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f"album_id,cover\na,{cover}\n")
    plan = plan_table(read_catalog(tmp_path / "c.csv", CatalogSettings()).table.to_pylist())
    (outcome,) = load(plan)
    assert isinstance(outcome, CoverError)
    assert outcome.reason == "missing_file" and "Windows path" in outcome.detail


def test_local_cover_and_web_schemes() -> None:
    def table(*cover_files: str | None) -> pa.Table:
        return plan_table({"album_id": "x", "cover": cover} for cover in cover_files)

    elsewhere = ["s3://b/k", "http://h/x", "data:,x", "gs://b/x", None]
    assert covers.local_cover(table(*elsewhere)) is None
    for cover in ("/x", "file:///x", "file:/x"):
        assert covers.local_cover(table(*elsewhere, cover)) == cover
    assert covers.web_schemes(table("/x", None)) == []
    assert covers.web_schemes(table("HTTPS://h/x", "/http://x")) == ["https"]
    assert covers.web_schemes(table("https://h/x", "http://h/x")) == ["http", "https"]


def test_outcomes_are_in_order_of_rows(tmp_path: Path) -> None:
    rows = []
    for n in range(100):
        if n % 3:
            (tmp_path / str(n)).write_bytes(b"%d" % n)
        rows.append({"album_id": str(n), "cover": str(tmp_path / str(n))})
    expected = [b"%d" % n if n % 3 else "missing_file" for n in range(100)]
    assert [shown(outcome) for outcome in outcomes(*rows)] == expected


# Repeated rows


@pytest.mark.parametrize(
    ("first", "second", "outcome", "detail"),
    [
        ("a", "a", (0,), ""),
        ("a", "copy-of-a", (0,), ""),
        ("a", "b", "conflicting_cover", "row 0"),
        ("a", "missing", "missing_file", ""),
        ("a", "folder", "unreadable_file", ""),
        ("a", None, "no_cover", ""),
        # the same path is the same cover, even one that cannot be read
        ("missing", "missing", (0,), ""),
        ("missing", "a", "conflicting_cover", "missing_file"),
        ("folder", "a", "conflicting_cover", "unreadable_file"),
        (None, "a", "conflicting_cover", "no_cover"),
        ("missing", "missing-too", "missing_file", ""),
        (None, None, "no_cover", ""),
    ],
)
def test_outcomes_of_repeated_ids(
    first: str | None, second: str | None, outcome: object, detail: str, cover_files: dict[str, str]
) -> None:
    def row(name: str | None, **others: Any) -> dict[str, Any]:
        return {"album_id": "x", "cover": name and cover_files[name], **others}

    found = outcomes(row(first), row(second, first_row=0))[1]
    assert shown(found) == outcome
    if detail:
        assert isinstance(found, CoverError) and detail in found.detail


def test_third_row_is_compared_with_the_first(cover_files: dict[str, str]) -> None:
    rows = [("a", None), ("b", 0), ("b", 0), ("copy-of-a", 0)]
    found = outcomes(
        *({"album_id": "x", "cover": cover_files[name], "first_row": first} for name, first in rows)
    )
    assert [shown(outcome) for outcome in found] == [
        b"AAA",
        *["conflicting_cover"] * 2,  # the second of them equals the other, but not the first
        (0,),
    ]


def test_rows_can_be_loaded_one_by_one(cover_files: dict[str, str]) -> None:
    """A task gets a few rows, with the location of the cover of the first row with their id."""
    rows: list[dict[str, Any]] = [
        {"album_id": "x", "cover": cover_files["a"]},
        {"album_id": "y", "cover": cover_files["b"]},
        {"album_id": "x", "cover": cover_files["copy-of-a"], "first_row": 0},
        {"album_id": "y", "cover": cover_files["a"], "first_row": 1},
    ]
    plan = plan_table(rows)
    alone = [load(plan.slice(row, 1))[0] for row in range(4)]
    assert [shown(outcome) for outcome in alone] == [b"AAA", b"BBB", (0,), "conflicting_cover"]


# Covers inside Parquet files


def embedded(tmp_path: Path, images: list[bytes | None], kind: str) -> str:
    """A Parquet catalog with image bytes, in row groups of two."""
    uri = str(tmp_path / "covers.parquet")
    if kind == "struct":
        type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array(
            [
                None if image is None else {"bytes": image, "path": f"{n}.jpg"}
                for n, image in enumerate(images)
            ],
            type_,
        )
    else:
        column = pa.array(images, {"binary": pa.binary(), "large": pa.large_binary()}[kind])
    ids = [str(n) for n in range(len(images))]
    pq.write_table(pa.table({"album_id": ids, "image": column}), uri, row_group_size=2)
    return uri


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["binary", "large", "struct"])
def test_images_in_a_parquet_file(
    kind: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_LARGE_GROUP_BYTES", 0 if large else 10**9)
    monkeypatch.setattr(dataset, "_STREAMED_ROWS", 1)
    images = [b"AAA", None, b"CCC", b"", b"AAA", b"FFF"]
    uri = embedded(tmp_path, images, kind)
    expected = ["no_cover" if image is None else image for image in images]
    plan = plan_table(read_catalog(uri, CatalogSettings()).table.to_pylist())
    found = load(plan, Source((uri,)))
    assert [shown(outcome) for outcome in found] == expected
    for start in range(6):
        for stop in range(start, 7):
            part = plan.slice(start, stop - start)
            again = load(part, Source((uri,)))
            assert list(map(shown, again)) == list(map(shown, found))[start:stop]
    some = plan.take([0, 2, 5])
    assert [shown(outcome) for outcome in load(some, Source((uri,)))] == [*(b"AAA", b"CCC", b"FFF")]


def test_row_without_bytes_is_read_from_its_path(
    tmp_path: Path, cover_files: dict[str, str]
) -> None:
    uri = str(tmp_path / "mixed.parquet")
    images = [b"AAA", None, None, None]
    paths = [cover_files["b"], cover_files["b"], "a", None]
    pq.write_table(pa.table({"album_id": list("wxyz"), "image": images, "cover": paths}), uri)
    read = read_catalog(uri, CatalogSettings())
    found = load(plan_table(read.table.to_pylist()), Source(read.files))
    assert [shown(outcome) for outcome in found] == [b"AAA", b"BBB", b"AAA", "no_cover"]


def test_large_row_group_is_read_once_and_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_LARGE_GROUP_BYTES", 2**20)
    monkeypatch.setattr(dataset, "_BUFFER_BYTES", 2**16)
    uri = str(tmp_path / "one_group.parquet")
    cover_files = [bytes([n % 256]) + os.urandom(20_000) for n in range(1000)]
    ids = [str(n) for n in range(1000)]
    pq.write_table(
        pa.table({"album_id": ids, "image": cover_files}),
        uri,
        data_page_size=2**16,
        write_batch_size=16,
    )
    read = read_catalog(uri, CatalogSettings())
    before, peak = pa.total_allocated_bytes(), 0
    found = []
    for _, outcomes_ in covers.load(plan_table(read.table.to_pylist()), Source(read.files), 50):
        peak = max(peak, pa.total_allocated_bytes() - before)
        found += [shown(outcome) for outcome in outcomes_]
    assert found == cover_files
    assert peak < sum(map(len, cover_files)) / 3


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_repeated_rows_in_and_out_of_parquet(
    kind: str, tmp_path: Path, cover_files: dict[str, str]
) -> None:
    uri = embedded(tmp_path, [b"AAA", b"AAA", b"BBB", None], kind)

    def inside(row: int, **others: Any) -> dict[str, Any]:
        return {"album_id": "x", "source": 0, "source_row": row, **others}

    def outside(name: str, **others: Any) -> dict[str, Any]:
        return {"album_id": "x", "cover": cover_files[name], **others}

    cases = [
        ((inside(0), inside(1, first_row=0)), (0,)),
        ((inside(0), inside(2, first_row=0)), "conflicting_cover"),
        ((inside(0), inside(3, first_row=0)), "no_cover"),
        ((inside(3), inside(0, first_row=0)), "conflicting_cover"),
        ((inside(0), outside("a", first_row=0)), (0,)),
        ((inside(0), outside("b", first_row=0)), "conflicting_cover"),
        ((outside("a"), inside(1, first_row=0)), (0,)),
        ((outside("missing"), inside(1, first_row=0)), "conflicting_cover"),
    ]
    for rows, expected in cases:
        assert shown(outcomes(*rows, source=Source((uri,)))[1]) == expected


@pytest.mark.parametrize(
    "positions",
    [
        [(2, 3), (0, 0), (1, 1), (1, 2), (0, 3), (2, 0), (0, 1)],
        [(0, 0), (1, 1), (2, 2)],  # consecutive rows, but not of one file
        [(0, 0), (0, 0), (0, 1)],
    ],
)
def test_several_files_and_another_column(positions: list[tuple[int, int]], tmp_path: Path) -> None:
    uris = []
    for n in range(3):
        uris.append(str(tmp_path / f"{n}.parquet"))
        pq.write_table(pa.table({"photo": [b"%d-%d" % (n, row) for row in range(4)]}), uris[-1])
    rows = [
        {"album_id": str(n), "source": file, "source_row": row}
        for n, (file, row) in enumerate(positions)
    ]
    found = outcomes(*rows, source=Source(tuple(uris), "photo"))
    assert [shown(outcome) for outcome in found] == [b"%d-%d" % position for position in positions]


# A prepared dataset


def prepared(root: Path) -> Manifest:
    """Two train shards and a test shard; the covers are re-encoded, so their hashes differ."""
    found = {}
    number = 0
    for split, parts in (("train", (2, 1)), ("dev", ()), ("test", (2,))):
        of_split = []
        for part, rows in enumerate(parts):
            records = []
            for _ in range(rows):
                records.append(
                    {
                        "album_id": f"album-{number}",
                        "row": 10 * number,  # in the catalog
                        "image": b"reencoded-%d" % number,
                        "cover_sha256": sha256(b"source-%d" % number),
                        "genres": ["Jazz"],
                        "split": split,
                        "title": f"Title {number}",
                    }
                )
                number += 1
            table = pa.Table.from_pylist(records, schema=schema.DATASET)
            path = f"{split}/part-{part:05d}.parquet"
            of_split.append(dataset.write_shard(str(root), path, table))
        found[split] = tuple(of_split)
    return Manifest(str(root), Genres(("Jazz",)), found, "id", {})


@pytest.mark.parametrize(
    ("splits", "numbers"),
    [
        (("train", "dev", "test"), [0, 1, 2, 3, 4]),
        (("test",), [3, 4]),
        (("test", "train"), [3, 4, 0, 1, 2]),
    ],
)
def test_rows_of_dataset_reader(
    splits: tuple[str, ...], numbers: list[int], tmp_path: Path
) -> None:
    reader = DatasetReader(prepared(tmp_path), splits)
    plan = pa.concat_tables(reader.parts())
    assert plan.schema.equals(covers.PLAN)
    assert plan["row"].to_pylist() == list(range(len(numbers)))
    assert plan["album_id"].to_pylist() == [f"album-{n}" for n in numbers]
    assert plan["title"].to_pylist() == [f"Title {n}" for n in numbers]
    assert plan["genres"].to_pylist() == [["Jazz"]] * len(numbers)
    assert plan["first_row"].null_count == len(numbers)
    found = load(plan, reader.source())
    assert all(isinstance(outcome, Cover) for outcome in found)
    cover_files = [outcome for outcome in found if isinstance(outcome, Cover)]
    assert [cover.data for cover in cover_files] == [b"reencoded-%d" % n for n in numbers]
    # of the source bytes, to identify the user's file
    assert [cover.sha256 for cover in cover_files] == [sha256(b"source-%d" % n) for n in numbers]
