"""The MODEL folder: everything that is needed to load a model and to know what it is.

    MODEL/bundle.json            format version, ids, every file's sha256; written last
    MODEL/model.safetensors      weights of trunk and head
    MODEL/genres.json            the vocabulary: column j of the scores is genre j
    MODEL/preprocessing.json     source bytes to normalised pixels
    MODEL/decision.json          the threshold of each genre
    MODEL/config.json            what it was trained with
    MODEL/history.jsonl          a line an epoch; steps.jsonl: the loss of every step
    MODEL/metrics.json           of the best epoch, on the dev split
    MODEL/loss.png  README.md    the loss curve and the model card

A MODEL is immutable: other thresholds or weights are another MODEL.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from covergenre import __version__, storage
from covergenre.covers import Preprocessing
from covergenre.errors import ModelError, StorageError
from covergenre.genres import Genres

if TYPE_CHECKING:
    from covergenre.models import CoverModel

FORMAT_VERSION = 1
_LOADED = ("model.safetensors", "genres.json", "preprocessing.json", "decision.json", "config.json")
_BESIDE = ("history.jsonl", "steps.jsonl", "metrics.json", "loss.png", "README.md")
BUNDLE_FILES = frozenset({"bundle.json", *_LOADED, *_BESIDE})


@dataclass(frozen=True)
class Bundle:
    """A MODEL folder, read and checked; the weights stay on disk until `load_model`."""

    uri: str
    model: str
    """Name in the registry."""
    genres: Genres
    preprocessing: Preprocessing
    precision: str
    thresholds: dict[str, float]
    weights_id: str
    """Of what decides a score: weights, genres, preprocessing, precision."""
    decision_id: str
    """Of what decides a label from a score: the thresholds."""
    files: dict[str, str]
    """sha256 of each file."""


def write_bundle(
    out: str,
    *,
    weights: bytes,
    model: str,
    genres: Genres,
    preprocessing: Preprocessing,
    precision: str,
    config: Mapping[str, Any],
    thresholds: Mapping[str, float],
    others: Mapping[str, bytes],
) -> Bundle:
    """Write a MODEL folder; bundle.json comes last, so half a folder is no MODEL.

    others: further files (history, metrics, pictures, README.md) by name.
    """
    files = {
        "model.safetensors": weights,
        "genres.json": _json(list(genres.names)),
        "preprocessing.json": _json(preprocessing.to_json()),
        "decision.json": _json({"thresholds": dict(thresholds)}),
        "config.json": _json({"model": model, "precision": precision, "train": dict(config)}),
        **others,
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
    parts += [hashes[n] for n in ("model.safetensors", "genres.json", "preprocessing.json")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def is_bundle(uri: str) -> bool:
    """Whether `uri` is a finished MODEL folder."""
    return storage.exists(storage.join(uri, "bundle.json"))


def read_bundle(uri: str) -> Bundle:
    """What the MODEL folder at `uri` is. Raises ModelError where it is none, or was changed."""
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise ModelError(f"{uri}: no such MODEL folder")
    if not is_bundle(uri):
        raise ModelError(
            f"{uri}: not a MODEL folder (no bundle.json); make one with `covergenre train`"
        )
    path = storage.join(uri, "bundle.json")
    value = storage.read_json(path)
    try:
        if value["format_version"] != FORMAT_VERSION:
            raise ModelError(
                f"{path}: format version {value['format_version']}, this covergenre reads"
                f" {FORMAT_VERSION}"
            )
        files = {str(k): str(v) for k, v in value["files"].items()}
        read = {n: json.loads(_checked(uri, n, files)) for n in _LOADED if n.endswith(".json")}
        return Bundle(
            uri=uri,
            model=read["config.json"]["model"],
            genres=Genres(tuple(read["genres.json"])),
            preprocessing=Preprocessing.from_json(read["preprocessing.json"]),
            precision=read["config.json"]["precision"],
            thresholds=read["decision.json"]["thresholds"],
            weights_id=value["weights_id"],
            decision_id=value["decision_id"],
            files=files,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a bundle of covergenre: {error}") from error


def _checked(uri: str, name: str, files: Mapping[str, str]) -> bytes:
    path = storage.join(uri, name)
    try:
        data = storage.read_bytes(path)
    except StorageError as error:
        raise ModelError(f"{path}: missing from the MODEL; copy the whole folder") from error
    if hashlib.sha256(data).hexdigest() != files[name]:
        raise ModelError(f"{path}: changed since it was written (sha256); a MODEL is immutable")
    return data


def check_weights(bundle: Bundle) -> None:
    """Raises ModelError where the weights are not those that were written: before work begins."""
    _checked(bundle.uri, "model.safetensors", bundle.files)


def load_model(bundle: Bundle) -> "CoverModel":
    """The model with its weights, on the CPU, in eval mode. Raises ModelError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from covergenre.models import build_model

    with torch.device("meta"):  # the weights follow: no time is spent on random ones
        model = build_model(bundle.model, len(bundle.genres))
    data = _checked(bundle.uri, "model.safetensors", bundle.files)
    try:
        model.load_state_dict(load(data), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{storage.join(bundle.uri, 'model.safetensors')}: not the weights of {bundle.model}"
            f" with {len(bundle.genres)} genres, as this covergenre builds it"
        ) from error
    return model.eval()
