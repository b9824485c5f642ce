"""score without Ray: what it writes, what resuming keeps, and who can read it."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, convert_to_deltalake
from images import encoded
from outputs import read_duplicates, read_labels, read_rejected
from PIL import Image

from covergenre import inference
from covergenre.config import ScoreConfig
from covergenre.demo.sample import write_untrained_model
from covergenre.errors import ConfigError, RejectedError
from covergenre.inference.batches import load
from covergenre.inference.parts import default_part_rows
from covergenre.inference.scorer import Report
from covergenre.stages import score as score_stage
from covergenre.stages.score import Labelled, _check_rejected, score

ROWS = 20


class RandomScoring(inference.Scoring):
    """The last part first, with scores that depend on nothing but the row."""

    def __iter__(self) -> Iterator[Report]:
        plan, ranges, bundle, write = self._job
        for part, start, stop in ranges[::-1].tolist():
            ((outcomes, pixels, _),) = load(plan, start, stop, bundle.preprocessing, stop - start)
            shape = len(pixels), len(bundle.genres)
            scores = np.random.default_rng(start).random(shape, np.float32)
            report = Report(rows=outcomes.num_rows)
            report.parts.append((part, write(part, outcomes, scores)))
            yield report


@pytest.fixture(autouse=True)
def random_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "Scoring", RandomScoring)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """Ids of type int32; rows 2 and 9 are rejected, and 19 repeats row 0."""
    folder = tmp_path / "catalog"
    folder.mkdir()
    names = [f"{row}.png" for row in range(ROWS)]
    for row, name in enumerate(names):
        if row != 2:
            (folder / name).write_bytes(encoded(Image.new("RGB", (8, 8), (row, 0, 0))))
    (folder / "9.png").write_text("<html>")
    names[19] = names[0]
    table = pa.table(
        {
            "album_id": pa.array([*range(100, 119), 100], pa.int32()),
            "cover": names,
            "title": [None, *(f"Title {row}" for row in range(1, ROWS))],
            "year": pa.array([None, *range(2001, 2000 + ROWS)], pa.int16()),
            "tags": [["a", "b"]] * ROWS,
        }
    )
    pq.write_table(table, folder / "catalog.parquet")
    return folder / "catalog.parquet"


def run(model: str, catalog: Path, out: Path, **settings: Any) -> Labelled:
    defaults = {"part_rows": 8, "shared_filesystem": True}
    paths = {"model": model, "catalog": str(catalog), "out": str(out)}
    return score(ScoreConfig(**paths, **(defaults | settings)))


SCORED = [100 + row for row in range(ROWS - 1) if row not in (2, 9)]


def test_output_has_labels_ledger_and_rejected_rows(
    untrained_model: str, catalog: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(untrained_model, catalog, out, carry=("year", "tags"))
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert {name for name in files if name.endswith(".parquet")} == {
        f"part-{part:08d}.parquet" for part in range(3)
    }
    assert {name.split("/")[0] for name in files if not name.startswith("part-")} == {
        *("_ledger.json", "_SUCCESS", "_rejected", "_state")
    }
    assert json.loads((out / "_ledger.json").read_text()) == done.ledger
    assert done.ledger["reasons"] == {"missing_file": 1, "not_an_image": 1}
    labels = read_labels(out)
    assert [row["album_id"] for row in labels] == SCORED
    assert [row["year"] for row in labels[:2]] == [None, 2001]
    assert labels[1]["title"] == "Title 1" and labels[1]["artist"] is None
    assert labels[1]["tags"] == ["a", "b"]
    for row in labels:
        assert row["top_score"] == max(row["scores"].values()) == row["scores"][row["top_genre"]]
        assert row["genres"] == [name for name, value in row["scores"].items() if value >= 0.5]
    rejected = read_rejected(out)
    assert [(r["row"], r["album_id"], r["reason"]) for r in rejected] == [
        (2, 102, "missing_file"),
        (9, 109, "not_an_image"),
    ]
    assert read_duplicates(out) == [{"row": 19, "album_id": 100, "first_row": 0}]
    schema = pq.read_schema(out / "part-00000000.parquet")
    assert schema.field("album_id").type == pa.int32()
    assert schema.field("year").type == pa.int16()
    assert schema.field("scores").type == pa.map_(pa.string(), pa.float32())


def test_resumed_run_rewrites_no_part(untrained_model: str, catalog: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(untrained_model, catalog, out)
    before = {file.name: file.read_bytes() for file in out.glob("part-*")}
    inodes = {file.name: file.stat().st_ino for file in out.glob("part-*")}
    (out / "_SUCCESS").unlink()
    (out / "part-00000001.parquet").unlink()
    # As if it had been left by an attempt in which a row of part 2 could not be fetched.
    (out / "_rejected/part-00000002.jsonl").write_text("{}\n")
    (out / "part-00000002.parquet").unlink()
    run(untrained_model, catalog, out)
    assert {file.name: file.read_bytes() for file in out.glob("part-*")} == before
    assert (out / "part-00000000.parquet").stat().st_ino == inodes["part-00000000.parquet"]
    assert [row["row"] for row in read_rejected(out)] == [2, 9]


def test_resumed_run_counts_with_few_objects(
    untrained_model: str, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ledger = run(untrained_model, catalog, out).ledger
    read: list[int] = []
    count_rows = score_stage.count_rows

    def counted(out: str, parts: Any, total: Any) -> None:
        read.extend(parts.tolist())
        count_rows(out, parts, total)

    monkeypatch.setattr(score_stage, "count_rows", counted)
    counts = ("rows", "scored", "rejected", "duplicates", "reasons")

    def resumed() -> dict[str, Any]:
        (out / "_SUCCESS").unlink()
        return {name: run(untrained_model, catalog, out).ledger[name] for name in counts}

    expected = {name: ledger[name] for name in counts}
    assert resumed() == expected and read == []
    (journal,) = (out / "_state/counts").iterdir()
    lines = journal.read_text().splitlines()
    # A part that was written later, and one with other bytes than were noted.
    entry = json.loads(lines[1])
    lines[1] = json.dumps(entry | {"bytes": 1, "counts": {"scored": 999}})
    journal.write_text("\n".join(lines[:2]))
    others = {json.loads(line)["part"] for line in lines[1:]}
    assert resumed() == expected and set(read) == others
    journal.unlink()
    read.clear()
    assert resumed() == expected and read == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 64), (20_000, 64), (100_000, 384), (300_000, 1024), (10**8, 1024)]
)
def test_small_catalogs_have_small_parts(rows: int, expected: int) -> None:
    assert default_part_rows(rows) == expected


def test_ids_of_a_csv_are_text(untrained_model: str, catalog: Path, tmp_path: Path) -> None:
    rows = pq.read_table(catalog).select(["album_id", "cover"]).to_pylist()
    with (catalog.parent / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["album_id", "cover"])
        writer.writeheader()
        writer.writerows(rows)
    run(untrained_model, catalog.parent / "c.csv", tmp_path / "out")
    assert [row["album_id"] for row in read_labels(tmp_path / "out")] == [str(n) for n in SCORED]
    assert read_rejected(tmp_path / "out")[0]["album_id"] == "102"


@pytest.mark.parametrize("names", ["title", "Row", "year,YEAR"])
def test_carried_columns_must_not_collide(names: str) -> None:
    with pytest.raises(ConfigError, match="carry"):
        ScoreConfig(model="m", catalog="c", out="o", carry=names)


@pytest.fixture
def labels(untrained_model: str, catalog: Path, tmp_path: Path) -> Path:
    run(untrained_model, catalog, tmp_path / "labels", carry=("year",))
    return tmp_path / "labels"


@pytest.mark.parametrize(("rejected", "tried"), [(29, 100), (1, 3), (2, 3), (1, 9_999), (7, 7)])
def test_error_for_rejected_rows_names_a_limit_that_accepts_them(
    rejected: int, tried: int, tmp_path: Path
) -> None:
    reasons = {"missing_file": rejected}
    ledger = {"rows": tried + 5, "duplicates": 5, "rejected": rejected, "reasons": reasons}
    with pytest.raises(RejectedError) as caught:
        _check_rejected(str(tmp_path), ledger, 0.0)
    limit = re.findall(r"--max-rejected ([0-9.]+);", str(caught.value))[-1]
    _check_rejected(str(tmp_path), ledger, float(limit))


def test_pyarrow_reads_the_labels_alone(labels: Path) -> None:
    table = pyarrow.dataset.dataset(labels, format="parquet").to_table()
    assert table["album_id"].to_pylist() == SCORED
    rejected = pyarrow.dataset.dataset(labels / "_rejected", format="json").to_table()
    assert rejected["album_id"].to_pylist() == [102, 109]


def test_pandas_reads_the_labels_alone(labels: Path) -> None:
    assert list(pd.read_parquet(labels)["album_id"]) == SCORED


@pytest.mark.parametrize("pattern", ["*.parquet", "**/*.parquet", "part-*.parquet"])
def test_duckdb_reads_the_labels_alone(labels: Path, pattern: str) -> None:
    query = f"SELECT album_id, scores['Rock'] FROM '{labels}/{pattern}' ORDER BY album_id"
    assert [row[0] for row in duckdb.connect().execute(query).fetchall()] == SCORED


@pytest.mark.parametrize("pattern", ["*.parquet", "**/*.parquet"])
def test_polars_reads_the_labels_alone(labels: Path, pattern: str) -> None:
    assert pl.read_parquet(f"{labels}/{pattern}")["album_id"].to_list() == SCORED


def test_polars_refuses_the_directory_rather_than_mix_its_files(labels: Path) -> None:
    """Polars knows no rule for names that begin with an underscore."""
    with pytest.raises(pl.exceptions.InvalidOperationError):
        pl.read_parquet(labels)


def test_rejected_rows_join_the_labels_in_duckdb(labels: Path, catalog: Path) -> None:
    query = f"""
        SELECT c.album_id, r.reason FROM '{catalog}' c
        JOIN '{labels}/_rejected/*.jsonl' r ON r.album_id = c.album_id ORDER BY ALL
    """
    assert duckdb.connect().execute(query).fetchall() == [
        (102, "missing_file"),
        (109, "not_an_image"),
    ]
    assert pl.read_ndjson(f"{labels}/_rejected/*.jsonl")["row"].to_list() == [2, 9]


def test_labels_of_two_models_are_one_table(labels: Path, catalog: Path, tmp_path: Path) -> None:
    model = write_untrained_model(str(tmp_path / "other_model"), ("Ambient", "Polka"))
    other = run(model, catalog, tmp_path / "other", carry=("year",)).uri
    ids = sorted(SCORED * 2)
    both = [pyarrow.dataset.dataset(folder, format="parquet") for folder in (labels, other)]
    assert both[0].schema.equals(both[1].schema)
    table = pyarrow.dataset.dataset(both).to_table()
    assert sorted(table["album_id"].to_pylist()) == ids
    query = f"SELECT album_id FROM (FROM '{labels}/*.parquet' UNION ALL FROM '{other}/*.parquet')"
    assert sorted(row[0] for row in duckdb.connect().execute(query).fetchall()) == ids
    frames = [pl.read_parquet(f"{folder}/*.parquet") for folder in (labels, other)]
    assert sorted(pl.concat(frames)["album_id"]) == ids
    frame = pd.concat([pd.read_parquet(labels), pd.read_parquet(other)])
    assert sorted(frame["album_id"]) == ids


def test_labels_become_a_delta_table(labels: Path) -> None:
    convert_to_deltalake(labels)
    table = DeltaTable(labels)
    assert sorted(table.to_pyarrow_table()["album_id"].to_pylist()) == SCORED
