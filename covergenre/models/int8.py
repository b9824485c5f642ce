"""int8 models: quantized by NNCF, run by OpenVINO on CPUs. Both are optional packages.

Weights are quantized to 7 of the 8 bits: with 8, CPUs without VNNI instructions would overflow, and
scores would depend on the CPU.
"""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import ModelError
from covergenre.models.bundle import INT8_FILES, Bundle, no_network
from covergenre.models.networks import CoverModel
from covergenre.models.predictor import CPU_ROWS, fixed_batches, normalise, sigmoid


class Int8Model:
    """A quantized model on the CPU; the same methods as InferenceModel."""

    def __init__(self, bundle: Bundle, xml: bytes, weights: bytes) -> None:
        """bundle: named in errors. xml, weights: the files INT8_FILES. Raises ModelError if
        OpenVINO is not installed, or cannot load the files."""
        self._bundle = bundle
        openvino = _package("openvino")
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # several workers of a machine would get the same cores
            "INFERENCE_PRECISION_HINT": "f32",  # of the layers that are not quantized
        }
        core = openvino.Core()
        try:
            self._compiled = core.compile_model(core.read_model(xml, weights), "CPU", settings)
        except RuntimeError as error:
            raise ModelError(
                f"{bundle.uri}: OpenVINO {openvino.__version__} cannot load the model:"
                f" {(str(error).splitlines() or [''])[-1]}",
                code="other_weights",
            ) from error

    def scores(self, pixels_BHWC: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """Scores in 0 to 1, float32 [B, genres], of uint8 [B, side, side, 3]; CPU_ROWS at a time,
        whatever batch_size."""
        outputs = [
            np.array(self._compiled(batch)[0][:count])
            for batch, count in fixed_batches(pixels_BHWC, CPU_ROWS)
        ]
        return sigmoid(np.concatenate(outputs))

    def features(self, pixels_BHWC: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """Raises ModelError: int8 models only have scores."""
        raise no_network(self._bundle, "features")

    @property
    def num_features(self) -> int:
        """Raises ModelError, as `features` does."""
        raise no_network(self._bundle, "features")

    @property
    def network(self) -> CoverModel:
        """Raises ModelError: it is not a network of torch."""
        raise no_network(self._bundle, "network")


class _FromPixels(nn.Module):
    """uint8 pixels [B, H, W, 3] -> logits, with the preprocessing."""

    def __init__(self, network: CoverModel, preprocessing: Preprocessing) -> None:
        super().__init__()
        self._network, self._preprocessing = network, preprocessing

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 255.0
        logits: Tensor = self._network(normalise(images_BCHW, self._preprocessing))
        return logits


def check_packages() -> None:
    """Raises ModelError (code "missing_extra") if NNCF or OpenVINO is not installed."""
    _package("openvino")
    _package("nncf")


def quantize_network(
    network: CoverModel, preprocessing: Preprocessing, pixels_BHWC: NDArray[np.uint8]
) -> dict[str, bytes]:
    """The files of a quantized network, by name.

    network: on the CPU, in eval mode. pixels_BHWC: covers to calibrate with, uint8 [covers, side,
    side, 3]; whole batches of CPU_ROWS are used, or one that is filled up.
    """
    openvino, nncf = _package("openvino"), _package("nncf")
    batches = [b for b, count in fixed_batches(pixels_BHWC, CPU_ROWS) if count == CPU_ROWS]
    batches = batches or [np.resize(pixels_BHWC, (CPU_ROWS, *pixels_BHWC.shape[1:]))]
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        nncf.set_log_level(logging.ERROR)
        example = torch.from_numpy(batches[0])
        exported = torch.export.export(_FromPixels(network, preprocessing).eval(), (example,))
        quantized = nncf.quantize(
            openvino.convert_model(exported),
            nncf.Dataset(batches),
            subset_size=len(batches),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE
            ),
        )
        openvino.save_model(quantized, Path(folder, "model.xml"), compress_to_fp16=False)
        saved = [Path(folder, name).read_bytes() for name in ("model.xml", "model.bin")]
    return dict(zip(INT8_FILES, saved, strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF shows progress bars on standard output, and all three packages warn."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _package(name: str) -> Any:
    """An optional package, imported without its telemetry, which is on by default."""
    try:
        with _quiet(), _no_telemetry():
            return import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"int8 models need the package {name}; install it on every machine: uv sync --extra"
            " int8 (or uv pip install nncf openvino)",
            code="missing_extra",
        ) from error


@contextlib.contextmanager
def _no_telemetry() -> Iterator[None]:
    """Both packages work without their package for telemetry."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # imports raise ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[name]
