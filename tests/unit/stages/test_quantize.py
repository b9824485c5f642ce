"""quantize: an int8 model directory, what it can do, and what it refuses."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import covergenre as cg
from covergenre import schema
from covergenre.config import QuantizeConfig
from covergenre.data import dataset
from covergenre.data.dataset import Manifest
from covergenre.data.genres import Genres
from covergenre.demo.sample import write_sample, write_untrained_model
from covergenre.errors import CovergenreError, DatasetError, ModelError, StorageError
from covergenre.io import storage
from covergenre.models import int8
from covergenre.models.bundle import device_of, read_bundle
from covergenre.stages.quantize import quantize

GENRES = ("Ambient", "Jazz", "Rock")


@pytest.fixture(scope="module")
def covers(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    catalog = write_sample(tmp_path_factory.mktemp("sample"), 20, side=96)
    return [path.read_bytes() for path in sorted((catalog.parent / "covers").iterdir())]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, covers: list[bytes]) -> str:
    """A dataset with a dev split of two shards."""
    uri = str(tmp_path_factory.mktemp("dataset"))
    rows = [
        {
            "album_id": str(row),
            "row": row,
            "image": image,
            "cover_sha256": hashlib.sha256(image).hexdigest(),
            "genres": [GENRES[row % 3]],
            "split": "dev",
        }
        for row, image in enumerate(covers)
    ]
    shards = tuple(
        dataset.write_shard(
            uri, f"dev/part-{n:05d}.parquet", pa.Table.from_pylist(part, schema=schema.DATASET)
        )
        for n, part in enumerate((rows[:7], rows[7:]))
    )
    genres, split = Genres(GENRES), {"train": (), "dev": shards, "test": ()}
    dataset.write_manifest(Manifest(uri, genres, split, dataset.dataset_id(genres, split), {}), {})
    return uri


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_untrained_model(str(tmp_path_factory.mktemp("source") / "model"), GENRES)


@pytest.fixture(scope="module")
def quantized(source: str, prepared: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("int8") / "model")
    done = quantize(config(source, prepared, out))
    assert done.metrics["covers"] == 20 and done.metrics["mean_score_difference"] < 0.01
    assert "int8" in done.summary()
    return out


def config(model: str, data: str, out: str, **settings: Any) -> QuantizeConfig:
    return QuantizeConfig(model=model, dataset=data, out=out, **settings)


def refused(model: str, data: str, out: str) -> CovergenreError:
    with pytest.raises(CovergenreError) as caught:
        quantize(config(model, data, out))
    assert "\n" not in str(caught.value)
    return caught.value


def test_int8_scores_are_close_and_do_not_depend_on_the_batch(
    quantized: str, source: str, covers: list[bytes]
) -> None:
    model = cg.load_model(quantized)
    scores = model.predict(covers).values
    assert model.precision == "int8" and "int8" in repr(model)
    np.testing.assert_allclose(scores, cg.load_model(source, "cpu").predict(covers), atol=0.03)
    assert np.array_equal(model.predict([covers[13], covers[2]]).values, scores[[13, 2]])
    assert np.array_equal(model.predict(covers[::-1], batch_size=3).values, scores[::-1])


def test_int8_model_directory_states_precision_and_source(quantized: str, source: str) -> None:
    bundle, original = read_bundle(quantized), read_bundle(source)
    assert (bundle.precision, bundle.source) == ("int8", original.uri)
    assert bundle.weights_id != original.weights_id
    assert bundle.decision_id == original.decision_id
    card = Path(quantized, "README.md").read_text()
    assert "**int8**" in card and original.weights_id in card
    assert not Path(f"{quantized}.quantizing").exists()


def test_what_int8_models_lack_names_the_source_model(
    quantized: str, source: str, prepared: str, covers: list[bytes], tmp_path: Path
) -> None:
    model = cg.load_model(quantized)
    for use in (lambda: model.module, lambda: model.embed(covers[:1])):
        with pytest.raises(ModelError, match=source) as caught:
            use()
        assert caught.value.code == "int8"
    assert source in str(refused(quantized, prepared, str(tmp_path / "again")))
    with pytest.raises(ModelError, match="int8 models run on CPUs"):
        cg.load_model(quantized, "gpu")
    assert device_of(read_bundle(quantized), "auto") == "cpu"
    assert device_of(read_bundle(source), "auto") == "auto"


def test_same_command_returns_the_finished_model(
    quantized: str, source: str, prepared: str
) -> None:
    done = quantize(config(source, prepared, quantized))
    assert "already quantized" in done.summary()
    with pytest.raises(StorageError):
        quantize(config(source, prepared, quantized, dev_covers=4))


def test_mistakes_are_refused_before_anything_is_written(
    source: str, prepared: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(source, prepared, str(tmp_path)).code == "not_empty"
    other = write_untrained_model(str(tmp_path / "other"), ("Folk", "Pop"))
    error = refused(other, prepared, str(tmp_path / "out"))
    assert isinstance(error, DatasetError) and error.code == "other_genres"
    assert not (tmp_path / "out").exists()


def test_missing_extra_is_one_line_with_the_command(
    quantized: str, source: str, prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelError, match="uv sync --extra int8") as caught:
        cg.load_model(quantized)
    assert caught.value.code == "missing_extra"
    assert refused(source, prepared, str(tmp_path / "out")).code == "missing_extra"


def test_damaged_weights_are_refused(quantized: str, tmp_path: Path) -> None:
    for name, data in storage_files(quantized).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "model.weights").write_bytes(b"other")
    with pytest.raises(ModelError, match="changed since it was written"):
        cg.load_model(tmp_path)
    with pytest.raises(ModelError, match="cannot load the model"):
        int8.Int8Model(read_bundle(quantized), b"<net/>", b"")


def test_quantizing_prints_nothing_and_loads_no_telemetry(
    source: str, prepared: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cg.quantize(source, prepared, out=tmp_path / "out", dev_covers=8)
    assert capfd.readouterr().out == ""
    assert "openvino_telemetry" not in sys.modules


def storage_files(uri: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(uri, name)) for name in storage.list_sizes(uri)}


def test_int8_models_can_be_evaluated_and_score(
    quantized: str, prepared: str, tmp_path: Path, without_ray: None
) -> None:
    measured = cg.evaluate(quantized, prepared, out=tmp_path / "metrics", split="dev")
    scored = cg.score(quantized, prepared, out=tmp_path / "labels")
    weights_id = cg.load_model(quantized).weights_id
    assert measured["albums"] == 20 and measured["weights_id"] == weights_id
    assert scored.ledger["scored"] == 20
    assert cg.read_labels(tmp_path / "labels")["weights_id"][0].as_py() == weights_id
