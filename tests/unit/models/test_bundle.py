"""The model directory: what is written is what is loaded, and nothing else passes for it."""

import hashlib
import io
import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import ModelError
from covergenre.io import storage
from covergenre.models import networks
from covergenre.models.bundle import (
    BUNDLE_FILES,
    Bundle,
    BundleContents,
    is_bundle,
    load_model,
    read_bundle,
    write_bundle,
)
from covergenre.models.networks import CoverModel, build_model

GENRES = Genres(("Folk", "Jazz", "Rock"))
JSON_FILES = ["genres.json", "preprocessing.json", "decision.json", "config.json"]


@cache
def weights(seed: int = 0, num_genres: int = 3) -> bytes:
    return save(build_model("tiny", num_genres, seed=seed).state_dict())


def write(out: Path, **others: Any) -> Bundle:
    """A model directory of random weights, as train writes it."""
    values: dict[str, Any] = {
        "weights": weights(),
        "model": "tiny",
        "genres": GENRES,
        "preprocessing": Preprocessing(side=32),
        "precision": "fp32",
        "training": {"epochs": 3},
        "other_files": {"history.jsonl": b"{}\n", "README.md": b"# card\n"},
    }
    values |= others
    thresholds = dict.fromkeys(values["genres"].names, 0.5)
    return write_bundle(str(out), BundleContents(**({"thresholds": thresholds} | values)))


def outputs(model: CoverModel) -> torch.Tensor:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        result: torch.Tensor = model(images)
    return result


# Round trip


def normed(name: str, num_genres: int) -> CoverModel:
    """A small network that, unlike `tiny`, keeps statistics."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return CoverModel(name, backbone, nn.Linear(4, num_genres))


@pytest.mark.parametrize("with_norm", [False, True])
def test_model_round_trip(with_norm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build_model("tiny", 3, seed=5)
    if with_norm:
        monkeypatch.setattr(networks, "build_model", normed)
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


def test_bundle_round_trip(tmp_path: Path) -> None:
    thresholds = {"Folk": 0.1, "Jazz": 0.25, "Rock": 0.9}
    written = write(tmp_path / "m", thresholds=thresholds, precision="bf16")
    bundle = read_bundle(tmp_path / "m")
    assert bundle == written == read_bundle(str(tmp_path / "m"))
    assert (bundle.uri, bundle.model, bundle.genres) == (str(tmp_path / "m"), "tiny", GENRES)
    assert bundle.preprocessing == Preprocessing(side=32)
    assert (bundle.thresholds, bundle.precision) == (thresholds, "bf16")
    assert sorted(bundle.files) == sorted(
        [*JSON_FILES, "model.safetensors", "history.jsonl", "README.md"]
    )
    assert json.loads((tmp_path / "m/config.json").read_text())["train"] == {"epochs": 3}
    assert json.loads((tmp_path / "m/genres.json").read_text()) == list(GENRES.names)


def test_copy_has_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    copy = read_bundle(f"{tmp_path}/copy/")
    assert copy.uri == str(tmp_path / "copy")
    assert (copy.weights_id, copy.decision_id) == (first.weights_id, first.decision_id)
    monkeypatch.chdir(tmp_path)
    assert read_bundle("copy") == copy


def test_bundle_json_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    put = storage.put

    def spied(uri: str, data: bytes) -> None:
        assert not is_bundle(str(tmp_path / "m"))
        put(uri, data)
        written.append(storage.name(uri))

    monkeypatch.setattr(storage, "put", spied)
    write(tmp_path / "m")
    assert written[-1] == "bundle.json" and len(written) == 8


def test_no_file_of_a_model_directory_ends_in_parquet(tmp_path: Path) -> None:
    """`*.parquet` in an output directory always means rows for readers of tables."""
    write(tmp_path / "m")
    names = {*BUNDLE_FILES, *(path.name for path in (tmp_path / "m").iterdir())}
    assert not [name for name in names if name.endswith(".parquet")]


# Identity


def test_weights_id_depends_on_what_determines_a_score(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    same = {
        "again": write(tmp_path / "again"),
        "thresholds": write(tmp_path / "t", thresholds=dict.fromkeys(GENRES.names, 0.4)),
        "settings": write(tmp_path / "s", training={"epochs": 4}),
        "files": write(tmp_path / "f", other_files={}),
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


def test_decision_id_depends_on_the_thresholds_only(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    changes: dict[str, dict[str, Any]] = {
        "w": {"weights": weights(seed=1)},
        "c": {"training": {}},
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


def refused(folder: Path, *codes: str) -> str:
    """The message, one line, without the directory. codes: that the error may have; none: any."""
    with pytest.raises(ModelError) as caught:
        load_model(read_bundle(str(folder)))
    text = str(caught.value)
    assert not codes or caught.value.code in codes, text
    assert "\n" not in text and text.startswith(str(folder))
    return text.removeprefix(str(folder))


def test_other_directories_and_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "not_found")
    refused(tmp_path, "not_a_model")
    (tmp_path / "model.safetensors").write_bytes(weights())
    refused(tmp_path / "model.safetensors", "not_a_model")
    assert not is_bundle(str(tmp_path)) and not is_bundle(str(tmp_path / "none"))
    write(tmp_path / "m")
    assert is_bundle(str(tmp_path / "m"))


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors"])
def test_missing_or_changed_file_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "m")
    path = tmp_path / "m" / name
    data = path.read_bytes()
    for change in (data + b" ", data[:-1], bytes([data[0] ^ 1]) + data[1:], b""):
        path.write_bytes(change)
        assert refused(tmp_path / "m", "changed").startswith(f"/{name}: ")
    path.unlink()
    assert refused(tmp_path / "m", "missing").startswith(f"/{name}: ")
    path.write_bytes(data)
    load_model(read_bundle(str(tmp_path / "m")))


def test_bundle_is_read_without_its_weights(tmp_path: Path) -> None:
    """A driver reads a bundle without its weights; the workers load them."""
    write(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    bundle = read_bundle(str(tmp_path / "m"))
    with pytest.raises(ModelError) as caught:
        load_model(bundle)
    assert caught.value.code == "missing"


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda v: v.update(format_version=1), "format version 1"),
        *[
            (lambda v, key=key: v.pop(key), key)
            for key in ("format_version", "weights_id", "decision_id", "files")
        ],
        (lambda v: v["files"].pop("genres.json"), "genres.json"),
        (lambda v: v.update(files=[]), "files"),
        (lambda v: v.update(files=None), "files"),
    ],
)
def test_invalid_bundle_json_is_refused(change: Change, part: str, tmp_path: Path) -> None:
    write(tmp_path / "m")
    path = tmp_path / "m/bundle.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    text = refused(tmp_path / "m", "invalid", "format_version")
    assert text.startswith("/bundle.json: ") and part in text


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_bundle_json_that_is_not_an_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text(text)
    refused(tmp_path, "invalid")


def test_bundle_json_that_is_not_json_is_refused(tmp_path: Path) -> None:
    for data in (b"{", b"", b"[" * 100_000, b"\xff{}"):
        (tmp_path / "bundle.json").write_bytes(data)
        refused(tmp_path, "invalid_json")


def test_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "m", model="transformer")
    with pytest.raises(ModelError, match="'transformer'"):
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
def test_weights_of_another_model_are_refused(
    others: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    """The hashes match, the content does not: a directory made by hand or by another version."""
    write(tmp_path / "m", **others())
    assert refused(tmp_path / "m", "other_weights").startswith("/model.safetensors: ")


def test_preprocessing_of_another_version_is_an_error(tmp_path: Path) -> None:
    class Later(Preprocessing):
        def to_json(self) -> dict[str, Any]:
            return super().to_json() | {"version": 2}

    with pytest.raises(ModelError, match="version 2"):
        write(tmp_path / "m", preprocessing=Later())


# Untrusted model directories


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of a model directory, and its hash and the ids in bundle.json."""
    (folder / name).write_bytes(data)
    path = folder / "bundle.json"
    value = json.loads(path.read_text())
    files = value["files"]
    files[name] = hashlib.sha256(data).hexdigest()
    parts = ["tiny", "fp32"]
    parts += [files[n] for n in ("model.safetensors", "genres.json", "preprocessing.json")]
    value["weights_id"] = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    value["decision_id"] = files["decision.json"][:16]
    path.write_text(json.dumps(value))


def test_replaced_file_that_is_valid_is_accepted(tmp_path: Path) -> None:
    write(tmp_path / "m")
    before = read_bundle(str(tmp_path / "m"))
    for name in before.files:
        forge(tmp_path / "m", name, (tmp_path / "m" / name).read_bytes())
    assert read_bundle(str(tmp_path / "m")) == before
    forge(tmp_path / "m", "model.safetensors", weights(seed=1))
    load_model(read_bundle(str(tmp_path / "m")))


class Foreign:
    """Unpickling this would write the file `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def torch_bytes(value: object, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "name",
    ["weights.pth", "old/WEIGHTS.PT", "x.pkl", "pytorch_model.bin", "scaler.joblib", "a.npy"],
)
def test_pickle_beside_the_weights_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "m")
    file = tmp_path / "m" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps(Foreign(tmp_path / "was run")))
    assert refused(tmp_path / "m", "pickle").startswith(f"/{name}: ")
    assert not (tmp_path / "was run").exists()
    file.unlink()
    load_model(read_bundle(str(tmp_path / "m")))


@pytest.mark.parametrize(
    "encode",
    [torch_bytes, partial(torch_bytes, _use_new_zipfile_serialization=False), pickle.dumps],
    ids=["torch", "torch-before-1.6", "pickle"],
)
def test_pickle_named_as_the_weights_is_refused(
    encode: Callable[[object], bytes], tmp_path: Path
) -> None:
    write(tmp_path / "m")
    data = encode({"head.2.bias": torch.ones(3), "x": Foreign(tmp_path / "was run")})
    forge(tmp_path / "m", "model.safetensors", data)
    assert refused(tmp_path / "m", "other_weights").startswith("/model.safetensors: ")
    assert not (tmp_path / "was run").exists()


def tensors() -> dict[str, torch.Tensor]:
    return dict(build_model("tiny", 3, seed=0).state_dict())


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"head.2.bias": None}, "head.2.bias"),
        ({"head.2.bias": torch.ones(4)}, "head.2.bias is [4], not [3]"),
        ({"head.0.weight": torch.ones(128, 64)}, "head.0.weight is [128, 64], not [64, 128]"),
        (
            {"head.2.bias": torch.ones(3, dtype=torch.float16)},
            "head.2.bias is torch.float16, not torch.float32",
        ),
        (
            {"head.2.bias": torch.ones(3, dtype=torch.int32)},
            "head.2.bias is torch.int32, not torch.float32",
        ),
        ({"b\nc": torch.ones(3)}, r"'b\nc'"),
    ],
    ids=["missing", "genres", "shape", "half", "integer", "unknown"],
)
def test_tensor_that_does_not_fit_is_named(
    change: dict[str, torch.Tensor | None], fact: str, tmp_path: Path
) -> None:
    write(tmp_path / "m")
    given = {name: t for name, t in (tensors() | change).items() if t is not None}
    forge(tmp_path / "m", "model.safetensors", save(given))
    assert f": {fact}" in refused(tmp_path / "m", "other_weights")


def test_other_number_of_genres_names_the_tensor(tmp_path: Path) -> None:
    write(tmp_path / "m")
    forge(tmp_path / "m", "model.safetensors", weights(num_genres=5))
    text = refused(tmp_path / "m", "other_weights")
    assert "head.2.weight is [5, 64], not [3, 64]" in text


def header(value: object, data: int = 16, length: int | None = None) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (length or len(text)).to_bytes(8, "little") + text + bytes(data)


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "length": header({"a": entry(0, 16, [4])}, length=2**63),
    "length beyond the file": header({"a": entry(0, 16, [4])}, length=90_000_000),
    "overlap": header({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}),
    "hole": header({"a": entry(8, 16, [2])}),
    "beyond the file": header({"a": entry(0, 32, [8])}),
    "overflow": header({"a": entry(0, 16, [2**62, 2**62])}),
    "negative": header({"a": entry(0, 16, [-2, -2])}),
    "unknown type": header({"a": entry(0, 16, [4], "PICKLE")}),
    "type that torch lacks": header({"a": entry(0, 16, [32], "F4")}),
    "no JSON": header(b'{"a":'),
    "no text": header(b'{"\xff":1}'),
    "deep": header(b'{"a":' + b"[" * 100_000),
    "list": header([]),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_crafted_header_is_an_error_of_one_line(data: bytes, tmp_path: Path) -> None:
    write(tmp_path / "m")
    forge(tmp_path / "m", "model.safetensors", data)
    assert refused(tmp_path / "m", "other_weights").startswith("/model.safetensors: ")


def edits(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path in a JSON value, its new value), of many edits; `...`: the key is removed."""
    others: list[Any] = [None, [], {}, "x", 7]
    if at:
        others = [..., None, [], {}, "x", True, -1, math.nan]
    for new in others:
        yield at, new
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from edits(value[key], (*at, key))


def edited(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    value = value.copy()
    if new is ... and len(at) == 1:
        del value[at[0]]
    else:
        value[at[0]] = edited(value[at[0]], at[1:], new)
    return value


def is_valid(name: str, at: tuple[Any, ...], new: Any) -> bool:
    """Whether the edit makes another valid model, or changes a value that is not read."""
    if name == "bundle.json":
        unread = at[:1] == ("files",) and at[1:] in (("history.jsonl",), ("README.md",))
        return at == ("covergenre",) or (unread and new in (..., "x"))
    a_number = new == -1 and len(at) == 2
    return at[:1] == ("train",) or (a_number and at[0] in ("mean", "thresholds"))


@pytest.mark.parametrize("name", [*JSON_FILES, "bundle.json"])
def test_edited_json_is_an_error_of_one_line(name: str, tmp_path: Path) -> None:
    """Each key is removed, and each value replaced by values of other types."""
    folder = tmp_path / "m"
    write(folder)
    original = {file.name: file.read_bytes() for file in folder.iterdir()}
    genuine = json.loads(original[name])
    for at, new in edits(genuine):
        for file, data in original.items():
            (folder / file).write_bytes(data)
        data = json.dumps(edited(genuine, at, new)).encode()
        if name == "bundle.json":
            (folder / name).write_bytes(data)
        else:
            forge(folder, name, data)
        if is_valid(name, at, new):
            read_bundle(str(folder))
        else:
            assert len(refused(folder)) < 400, (at, new)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/../../secret"])
def test_names_in_bundle_json_cannot_refer_to_other_directories(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("{}")
    write(tmp_path / "m")
    path = tmp_path / "m" / "bundle.json"
    value = json.loads(path.read_text())
    value["files"][name] = hashlib.sha256(b"{}").hexdigest()
    path.write_text(json.dumps(value))
    opened: list[str] = []
    open_input = storage.open_input

    def spied(uri: str) -> Any:
        opened.append(uri)
        return open_input(uri)

    monkeypatch.setattr(storage, "open_input", spied)
    load_model(read_bundle(str(tmp_path / "m")))
    assert len(opened) == 6
    assert all(storage.parent(uri) == str(tmp_path / "m") for uri in opened)
