"""Load pretrained weights into a backbone: each tensor of the file must match the backbone.

No pickled code is executed: a file is safetensors, or a torch file that contains only tensors.
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

# Layers after the backbone: ignored, because the head is always new.
_HEADS = ("classifier.", "fc.", "head.")
# A step counter of batch norm layers, which nothing reads; old files lack it.
_STEP_COUNT = ".num_batches_tracked"
_WEB = ("http://", "https://")
_USE_A_FILE = (
    "download the file and give its path: --weights FILE (safetensors or .pth, with torchvision's"
    " tensor names)"
)


@dataclass(frozen=True)
class LoadedWeights:
    """Result of `load_backbone_weights`."""

    origin: str
    """torchvision's name of the weights, "none", or path or URI of the file, without secrets."""
    missing: tuple[str, ...]
    """Tensors that the file lacks; they keep their random values."""


def load_backbone_weights(
    model: CoverModel, weights: str, *, allow_partial: bool = False
) -> LoadedWeights:
    """Copy pretrained weights into `model.backbone`, in float32.

    weights: "imagenet" (downloaded once by torchvision), "none" (the backbone stays random), or a
    path, file://, s3:// or http(s):// URL of a file with torchvision's names: safetensors, a
    torch state dict, or model.safetensors of a model directory. Classifier entries are ignored.
    allow_partial: accept a file that lacks some of the tensors.

    Raises ModelError if the weights cannot be downloaded or do not fit, and StorageError if a path
    or s3:// URL cannot be read; the backbone is not changed then.
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
            f"torchvision has no ImageNet weights for {name}; use --weights none, or another"
            f" --model: {known}",
            code="no_imagenet_weights",
        )
    import torchvision

    entry = torchvision.models.get_weight(origin)
    try:
        # torch.hub prints messages to standard output, which is for results.
        with contextlib.redirect_stdout(sys.stderr), _no_warnings():
            state = entry.get_state_dict(
                progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
    except (OSError, HTTPException) as error:
        raise _download_error(entry.url, error) from error
    except Exception as error:  # a wrong hash; torch raises any class for damaged bytes
        raise ModelError(
            f"{entry.url}: the downloaded copy in {torch.hub.get_dir()} is damaged"
            f" ({_first_line(error)}); delete it and try again",
            code="damaged_weights",
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
                raise _download_error(shown, error) from error
            return file.read_bytes()
    if "/" not in weights and not storage.exists(weights):
        hint = did_you_mean(weights, ("imagenet", "none"))
        raise ModelError(f"--weights {weights}: no such file{hint}", code="no_weights_file")
    if storage.scheme(weights) != "s3" and storage.is_directory(weights):
        raise ModelError(
            f"{weights}: is a directory; give a file (in a model directory: model.safetensors)",
            code="is_a_directory",
        )
    return storage.read_bytes(weights)


def _parse(data: bytes, shown: str) -> Mapping[Any, object]:
    """The mapping in the file. The format is detected by content, not by name."""
    if data[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
        try:
            return dict(safetensors.torch.load(data))
        except SafetensorError as error:
            raise ModelError(
                f"{shown}: damaged safetensors file: {_first_line(error)}", code="damaged_weights"
            ) from error
    if not data.startswith((b"PK", b"\x80")):  # a zip, or the bare pickle of torch before 1.6
        raise ModelError(f"{shown}: not a safetensors or torch file", code="not_weights")
    try:
        with _no_warnings():
            state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{shown}: contains other objects than tensors, which are not loaded; save only its"
            " state_dict(), preferably as safetensors",
            code="not_only_tensors",
        ) from error
    except Exception as error:  # torch raises any class for damaged bytes
        raise ModelError(
            f"{shown}: damaged torch file: {_first_line(error)}", code="damaged_weights"
        ) from error
    if not isinstance(state, Mapping):
        raise ModelError(
            f"{shown}: contains a {type(state).__name__}, not named tensors", code="not_weights"
        )
    inner = state.get("state_dict")
    return inner if isinstance(inner, Mapping) else state


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """torch warns about some kinds of pickle, whether it then reads or refuses them."""
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
                f"{shown}: {name!r} is a {type(value).__name__}, not a tensor; save only the"
                " state_dict()",
                code="not_only_tensors",
            )
        if name in tensors:
            raise ModelError(
                f"{shown}: contains {name} twice, with different prefixes", code="duplicate_tensor"
            )
        if not name.endswith(_STEP_COUNT):
            if not value.is_floating_point():
                raise ModelError(
                    f"{shown}: {name} is {value.dtype}; give floating-point weights",
                    code="not_float",
                )
            value = value.float()
            if not value.isfinite().all():
                raise ModelError(
                    f"{shown}: {name} has values that are not finite (NaN or Inf)",
                    code="not_finite",
                )
        tensors[name] = value
    return tensors


def _check(
    model: CoverModel, tensors: Mapping[str, Tensor], shown: str, allow_partial: bool
) -> tuple[str, ...]:
    """Names of tensors of the backbone that `tensors` lacks. Raises ModelError for a mismatch."""
    expected = _shapes(model)
    given = [name for name in tensors if not name.endswith(_STEP_COUNT)]
    if not given:
        raise ModelError(
            f"{shown}: contains no tensor of the backbone of {model.name}; expected names such as"
            f" {next(iter(expected))}",
            code="no_backbone_tensor",
        )
    unknown = sorted(name for name in tensors if name not in expected)
    if unknown:
        raise ModelError(
            f"{shown}: {_first_of(unknown)} not in {model.name}{_hint(tensors, expected, unknown)}",
            code="unknown_tensors",
        )
    other_shape = [n for n in expected if n in tensors and tensors[n].shape != expected[n]]
    if other_shape:
        name = other_shape[0]
        raise ModelError(
            f"{shown}: {_first_of(other_shape)} of another shape than in {model.name}:"
            f" {name} is {_by(tensors[name].shape)}, not {_by(expected[name])}"
            f"{_hint(tensors, expected, unknown)}",
            code="other_shapes",
        )
    missing = [n for n in expected if n not in tensors and not n.endswith(_STEP_COUNT)]
    if missing and not allow_partial:
        raise ModelError(
            f"{shown}: {_first_of(missing)} missing, of {len(given) + len(missing)} in"
            f" {model.name}; with --allow-partial-weights, missing tensors stay random",
            code="missing_tensors",
        )
    return tuple(missing)


def _shapes(model: CoverModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.backbone.state_dict().items()}


def _hint(
    tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], unknown: list[str]
) -> str:
    """Suggests the model that the file fits, or else the correct name of a misspelled tensor."""
    for other in MODELS:
        with torch.device("meta"):
            shapes = _shapes(build_model(other, 1))
        if all(shapes.get(name) == tensor.shape for name, tensor in tensors.items()):
            return f"; the file fits --model {other}"
    near = did_you_mean(unknown[0], expected.keys() - tensors.keys()) if unknown else ""
    # Without a similar name it would be a list of hundreds of valid names.
    return near if near.startswith("; did you mean") else ""


def _download_error(url: str, error: Exception) -> ModelError:
    if isinstance(error, HTTPError):
        error.close()  # the error keeps the connection open
        problem = f"the server answered {error.code} {error.reason}"
    elif isinstance(error, OSError) and error.filename is not None:
        problem = f"cannot save the download: {error.strerror}: {error.filename}"
    else:
        problem = f"cannot reach the server: {_first_line(getattr(error, 'reason', error))}"
    return ModelError(f"{url}: {problem}; {_USE_A_FILE}", code="download_failed")


def _without_secrets(uri: str) -> str:
    """`uri` without query, which may be a signature, and without user name and password."""
    if not uri.lower().startswith(_WEB):
        return uri
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _first_of(names: list[str]) -> str:
    """`conv1.weight and 3 more are`: the subject of a message about several tensors."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _by(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
