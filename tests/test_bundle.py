"""The MODEL folder: what is written is what is loaded, and nothing else passes for it."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from covergenre import models, storage
from covergenre.bundle import Bundle, is_bundle, load_model, read_bundle, write_bundle
from covergenre.covers import Preprocessing
from covergenre.errors import CovergenreError, ModelError, StorageError
from covergenre.genres import Genres
from covergenre.models import CoverModel, build_model

GENRES = Genres(("Folk", "Jazz", "Rock"))
JSON_FILES = ["genres.json", "preprocessing.json", "decision.json", "config.json"]


@cache
def weights(seed: int = 0, num_genres: int = 3) -> bytes:
    return save(build_model("tiny", num_genres, seed=seed).state_dict())


def write(out: Path, **others: Any) -> Bundle:
    """A MODEL of random weights, as train writes it."""
    values: dict[str, Any] = {
        "weights": weights(),
        "model": "tiny",
        "genres": GENRES,
        "preprocessing": Preprocessing(side=32),
        "precision": "fp32",
        "config": {"epochs": 3},
        "thresholds": dict.fromkeys(GENRES.names, 0.5),
        "others": {"history.jsonl": b"{}\n", "README.md": b"# card\n"},
    }
    return write_bundle(str(out), **(values | others))


def outputs(model: CoverModel) -> torch.Tensor:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        result: torch.Tensor = model(images)
    return result


# Round trip


def normed(name: str, num_genres: int) -> CoverModel:
    """A small network that, unlike `tiny`, keeps statistics."""
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return CoverModel(name, trunk, nn.Linear(4, num_genres))


@pytest.mark.parametrize("with_norm", [False, True])
def test_a_model_is_loaded_as_it_was_written(
    with_norm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = build_model("tiny", 3, seed=5)
    if with_norm:
        monkeypatch.setattr(models, "build_model", normed)
        original = normed("tiny", 3)
        original(torch.rand(4, 3, 8, 8) * 3 + 1)  # leaves statistics that no new network has
    original.eval()
    write(tmp_path / "m", weights=save(original.state_dict()))
    loaded = load_model(read_bundle(str(tmp_path / "m")))
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(original))
    state = loaded.state_dict()
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in original.state_dict().items())
    assert all(p.device.type == "cpu" for p in loaded.parameters())


def test_all_of_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    thresholds = {"Folk": 0.1, "Jazz": 0.25, "Rock": 0.9}
    written = write(tmp_path / "m", thresholds=thresholds, precision="bf16")
    bundle = read_bundle(str(tmp_path / "m"))
    assert bundle == written
    assert (bundle.uri, bundle.model, bundle.genres) == (str(tmp_path / "m"), "tiny", GENRES)
    assert bundle.preprocessing == Preprocessing(side=32)
    assert (bundle.thresholds, bundle.precision) == (thresholds, "bf16")
    assert sorted(bundle.files) == sorted(
        [*JSON_FILES, "model.safetensors", "history.jsonl", "README.md"]
    )
    assert json.loads((tmp_path / "m/config.json").read_text())["train"] == {"epochs": 3}
    assert json.loads((tmp_path / "m/genres.json").read_text()) == list(GENRES.names)


def test_a_copy_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    copy = read_bundle(f"{tmp_path}/copy/")
    assert copy.uri == str(tmp_path / "copy")
    assert (copy.weights_id, copy.decision_id) == (first.weights_id, first.decision_id)
    monkeypatch.chdir(tmp_path)
    assert read_bundle("copy") == copy


def test_bundle_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    put = storage.put

    def spied(uri: str, data: bytes) -> None:
        assert not is_bundle(str(tmp_path / "m"))
        put(uri, data)
        written.append(storage.name(uri))

    monkeypatch.setattr(storage, "put", spied)
    write(tmp_path / "m")
    assert written[-1] == "bundle.json" and len(written) == 8


# Identity


def test_what_changes_a_score_changes_the_weights_id(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    same = {
        "again": write(tmp_path / "again"),
        "thresholds": write(tmp_path / "t", thresholds=dict.fromkeys(GENRES.names, 0.4)),
        "settings": write(tmp_path / "s", config={"epochs": 4}),
        "files": write(tmp_path / "f", others={}),
    }
    for what, bundle in same.items():
        assert bundle.weights_id == base.weights_id, what
    other = {
        "weights": write(tmp_path / "w", weights=weights(seed=1)),
        "genres": write(tmp_path / "g", genres=Genres(("Folk", "Jazz", "Soul"))),
        "side": write(tmp_path / "p", preprocessing=Preprocessing(side=64)),
        "mean": write(tmp_path / "n", preprocessing=Preprocessing(side=32, mean=(0.5, 0.5, 0.5))),
        "precision": write(tmp_path / "b", precision="bf16"),
        "model": write(tmp_path / "o", model="baseline"),
    }
    ids = {base.weights_id, *(bundle.weights_id for bundle in other.values())}
    assert len(ids) == 1 + len(other)


def test_thresholds_and_they_alone_change_the_decision_id(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    changes: dict[str, dict[str, Any]] = {
        "w": {"weights": weights(seed=1)},
        "c": {"config": {}},
        "p": {"precision": "bf16"},
        "s": {"preprocessing": Preprocessing(side=64)},
    }
    for name, change in changes.items():
        assert write(tmp_path / name, **change).decision_id == base.decision_id
    ids = {base.decision_id}
    for number, value in enumerate((0.4, 0.50001, 1.0)):
        thresholds = {"Folk": value, "Jazz": 0.5, "Rock": 0.5}
        ids.add(write(tmp_path / f"t{number}", thresholds=thresholds).decision_id)
    assert len(ids) == 4


# What is refused


def refused(place: Path, kind: type[CovergenreError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        load_model(read_bundle(str(place)))
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(place))
    return text.removeprefix(str(place))


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    assert "no such MODEL folder" in refused(tmp_path / "none")
    assert "not a MODEL folder (no bundle.json)" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights())
    assert "not a MODEL folder" in refused(tmp_path / "model.safetensors")
    assert not is_bundle(str(tmp_path)) and not is_bundle(str(tmp_path / "none"))
    write(tmp_path / "m")
    assert is_bundle(str(tmp_path / "m"))


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors"])
def test_a_missing_or_changed_file_is_told(name: str, tmp_path: Path) -> None:
    write(tmp_path / "m")
    path = tmp_path / "m" / name
    data = path.read_bytes()
    for change in (data + b" ", data[:-1], bytes([data[0] ^ 1]) + data[1:], b""):
        path.write_bytes(change)
        text = refused(tmp_path / "m")
        assert text.startswith(f"/{name}: changed since it was written")
    path.unlink()
    assert refused(tmp_path / "m").startswith(f"/{name}: missing from the MODEL")
    path.write_bytes(data)
    load_model(read_bundle(str(tmp_path / "m")))


def test_the_weights_may_be_read_later(tmp_path: Path) -> None:
    """A driver reads a bundle without its weights; the workers load them."""
    write(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    bundle = read_bundle(str(tmp_path / "m"))
    with pytest.raises(ModelError, match="missing from the MODEL"):
        load_model(bundle)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda v: v.update(format_version=2), "format version 2, this covergenre reads 1"),
        *[
            (lambda v, key=key: v.pop(key), key)
            for key in ("format_version", "weights_id", "decision_id", "files")
        ],
        (lambda v: v["files"].pop("genres.json"), "genres.json"),
        (lambda v: v.update(files=[]), "not a bundle of covergenre"),
        (lambda v: v.update(files=None), "not a bundle of covergenre"),
    ],
)
def test_a_bundle_that_is_none(change: Change, part: str, tmp_path: Path) -> None:
    write(tmp_path / "m")
    path = tmp_path / "m/bundle.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    text = refused(tmp_path / "m")
    assert text.startswith("/bundle.json: ") and part in text


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_other_json_is_no_bundle(text: str, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text(text)
    assert "not a bundle of covergenre" in refused(tmp_path)


def test_a_bundle_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{")
    assert "not valid JSON" in refused(tmp_path, StorageError)


def test_a_model_of_another_version_is_told(tmp_path: Path) -> None:
    write(tmp_path / "m", model="transformer")
    with pytest.raises(ModelError, match="no model 'transformer'"):
        load_model(read_bundle(str(tmp_path / "m")))


@pytest.mark.parametrize(
    "others",
    [
        lambda: {"weights": weights(num_genres=2)},
        lambda: {"model": "baseline"},
        lambda: {"weights": b"no safetensors at all"},
        lambda: {"weights": b""},
    ],
    ids=["genres", "model", "garbage", "empty"],
)
def test_weights_that_are_not_the_models_are_told(
    others: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    """The hashes fit, the content does not: a MODEL made by hand, or by another version."""
    write(tmp_path / "m", **others())
    assert refused(tmp_path / "m").startswith("/model.safetensors: not the weights of ")


def test_steps_of_another_version_are_told(tmp_path: Path) -> None:
    class Later(Preprocessing):
        def to_json(self) -> dict[str, Any]:
            return super().to_json() | {"version": 2}

    with pytest.raises(ModelError, match="preprocessing: version 2 needs another version"):
        write(tmp_path / "m", preprocessing=Later())
