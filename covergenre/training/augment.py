"""Data augmentation on the device.

The changes to an image depend only on (seed, epoch, row), so that training gives the same result
with any number of workers.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# Published settings of the baseline, for values in 0 to 1.
_BRIGHTNESS = 32 / 255
_SATURATION = (0.5, 1.5)
# Milder than torchvision's (0.08, 1), because the layout of a cover is related to its genre.
_CROP_SIDE = (0.8, 1.0)


def augment(
    images_BCHW: "torch.Tensor", rows: NDArray[np.int64], *, kind: str, seed: int, epoch: int
) -> "torch.Tensor":
    """Augment images in 0 to 1. kind: "none", "color" (random brightness and saturation) or "light"
    (the same, and random flips and crops)."""
    if kind == "none" or not len(rows):
        return images_BCHW
    import torch

    draws = torch.from_numpy(_uniform(rows, seed=seed, epoch=epoch, count=6))
    u = draws.to(images_BCHW.device).unbind(1)
    if kind == "light":
        images_BCHW = _mirror_and_crop(images_BCHW, *u[2:])
    brightness = (2 * u[0] - 1) * _BRIGHTNESS
    saturation = _SATURATION[0] + (_SATURATION[1] - _SATURATION[0]) * u[1]
    # saturation * image + (1 - saturation) * gray + brightness, with few passes over memory
    saturation, brightness = (values.view(-1, 1, 1, 1) for values in (saturation, brightness))
    red, green, blue = images_BCHW.split(1, dim=1)
    shift = (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    shift.mul_(1 - saturation).add_(brightness)
    return torch.addcmul(shift, images_BCHW, saturation).clamp_(0, 1)


def _mirror_and_crop(
    images_BCHW: "torch.Tensor",
    mirror: "torch.Tensor",
    side: "torch.Tensor",
    across: "torch.Tensor",
    down: "torch.Tensor",
) -> "torch.Tensor":
    import torch
    from torch.nn import functional

    side = _CROP_SIDE[0] + (_CROP_SIDE[1] - _CROP_SIDE[0]) * side
    batch, _, height, width = images_BCHW.shape
    # As affine_grid computes for a scaling and a shift, in a third of the time.
    grid = images_BCHW.new_empty(batch, height, width, 2)
    direction = side * torch.where(mirror < 0.5, -1.0, 1.0)
    x = direction[:, None] * _centers(width, grid) + ((1 - side) * (2 * across - 1))[:, None]
    y = side[:, None] * _centers(height, grid) + ((1 - side) * (2 * down - 1))[:, None]
    grid[..., 0], grid[..., 1] = x[:, None, :], y[:, :, None]
    return functional.grid_sample(
        images_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _centers(count: int, like: "torch.Tensor") -> "torch.Tensor":
    """The centers of `count` pixels, where -1 and 1 are the outer edges of the image."""
    import torch

    return (2 * torch.arange(count, device=like.device, dtype=like.dtype) + 1) / count - 1


def _uniform(rows: NDArray[np.int64], *, seed: int, epoch: int, count: int) -> NDArray[np.float32]:
    """[rows, count] in [0, 1), from a counter-based random stream per row: order is irrelevant."""
    raw = np.stack(
        # Key 1; the order of samples uses key 0.
        [np.random.Philox(counter=[0, 0, r, epoch], key=[seed, 1]).random_raw(count) for r in rows]
    )
    return (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
