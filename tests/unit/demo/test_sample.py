"""The drawn sample: the same every time, a fair catalog, and covers that can be learnt from."""

import csv
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from covergenre.demo.sample import GENRES, write_sample
from covergenre.errors import ConfigError, StorageError

ALBUMS = 300
SIDE = 120  # half the usual, to be quick


def digest(folder: Path) -> dict[str, str]:
    """Path inside the folder -> SHA-256 of each of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def read(catalog: Path) -> list[dict[str, str]]:
    with catalog.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample"), ALBUMS, side=SIDE)


@pytest.fixture(scope="module")
def rows(sample: Path) -> list[dict[str, str]]:
    return read(sample)


@pytest.fixture(scope="module")
def has(rows: list[dict[str, str]]) -> dict[str, NDArray[np.bool_]]:
    """Genre -> which albums have it, [albums]."""
    return {
        genre: np.array([genre in row["genres"].split("|") for row in rows]) for genre in GENRES
    }


def test_catalog_has_its_columns_and_names_every_cover(
    sample: Path, rows: list[dict[str, str]]
) -> None:
    assert sample.name == "catalog.csv"
    assert list(rows[0]) == ["album_id", "cover", "genres", "title", "artist"]
    assert [row["album_id"] for row in rows] == [f"synthetic_{i:06d}" for i in range(1, ALBUMS + 1)]
    assert rows[0]["cover"] == "covers/synthetic_000001.jpg"
    assert all(row["title"] and row["artist"] for row in rows)
    assert b"\r" not in sample.read_bytes()
    on_disk = {path.name for path in (sample.parent / "covers").iterdir()}
    assert on_disk == {Path(row["cover"]).name for row in rows}
    assert len(on_disk) == ALBUMS


def test_readme_says_that_nothing_is_real(sample: Path) -> None:
    readme = (sample.parent / "README.md").read_text(encoding="utf-8")
    assert "drawn by a program" in readme
    assert "not real" in readme
    assert f"{ALBUMS} covers" in readme


def test_every_cover_is_a_picture_of_its_own(sample: Path, rows: list[dict[str, str]]) -> None:
    seen = set()
    for row in rows:
        path = sample.parent / row["cover"]
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE))
            pixels = np.asarray(image)
        # Blurred, so that grain alone does not count as a picture.
        coarse = pixels.reshape(12, 10, 12, 10, 3).mean(axis=(1, 3))
        assert np.ptp(coarse) > 8, f"{path.name} is blank"
        seen.add(pixels.tobytes())
    assert len(seen) == ALBUMS


def test_same_seed_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    write_sample(tmp_path / "here", 12, seed=3)
    code = "from covergenre.demo.sample import *; write_sample(Path('there'), 12, seed=3)"
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert digest(tmp_path / "here") == digest(tmp_path / "there")
    assert len(digest(tmp_path / "here")) == 14


def test_a_larger_sample_extends_a_smaller_one(tmp_path: Path, sample: Path) -> None:
    small = write_sample(tmp_path, 7, side=SIDE)
    assert sample.read_text().startswith(small.read_text())
    large = digest(sample.parent)
    for name, value in digest(tmp_path).items():
        assert name.endswith((".csv", ".md")) or value == large[name]


def test_another_seed_gives_other_albums(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    other = write_sample(tmp_path, 30, seed=1)
    assert [row["genres"] for row in read(other)] != [row["genres"] for row in rows[:30]]
    pictures = set(digest(tmp_path / "covers").values())
    write_sample(tmp_path, 30, seed=0)
    assert pictures.isdisjoint(digest(tmp_path / "covers").values())


@pytest.mark.parametrize("side", [None, 33])
def test_side_is_the_side_of_the_cover(tmp_path: Path, side: int | None) -> None:
    if side is None:
        write_sample(tmp_path, 8)
    else:
        write_sample(tmp_path, 8, side=side)
    for path in (tmp_path / "covers").iterdir():
        with Image.open(path) as image:
            assert image.size == (side or 240, side or 240)


def test_genres_are_uneven_and_occur_together_more_than_by_chance(
    rows: list[dict[str, str]], has: dict[str, NDArray[np.bool_]]
) -> None:
    sizes = Counter(len(set(row["genres"].split("|"))) for row in rows)
    assert set(sizes) == {1, 2, 3}
    assert {genre for row in rows for genre in row["genres"].split("|")} == set(GENRES)
    assert len(GENRES) == 8
    counts = {genre: int(has[genre].sum()) for genre in GENRES}
    assert max(counts, key=lambda genre: counts[genre]) == "Pop"
    assert counts["Pop"] > 3 * min(counts.values())
    for one, other in (("Ambient", "Electronic"), ("Blues", "Jazz")):
        together = (has[one] & has[other]).mean()
        assert together > 1.5 * has[one].mean() * has[other].mean()


def test_artists_have_several_albums_mostly_of_one_genre(rows: list[dict[str, str]]) -> None:
    mains: dict[str, list[str]] = {}
    for row in rows:
        mains.setdefault(row["artist"], []).append(row["genres"].split("|")[0])
    assert 2 < ALBUMS / len(mains) < 8
    prolific = [genres for genres in mains.values() if len(genres) >= 4]
    top = [Counter(genres).most_common(1)[0][1] / len(genres) for genres in prolific]
    assert len(prolific) > 20
    assert 0.8 < np.mean(top) < 1
    # Artists come and go with a block of albums: none of them is in two.
    first, second = ({row["artist"] for row in part} for part in (rows[:100], rows[100:200]))
    assert first.isdisjoint(second)


def test_a_simple_classifier_learns_the_genres_but_not_all(
    sample: Path, rows: list[dict[str, str]], has: dict[str, NDArray[np.bool_]]
) -> None:
    """Tiny pixels and a histogram of colours, on covers of artists it has not seen."""
    features = []
    for row in rows:
        with Image.open(sample.parent / row["cover"]) as image:
            tiny = np.asarray(image.reduce(10), dtype=np.float64) / 255
            bins = np.asarray(image.reduce(2)).reshape(-1, 3).astype(np.int64) // 64
        histogram = np.bincount(bins @ [16, 4, 1], minlength=64) / len(bins)
        features.append(np.concatenate([tiny.ravel(), 8 * np.sqrt(histogram)]))
    X = np.stack(features)
    learn = 200  # the end of a block, so no artist is on both sides
    aucs = []
    for genre in GENRES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        model.fit(X[:learn], has[genre][:learn])
        aucs.append(roc_auc_score(has[genre][learn:], model.predict_proba(X[learn:])[:, 1]))
    assert 0.7 < np.mean(aucs) < 0.999, dict(zip(GENRES, aucs, strict=True))


@pytest.mark.parametrize(("albums", "side"), [(0, 240), (-3, 240), (5, 31)])
def test_sizes_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, albums: int, side: int
) -> None:
    with pytest.raises(ConfigError, match=r"albums: (0|-3)|side: 31"):
        write_sample(tmp_path / "out", albums, side=side)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        write_sample(place, 1)
