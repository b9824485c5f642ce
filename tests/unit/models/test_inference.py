"""Models loaded for inference: equal bits in every batch, and the scores of the trained network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.modules.batchnorm import _BatchNorm

from covergenre.data.image_decoding import Preprocessing
from covergenre.models import inference
from covergenre.models.inference import InferenceModel, fold_batch_norm
from covergenre.models.networks import CoverModel, build_model
from covergenre.models.predictor import (
    CPU_ROWS,
    Predictor,
    fixed_batches,
    sigmoid,
    to_device,
    to_unit,
)

SPEC = replace(Preprocessing(), side=64)
WITH_BATCH_NORM = ("baseline", "mobilenet_v2", "resnet18")


def network(name: str) -> CoverModel:
    """Random weights and, as after training, statistics of batch norms."""
    model = build_model(name, 5, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return to_device(model, "cpu")


def random_pixels(rows: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (rows, SPEC.side, SPEC.side, 3), np.uint8)


def slow_scores(model: CoverModel, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    logits = Predictor(model, SPEC, "cpu", "fp32").logits_of(to_unit(pixels, "cpu"))
    return logits.sigmoid().numpy()


@pytest.mark.parametrize(
    ("name", "precision"),
    [("tiny", "fp32"), ("tiny", "bf16"), ("mobilenet_v2", "fp32"), ("baseline", "fp32")],
)
def test_scores_of_a_row_do_not_depend_on_its_batch(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "cpu_has_bf16", lambda: True)  # else it is emulated
    model = InferenceModel(network(name), SPEC, "cpu", precision)
    pixels = random_pixels(2 * CPU_ROWS + 3)
    expected = model.scores(pixels, 64)
    assert expected.shape == (len(pixels), 5) and expected.dtype == np.float32
    assert np.array_equal(model.scores(pixels, 7), expected)
    for rows in ([0], [17, 2, 11, 5, 0], range(18, -1, -1)):
        assert np.array_equal(model.scores(pixels[list(rows)], 64), expected[list(rows)])
    features = model.features(pixels, 64)
    assert np.array_equal(model.features(pixels[[9, 1]], 64), features[[9, 1]])


@pytest.mark.parametrize("name", ["tiny", *WITH_BATCH_NORM])
def test_scores_are_those_of_the_network(name: str) -> None:
    model, pixels = network(name), random_pixels(6)
    fast = InferenceModel(model, SPEC, "cpu", "fp32")
    np.testing.assert_allclose(fast.scores(pixels, 64), slow_scores(model, pixels), atol=1e-5)
    logits = model.head[-1] if isinstance(model.head, torch.nn.Sequential) else model.head
    with torch.inference_mode():
        scores = logits(torch.from_numpy(fast.features(pixels, 64))).sigmoid().numpy()
    np.testing.assert_allclose(scores, slow_scores(model, pixels), atol=1e-5)


def test_bf16_scores_are_close_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "cpu_has_bf16", lambda: True)
    model, pixels = network("tiny"), random_pixels(6)
    scores = InferenceModel(model, SPEC, "cpu", "bf16").scores(pixels, 64)
    expected = slow_scores(model, pixels)
    np.testing.assert_allclose(scores, expected, atol=0.02)
    assert not np.array_equal(scores, expected)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_bf16_model_runs_in_fp32_on_cpus_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "cpu_has_bf16", lambda: False)
    model, pixels = network("tiny"), random_pixels(3)
    bf16, fp32 = (InferenceModel(model, SPEC, "cpu", name) for name in ("bf16", "fp32"))
    assert np.array_equal(bf16.scores(pixels, 64), fp32.scores(pixels, 64))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_folding_leaves_the_network_as_it_was_and_no_batch_norm(name: str) -> None:
    model = network(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    last, shared = list(model.parameters())[-2], list(folded.parameters())[-2]
    assert last.data_ptr() == shared.data_ptr()


def test_sigmoid_of_any_logit() -> None:
    logits = np.array([-1e4, -100, -20, -1, 0, 1, 20, 1e4], np.float32)
    scores = sigmoid(logits)
    assert scores.dtype == np.float32 and (scores[0], scores[4], scores[-1]) == (0, 0.5, 1)
    expected = torch.from_numpy(logits).double().sigmoid().numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-45)


def test_no_pixels_give_no_scores() -> None:
    model = InferenceModel(network("tiny"), SPEC, "cpu", "fp32")
    assert model.scores(random_pixels(0), 64).shape == (0, 5)


def test_fixed_batches_are_filled_with_zeros() -> None:
    pixels = random_pixels(5)
    batches = list(fixed_batches(pixels, 3))
    assert [count for _, count in batches] == [3, 2]
    assert all(len(batch) == 3 for batch, _ in batches)
    assert np.array_equal(batches[1][0][:2], pixels[3:]) and not batches[1][0][2].any()
