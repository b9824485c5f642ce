"""The forward pass of the network under training; pixels to tensors. See also inference.py."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from covergenre.data.image_decoding import Preprocessing

if TYPE_CHECKING:
    import torch

    from covergenre.models.networks import CoverModel

CPU_ROWS = 8
"""Rows of a forward pass of inference on CPUs, whatever the batch size. More are slower, as
activations do not fit the caches; with fewer, VGG16 reads its dense layers too often."""


class Predictor:
    """The network under training on a device: its logits for whole batches of any size."""

    def __init__(
        self, model: "CoverModel", preprocessing: Preprocessing, device: str, precision: str
    ) -> None:
        self._model = model
        self._preprocessing = preprocessing
        self._device = device
        self._precision = precision

    def logits_of(self, images_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Logits in float32 of images in 0 to 1 on the device; finite even where the score rounds
        to 0 or 1."""
        import torch

        training = self._model.training
        self._model.eval()
        with torch.inference_mode(), autocast(self._device, self._precision):
            logits: torch.Tensor = self._model(normalise(images_BCHW, self._preprocessing)).float()
        self._model.train(training)
        return logits


def fixed_batches(
    pixels_BHWC: NDArray[np.uint8], rows: int
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """`pixels_BHWC` in copies of exactly `rows` rows, the last filled up with zeros; with the
    number of rows that are not filling. No pixels give one batch, of filling only."""
    for start in range(0, max(1, len(pixels_BHWC)), rows):
        given = pixels_BHWC[start : start + rows]
        batch = np.zeros((rows, *given.shape[1:]), np.uint8)
        batch[: len(given)] = given
        yield batch, len(given)


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores of logits, computed in float64.

    Not torch's sigmoid: on CPUs it rounds the last elements of a tensor in another way, so that a
    score would depend on the position of its row.
    """
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64))).astype(np.float32)


def autocast(device: str, precision: str) -> "torch.autocast":
    """torch.autocast for a precision of the settings: fp32 (off) or bf16."""
    import torch

    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16")


def to_unit(pixels_BHWC: NDArray[np.uint8], device: str) -> "torch.Tensor":
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in 0 to 1, on `device`.

    The pixels are transferred as bytes, a quarter of the size of floats. The result is laid out
    channels-last, which convolutions prefer.
    """
    import torch

    pixels = torch.frombuffer(bytearray(pixels_BHWC.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(pixels_BHWC.shape).to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).float().div_(255.0)


def normalise(images_BCHW: "torch.Tensor", spec: Preprocessing) -> "torch.Tensor":
    """Images in 0 to 1 -> zero mean and unit variance by channel, as the backbone expects."""
    import torch

    mean = torch.tensor(spec.mean, device=images_BCHW.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=images_BCHW.device).view(1, 3, 1, 1)
    return (images_BCHW - mean) / std


def to_device(model: "CoverModel", device: str) -> "CoverModel":
    """The model on `device`, its convolutions laid out channels-last."""
    import torch

    return model.to(device).to(memory_format=torch.channels_last)
