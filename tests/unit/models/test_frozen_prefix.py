"""The frozen first stages of each network, and what follows them."""

import pytest
import torch

from covergenre.models import frozen_prefix, networks


@pytest.mark.parametrize(
    "name", ["alexnet", "baseline", "mobilenet_v2", "resnet18", "tiny", "vgg16"]
)
def test_prefix_and_tail_compute_what_the_model_computes(name: str) -> None:
    model = networks.build_model(name, 3, seed=0).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        count = len(frozen_prefix.stages(model))
        for cut in {0, 1, count // 2, count}:
            features = frozen_prefix.prefix(model, cut)(images)
            assert frozen_prefix.Tail(model, cut)(features).equal(expected)


@pytest.mark.parametrize(
    ("name", "freeze", "shape"),
    [
        ("vgg16", "paper", (512, 28, 28)),  # after block4_conv1 and its ReLU
        ("vgg16", "all", (25088,)),
        ("mobilenet_v2", "all", (1280,)),
        ("mobilenet_v2", "1", (32, 112, 112)),
        ("resnet18", "1", (64, 56, 56)),
        ("resnet18", "2", (64, 56, 56)),  # a block is cached as a whole or not at all
        ("baseline", "2", (128, 56, 56)),
        ("tiny", "3", (64, 14, 14)),
    ],
)
def test_frozen_stages_end_before_the_first_trained_layer(
    name: str, freeze: str, shape: tuple[int, ...]
) -> None:
    model = networks.build_model(name, 3, seed=0)
    networks.freeze(model, freeze)
    count = frozen_prefix.count_frozen(model)
    assert frozen_prefix.feature_shape(model, count, 224, "fp32") == (shape, torch.float32)
    assert all(not p.requires_grad for p in frozen_prefix.prefix(model, count).parameters())


@pytest.mark.parametrize("name", ["vgg16", "tiny"])
def test_model_that_is_trained_as_a_whole_has_no_frozen_stages(name: str) -> None:
    assert frozen_prefix.count_frozen(networks.build_model(name, 3, seed=0)) == 0
