"""Random changes to images: of (seed, epoch, row) alone, and within their bounds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from covergenre.training.augment import _mirror_and_crop, _uniform, augment

KINDS = ["color", "light"]


def images(count: int, side: int = 12, seed: int = 0) -> Tensor:
    """[count, 3, side, side] in 0 to 1."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def changed(batch: Tensor, rows: list[int], kind: str = "light", **others: Any) -> Tensor:
    options = {"seed": 0, "epoch": 0} | others
    return augment(batch.clone(), np.array(rows, np.int64), kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_change_of_a_row_does_not_depend_on_the_batch(kind: str) -> None:
    rows = [5, 0, 3, 999_999_999_999, 7, 1, 2, 4, 6]
    batch = images(len(rows))
    whole = changed(batch, rows, kind)
    for at, row in enumerate(rows):
        assert torch.equal(changed(batch[at : at + 1], [row], kind)[0], whole[at])
    for part in ([0, 1], [8, 3, 5], [2, 2], list(range(9))[::-1]):
        again = changed(batch[part], [rows[at] for at in part], kind)
        assert torch.equal(again, whole[part])


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_and_input_are_not_changed(kind: str) -> None:
    batch = images(4)
    before = batch.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augment(batch, np.arange(4), kind=kind, seed=0, epoch=0)
    assert torch.equal(batch, before)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(augment(batch, np.arange(4), kind=kind, seed=0, epoch=0), first)


def test_none_returns_the_input() -> None:
    batch = images(3)
    assert torch.equal(changed(batch, [0, 1, 2], "none"), batch)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_empty_batch_is_accepted(kind: str) -> None:
    assert changed(images(0), [], kind).shape == (0, 3, 12, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_change_depends_on_seed_epoch_and_row(kind: str) -> None:
    batch = images(1)
    results = [
        changed(batch, [row], kind, seed=seed, epoch=epoch)
        for row in (0, 1, 2**40)
        for seed in (0, 1, 2**63 - 1)
        for epoch in (0, 1)
    ]
    for at, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in results[:at])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 8, 12)])
def test_shape_type_and_range_are_kept(kind: str, shape: tuple[int, ...]) -> None:
    for fill in (0.0, 1.0, None):
        batch = torch.rand(shape) if fill is None else torch.full(shape, fill)
        result = changed(batch, [0, 1], kind)
        assert result.shape == shape
        assert result.dtype == torch.float32
        assert result.min() >= 0 and result.max() <= 1


def test_brightness_covers_its_range() -> None:
    """In a grey image only the brightness can change."""
    rows = list(range(2000))
    result = changed(torch.full((2000, 3, 1, 1), 0.5), rows, "color").flatten(1)
    assert (result.amax(1) - result.amin(1)).max() < 1e-6
    shift = result[:, 0] - 0.5
    bound = 32 / 255
    assert shift.abs().max() <= bound + 1e-6
    assert shift.max() > 0.98 * bound and shift.min() < -0.98 * bound
    assert abs(float(shift.mean())) < 0.06 * bound  # deviation of the mean: 0.013 * bound


def test_saturation_covers_its_range() -> None:
    """Only the saturation changes the difference of two channels."""
    rows = list(range(2000))
    batch = torch.tensor([0.5, 0.5, 0.6]).view(1, 3, 1, 1).expand(2000, 3, 1, 1)
    result = changed(batch, rows, "color")[:, :, 0, 0]
    factor = (result[:, 2] - result[:, 0]) / 0.1
    assert factor.min() >= 0.5 - 1e-4 and factor.max() <= 1.5 + 1e-4
    assert factor.min() < 0.51 and factor.max() > 1.49
    assert abs(float(factor.mean()) - 1) < 0.03
    assert torch.allclose(result[:, 0], result[:, 1])


def test_color_moves_no_pixel() -> None:
    batch = torch.zeros(50, 3, 6, 6)
    batch[:, :, 2, 4] = 0.6
    result = changed(batch, list(range(50)), "color")
    bright = result[:, 0, 2, 4].clone()
    result[:, :, 2, 4] = 0
    assert (bright > result.flatten(1).amax(1) + 0.3).all()


def test_light_mirrors_about_half_of_the_images() -> None:
    """Darker to the left; a mirror image is darker to the right."""
    ramp = torch.linspace(0.2, 0.8, 16).expand(400, 3, 16, 16)
    result = changed(ramp, list(range(400)))
    mirrored = result[:, 0, 8, 0] > result[:, 0, 8, -1]
    assert 160 < int(mirrored.sum()) < 240  # 200 expected, deviation 10
    upside_down = changed(ramp.transpose(2, 3), list(range(400)))
    assert (upside_down[:, 0, 0, 8] < upside_down[:, 0, -1, 8]).all()


def test_changes_are_independent_of_each_other() -> None:
    rows = list(range(1000))
    ramp = torch.linspace(0.2, 0.8, 16).expand(1000, 3, 16, 16)
    light = changed(ramp, rows)[:, 0, 8]
    mirrored = (light[:, 0] > light[:, -1]).numpy()
    kept = (light.amax(1) - light.amin(1)).numpy()
    plain = torch.tensor([0.5, 0.5, 0.6]).view(1, 3, 1, 1).expand(1000, 3, 1, 1)
    color = changed(plain, rows, "color")[:, :, 0, 0].numpy()
    saturation = color[:, 2] - color[:, 0]
    brightness = color @ np.array([0.299, 0.587, 0.114])
    related = np.corrcoef([mirrored, kept, brightness, saturation]) - np.eye(4)
    assert np.abs(related).max() < 0.13  # deviation 0.032


def test_light_keeps_between_four_fifths_and_all_of_a_side() -> None:
    """The values of a ramp show which part of it was kept."""
    side = 64
    across = torch.linspace(0.2, 0.8, side)
    ramp = torch.stack([across.expand(side, side)] * 3).expand(300, 3, side, side)
    result = changed(ramp, list(range(300)))[:, 0, side // 2]
    # brightness cancels in a difference; saturation changes no grey
    kept = (result.amax(1) - result.amin(1)) / 0.6
    assert kept.min() > 0.78 and kept.max() <= 1 + 1e-4
    assert kept.min() < 0.82 and kept.max() > 0.98


def test_crop_is_inside_the_image() -> None:
    """A frame is cut or kept, never repeated from beyond the edge."""
    side = 40
    x = torch.linspace(-1, 1, side)
    batch = torch.stack([x.expand(side, side)] * 3).mul(0.3).add(0.5).expand(300, 3, side, side)
    result = changed(batch, list(range(300)))[:, 0, side // 2]
    steps = (result[:, 1:] - result[:, :-1]).abs()
    whole = 0.6 / (side - 1)
    # every step is that of the ramp, but for the half pixel at the border
    assert steps[:, 1:-1].min() > 0.75 * whole and steps.max() < 1.05 * whole


def test_draws_are_uniform_and_of_independent_columns() -> None:
    draws = _uniform(np.arange(4000), seed=3, epoch=1, count=6)
    assert draws.shape == (4000, 6) and draws.dtype == np.float32
    assert draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        counts = np.histogram(column, 10, (0, 1))[0]
        assert (np.abs(counts - 400) < 90).all()  # deviation 19
    correlation = np.corrcoef(draws.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.08  # deviation 0.016


def test_golden_draws() -> None:
    """Other values would change resumed runs."""
    drawn = _uniform(np.array([0, 12345]), seed=42, epoch=3, count=3)
    assert (drawn * 2**24).astype(int).tolist() == [
        [3102819, 2714312, 4366366],
        [11608391, 9010395, 8479120],
    ]


def test_crop_is_that_of_torchs_affine_grid() -> None:
    from torch.nn import functional

    batch, u = images(5, side=14), torch.rand(4, 5, generator=torch.Generator().manual_seed(1))
    side = 0.8 + 0.2 * u[1]
    theta = torch.zeros(5, 2, 3)
    theta[:, 0, 0] = side * torch.where(u[0] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = side
    theta[:, 0, 2], theta[:, 1, 2] = (1 - side) * (2 * u[2] - 1), (1 - side) * (2 * u[3] - 1)
    grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
    expected = functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(_mirror_and_crop(batch, *u), expected, atol=1e-5, rtol=0)
