"""Inference: pixels to scores or features, on one device."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from covergenre.data.image_decoding import Preprocessing

if TYPE_CHECKING:
    import torch

    from covergenre.models.networks import CoverModel


class Predictor:
    """A model on a device; takes uint8 pixels and returns scores or features."""

    def __init__(
        self, model: "CoverModel", preprocessing: Preprocessing, device: str, precision: str
    ) -> None:
        self._model = model
        self._preprocessing = preprocessing
        self._device = device
        self._precision = precision

    def __call__(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores in 0 to 1, float32 [batch, genres], of uint8 [batch, side, side, 3]."""
        scores = self.scores_of(to_unit(pixels_BHWC, self._device))
        return np.asarray(scores.cpu().numpy(), np.float32)

    def scores_of(self, images_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Scores of images in 0 to 1 on the device; the result is on the device, too."""
        return self.logits_of(images_BCHW).sigmoid()

    def logits_of(self, images_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Logits in float32; finite even where the score rounds to 0 or 1."""
        return self._run(self._model, images_BCHW)

    def features(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Penultimate features, float32 [batch, features], of uint8 [batch, side, side, 3]."""
        features = self._run(self._model.embed, to_unit(pixels_BHWC, self._device))
        return np.asarray(features.cpu().numpy(), np.float32)

    def _run(
        self, function: "Callable[[torch.Tensor], torch.Tensor]", images_BCHW: "torch.Tensor"
    ) -> "torch.Tensor":
        import torch

        training = self._model.training
        self._model.eval()
        with torch.inference_mode(), autocast(self._device, self._precision):
            output = function(normalise(images_BCHW, self._preprocessing)).float()
        self._model.train(training)
        return output


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
