"""Load pretrained weights into a backbone: each tensor of the file must match the backbone.

Nothing pickled is executed: a file is safetensors, or a torch file that holds only tensors.
"""

import contextlib
import io
import pickle
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from covergenre.errors import ModelError, did_you_mean
from covergenre.io import storage
from covergenre.models.networks import CoverModel, build_model
from covergenre.registry import MODELS, model_spec

# The head is always new: these belong to another task's classifier, or to another model's head.
_HEADS = ("classifier.", "fc.", "head.")
# Counts the steps behind a norm's running statistics; nothing reads it. Old files lack it.
_STEP_COUNT = ".num_batches_tracked"
_WEB = ("http://", "https://")
_GIVE_A_FILE = (
    "give a file instead: --weights FILE, with torchvision's names, in safetensors or .pth"
)


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_backbone_weights` put into a backbone."""

    origin: str
    """torchvision's name of the weights, "none", or the file's path or URI without any secret."""
    missing: tuple[str, ...]
    """Tensors of the backbone that the file lacks: they keep their random weights."""


def load_backbone_weights(
    model: CoverModel, weights: str, *, allow_partial: bool = False
) -> LoadedWeights:
    """Copy pretrained weights into `model.backbone`, in float32.

    weights: "imagenet" (downloaded once by torchvision), "none" (the backbone stays random), or a
    path, file://, s3:// or http(s):// URL of a file with torchvision's names: safetensors, a
    torch state dict, or model.safetensors of a model directory. Classifier entries are ignored.
    allow_partial: take a file that lacks some of the backbone.

    Raises ModelError, and leaves the backbone as it was, where the weights cannot be had or do not
    fit; StorageError where a path or s3:// URL cannot be read.
    """
    if weights == "none":
        return LoadedWeights("none", ())
    if weights == "imagenet":
        origin, entries = _imagenet(model.name)
    else:
        origin = _without_secrets(weights)
        entries = _parse(_read(weights, origin), origin)
    tensors = _backbone_tensors(entries, origin)
    missing = _check(model, tensors, origin, allow_partial)
    model.backbone.load_state_dict(tensors, strict=False)
    return LoadedWeights(origin, missing)


def _imagenet(name: str) -> tuple[str, Mapping[Any, object]]:
    origin = model_spec(name).imagenet
    if origin is None:
        known = ", ".join(other for other, spec in MODELS.items() if spec.imagenet)
        raise ModelError(
            f"--weights imagenet: there are none for {name}; use --weights none, or one of {known}"
        )
    import torchvision

    entry = torchvision.models.get_weight(origin)
    try:
        # torch.hub tells of its download on standard output, which is for results.
        with contextlib.redirect_stdout(sys.stderr), _no_warnings():
            state = entry.get_state_dict(
                progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
    except (OSError, HTTPException) as error:
        raise ModelError(_download_failed(entry.url, error)) from error
    except Exception as error:  # a wrong hash, or anything that damaged bytes make torch raise
        raise ModelError(
            f"{entry.url}: the download, or its copy in {torch.hub.get_dir()}, is damaged"
            f" ({_first_line(error)}); delete the copy and try again"
        ) from error
    return origin, state


def _read(weights: str, shown: str) -> bytes:
    """The bytes of a local or remote file."""
    if weights.lower().startswith(_WEB):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "weights")
            try:
                torch.hub.download_url_to_file(weights, str(file), progress=False)
            except (OSError, HTTPException) as error:
                raise ModelError(_download_failed(shown, error)) from error
            return file.read_bytes()
    if "/" not in weights and not storage.exists(weights):
        hint = did_you_mean(weights, ("imagenet", "none"))
        raise ModelError(f"--weights: there is no file {weights!r}{hint}")
    if storage.scheme(weights) != "s3" and storage.is_directory(weights):
        raise ModelError(
            f"{weights}: is a directory; give a file (of a model directory, model.safetensors)"
        )
    return storage.read_bytes(weights)


def _parse(data: bytes, shown: str) -> Mapping[Any, object]:
    """Whatever mapping the file holds; the format is told by its content, not by its name."""
    if data[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
        try:
            return dict(safetensors.torch.load(data))
        except SafetensorError as error:
            raise ModelError(f"{shown}: damaged safetensors: {_first_line(error)}") from error
    if not data.startswith((b"PK", b"\x80")):  # a zip, or the bare pickle of torch before 1.6
        raise ModelError(f"{shown}: is neither a safetensors nor a torch file")
    try:
        with _no_warnings():
            state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{shown}: only tensors are loaded, and this torch file holds other objects;"
            " save its state_dict() alone, best as safetensors"
        ) from error
    except Exception as error:  # damaged bytes make torch raise nearly anything
        raise ModelError(f"{shown}: is no readable torch file: {_first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ModelError(f"{shown}: holds a {type(state).__name__}, not named tensors")
    inner = state.get("state_dict")
    return inner if isinstance(inner, Mapping) else state


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """torch warns of kinds of pickle that it then reads, or refuses, all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _backbone_tensors(entries: Mapping[Any, object], shown: str) -> dict[str, Tensor]:
    """The entries that may belong to a backbone, by torchvision's names, in float32."""
    tensors: dict[str, Tensor] = {}
    for key, value in entries.items():
        # DistributedDataParallel puts "module." before every name, covergenre "backbone."
        name = str(key).removeprefix("module.").removeprefix("backbone.")
        if name.startswith(_HEADS):
            continue
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{shown}: {name!r} is a {type(value).__name__}, not a tensor; save the"
                " state_dict() alone"
            )
        if name in tensors:
            raise ModelError(f"{shown}: holds {name} twice, under different prefixes")
        if not name.endswith(_STEP_COUNT):
            if not value.is_floating_point():
                raise ModelError(
                    f"{shown}: {name} is {value.dtype}; give weights of floating point"
                )
            value = value.float()
            if not value.isfinite().all():
                raise ModelError(f"{shown}: {name} holds numbers that are not finite")
        tensors[name] = value
    return tensors


def _check(
    model: CoverModel, tensors: Mapping[str, Tensor], shown: str, allow_partial: bool
) -> tuple[str, ...]:
    """Names of the backbone's tensors that `tensors` lacks. Raises ModelError for any mismatch."""
    wanted = _shapes(model)
    weights_given = [name for name in tensors if not name.endswith(_STEP_COUNT)]
    if not weights_given:
        raise ModelError(
            f"{shown}: holds no tensor of {model.name}'s backbone; expected {next(iter(wanted))}"
            " and the like"
        )
    unknown = sorted(name for name in tensors if name not in wanted)
    if unknown:
        raise ModelError(
            f"{shown}: {_first_of(unknown)} not in {model.name}{_way_out(tensors, wanted, unknown)}"
        )
    misshapen = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name]]
    if misshapen:
        name = misshapen[0]
        raise ModelError(
            f"{shown}: {_first_of(misshapen)} of another shape than in {model.name}:"
            f" {name} is {_by(tensors[name].shape)}, not {_by(wanted[name])}"
            f"{_way_out(tensors, wanted, unknown)}"
        )
    missing = [name for name in wanted if name not in tensors and not name.endswith(_STEP_COUNT)]
    if missing and not allow_partial:
        raise ModelError(
            f"{shown}: {_first_of(missing)} missing, of {len(weights_given) + len(missing)} in"
            f" {model.name}; to leave what is missing random: --allow-partial-weights"
        )
    return tuple(missing)


def _shapes(model: CoverModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.backbone.state_dict().items()}


def _way_out(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], unknown: list[str]
) -> str:
    """The model that the file does fit, or else the name that an unknown name was meant to be."""
    for other in MODELS:
        with torch.device("meta"):
            shapes = _shapes(build_model(other, 1))
        if all(shapes.get(name) == tensor.shape for name, tensor in tensors.items()):
            return f"; the file fits --model {other}"
    near = did_you_mean(unknown[0], wanted.keys() - tensors.keys()) if unknown else ""
    # A list of all valid names, which it gives where none is near, would be hundreds.
    return near if near.startswith("; did you mean") else ""


def _download_failed(url: str, error: Exception) -> str:
    if isinstance(error, HTTPError):
        error.close()  # it holds the connection
        what = f"its host answered {error.code} {error.reason}"
    elif isinstance(error, OSError) and error.filename is not None:
        what = f"cannot be stored here: {error.strerror}: {error.filename}"
    else:
        reason = getattr(error, "reason", error)
        what = f"its host could not be reached: {_first_line(reason)}"
    return f"{url}: {what}; {_GIVE_A_FILE}"


def _without_secrets(uri: str) -> str:
    """A signed address carries its key in the query, others a password before the host."""
    if not uri.lower().startswith(_WEB):
        return uri
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _first_of(names: list[str]) -> str:
    """`conv1.weight and 3 more are`: for a message that names one and counts all."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _by(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
