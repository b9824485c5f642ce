"""A trained model in Python: load_model and Model. No Ray."""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from covergenre.api import images
from covergenre.api.images import Cover, Transform
from covergenre.api.scores import Scores
from covergenre.data.covers import Source
from covergenre.data.image_decoding import CoverError
from covergenre.errors import ConfigError, DeviceMemoryError, ImageError
from covergenre.io import storage
from covergenre.io.urls import redacted
from covergenre.models import bundle as bundles
from covergenre.progress import Callback, Progress, reporting

if TYPE_CHECKING:
    from covergenre.models.inference import InferenceModel
    from covergenre.models.int8 import Int8Model
    from covergenre.models.networks import CoverModel


def load_model(uri: str | os.PathLike[str], device: str = "auto") -> "Model":
    """Load a model directory that `train` wrote. The SHA-256 of the weights is checked.

    Args:
        uri: the model directory, local or s3://.
        device: "auto" (a GPU if torch has one, else the CPU), "cpu", "gpu", or a device of torch
            such as "cuda:1" or "mps".

    Returns:
        The model in eval mode on the device.

    Raises:
        ModelError: not a model directory, or its files were changed.
        StorageError: it cannot be read.
        ConfigError: there is no such device (code "no_device").
    """
    from covergenre.models.inference import load_for_inference

    bundle = bundles.read_bundle(os.fspath(uri))
    torch_device = _torch_device(bundles.device_of(bundle, device))
    return Model(bundle, load_for_inference(bundle, torch_device), torch_device)


def _torch_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    name = "cuda" if name == "gpu" else name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r}: torch cannot use it: {reason}", code="no_device"
        ) from None
    return name


class Model:
    """A trained model on a device. Made by `load_model`.

    Attributes:
        transform: converts a PIL image (or any other cover) to a float32 tensor [3, side, side],
            with the preprocessing of training.
        uri: the model directory.
        device: name of the torch device.
    """

    def __init__(
        self, bundle: bundles.Bundle, model: "InferenceModel | Int8Model", device: str
    ) -> None:
        self.transform = Transform(bundle.preprocessing)
        self.uri = bundle.uri
        self.device = device
        self._bundle = bundle
        self._model = model

    @property
    def module(self) -> "CoverModel":
        """The network as a torch.nn.Module in eval mode: normalized images, float32
        [batch, 3, side, side] as returned by `transform`, to logits [batch, genres].

        It has the trained layers. `predict` and `embed` use a faster form of it, made when the
        model was loaded; do not change its weights. Int8 models have no network (ModelError)."""
        return self._model.network

    @property
    def name(self) -> str:
        """Name of the architecture, such as "vgg16"."""
        return self._bundle.model

    @property
    def genres(self) -> tuple[str, ...]:
        """Names of the genres: column j of the scores is genre j."""
        return self._bundle.genres.names

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold of each genre: a cover has the genre if its score is at least the threshold."""
        return dict(self._bundle.thresholds)

    @property
    def weights_id(self) -> str:
        """Identity of what determines a score: weights, genres, preprocessing and precision."""
        return self._bundle.weights_id

    @property
    def precision(self) -> str:
        """Arithmetic precision: "fp32", "bf16" or "int8"."""
        return self._bundle.precision

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the model was trained with, by name."""
        config = storage.read_json(storage.join(self.uri, "config.json"))
        settings: dict[str, Any] = config["train"].get("settings", {})
        return settings

    def predict(
        self,
        covers: Cover | Iterable[Cover],
        *,
        batch_size: int = 64,
        errors: Literal["raise", "nan"] = "raise",
        allow_private_addresses: bool = False,
        progress: bool = False,
        callbacks: Iterable[Callback] = (),
    ) -> Scores:
        """Score covers, as the `score` stage does, in this process.

        On a CPU, the scores of a cover have the same bits whatever the other covers and batch_size
        are, and in `score` too (at an equal number of threads of torch). On a GPU they have them at
        equal batch_size.

        Encoded images are decoded in a child process: a malformed one cannot crash this one.

        Args:
            covers: one cover or several, of any mix of types: paths and URLs (local, s3://,
                http(s)://, data:), encoded bytes, PIL images, and pixels as uint8 arrays
                [height, width], [height, width, 3] (RGB) or [height, width, 4] (RGBA). May be a
                generator: no more than two batches are in memory.
            batch_size: covers in a batch; on a GPU, also covers in a forward pass.
            errors: "raise" raises ImageError for the first cover that cannot be read or decoded;
                "nan" sets its scores to NaN, and the reason in `Scores.reasons`.
            allow_private_addresses: also fetch http(s) URLs of private networks and this machine.
            progress: show a progress bar, or log lines where stderr is not a terminal.
            callbacks: functions that are called with a ProgressEvent after each batch.

        Returns:
            Scores, float32 [covers, genres], in the order of `covers`.

        Raises:
            ImageError: a cover cannot be read or decoded; see its `index` and `code`.
            DeviceMemoryError: a batch does not fit in the memory of the device.
        """
        with reporting(progress, callbacks):
            values, names, reasons = self._run(
                *(self._model.scores, len(self.genres), "predict", covers),
                *(batch_size, errors, allow_private_addresses),
            )
        return Scores(values, self.genres, self._bundle.thresholds, names, reasons)

    def embed(
        self,
        covers: Cover | Iterable[Cover],
        *,
        batch_size: int = 64,
        errors: Literal["raise", "nan"] = "raise",
        allow_private_addresses: bool = False,
        progress: bool = False,
        callbacks: Iterable[Callback] = (),
    ) -> NDArray[np.float32]:
        """Penultimate features of covers: the input of the last layer of the network.

        Arguments and errors are those of `predict`.

        Returns:
            float32 [covers, features], in the order of `covers`: 4096 features for vgg16, 512 for
            resnet18. NaN for a cover that cannot be used, with `errors="nan"`.

        Raises:
            ModelError: an int8 model has no features (code "int8").
        """
        with reporting(progress, callbacks):
            values, _, _ = self._run(
                *(self._model.features, self._model.num_features, "embed", covers),
                *(batch_size, errors, allow_private_addresses),
            )
        return values

    def _run(
        self,
        compute: Callable[[NDArray[np.uint8], int], NDArray[np.float32]],
        width: int,
        task: str,
        covers: Cover | Iterable[Cover],
        batch_size: int,
        errors: str,
        allow_private_addresses: bool,
    ) -> tuple[NDArray[np.float32], list[str], list[str | None]]:
        """(values [covers, width], name of each cover, reason for missing values or None)"""
        import torch

        if errors not in ("raise", "nan"):
            raise ConfigError(f"errors: {errors!r} is not 'raise' or 'nan'", code="invalid")
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is less than 1", code="invalid")
        total, covers = images.as_list(covers)
        source = Source(allow_private=allow_private_addresses)
        batches = images.decode_batches(covers, self._bundle.preprocessing, source, batch_size)
        parts = [np.empty((0, width), np.float32)]
        names: list[str] = []
        reasons: list[str | None] = []
        with Progress(task, total, "covers") as counter:
            for batch in batches:
                pixels = []
                for name, found in batch:
                    if isinstance(found, CoverError):
                        if errors == "raise":
                            raise ImageError(
                                f"cover {len(names)} ({redacted(name)}): {found}",
                                code=found.reason,
                                index=len(names),
                            ) from found
                    else:
                        pixels.append(found)
                    names.append(name)
                    reasons.append(str(found) if isinstance(found, CoverError) else None)
                values = np.full((len(batch), width), np.nan, np.float32)
                good = [reason is None for reason in reasons[-len(batch) :]]
                try:
                    if pixels:
                        values[good] = compute(np.stack(pixels), batch_size)
                except torch.OutOfMemoryError as error:
                    raise DeviceMemoryError(
                        f"a batch of {len(pixels)} covers does not fit in the memory of"
                        f" {self.device}; use a smaller batch_size"
                    ) from error
                parts.append(values)
                counter.advance(len(batch))
        return np.concatenate(parts), names, reasons

    def __repr__(self) -> str:
        return (
            f"Model({self.uri!r}, {self.name}, {len(self.genres)} genres, {self.precision},"
            f" device={self.device!r},"
            f" weights_id={self.weights_id!r})"
        )
