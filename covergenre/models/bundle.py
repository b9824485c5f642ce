"""The model directory: everything needed to load a model, and what it was trained with.

    DIR/bundle.json            format version, ids, every file's sha256; written last
    DIR/model.safetensors      weights of backbone and head; int8: model.xml, model.weights
    DIR/genres.json            the vocabulary: column j of the scores is genre j
    DIR/preprocessing.json     how covers become normalized pixels
    DIR/decision.json          the threshold of each genre
    DIR/config.json            settings and inputs of the training run
    DIR/history.jsonl          a line for each epoch; steps.jsonl: the loss of each step
    DIR/metrics.json           of the best epoch, on the dev split
    DIR/loss.png  README.md    the loss curve and the model card

It is never changed: other thresholds or weights make another model. No name ends in .parquet.
"""

import csv
import hashlib
import io
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covergenre import __version__
from covergenre.data.dataset import Manifest
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import DatasetError, ModelError, StorageError
from covergenre.io import storage

if TYPE_CHECKING:
    from covergenre.models.networks import CoverModel

FORMAT_VERSION = 2
_SAFETENSORS = "model.safetensors"
INT8_FILES = ("model.xml", "model.weights")
"""A model of OpenVINO, which calls the second file model.bin, like some pickles."""
_JSON_FILES = ("genres.json", "preprocessing.json", "decision.json", "config.json")
_BESIDE = ("history.jsonl", "steps.jsonl", "metrics.json", "loss.png", "README.md")
BUNDLE_FILES = frozenset({"bundle.json", _SAFETENSORS, *INT8_FILES, *_JSON_FILES, *_BESIDE})
_PICKLES = (
    *(".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"),
)
"""Extensions of files that may contain a pickle; a model directory has none."""


@dataclass(frozen=True)
class Bundle:
    """A checked model directory; `load_model` loads its weights."""

    uri: str
    model: str
    """Name in the registry."""
    genres: Genres
    preprocessing: Preprocessing
    precision: str
    thresholds: dict[str, float]
    weights_id: str
    """Identity of what determines a score: weights, genres, preprocessing, precision."""
    decision_id: str
    """Identity of what determines a label from a score: the thresholds."""
    files: dict[str, str]
    """sha256 of each file."""
    source: str = ""
    """Of an int8 model: the model directory that was quantized."""


@dataclass(frozen=True, kw_only=True)
class BundleContents:
    """What `write_bundle` writes."""

    weights: bytes | Mapping[str, bytes]
    """Of backbone and head, as safetensors; int8: the files INT8_FILES by name."""
    model: str
    """Name in the registry."""
    genres: Genres
    preprocessing: Preprocessing
    precision: str
    """fp32, bf16 or int8."""
    thresholds: Mapping[str, float]
    """Of each genre."""
    training: Mapping[str, Any]
    """Settings and inputs of the training run, as JSON values."""
    quantization: Mapping[str, Any] | None = None
    """Of an int8 model: `source` (the model directory) and others, as JSON values."""
    other_files: Mapping[str, bytes]
    """Further files (history, metrics, plots, README.md) by name."""


def write_bundle(out: str, contents: BundleContents) -> Bundle:
    """Write a model directory. bundle.json is written last: without it the directory is
    incomplete."""
    model, precision = contents.model, contents.precision
    config = {"model": model, "precision": precision, "train": dict(contents.training)}
    if contents.quantization is not None:
        config["quantize"] = dict(contents.quantization)
    weights = contents.weights
    files = {
        **({_SAFETENSORS: weights} if isinstance(weights, bytes) else weights),
        "genres.json": storage.json_bytes(list(contents.genres.names)),
        "preprocessing.json": storage.json_bytes(contents.preprocessing.to_json()),
        "decision.json": storage.json_bytes({"thresholds": dict(contents.thresholds)}),
        "config.json": storage.json_bytes(config),
        **contents.other_files,
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    value = {
        "format_version": FORMAT_VERSION,
        "covergenre": __version__,
        "weights_id": _weights_id(hashes, model, precision),
        "decision_id": hashes["decision.json"][:16],
        "files": hashes,
    }
    for name, data in files.items():
        storage.put(storage.join(out, name), data)
    storage.put_json(storage.join(out, "bundle.json"), value)
    return read_bundle(out)


def _weights_id(hashes: Mapping[str, str], model: str, precision: str) -> str:
    parts = [model, precision]
    files = (*_weights_files(precision), "genres.json", "preprocessing.json")
    parts += [hashes[name] for name in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _weights_files(precision: str) -> tuple[str, ...]:
    return INT8_FILES if precision == "int8" else (_SAFETENSORS,)


def is_bundle(uri: str) -> bool:
    """Whether `uri` is a complete model directory."""
    return storage.exists(storage.join(uri, "bundle.json"))


def read_bundle(uri: str | Path) -> Bundle:
    """Read the model directory at `uri`. Raises ModelError if it is not one, or was changed.

    Only the files named above are opened. A directory with a pickle is refused, because loading a
    pickle can run any code, and another program might load it.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise ModelError(f"{uri}: no such model directory; check the path", code="not_found")
    if not is_bundle(uri):
        raise ModelError(
            f"{uri}: not a model directory (no bundle.json); create one with `covergenre train`",
            code="not_a_model",
        )
    for name in storage.list_sizes(uri):
        if name.lower().endswith(_PICKLES):
            raise ModelError(
                f"{storage.join(uri, name)}: this file may be a pickle, which can run arbitrary"
                " code when loaded; covergenre does not need it; delete it if you trust the rest of"
                " the directory",
                code="pickle",
            )
    path = storage.join(uri, "bundle.json")
    value = _parsed(path, storage.read_bytes(path))
    version = value.get("format_version") if isinstance(value, dict) else None
    _expect(type(version) is int, path, "format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: format version {version}; this version of covergenre reads"
            f" {FORMAT_VERSION}; train the model again",
            code="format_version",
        )
    files = value.get("files")
    good = isinstance(files, dict) and all(isinstance(hashed, str) for hashed in files.values())
    _expect(good, path, "files")
    for name in _JSON_FILES:
        _expect(name in files, path, f"files: {name}")
    read: dict[str, Any] = {}
    for name in _JSON_FILES:
        where = storage.join(uri, name)
        read[name] = _parsed(where, _checked(uri, name, files))
        kind = list if name == "genres.json" else dict
        _expect(isinstance(read[name], kind), where, f"a JSON {kind.__name__}")
    config, where = read["config.json"], storage.join(uri, "config.json")
    model, precision = config.get("model"), config.get("precision")
    _expect(isinstance(model, str), where, "model")
    _expect(precision in ("fp32", "bf16", "int8"), where, "precision")
    source = config.get("quantize", {}).get("source", "") if precision == "int8" else ""
    for name in _weights_files(precision):
        _expect(name in files, path, f"files: {name}")
    genres = _genres(storage.join(uri, "genres.json"), read["genres.json"])
    weights_id = _weights_id(files, model, precision)
    _expect(value.get("weights_id") == weights_id, path, "weights_id")
    _expect(value.get("decision_id") == files["decision.json"][:16], path, "decision_id")
    return Bundle(
        uri=uri,
        model=model,
        genres=genres,
        preprocessing=_preprocessing(
            storage.join(uri, "preprocessing.json"), read["preprocessing.json"]
        ),
        precision=precision,
        thresholds=_thresholds(
            storage.join(uri, "decision.json"), read["decision.json"].get("thresholds"), genres
        ),
        weights_id=weights_id,
        decision_id=value["decision_id"],
        files=files,
        source=str(source),
    )


def _parsed(path: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}", code="invalid_json") from error


def _expect(good: bool, path: str, what: str) -> None:
    if not good:
        raise ModelError(
            f"{path}: {what}: missing or invalid; copy the model directory again", code="invalid"
        )


def _genres(path: str, names: list[Any]) -> Genres:
    _expect(bool(names) and all(isinstance(name, str) for name in names), path, "a list of names")
    try:
        return Genres(tuple(names))
    except DatasetError as error:
        raise ModelError(
            f"{path}: genres must be sorted, unique and not empty", code="invalid"
        ) from error


def _preprocessing(path: str, values: dict[str, Any]) -> Preprocessing:
    defaults = Preprocessing().to_json()
    for name, default in defaults.items():
        found = values.get(name)
        if isinstance(default, tuple):
            good = isinstance(found, list) and len(found) == len(default)
            good = good and all(_is_number(number) for number in values[name])
        else:
            good = type(found) is type(default)
        _expect(good, path, name)
    _expect(values["side"] > 0, path, "side")
    _expect(all(number > 0 for number in values["std"]), path, "std")
    try:
        return Preprocessing.from_json(values)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _thresholds(path: str, values: Any, genres: Genres) -> dict[str, float]:
    good = isinstance(values, dict) and sorted(values) == list(genres.names)
    good = good and all(_is_number(number) for number in values.values())
    _expect(good, path, "a threshold of each genre")
    return dict(values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _checked(uri: str, name: str, files: Mapping[str, str]) -> bytes:
    path = storage.join(uri, name)
    try:
        data = storage.read_bytes(path)
    except StorageError as error:
        raise ModelError(
            f"{path}: missing from the model directory; copy the whole directory", code="missing"
        ) from error
    if hashlib.sha256(data).hexdigest() != files[name]:
        raise ModelError(
            f"{path}: changed since it was written (sha256); copy the model directory again",
            code="changed",
        )
    return data


def check_weights(bundle: Bundle) -> None:
    """Raises ModelError if a file of the weights is missing or was changed."""
    read_weights(bundle)


def read_weights(bundle: Bundle) -> list[bytes]:
    """The files of the weights. Raises ModelError if one is missing or was changed."""
    return [_checked(bundle.uri, n, bundle.files) for n in _weights_files(bundle.precision)]


def no_network(bundle: Bundle, what: str) -> ModelError:
    """The error for a use that an int8 model does not have, such as "features"."""
    return ModelError(
        f"{bundle.uri}: an int8 model has scores only, no {what}; use the model that was quantized:"
        f" {bundle.source}",
        code="int8",
    )


def check_genres(bundle: Bundle, manifest: Manifest) -> None:
    """Raises DatasetError unless the dataset has the genres of the model."""
    if bundle.genres != manifest.genres:
        extra = set(bundle.genres.names) ^ set(manifest.genres.names)
        names = io.StringIO()
        csv.writer(names, lineterminator="").writerow(bundle.genres.names)
        raise DatasetError(
            f"{manifest.uri}: the dataset has other genres than {bundle.uri} (difference:"
            f" {', '.join(sorted(extra)[:5])}{', ...' if len(extra) > 5 else ''}); prepare the"
            f" dataset again with --genres {shlex.quote(names.getvalue())}",
            code="other_genres",
        )


def device_of(bundle: Bundle, device: str) -> str:
    """The device of the settings for a model: int8 models run on CPUs only. Raises ModelError."""
    if bundle.precision != "int8":
        return device
    if device not in ("auto", "cpu"):
        raise ModelError(
            f"{bundle.uri}: int8 models run on CPUs, not on {device}; use the model that was"
            f" quantized ({bundle.source}), or the device cpu",
            code="int8",
        )
    return "cpu"


def load_model(bundle: Bundle) -> "CoverModel":
    """The model with its weights, on the CPU, in eval mode. Raises ModelError."""
    if bundle.precision == "int8":
        raise no_network(bundle, "network")
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from covergenre.models.networks import build_model

    with torch.device("meta"):  # no random weights: they would be replaced
        model = build_model(bundle.model, len(bundle.genres))
    (data,) = read_weights(bundle)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise _other_weights(bundle, f"not a safetensors file: {error}") from error
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise _other_weights(bundle, f"{name} is missing")
        found = tensors[name]
        if found.shape != tensor.shape:
            raise _other_weights(bundle, f"{name} is {list(found.shape)}, not {list(tensor.shape)}")
        if found.dtype != tensor.dtype:
            raise _other_weights(bundle, f"{name} is {found.dtype}, not {tensor.dtype}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise _other_weights(bundle, f"{unknown[0]!r} is unknown")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _other_weights(bundle: Bundle, what: str) -> ModelError:
    return ModelError(
        f"{storage.join(bundle.uri, 'model.safetensors')}: not the weights of this version's"
        f" {bundle.model} with {len(bundle.genres)} genres: {what}",
        code="other_weights",
    )
