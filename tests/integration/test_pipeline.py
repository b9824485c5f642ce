"""The four stages on a local Ray: catalog -> dataset -> model -> metrics and labels."""

import contextlib
import csv
import dataclasses
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from outputs import read_duplicates, read_labels, read_rejected
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from training_runs import BATCH_SIZE, FLAGS, losses, read_jsonl, train_config

import covergenre as cg
from covergenre import inference, schema
from covergenre.cli import main
from covergenre.cluster.workers import Workers, available_cores
from covergenre.config import EvaluateConfig, PrepareConfig, ScoreConfig
from covergenre.data.dataset import read_manifest, read_table, write_manifest
from covergenre.data.image_decoding import decode, sha256
from covergenre.errors import (
    CatalogError,
    ConfigError,
    DatasetError,
    ModelError,
    RejectedError,
    StorageError,
    UserError,
)
from covergenre.inference import local_scoring
from covergenre.io import storage
from covergenre.models.bundle import Bundle, load_model, read_bundle
from covergenre.models.networks import build_model
from covergenre.models.predictor import normalise, to_unit
from covergenre.stages.evaluate import evaluate
from covergenre.stages.prepare import prepare
from covergenre.stages.score import Labelled, score
from covergenre.stages.train import Trained, train

pytestmark = pytest.mark.usefixtures("local_ray")

Rows = list[dict[str, Any]]


@contextlib.contextmanager
def refused(error: type[UserError], code: str, fact: str) -> Iterator[None]:
    """The body raises an error of this type and code, in one line that states the fact."""
    with pytest.raises(error) as caught:
        yield
    line = str(caught.value)
    assert (caught.value.code, caught.value.exit_code) == (code, 2), line
    assert "\n" not in line and fact in line


# --- prepare -------------------------------------------------------------------------------


def test_prepare_keeps_every_album_once_with_its_genres(
    synthetic_catalog: Path, dataset: Path
) -> None:
    with synthetic_catalog.open() as file:
        source = {row["album_id"]: row for row in csv.DictReader(file)}
    manifest = read_manifest(str(dataset))
    seen: Counter[str] = Counter()
    for split in schema.SPLITS:
        for uri in manifest.shard_uris(split):
            table = read_table(uri)
            assert table.schema.equals(schema.DATASET)
            for row in table.to_pylist():
                seen[row["album_id"]] += 1
                original = source[row["album_id"]]
                assert row["split"] == split
                assert set(row["genres"]) <= set(original["genres"].split("|"))
                assert row["cover_sha256"] == sha256(
                    (synthetic_catalog.parent / original["cover"]).read_bytes()
                )
    rejected = read_rejected(dataset)
    assert set(seen.values()) == {1}
    assert len(seen) + len(rejected) == len(source)
    assert manifest.counts["rows"] == len(source)
    by_split = manifest.counts["genres_by_split"]
    for split in schema.SPLITS:
        tables = map(read_table, manifest.shard_uris(split))
        found = Counter(
            genre for table in tables for row in table["genres"].to_pylist() for genre in row
        )
        assert {genre: by_split[genre][split] for genre in by_split} == {
            genre: found[genre] for genre in manifest.genres.names
        }
    for picture in ("label_distribution.png", "genres_by_split.png"):
        assert (dataset / "_report" / picture).stat().st_size > 5_000


def test_prepare_again_changes_nothing_and_other_settings_are_refused(
    synthetic_catalog: Path, dataset: Path
) -> None:
    before = (dataset / "_manifest.json").read_bytes()
    config = PrepareConfig(
        catalog=str(synthetic_catalog), out=str(dataset), shard_rows=20, min_share=0.0
    )
    assert "already prepared" in prepare(config).summary()
    assert (dataset / "_manifest.json").read_bytes() == before
    with refused(StorageError, "other_run", str(dataset)):
        prepare(config.model_copy(update={"top_genres": 3}))


def test_prepare_rejects_bad_rows_with_reasons(tmp_path: Path) -> None:
    def cover(name: str, color: str) -> str:
        Image.new("RGB", (40, 40), color).save(tmp_path / name)
        return name

    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").touch()
    rows = [(f"album{i}", cover(f"{i}.png", "red"), "Pop") for i in range(30)]
    rows += [
        ("text", "text.jpg", "Pop"),
        ("empty", "empty.jpg", "Pop"),
        ("gone", "gone.jpg", "Pop"),
        ("", "0.png", "Pop"),
        ("nameless", "", "Pop"),
        ("unlabelled", "1.png", ""),
        ("rare", "2.png", "Polka"),
        ("album0", "1.png", "Pop"),  # the same picture under another name: a duplicate
        ("album1", cover("blue.png", "blue"), "Pop"),
    ]
    with (tmp_path / "catalog.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("album_id", "cover", "genres"), *rows])
    out = tmp_path / "dataset"
    done = prepare(
        PrepareConfig(catalog=str(tmp_path / "catalog.csv"), out=str(out), min_share=0.1)
    )
    reasons = {row["row"]: row["reason"] for row in read_rejected(out)}
    assert reasons == {
        30: "not_an_image",
        31: "empty_file",
        32: "missing_file",
        33: "null_id",
        34: "no_cover",
        35: "unlabelled",
        36: "no_selected_genre",
        38: "conflicting_cover",
    }
    assert set(reasons.values()) <= set(schema.REASONS)
    (duplicate,) = read_duplicates(out)
    assert (duplicate["row"], duplicate["first_row"]) == (37, 0)
    counts = done.manifest.counts
    assert (counts["rows"], counts["albums"], counts["rejected"], counts["duplicates"]) == (
        39,
        30,
        8,
        1,
    )


def test_prepare_reencodes_large_covers_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 255, (6, 9, 3), np.uint8)
        side = 900 if i % 2 else 200
        Image.fromarray(pixels).resize((side, side * 2 // 3)).save(tmp_path / f"{i}.png")
    lines = ["album_id,cover,genres", *(f"a{i},{i}.png,Pop" for i in range(20))]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    for keep in (False, True):
        out = tmp_path / f"keep{keep}"
        done = prepare(
            PrepareConfig(catalog=str(tmp_path / "c.csv"), out=str(out), keep_original=keep)
        )
        for split in schema.SPLITS:
            for uri in done.manifest.shard_uris(split):
                for row in read_table(uri).to_pylist():
                    source = (tmp_path / f"{row['album_id'][1:]}.png").read_bytes()
                    assert row["cover_sha256"] == sha256(source)
                    if keep or int(row["album_id"][1:]) % 2 == 0:
                        assert row["image"] == source
                    else:
                        assert Image.open(io.BytesIO(row["image"])).size == (300, 200)


def test_genre_map_and_splits_by_artist(
    synthetic_catalog: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Mapped genres get their new names, names that the catalog lacks are logged, and no artist is
    in two splits."""
    genre_map = tmp_path / "map.csv"
    genre_map.write_text("from,to\nJazz,Jazz and Blues\nBlues,Jazz and Blues\nJazzz,Jazz\n")
    manifest = prepare(
        PrepareConfig(
            catalog=str(synthetic_catalog),
            out=str(tmp_path / "out"),
            genre_map=str(genre_map),
            group_by="artist",
            min_share=0.0,
        )
    ).manifest
    assert "genre map: 2 of 3 names occur in the catalog; not found: Jazzz\n" in caplog.text
    names = manifest.genres.names
    assert "Jazz and Blues" in names and not {"Jazz", "Blues"} & set(names)
    splits: dict[str, set[str]] = {}
    for split in schema.SPLITS:
        for uri in manifest.shard_uris(split):
            for row in read_table(uri).to_pylist():
                splits.setdefault(row["artist"], set()).add(split)
    assert len(splits) > 10
    assert all(len(found) == 1 for found in splits.values())


# --- train ---------------------------------------------------------------------------------


def test_model_directory_is_complete_and_holds_the_best_epoch(trained_model: Path) -> None:
    bundle = read_bundle(str(trained_model))
    assert set(bundle.files) | {"bundle.json"} == {p.name for p in trained_model.iterdir()}
    history = read_jsonl(trained_model / "history.jsonl")
    best = max(history, key=lambda record: record["dev_pr_auc_micro"])
    assert json.loads((trained_model / "metrics.json").read_text()) == best
    assert not trained_model.with_name(f"{trained_model.name}.training").exists()
    assert f"epoch {best['epoch']}" in (trained_model / "README.md").read_text()


def test_training_lowers_the_loss(trained_model: Path) -> None:
    assert np.mean(losses(trained_model)[-4:]) < np.mean(losses(trained_model)[:4])


def test_training_again_is_done_and_other_settings_are_refused(
    dataset: Path, trained_model: Path
) -> None:
    again = train(train_config(dataset, trained_model, workers=2))
    assert "already trained" in again.summary()
    with refused(StorageError, "other_run", str(trained_model)):
        train(train_config(dataset, trained_model, batch_size=8))


def test_pretrained_weights_freezing_and_the_seed_reach_the_workers(
    trained_model: Path, frozen_run: Trained
) -> None:
    first, then = (load_model(read_bundle(str(p))) for p in (trained_model, frozen_run.uri))
    then_backbone = then.backbone.state_dict()
    for name, tensor in first.backbone.state_dict().items():
        assert tensor.equal(then_backbone[name]), name
    # The first step of Adam changes each weight by the learning rate, 0.001, or less.
    genres = read_bundle(frozen_run.uri).genres
    for seed in (0, 1):
        drawn = build_model("tiny", len(genres), seed=seed).head.parameters()
        pairs = zip(drawn, then.head.parameters(), strict=True)
        moved = [(a - b).abs().max().item() for a, b in pairs]
        assert max(moved) > 0
        assert (max(moved) < 0.0011) == (seed == 1), (seed, moved)


# --- evaluate ------------------------------------------------------------------------------


def test_evaluate_counts_every_album_once(
    dataset: Path, trained_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "metrics"
    evaluate(
        EvaluateConfig(
            model=str(trained_model),
            dataset=str(dataset),
            out=str(out),
            split="train",
            workers=3,
            batch_size=7,
        )
    )
    manifest = read_manifest(str(dataset))
    expected = Counter(
        row["album_id"]
        for uri in manifest.shard_uris("train")
        for row in read_table(uri).to_pylist()
    )
    predictions = read_labels(out)
    assert Counter(row["album_id"] for row in predictions) == expected
    metrics = json.loads((out / "_metrics.json").read_text())
    assert metrics["albums"] == len(predictions) == manifest.rows("train")

    names = manifest.genres.names
    truth = manifest.genres.multi_hot([row["true_genres"] for row in predictions])
    scores = np.array([[row["scores"][g] for g in names] for row in predictions])
    assert metrics["roc_auc_micro"] == pytest.approx(roc_auc_score(truth, scores, average="micro"))
    assert metrics["pr_auc_micro"] == pytest.approx(
        average_precision_score(truth, scores, average="micro")
    )
    both = [j for j in range(len(names)) if 0 < truth[:, j].sum() < len(truth)]
    assert metrics["roc_auc_macro"] == pytest.approx(
        roc_auc_score(truth[:, both], scores[:, both], average="macro")
    )
    assert metrics["pr_auc_macro"] == pytest.approx(
        average_precision_score(truth[:, both], scores[:, both], average="macro")
    )


def damaged(root: Path, copy: Path, name: str) -> str:
    """A copy of a folder, with one file's middle overwritten."""
    shutil.copytree(root, copy)
    data = bytearray((copy / name).read_bytes())
    data[200:-200] = bytes(len(data) - 400)
    (copy / name).write_bytes(data)
    return str(copy)


def test_damaged_file_is_one_line(dataset: Path, trained_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = damaged(trained_model, tmp_path / "model", "model.safetensors")
    with refused(ModelError, "changed", "model.safetensors"):
        evaluate(EvaluateConfig(model=model, dataset=str(dataset), out=str(out)))
    with refused(ModelError, "changed", "model.safetensors"):
        score(ScoreConfig(model=model, catalog=str(dataset), out=str(out)))
    assert not out.exists()
    # Found by a task on the cluster, and reported as if it had been found here.
    broken = damaged(dataset, tmp_path / "dataset", "train/part-00001.parquet")
    with refused(StorageError, "", "part-00001.parquet"):
        evaluate(
            EvaluateConfig(model=str(trained_model), dataset=broken, out=str(out), split="train")
        )


# --- score ---------------------------------------------------------------------------------


def by_hand(bundle: Bundle, covers: list[bytes]) -> NDArray[np.float32]:
    """Scores without Ray, cover by cover."""
    model = load_model(bundle)
    out = []
    with torch.inference_mode():
        for cover in covers:
            pixels = decode(cover, bundle.preprocessing)[None]
            images = normalise(to_unit(pixels, "cpu"), bundle.preprocessing)
            out.append(model(images).sigmoid().numpy()[0])
    return np.array(out)


def messy_catalog(synthetic_catalog: Path, folder: Path) -> Path:
    """The synthetic covers, and rows that are missing, damaged or repeated; absolute paths."""
    with synthetic_catalog.open() as file:
        rows = [
            (r["album_id"], str(synthetic_catalog.parent / r["cover"]))
            for r in csv.DictReader(file)
        ]
    (folder / "copy.jpg").write_bytes(Path(rows[3][1]).read_bytes())
    (folder / "broken.jpg").write_bytes(Path(rows[4][1]).read_bytes()[:900])
    rows[40:40] = [("gone", str(folder / "gone.jpg")), ("broken", str(folder / "broken.jpg"))]
    rows += [
        (rows[3][0], str(folder / "copy.jpg")),
        (rows[3][0], rows[5][1]),
        ("", rows[6][1]),
        (rows[7][0], rows[7][1]),
    ]
    catalog = folder / "messy.csv"
    with catalog.open("w", newline="") as file:
        csv.writer(file).writerows([("album_id", "cover"), *rows])
    return catalog


def test_score_accounts_for_every_row_and_matches_scores_computed_without_ray(
    synthetic_catalog: Path, trained_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = messy_catalog(synthetic_catalog, tmp_path)
    out = tmp_path / "labels"
    config = ScoreConfig(
        model=str(trained_model), catalog=str(catalog), out=str(out), part_rows=50, batch_size=8
    )
    done = score(config.model_copy(update={"workers": 2}))
    with catalog.open() as file:
        source = list(csv.DictReader(file))
    labels, rejected = read_labels(out), read_rejected(out)
    n = len(source)
    assert done.ledger["rows"] == n
    assert {r["row"]: r["reason"] for r in rejected} == {
        40: "missing_file",
        41: "truncated_image",
        n - 3: "conflicting_cover",
        n - 2: "null_id",
    }
    duplicates = read_duplicates(out)
    assert {(d["row"], d["first_row"]) for d in duplicates} == {(n - 4, 3), (n - 1, 7)}
    assert (out / "_SUCCESS").exists()
    assert (done.ledger["scored"], done.ledger["rejected"], done.ledger["duplicates"]) == (
        len(labels),
        4,
        2,
    )
    every = [r["row"] for r in [*labels, *rejected, *duplicates]]
    assert sorted(every) == list(range(n))

    bundle = read_bundle(str(trained_model))
    expected = by_hand(bundle, [Path(source[r["row"]]["cover"]).read_bytes() for r in labels])
    got = np.array([[r["scores"][g] for g in bundle.genres.names] for r in labels])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for row in labels:
        assert row["genres"] == [g for g in bundle.genres.names if row["scores"][g] >= 0.5]
        assert row["weights_id"] == bundle.weights_id

    # A small job without Ray writes the same bytes, with as many threads as each worker had.
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, available_cores() // 2))
    with monkeypatch.context() as patch:
        patch.setattr(local_scoring, "is_small_job", lambda *_: True)
        alone = score(config.model_copy(update={"out": str(tmp_path / "alone")}))
    torch.set_num_threads(threads)
    assert alone.ledger["rows"] == n
    for name in (*(f.name for f in out.glob("part-*")), "_rejected/part-00000000.jsonl"):
        assert (tmp_path / "alone" / name).read_bytes() == (out / name).read_bytes(), name

    # Resumed: a lost part is written again byte for byte, whatever the number of workers.
    lost = out / "part-00000001.parquet"
    before = lost.read_bytes()
    lost.unlink()
    (out / "_SUCCESS").unlink()
    again = score(config)
    assert lost.read_bytes() == before
    assert again.ledger["scored"] == len(labels)
    assert "already labeled" in score(config).summary()


@pytest.mark.usefixtures("without_ray")
def test_too_many_rejected_rows_fail_until_the_limit_is_raised(
    synthetic_catalog: Path, trained_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with synthetic_catalog.open() as file:
        good = next(csv.DictReader(file))["cover"]
    catalog, out = tmp_path / "catalog.csv", tmp_path / "labels"
    covers = [str(synthetic_catalog.parent / good), "gone.jpg", "gone too.jpg", "gs://bucket/a.jpg"]
    rows = [(f"album {n}", cover) for n, cover in enumerate([*covers, covers[0]])]
    with catalog.open("w", newline="") as file:
        csv.writer(file).writerows([("album_id", "cover"), *rows, rows[0]])

    def run(limit: float | None, catalog: Path = catalog, out: Path = out) -> Labelled:
        given = {"model": str(trained_model), "catalog": str(catalog), "out": str(out)}
        return score(ScoreConfig(**given, max_rejected=limit))

    with pytest.raises(RejectedError) as caught:
        run(0.5)
    line = str(caught.value)
    assert "3 of 5 rows were rejected (60.0%), over --max-rejected 0.5: " in line
    assert "\n" not in line and caught.value.exit_code == 3
    ledger = json.loads((out / "_ledger.json").read_text())
    assert (ledger["rows"], ledger["scored"], ledger["duplicates"]) == (6, 2, 1)
    assert not (out / "_SUCCESS").exists()

    monkeypatch.setattr(inference, "Scoring", None)  # nothing is scored again
    with pytest.raises(RejectedError):
        run(0.5)
    assert json.loads((out / "_ledger.json").read_text()) == ledger
    assert "rejected (60.0%)" in run(0.6).summary()
    assert (out / "_SUCCESS").exists()
    assert "already labeled" in run(None).summary()
    with pytest.raises(RejectedError):
        run(0.5)
    assert not (out / "_SUCCESS").exists()


@pytest.mark.usefixtures("without_ray")
def test_rejecting_every_row_is_an_error_unless_allowed(
    trained_model: Path, tmp_path: Path
) -> None:
    catalog = tmp_path / "catalog.csv"
    catalog.write_text("album_id,cover\na,gone.jpg\nb,gone.jpg\na,gone.jpg\n")
    config = ScoreConfig(model=str(trained_model), catalog=str(catalog), out=str(tmp_path / "out"))
    with pytest.raises(RejectedError) as caught:
        score(config)
    assert "2 of 2" in str(caught.value)
    done = score(config.model_copy(update={"max_rejected": 1.0}))
    assert done.ledger["scored"] == 0 and (tmp_path / "out" / "_SUCCESS").exists()
    assert "warning: nothing was labeled" in done.summary()
    (tmp_path / "page.jpg").write_text("<html>")
    catalog.write_text("album_id,cover\na,page.jpg\n")
    done = score(config.model_copy(update={"out": str(tmp_path / "no images")}))
    assert done.ledger["reasons"] == {"not_an_image": 1}


@pytest.mark.usefixtures("without_ray")
def test_scoring_a_dataset_scores_all_its_splits(
    dataset: Path, trained_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    score(ScoreConfig(model=str(trained_model), catalog=str(dataset), out=str(out)))
    manifest = read_manifest(str(dataset))
    rows = [
        row
        for split in schema.SPLITS
        for uri in manifest.shard_uris(split)
        for row in read_table(uri).to_pylist()
    ]
    labels = read_labels(out)
    assert [r["album_id"] for r in labels] == [r["album_id"] for r in rows]
    assert [r["cover_sha256"] for r in labels] == [r["cover_sha256"] for r in rows]
    assert [r["row"] for r in labels] == list(range(len(rows)))


@pytest.mark.usefixtures("without_ray")
def test_covers_stored_in_parquet_are_scored(
    synthetic_catalog: Path, trained_model: Path, tmp_path: Path
) -> None:
    import pyarrow as pa

    with synthetic_catalog.open() as file:
        source = list(csv.DictReader(file))[:60]
    images = [(synthetic_catalog.parent / row["cover"]).read_bytes() for row in source]
    images[10] = b""
    table = pa.table(
        {"album_id": [r["album_id"] for r in source], "image": pa.array(images, pa.large_binary())}
    )
    for part in range(2):
        pq.write_table(table.slice(part * 30, 30), tmp_path / f"part{part}.parquet")
    out = tmp_path / "labels"
    done = score(
        ScoreConfig(
            model=str(trained_model),
            catalog=str(tmp_path / "*.parquet"),
            out=str(out),
            part_rows=25,
        )
    )
    assert done.ledger["reasons"] == {"empty_file": 1}
    assert [r["album_id"] for r in read_labels(out)] == [
        r["album_id"] for i, r in enumerate(source) if i != 10
    ]


@pytest.mark.commands
@pytest.mark.usefixtures("local_training")
def test_all_stages_on_s3(s3: str, synthetic_catalog: Path, tmp_path: Path) -> None:
    """Catalog, covers, settings, dataset, model, metrics and labels: nothing is on a local disk."""
    root = f"{s3}/{tmp_path.name}"

    def run(*arguments: str) -> None:
        main([*arguments])

    for name in (
        "catalog.csv",
        *(f"covers/{f.name}" for f in synthetic_catalog.parent.glob("*/*")),
    ):
        storage.put_file(f"{root}/catalog/{name}", synthetic_catalog.parent / name)
    catalog = f"{root}/catalog/catalog.csv"
    storage.put(f"{root}/prepare.yaml", b"min_share: 0\nshard_rows: 20\n")
    run("prepare", catalog, "--out", f"{root}/dataset", "--config", f"{root}/prepare.yaml")
    run("train", f"{root}/dataset", "--out", f"{root}/model", *FLAGS, "--workers", "1")
    metrics = ("--out", f"{root}/metrics", "--split", "dev")
    run("evaluate", f"{root}/model", f"{root}/dataset", *metrics)
    measured = storage.read_json(f"{root}/metrics/_metrics.json")
    best = storage.read_json(f"{root}/model/metrics.json")
    for name in ("roc_auc_micro", "roc_auc_macro", "pr_auc_micro", "pr_auc_macro", "recall"):
        assert best[f"dev_{name}"] == pytest.approx(measured[name], abs=1e-6)
    run("score", f"{root}/model", catalog, "--out", f"{root}/labels")
    ledger = storage.read_json(f"{root}/labels/_ledger.json")
    assert (ledger["rows"], ledger["scored"]) == (150, 150)
    held = storage.list_sizes(root)
    assert {name.split("/")[0] for name in held} == {
        *("catalog", "prepare.yaml", "dataset", "model", "metrics", "labels")
    }
    # The same covers from a local disk have the same scores.
    labels = cg.read_labels(f"{root}/labels").to_pylist()
    covers = [synthetic_catalog.parent / "covers" / f"{row['album_id']}.jpg" for row in labels]
    scores = cg.load_model(f"{root}/model", device="cpu").predict(covers)
    found = [[dict(row["scores"])[genre] for genre in scores.genres] for row in labels]
    np.testing.assert_allclose(scores, found, atol=1e-5)


@pytest.mark.commands
def test_two_workers_on_s3_compute_what_one_computes(
    s3: str, dataset: Path, trained_model: Path, tmp_path: Path
) -> None:
    root = f"{s3}/{tmp_path.name}"
    for file in (file for file in dataset.rglob("*") if file.is_file()):
        storage.put_file(f"{root}/dataset/{file.relative_to(dataset)}", file)
    main(["train", f"{root}/dataset", "--out", f"{root}/model", *FLAGS, "--workers", "2"])
    model = tmp_path / "model"
    model.mkdir()
    for name in ("history.jsonl", "steps.jsonl"):
        (model / name).write_bytes(storage.read_bytes(f"{root}/model/{name}"))
    rows = read_manifest(f"{root}/dataset").rows("train")
    assert rows % BATCH_SIZE == 1
    assert len(losses(trained_model)) == len(losses(model)) == 2 * -(-rows // BATCH_SIZE)
    np.testing.assert_allclose(losses(trained_model), losses(model), atol=1e-4)
    histories = [read_jsonl(m / "history.jsonl") for m in (trained_model, model)]
    for one, two in zip(*histories, strict=True):
        assert one["dev_loss"] == pytest.approx(two["dev_loss"], abs=1e-4)
        assert one["dev_pr_auc_micro"] == pytest.approx(two["dev_pr_auc_micro"], abs=1e-2)
    (best,) = (r for r in histories[1] if r == storage.read_json(f"{root}/model/metrics.json"))
    assert best["best"]


# --- a user's mistakes ---------------------------------------------------------------------


def test_user_error_is_one_line(
    synthetic_catalog: Path, dataset: Path, trained_model: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    catalog, model = str(synthetic_catalog), str(trained_model)
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "thesis.txt").touch()
    with refused(StorageError, "not_empty", "thesis.txt"):
        prepare(PrepareConfig(catalog=catalog, out=str(busy)))
    with refused(StorageError, "not_empty", "thesis.txt"):
        train(train_config(dataset, busy))
    with refused(StorageError, "not_found", "none.csv"):
        prepare(PrepareConfig(catalog=str(tmp_path / "none.csv"), out=out))
    with refused(CatalogError, "no_column", "--genres-column"):
        prepare(PrepareConfig(catalog=catalog, out=out, genres_column="genre"))
    with refused(ConfigError, "min_share_too_high", "--min-share"):
        prepare(PrepareConfig(catalog=catalog, out=out, min_share=1.0))
    with refused(DatasetError, "no_manifest", str(synthetic_catalog.parent)):
        train(train_config(synthetic_catalog.parent, tmp_path / "m"))
    with refused(ModelError, "not_a_model", str(dataset)):
        score(ScoreConfig(model=str(dataset), catalog=catalog, out=out))
    with refused(ConfigError, "too_many_workers", "--workers 50"):
        score(ScoreConfig(model=model, catalog=catalog, out=out, workers=50))
    assert not (tmp_path / "out" / "labels").exists()
    shutil.rmtree(out)
    # Four would leave their readers no CPU to decode on.
    with refused(ConfigError, "too_many_workers", "--workers 4"):
        train(train_config(dataset, tmp_path / "m", workers=4))


def test_batch_smaller_than_the_number_of_workers_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Workers(count=2, use_gpu=True, cpus=0.5, per_node=2)  # one for each GPU
    monkeypatch.setattr("covergenre.stages.train.training_workers", lambda config: two)
    with refused(ConfigError, "batch_size", "--batch-size 1"):
        train(train_config(dataset, tmp_path / "m", batch_size=1))


def test_empty_dev_split_is_an_error(dataset: Path, tmp_path: Path) -> None:
    manifest = read_manifest(str(dataset))
    without_dev = manifest.shards | {"dev": ()}
    copy = dataclasses.replace(manifest, uri=str(tmp_path / "no_dev"), shards=without_dev)
    write_manifest(copy, {})
    with refused(DatasetError, "empty_split", "dev"):
        train(train_config(tmp_path / "no_dev", tmp_path / "m"))
