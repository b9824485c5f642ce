"""The Python API without Ray: models, scores, datasets and labels."""

import hashlib
import inspect
import io
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from images import encoded
from PIL import Image

import covergenre as cg
from covergenre import schema
from covergenre.api.images import Transform
from covergenre.config import (
    EvaluateConfig,
    PrepareConfig,
    ScoreConfig,
    StageConfig,
    TrainConfig,
)
from covergenre.data import dataset as shards
from covergenre.data import image_decoding
from covergenre.data.dataset import Manifest
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.demo.sample import write_sample
from covergenre.errors import (
    ConfigError,
    DatasetError,
    ImageError,
    ModelError,
    StorageError,
)
from covergenre.io import storage
from covergenre.metrics import multilabel_metrics
from covergenre.models.networks import build_model
from covergenre.models.predictor import normalise, to_unit
from covergenre.progress import Progress
from covergenre.registry import MODELS
from covergenre.stages import evaluate as evaluate_stage
from covergenre.stages import prepare as prepare_stage
from covergenre.stages import score as score_stage
from covergenre.stages import train as train_stage
from covergenre.stages.evaluate import Evaluated
from covergenre.stages.prepare import Prepared
from covergenre.stages.score import Labelled
from covergenre.stages.train import Trained

GENRES = ("Ambient", "Jazz", "Rock")


@pytest.fixture(scope="module")
def covers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve JPEG files."""
    catalog = write_sample(tmp_path_factory.mktemp("sample"), 12, side=96)
    return sorted((catalog.parent / "covers").iterdir())


@pytest.fixture(scope="module")
def large_jpeg() -> bytes:
    """One that the pipeline decodes at half its size."""
    noise = np.random.default_rng(0).integers(0, 256, (75, 100, 3), np.uint8)
    image = Image.fromarray(noise).resize((2000, 1500), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", exif=_orientation(6))


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.fixture(scope="module")
def model(untrained_model: str) -> cg.Model:
    return cg.load_model(untrained_model, device="cpu")


def write_dataset(uri: str, covers: list[Path]) -> str:
    """A dataset as prepare writes it: two shards of train, in small row groups; dev is empty."""
    genres = Genres(GENRES)
    rows = [
        {
            "album_id": cover.stem,
            "row": row,
            "image": cover.read_bytes(),
            "cover_sha256": hashlib.sha256(cover.read_bytes()).hexdigest(),
            "genres": [GENRES[row % 3]],
            "split": "train",
            "title": f"Title {row}",
        }
        for row, cover in enumerate(covers)
    ]
    parts = [
        shards.write_shard(
            uri,
            f"train/part-{number:05d}.parquet",
            pa.Table.from_pylist(part, schema=schema.DATASET),
        )
        for number, part in enumerate((rows[:5], rows[5:]))
    ]
    split = {"train": tuple(parts), "dev": (), "test": ()}
    id_ = shards.dataset_id(genres, split)
    shards.write_manifest(Manifest(uri, genres, split, id_, {}), {})
    return uri


@pytest.fixture
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 2)


@pytest.fixture
def prepared(small_row_groups: None, tmp_path: Path, covers: list[Path]) -> str:
    return write_dataset(str(tmp_path / "dataset"), covers)


def run_python(code: str, **environment: str) -> str:
    """Standard output and error of a separate Python process, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_loads_no_slow_packages() -> None:
    loaded = run_python("import sys, covergenre; print(*sys.modules)").split()
    heavy = {"numpy", "pandas", "PIL", "pyarrow", "pydantic", "ray", "sklearn", "torch", "boto3"}
    assert not heavy & set(loaded)
    assert [name for name in loaded if name.startswith("covergenre")] == ["covergenre"]


def test_every_public_name_exists_and_is_listed() -> None:
    assert sorted(cg.__all__) == cg.__all__
    assert set(cg.__all__) <= set(dir(cg))
    for name in cg.__all__:
        assert getattr(cg, name) is not None
    with pytest.raises(AttributeError):
        cg.load_modell  # noqa: B018


def test_import_load_and_predict_change_nothing_in_the_process(
    untrained_model: str, covers: list[Path]
) -> None:
    code = f"""
        import logging, os, signal, sys, threading

        def state():
            return (
                dict(os.environ),
                {{number: signal.getsignal(number) for number in signal.valid_signals()}},
                logging.root.handlers[:],
                logging.root.level,
                sys.excepthook,
                os.getcwd(),
                os.stat(1),
                os.stat(2),
            )

        import torch  # changes settings itself
        before = state()
        import covergenre as cg
        model = cg.load_model({untrained_model!r}, device="cpu")
        assert len(model.predict([{str(covers[0])!r}, b"x"], errors="nan")) == 2
        assert state() == before
        assert not {{"ray", "pandas", "matplotlib"}} & set(sys.modules)
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    """
    assert run_python(code) == ""


def test_predict_takes_any_mix_of_covers(
    model: cg.Model, covers: list[Path], untrained_model: str
) -> None:
    path, data = covers[0], covers[0].read_bytes()
    image = Image.open(io.BytesIO(data))
    mix: list[Any] = [str(path), path, data, image, image, bytearray(data), path.as_uri()]
    scores = model.predict(mix)
    assert len(scores) == 7 and scores.shape == (7, len(model.genres))
    assert scores.values.dtype == np.float32
    np.testing.assert_allclose(scores, np.tile(scores[0], (7, 1)), atol=1e-6)
    assert (scores.values > 0).all() and (scores.values < 1).all()
    assert scores.genres == model.genres
    assert scores.names[:2] == [str(path)] * 2 and scores.names[2:4] == [
        "<bytes 2>",
        "<JpegImageFile 3>",
    ]
    # In memory
    rgb = image_decoding.decode_rgb(data)
    pixels = np.asarray(rgb)
    in_memory = model.predict([rgb, pixels, np.dstack([pixels, np.full_like(pixels[..., 0], 255)])])
    np.testing.assert_allclose(in_memory, scores[:3], atol=1e-6)
    grey = np.asarray(rgb.convert("L"))
    greys = model.predict([grey, grey[..., None], np.stack([grey] * 3, -1)])
    np.testing.assert_allclose(greys, np.tile(greys[0], (3, 1)), atol=1e-6)


def test_predict_takes_one_cover_a_batch_of_pixels_and_a_generator(
    model: cg.Model, covers: list[Path]
) -> None:
    expected = model.predict(covers, batch_size=5).values
    np.testing.assert_allclose(model.predict(iter(covers), batch_size=1), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(str(covers[3])), expected[3:4], atol=1e-6)
    with Image.open(covers[3]) as image:
        one = model.predict(image)
    np.testing.assert_allclose(one, expected[3:4], atol=1e-6)
    assert one.names == [str(covers[3])]
    pixels = np.stack([np.asarray(image_decoding.decode_rgb(c.read_bytes())) for c in covers])
    np.testing.assert_allclose(model.predict(pixels), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(pixels[3]), expected[3:4], atol=1e-6)
    assert model.predict([]).shape == (0, len(model.genres))
    assert model.predict([]).top(2) == [] and model.predict([]).labels() == []


def test_predict_reads_s3(model: cg.Model, covers: list[Path], s3: str) -> None:
    uri = f"{s3}/api/a.jpg"
    storage.put(uri, covers[0].read_bytes())
    np.testing.assert_array_equal(model.predict([uri]), model.predict([covers[0]]))


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("missing.jpg", "missing_file"),
        (Path("missing.jpg"), "missing_file"),
        (b"not an image", "not_an_image"),
        (b"", "empty_file"),
        ("http://127.0.0.1:9/a.jpg", "address_refused"),
        ("gs://bucket/a.jpg", "unsupported_scheme"),
        (None, "no_cover"),
        (3, "not_an_image"),
        (np.zeros((4, 4, 3), np.float32), "not_an_image"),
        (np.zeros((4, 4, 2), np.uint8), "not_an_image"),
    ],
)
def test_bad_cover_is_an_error_with_its_index_or_nan(
    model: cg.Model, covers: list[Path], bad: Any, code: str
) -> None:
    with pytest.raises(ImageError) as raised:
        model.predict([*covers[:3], bad, covers[4]], batch_size=2)
    assert (raised.value.index, raised.value.code) == (3, code)
    assert "\n" not in str(raised.value)
    scores = model.predict([covers[0], bad, covers[1]], errors="nan")
    assert np.isnan(scores.values).all(axis=1).tolist() == [False, True, False]
    reasons = scores.reasons
    assert reasons[0] is None and reasons[1] is not None and reasons[1].startswith(code)
    assert scores.labels()[1] == [] and scores.top(2)[1] == []
    assert np.isnan(model.embed([bad], errors="nan")).all()


def test_invalid_arguments_of_predict(model: cg.Model) -> None:
    for arguments in ({"errors": "ignore"}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            model.predict([], **arguments)


def test_predict_reports_progress_to_callbacks(
    model: cg.Model, covers: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[cg.ProgressEvent] = []
    model.predict(covers, batch_size=5, callbacks=[events.append])
    assert [(event.done, event.total) for event in events] == [(5, 12), (10, 12), (12, 12)]
    model.predict(covers, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""


def test_scores_have_the_same_bits_alone_and_in_any_batch(
    model: cg.Model, covers: list[Path]
) -> None:
    scores = model.predict(covers).values
    assert np.array_equal(model.predict(covers[7]).values, scores[[7]])
    mix = model.predict([covers[3], b"damaged", covers[1]], batch_size=2, errors="nan").values
    assert np.array_equal(mix[[0, 2]], scores[[3, 1]])


def test_embed_gives_the_input_of_the_last_layer(model: cg.Model, covers: list[Path]) -> None:
    features = model.embed(covers[:3])
    assert features.shape == (3, 64) and features.dtype == np.float32
    with torch.inference_mode():
        logits = model.module.head[-1](torch.from_numpy(features))  # type: ignore[index]
    np.testing.assert_allclose(logits.sigmoid().numpy(), model.predict(covers[:3]), atol=1e-6)


@pytest.mark.parametrize("opened", ["bytes", "file", "memory"])
def test_transform_is_the_preprocessing_of_the_pipeline(
    model: cg.Model, large_jpeg: bytes, opened: str, tmp_path: Path
) -> None:
    """Also of a JPEG so large that the pipeline decodes it at half its size."""
    spec = Preprocessing()
    pixels = image_decoding.decode(large_jpeg, spec)
    (tmp_path / "large.jpg").write_bytes(large_jpeg)
    image: Any = large_jpeg
    if opened != "bytes":
        file = tmp_path / "large.jpg" if opened == "file" else io.BytesIO(large_jpeg)
        image = Image.open(file)
    tensor = model.transform(image)
    assert (tensor.shape, tensor.dtype) == ((3, 224, 224), torch.float32)
    torch.testing.assert_close(
        tensor, normalise(to_unit(pixels[None], "cpu"), spec)[0], rtol=0, atol=0
    )
    assert torch.equal(pickle.loads(pickle.dumps(model.transform))(large_jpeg), tensor)
    if isinstance(image, Image.Image):  # which the caller still can use
        assert image.size == (2000, 1500)
        image.load()
        assert (model.transform(image) - tensor).abs().mean() < 0.02
    with torch.inference_mode():
        logits = model.module(tensor[None])
    np.testing.assert_allclose(logits.sigmoid().numpy(), model.predict(large_jpeg), atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_features_for_its_last_layer(name: str) -> None:
    with torch.device("meta"):  # shapes only
        network = build_model(name, 3).eval()
        features = network.embed(torch.empty(2, 3, 224, 224))
    last = [layer for layer in network.head.modules() if isinstance(layer, torch.nn.Linear)][-1]
    assert features.shape == (2, network.num_features) == (2, last.in_features)


def test_module_is_in_eval_mode(model: cg.Model) -> None:
    assert isinstance(model.module, torch.nn.Module)
    assert not any(module.training for module in model.module.modules())


def test_model_attributes_are_those_of_its_directory(model: cg.Model, untrained_model: str) -> None:
    assert model.uri == untrained_model and model.name == "tiny"
    assert sorted(model.thresholds) == list(model.genres)
    assert len(model.weights_id) == 16
    assert model.config == {}
    assert untrained_model in repr(model) and "\n" not in repr(model)


def test_models_are_loaded_from_paths_and_s3(
    model: cg.Model, untrained_model: str, covers: list[Path], s3: str
) -> None:
    uri = f"{s3}/api/model"
    for file in Path(untrained_model).iterdir():
        storage.put(f"{uri}/{file.name}", file.read_bytes())
    for directory in (Path(untrained_model), uri):
        loaded = cg.load_model(directory)
        np.testing.assert_array_equal(loaded.predict(covers[0]), model.predict(covers[0]))


def test_load_model_raises_for_invalid_directories(untrained_model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        cg.load_model(tmp_path)
    with pytest.raises(ConfigError) as raised:
        cg.load_model(untrained_model, device="cuda:99")
    assert raised.value.code == "no_device"


@pytest.fixture
def scores() -> cg.Scores:
    values = np.array([[0.1, 0.9, 0.5], [0.4, 0.3, 0.2], [np.nan] * 3], np.float32)
    return cg.Scores(
        values, GENRES, dict.fromkeys(GENRES, 0.5), ["a.jpg", "b<b>.jpg", "c"], [None, None, "why"]
    )


def test_scores_are_an_array(scores: cg.Scores) -> None:
    assert np.asarray(scores) is scores.values
    assert np.asarray(scores, np.float64).dtype == np.float64
    assert np.array(scores) is not scores.values
    assert np.nanmax(scores) == np.float32(0.9)
    assert scores[0].tolist() == scores.values[0].tolist()
    assert scores["Jazz"][:2].tolist() == scores.values[:2, 1].tolist()
    with pytest.raises(KeyError):
        scores["Jaz"]
    with pytest.raises(IndexError):
        scores[3]
    for key in (slice(1, 2), [1], np.array([False, True, False])):
        part = scores[key]
        assert (part.names, part.reasons, part.shape) == (["b<b>.jpg"], [None], (1, 3))
    assert [row.tolist() for row in scores][1] == scores.values[1].tolist()


def test_labels_are_the_genres_that_reach_their_threshold(scores: cg.Scores) -> None:
    assert scores.labels() == [["Jazz", "Rock"], [], []]
    assert scores.labels(0.3) == [["Jazz", "Rock"], ["Ambient", "Jazz"], []]
    each = {"Ambient": 0.05, "Jazz": 0.95, "Rock": 0.5}
    assert scores.labels(each) == [["Ambient", "Rock"], ["Ambient"], []]
    with pytest.raises(ConfigError):
        scores.labels({"Jazz": 0.5})


def test_top_is_sorted_by_score(scores: cg.Scores) -> None:
    top = scores.top(2)
    assert [[genre for genre, _ in best] for best in top] == [
        ["Jazz", "Rock"],
        ["Ambient", "Jazz"],
        [],
    ]
    assert top[0][0][1] == pytest.approx(0.9)
    assert [len(best) for best in scores.top(9)] == [3, 3, 0]


def test_scores_as_a_data_frame(scores: cg.Scores) -> None:
    frame = scores.to_pandas()
    assert list(frame.columns) == list(GENRES)
    assert list(frame.index) == scores.names
    np.testing.assert_array_equal(frame.to_numpy(), scores.values)


def test_scores_are_shown_with_their_highest_genres(scores: cg.Scores) -> None:
    assert "a.jpg" in repr(scores) and "Jazz 0.90" in repr(scores) and "why" in repr(scores)
    assert "b&lt;b&gt;.jpg" in scores._repr_html_() and "<b>" not in scores._repr_html_()
    many = scores[[0] * 25]
    assert len(repr(many).splitlines()) == 12


def test_dataset_gives_images_and_targets(prepared: str, covers: list[Path]) -> None:
    train = cg.load_dataset(Path(prepared), split="train")
    assert (len(train), train.genres, train.uri) == (12, GENRES, prepared)
    for index in (7, 0, 11, 4, 5, -1):
        image, target = train[index]
        data = covers[index].read_bytes()
        assert isinstance(image, Image.Image) and image.mode == "RGB"
        assert image.tobytes() == image_decoding.decode_rgb(data).tobytes()
        assert target.tolist() == train.targets[index].tolist()
        assert train.encoded(index) == data
    assert train.targets.argmax(axis=1).tolist() == [0, 1, 2] * 4
    assert sum(1 for _ in iter(train)) == 12
    with pytest.raises(IndexError):
        train[12]
    assert len(cg.load_dataset(prepared, "dev")) == 0
    assert prepared in repr(train) and "\n" not in repr(train)


def test_dataset_transforms_covers(prepared: str, model: cg.Model, covers: list[Path]) -> None:
    train = cg.load_dataset(prepared, "train", transform=model.transform)
    assert torch.equal(train[3][0], model.transform(covers[3].read_bytes()))
    other = cg.load_dataset(prepared, "train", transform=lambda image: image.size)
    assert other[0][0] == (96, 96)


def test_dataset_as_a_data_frame_has_all_but_the_covers(prepared: str) -> None:
    frame = cg.load_dataset(prepared, "train").to_pandas()
    assert list(frame.columns) == [name for name in schema.DATASET.names if name != "image"]
    assert frame["title"].tolist() == [f"Title {row}" for row in range(12)]
    assert len(cg.load_dataset(prepared, "dev").to_pandas()) == 0


@pytest.mark.parametrize(("cache_bytes", "reads"), [(2**20, 7), (0, 24)])
def test_dataset_reads_a_row_group_once_while_it_is_cached(
    prepared: str, monkeypatch: pytest.MonkeyPatch, cache_bytes: int, reads: int
) -> None:
    read: list[tuple[int, int]] = []
    read_rows = shards.read_rows

    def counted(uri: str, start: int, stop: int, columns: Any = None) -> pa.Table:
        read.append((start, stop))
        return read_rows(uri, start, stop, columns)

    monkeypatch.setattr(shards, "read_rows", counted)
    train = cg.load_dataset(prepared, "train", cache_bytes=cache_bytes)
    for index in [*range(0, 12, 2), *range(1, 12, 2)] * 2:
        train[index]
    assert len(read) == reads
    assert all(stop - start <= 2 for start, stop in read)


@pytest.mark.parametrize(
    ("where", "context", "workers"),
    [("local", "fork", 2), ("s3", "fork", 2), ("local", "spawn", 1)],
)
def test_dataset_in_workers_of_a_data_loader(
    covers: list[Path],
    small_row_groups: None,
    model: cg.Model,
    s3: str,
    tmp_path: Path,
    where: str,
    context: str,
    workers: int,
) -> None:
    uri = write_dataset(f"{s3}/api/dataset" if where == "s3" else str(tmp_path / "d"), covers)
    train = cg.load_dataset(uri, "train", transform=model.transform)
    expected = torch.stack([train[index][0] for index in range(12)])
    loader = torch.utils.data.DataLoader(
        train, batch_size=4, num_workers=workers, multiprocessing_context=context
    )
    images, targets = map(torch.cat, zip(*loader, strict=True))
    assert torch.equal(images, expected)
    assert targets.argmax(dim=1).tolist() == [0, 1, 2] * 4


def test_load_dataset_raises_for_missing_datasets_and_splits(prepared: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        cg.load_dataset(prepared, "valid")  # type: ignore[arg-type]
    with pytest.raises(DatasetError):
        cg.load_dataset(tmp_path / "none", "train")


def test_damaged_cover_of_a_dataset_is_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"damaged")
    uri = write_dataset(str(tmp_path / "dataset"), [bad] * 6)
    for transform in (None, Transform(Preprocessing())):
        with pytest.raises(DatasetError) as raised:
            cg.load_dataset(uri, "train", transform=transform)[1]
        assert raised.value.code == "bad_cover"


@pytest.fixture(params=["local", "s3"])
def labels(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A finished output directory of score, in two parts."""
    where = request.param
    uri = f"{request.getfixturevalue('s3')}/api/labels" if where == "s3" else str(tmp_path / "out")
    for number in range(2):
        rows = [2 * number, 2 * number + 1]
        table = pa.table({"album_id": [f"album {row}" for row in rows], "row": rows})
        storage.put(f"{uri}/part-{number:08d}.parquet", shards.to_parquet(table))
    storage.put(f"{uri}/_rejected/part-00000000.jsonl", b"{}\n")
    storage.put(f"{uri}/_ledger.json", b"{}")
    storage.put(f"{uri}/_SUCCESS", b"")
    return uri


def test_labels_are_read_in_order(labels: str) -> None:
    assert cg.read_labels(labels)["row"].to_pylist() == [0, 1, 2, 3]
    assert cg.read_labels(labels, columns=["album_id"]).column_names == ["album_id"]
    if not storage.is_uri(labels):
        assert cg.read_labels(Path(labels)).num_rows == 4


def test_labels_of_an_unfinished_run_are_refused(labels: str) -> None:
    storage.delete_file(f"{labels}/_SUCCESS")
    with pytest.raises(StorageError) as raised:
        cg.read_labels(labels)
    assert raised.value.code == "unfinished"
    assert cg.read_labels(labels, allow_partial=True).num_rows == 4


def test_directory_without_labels_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(StorageError) as raised:
        cg.read_labels(tmp_path)
    assert raised.value.code == "not_labels"


def batches(covers: list[Path]) -> dict[str, Any]:
    """The same three rows, the second with a bad cover, in the formats of Ray Data."""
    rows = [covers[0].read_bytes(), b"bad", covers[1].read_bytes()]
    table = pa.table({"image": pa.array(rows, pa.binary()), "id": [1, 2, 3]})
    objects = np.array(rows, object)
    return {
        "pyarrow": table,
        "pandas": table.to_pandas(),
        "numpy": {"image": objects, "id": np.arange(1, 4)},
    }


@pytest.mark.parametrize("batch_format", ["pyarrow", "pandas", "numpy"])
def test_batch_predictor_adds_columns_to_every_batch_format(
    model: cg.Model, covers: list[Path], untrained_model: str, batch_format: str
) -> None:
    predict = cg.BatchPredictor(untrained_model, "cpu")
    batch = batches(covers)[batch_format]
    out = predict(batch)
    assert type(out) is type(batch)
    frame = out.to_pandas() if batch_format == "pyarrow" else out
    assert list(frame["id"]) == [1, 2, 3]
    expected = model.predict(covers[:2])
    for row, index in ((0, 0), (2, 1)):
        genre, score = expected.top(1)[index][0]
        assert frame["top_genre"][row] == genre
        np.testing.assert_allclose(frame["top_score"][row], score, atol=1e-6)
        np.testing.assert_allclose(frame["scores"][row], expected[index], atol=1e-6)
        assert list(frame["genres"][row]) == expected.labels()[index]
    assert frame["reason"][1] == "not_an_image"
    assert [bool(pd.isna(value)) for value in frame["reason"]] == [True, False, True]
    assert all(pd.isna(frame[name][1]) for name in ("top_genre", "top_score", "genres"))


def test_batch_predictor_takes_pixels_and_an_empty_batch(
    covers: list[Path], untrained_model: str
) -> None:
    predict = cg.BatchPredictor(untrained_model, "cpu", prefix="predicted_")
    pixels = np.stack([np.asarray(image_decoding.decode_rgb(c.read_bytes())) for c in covers[:2]])
    out = predict({"image": pixels, "genres": np.array([1, 2])})
    assert out["predicted_scores"].shape == (2, len(predict.genres))
    assert out["genres"].tolist() == [1, 2]
    empty = predict(pa.table({"image": pa.array([], pa.binary())}))
    assert empty.num_rows == 0 and "predicted_scores" in empty.column_names


@pytest.mark.parametrize(
    ("columns", "code"), [({"img": [b""]}, "no_column"), ({"reason": ["x"]}, "column_exists")]
)
def test_batch_predictor_refuses_batches_of_other_columns(
    untrained_model: str, columns: dict[str, Any], code: str
) -> None:
    table = pa.table(columns if code == "no_column" else {"image": [b""], **columns})
    with pytest.raises(ConfigError) as raised:
        cg.BatchPredictor(untrained_model, "cpu")(table)
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        (cg.prepare, PrepareConfig),
        (cg.train, TrainConfig),
        (cg.evaluate, EvaluateConfig),
        (cg.score, ScoreConfig),
    ],
)
def test_stage_functions_show_every_setting(
    function: Callable[..., Any], settings: type[StageConfig]
) -> None:
    parameters = inspect.signature(function).parameters
    assert set(parameters) == {*settings.model_fields, "progress", "callbacks", "verbose"}
    for name, field in settings.model_fields.items():
        if not field.is_required():
            assert parameters[name].default == field.default
            assert f"{name} (" in str(function.__doc__)


def test_wrong_settings_of_a_stage_are_a_config_error(tmp_path: Path) -> None:
    for settings, code in (({"epocs": 3}, "unknown"), ({"epochs": "x"}, "invalid")):
        with pytest.raises(ConfigError) as raised:
            cg.train(tmp_path, out=tmp_path / "m", **settings)
        assert raised.value.code == code
    with pytest.raises(DatasetError):
        cg.train(tmp_path / "none", out=tmp_path / "m")
    with pytest.raises(ModelError):
        cg.evaluate(tmp_path / "none", tmp_path / "d", out=tmp_path / "e")


def test_api_page_is_generated_from_the_docstrings() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "make_api.py"))["make"]()
    assert (docs / "api.md").read_text() == page, "run: python docs/make_api.py"


def test_stage_functions_pass_settings_on_and_return_results(
    prepared: str,
    untrained_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without Ray: what a stage does is tested with the stages."""

    manifest = shards.read_manifest(prepared)
    metrics = multilabel_metrics(np.eye(3), np.eye(3), GENRES)
    results = {
        prepare_stage: Prepared(manifest),
        train_stage: Trained(str(tmp_path / "m"), "id", {"epoch": 1}, []),
        evaluate_stage: Evaluated("e", "dev", metrics),
        score_stage: Labelled("l", {"rows": 3, "scored": 2}),
    }
    calls: list[Any] = []
    for stage, result in results.items():
        monkeypatch.setattr(type(result), "summary", lambda self: f"summary of <{type(self)}>")

        def run(settings: StageConfig, *, verbose: bool, result: Any = result) -> Any:
            with Progress("test", 1, "rows") as progress:
                progress.advance(1)
            calls.append(settings)
            return result

        monkeypatch.setattr(stage, stage.__name__.rpartition(".")[2], run)

    events: list[cg.ProgressEvent] = []
    done = cg.prepare(Path("c"), out="d", shard_rows=5, callbacks=[events.append])
    assert calls[-1] == PrepareConfig(catalog="c", out="d", shard_rows=5)
    assert (done.uri, done.genres, len(done.load("train"))) == (prepared, GENRES, 12)
    assert repr(done) == done.summary() and "&lt;" in done._repr_html_()

    trained = cg.train("d", out=tmp_path / "m", epochs=3, callbacks=[events.append])
    assert calls[-1] == TrainConfig(dataset="d", out=str(tmp_path / "m"), epochs=3)
    shutil.copytree(untrained_model, tmp_path / "m")
    (tmp_path / "m" / "history.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert trained.history["epoch"].tolist() == [1, 2]
    assert trained.model is trained.model and trained.model.uri == trained.uri

    measured = cg.evaluate("m", "d", out="e", split="dev", callbacks=[events.append])
    assert calls[-1] == EvaluateConfig(model="m", dataset="d", out="e", split="dev")
    assert measured["albums"] == 3 and dict(measured) == metrics
    assert list(measured.by_genre.index) == list(GENRES)

    scored = cg.score("m", "c", out="l", batch_size=8, callbacks=[events.append])
    assert calls[-1] == ScoreConfig(model="m", catalog="c", out="l", batch_size=8)
    assert scored.ledger["scored"] == 2
    assert [event.done for event in events] == [1] * 4
