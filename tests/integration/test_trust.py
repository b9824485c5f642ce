"""Untrusted input: no code is executed, no path is made from it, and secrets are not stored."""

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import read_labels
from PIL import Image

from covergenre.config import PrepareConfig, ScoreConfig
from covergenre.errors import CatalogError, RejectedError
from covergenre.io.urls import redacted
from covergenre.models.model_card import _plain
from covergenre.stages.prepare import prepare
from covergenre.stages.score import score

pytestmark = pytest.mark.usefixtures("local_ray", "without_ray")


def catalog(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    Image.new("RGB", (40, 40), "blue").save(folder / "blue.png")
    with (folder / "catalog.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["album_id", "cover", "genres"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "catalog.csv"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("column", ["album_id", "cover", "image", "genres", "unused"])
def test_pickled_code_in_a_parquet_file_is_not_executed(
    column: str, untrained_model: str, tmp_path: Path
) -> None:
    """Ray Data's own type for Python objects unpickles what it finds."""
    columns = {"album_id": ["a"], "cover": ["b.png"], "genres": ["Rock"]}
    table = pa.table({name: values for name, values in columns.items() if name != column})
    payload = pa.array([pickle.dumps(Touch(tmp_path / "ran"))], pa.large_binary())
    metadata = {
        "ARROW:extension:name": "ray.data.arrow_pickled_object",
        "ARROW:extension:metadata": "",
    }
    field = pa.field(column, pa.large_binary(), metadata=metadata)
    file = tmp_path / "catalog.parquet"
    pq.write_table(table.append_column(field, payload), file)
    # It is what it is taken for.
    pq.read_table(file)[column].to_pylist()
    (tmp_path / "ran").unlink()

    preparing = PrepareConfig(catalog=str(file), out=str(tmp_path / "d"), min_share=0.0)
    scoring = ScoreConfig(model=untrained_model, catalog=str(file), out=str(tmp_path / "l"))
    refused = ("album_id", "cover", "image")
    stages: list[tuple[Callable[[], object], tuple[str, ...]]] = [
        (lambda: prepare(preparing), (*refused, "genres")),
        (lambda: score(scoring), refused),
    ]
    for stage, used in stages:
        # Of an unused column nothing is read, and the row's cover is not there.
        with pytest.raises((CatalogError, RejectedError)) as caught:
            stage()
        line = str(caught.value)
        assert "\n" not in line and str(tmp_path) in line
        assert ("has the extension type" in line) == (column in used)
        assert ("missing_file" in line) == (column not in used)
    assert not (tmp_path / "ran").exists()


ODD = [
    "../../../outside",
    "/etc/passwd",
    "a/b",
    "two\nlines",
    "'; DROP TABLE albums; --",
    '"quoted", and more',
    "<script>alert(1)</script>",
    "émoji 🎷",
    "=1+1",
    " spaces ",
    "x" * 10_000,
]


def test_unusual_ids_are_kept_and_never_become_paths(untrained_model: str, tmp_path: Path) -> None:
    rows = [{"album_id": odd, "cover": "red.png", "genres": "Rock"} for odd in ODD]
    rows += [rows[3], rows[7] | {"cover": "blue.png"}, rows[0] | {"album_id": ""}]
    source = catalog(tmp_path / "in", rows)
    before = {file for file in tmp_path.rglob("*") if "out" not in file.parts}
    out = tmp_path / "out"
    prepared = prepare(
        PrepareConfig(catalog=str(source), out=str(out / "dataset"), min_share=0.0)
    ).manifest
    done = score(ScoreConfig(model=untrained_model, catalog=str(source), out=str(out / "labels")))
    ledger, counts = done.ledger, prepared.counts
    assert [ledger[n] for n in ("scored", "rejected", "duplicates")] == [len(ODD), 2, 1]
    assert [counts[n] for n in ("albums", "rejected", "duplicates")] == [len(ODD), 2, 1]
    assert ledger["reasons"] == counts["reasons"] == {"conflicting_cover": 1, "null_id": 1}
    assert [row["album_id"] for row in read_labels(out / "labels")] == ODD
    albums = [
        album
        for split in ("train", "dev", "test")
        for uri in prepared.shard_uris(split)
        for album in pq.read_table(uri)["album_id"].to_pylist()
    ]
    assert sorted(albums) == sorted(ODD)
    assert {file for file in tmp_path.rglob("*") if "out" not in file.parts} == before
    names = [file.name for file in out.rglob("*")]
    assert not any(odd.strip("./") in name for name in names for odd in ODD)


def test_secrets_in_urls_are_neither_stored_nor_logged(
    untrained_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """But in _state/plan, which is the catalog's own rows."""
    secrets = ("pass1", "sign2", "pass3")
    covers = [
        f"https://somebody:{secrets[0]}@127.0.0.1/a.jpg",
        f"https://127.0.0.1/b.jpg?X-Amz-Signature={secrets[1]}",
        f"s3://key:{secrets[2]}@no-such-bucket/c.jpg",
        "red.png",
    ]
    rows = [{"album_id": str(n), "cover": c, "genres": "Rock"} for n, c in enumerate(covers)]
    source = catalog(tmp_path / "in", [*rows, rows[0], rows[1] | {"genres": ""}])
    out = tmp_path / "out"
    config = {"catalog": str(source), "covers": None}
    prepare(PrepareConfig(**config, out=str(out / "dataset"), min_share=0.0))
    done = score(ScoreConfig(**config, model=untrained_model, out=str(out / "labels")))
    assert done.ledger["rejected"] == 3
    kept = json.dumps(
        [
            pq.read_table(file).to_pylist() if file.suffix == ".parquet" else file.read_text()
            for file in out.rglob("*")
            if file.is_file()
            and "plan" not in str(file.relative_to(out))
            and file.suffix not in (".png", ".arrow")
        ],
        default=str,
    )
    kept += json.dumps([pq.read_table(f).to_pylist() for f in out.rglob("part-plan.parquet")])
    kept += "".join(capfd.readouterr())
    assert "somebody" not in kept and "***@127.0.0.1/a.jpg" in kept
    assert not any(secret in kept for secret in secrets)
    settings = PrepareConfig(catalog="s3://key:pass4@bucket/c.csv", out="x").saved()
    assert settings["catalog"] == "s3://***@bucket/c.csv"
    assert redacted("s3://key:pass4@bucket/c.csv") == settings["catalog"]


def test_genre_names_are_escaped_in_the_model_card() -> None:
    assert _plain("R&B\n# A <b>[title](http://x)</b>") == (
        r"R\&B \# A \<b\>\[title\](http://x)\</b\>"
    )
    assert _plain("Hip Hop") == "Hip Hop"
