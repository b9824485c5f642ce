"""Models loaded for inference, as score, evaluate and predict run them.

Faster than the trained network, with the same scores up to rounding: batch norms are folded into
the layers before them, weights are converted to the precision of the model once, and pixels are
normalized in two passes over memory instead of five.

The scores of a cover do not depend on the other covers of its batch, not even in the last bit:
every forward pass has the same shape. (Matrix products of other shapes add their terms in another
order.)
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from covergenre.data.image_decoding import Preprocessing
from covergenre.models.bundle import Bundle, load_model, read_weights
from covergenre.models.int8 import Int8Model
from covergenre.models.networks import CoverModel
from covergenre.models.predictor import CPU_ROWS, fixed_batches, sigmoid, to_device


class InferenceModel:
    """A network on a device; uint8 pixels to scores or features."""

    def __init__(
        self, network: CoverModel, preprocessing: Preprocessing, device: str, precision: str
    ) -> None:
        """network: on `device`. It is not changed, and shares its weights with this object, except
        those that are folded or converted."""
        self.network = network
        self._device = torch.device(device)
        self._dtype = compute_dtype(self._device, precision)
        folded = fold_batch_norm(network).to(self._dtype)
        self._folded = folded.to(memory_format=torch.channels_last)
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        # For a whole line of pixels: tensors of three numbers are slow to apply.
        line = preprocessing.side
        self._scale = (1 / (255 * std)).float().repeat(line).to(self._device)
        self._shift = (-mean / std).float().repeat(line).to(self._device)

    @property
    def num_features(self) -> int:
        """Number of features that `features` returns."""
        return self.network.num_features

    def scores(self, pixels_BHWC: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """Scores in 0 to 1, float32 [B, genres], of uint8 [B, side, side, 3].

        batch_size: rows of a forward pass on GPUs; CPU_ROWS on CPUs.
        """
        return sigmoid(self._run(self._folded, pixels_BHWC, batch_size))

    def features(self, pixels_BHWC: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """Penultimate features, float32 [B, num_features]; arguments as of `scores`."""
        return self._run(self._folded.embed, pixels_BHWC, batch_size)

    def _run(
        self, function: Callable[[Tensor], Tensor], pixels_BHWC: NDArray[np.uint8], batch_size: int
    ) -> NDArray[np.float32]:
        rows = CPU_ROWS if self._device.type == "cpu" else batch_size
        with torch.inference_mode():
            outputs = [
                function(self._normalized(batch))[:count].float()
                for batch, count in fixed_batches(pixels_BHWC, rows)
            ]
            return np.asarray(torch.cat(outputs).cpu().numpy(), np.float32)

    def _normalized(self, pixels_BHWC: NDArray[np.uint8]) -> Tensor:
        """Normalized images [B, 3, H, W], laid out channels-last as the pixels are."""
        b, h, w, c = pixels_BHWC.shape
        lines = torch.from_numpy(pixels_BHWC).to(self._device, non_blocking=True).view(b, h, w * c)
        lines = lines.float().mul_(self._scale).add_(self._shift).to(self._dtype)
        return lines.view(b, h, w, c).permute(0, 3, 1, 2)


def load_for_inference(bundle: Bundle, device: str) -> InferenceModel | Int8Model:
    """The model of a model directory on a torch device. Raises ModelError."""
    if bundle.precision == "int8":
        return Int8Model(bundle, *read_weights(bundle))
    network = to_device(load_model(bundle), device)
    return InferenceModel(network, bundle.preprocessing, device, bundle.precision)


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type of weights and activations for a precision of the settings.

    float32 for bf16 on CPUs without instructions for it, where bf16 is emulated: many times slower
    and no more precise.
    """
    if precision == "fp32" or (device.type == "cpu" and not cpu_has_bf16()):
        return torch.float32
    return torch.bfloat16


def cpu_has_bf16() -> bool:
    """Whether oneDNN computes with bf16 on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fold_batch_norm(model: CoverModel) -> CoverModel:
    """A copy in eval mode, with each batch norm folded into the convolution or dense layer before
    it. Other tensors share their memory with those of `model`."""
    # New parameters: `Module.to` changes parameters in place.
    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    folded = copy.deepcopy(model, shared).eval()
    # In order of definition, a batch norm comes directly after the layer whose output it takes.
    leaves = [(n, m) for n, m in folded.named_modules() if next(m.children(), None) is None]
    for (name, layer), (norm_name, norm) in pairwise(leaves):
        if not isinstance(norm, _BatchNorm):
            continue
        if isinstance(layer, nn.Conv2d):
            fused: nn.Module = nn.utils.fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear):
            fused = nn.utils.fuse_linear_bn_eval(layer, norm)
        else:
            continue
        folded.set_submodule(name, fused)
        folded.set_submodule(norm_name, nn.Identity())
    return folded
