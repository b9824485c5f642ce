import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import covergenre.models.networks
from covergenre.errors import ConfigError, ModelError
from covergenre.models.networks import (
    CoverModel,
    build_model,
    convolutions,
    count_parameters,
    freeze,
    training_mode,
)
from covergenre.registry import MODELS


def on_meta(name: str, num_genres: int = 20) -> CoverModel:
    with torch.device("meta"):
        return build_model(name, num_genres)


def frozen_names(model: CoverModel) -> list[str]:
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_computes_logits(name: str) -> None:
    model = on_meta(name, 7).eval()
    images = torch.empty(2, 3, 224, 224, device="meta")
    features = model.backbone(images)
    assert features.ndim == 2 and features.shape[0] == 2
    assert model(images).shape == (2, 7)
    assert model.name == name
    assert all(p.is_meta for p in model.parameters())


def test_vgg16_has_the_parameter_counts_of_the_paper() -> None:
    model = on_meta("vgg16", 20)
    assert freeze(model, "paper") == 2_915_648
    assert count_parameters(model) == (134_342_484, 131_426_836, 2_915_648)
    assert count_parameters(on_meta("vgg16", 15))[0] == 134_321_999
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())


def test_baseline_is_that_of_the_paper() -> None:
    model = on_meta("baseline")
    found = convolutions(model)
    assert [conv.out_channels for _, conv in found] == [64, 128, 256, 512, 1024, 2048]
    assert model.backbone(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 2048 * 3 * 3)
    dense = [m for m in model.head.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in dense] == [2048, 2048, 2048, 20]
    assert len(norms(model.backbone)) == 6 and len(norms(model.head)) == 3
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.2] * 3


@pytest.mark.parametrize(
    ("name", "dropout"), [("alexnet", [0.5, 0.5]), ("mobilenet_v2", [0.2]), ("tiny", [])]
)
def test_dropout(name: str, dropout: list[float]) -> None:
    assert [m.p for m in on_meta(name).modules() if isinstance(m, nn.Dropout)] == dropout


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("vgg16", "features.0.weight"),
        ("resnet18", "conv1.weight"),
        ("mobilenet_v2", "features.0.0.weight"),
    ],
)
def test_backbone_tensors_have_torchvisions_names(name: str, first: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
    ours = on_meta(name).backbone.state_dict()
    assert next(iter(ours)) == first
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in theirs.items() if not n.startswith(("classifier.", "fc."))
    }


def test_seed_determines_the_weights_and_keeps_the_global_state() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_model("tiny", 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    weights = [m.backbone.state_dict()["features.block1.conv.weight"] for m in (first, other)]
    assert not torch.equal(*weights)


def test_without_a_seed_weights_come_from_the_global_state() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        drawn = build_model("tiny", 3)
    seeded = build_model("tiny", 3, seed=5)
    for a, b in zip(drawn.parameters(), seeded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_initialisation_is_he_and_glorot_with_zero_biases() -> None:
    model = build_model("alexnet", 20, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
        elif isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert module.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        else:
            continue
        assert module.bias is not None and not module.bias.any()


def test_batch_norms_are_initially_the_identity() -> None:
    for norm in norms(build_model("resnet18", 2, seed=0)):
        assert norm.running_mean is not None and norm.running_var is not None
        assert (norm.weight == 1).all() and (norm.running_var == 1).all()
        assert not norm.bias.any() and not norm.running_mean.any()
        assert norm.num_batches_tracked == 0


def test_layer_without_initialisation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(name: str, num_genres: int) -> tuple[nn.Module, nn.Module]:
        return nn.Flatten(), nn.Bilinear(2, 2, num_genres)

    monkeypatch.setattr(covergenre.models.networks, "_backbone_and_head", parts)
    with pytest.raises(AssertionError, match="Bilinear"):
        build_model("tiny", 3)


def test_unknown_model_and_no_genres_are_errors() -> None:
    with pytest.raises(ModelError, match=r"'vgg61'.*'vgg16'"):
        build_model("vgg61", 3)
    with pytest.raises(ValueError, match="num_genres"):
        build_model("tiny", 0)


def test_convolutions_in_order() -> None:
    assert [name for name, _ in convolutions(on_meta("vgg16"))] == [
        f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    ]
    names = [name for name, _ in convolutions(on_meta("resnet18"))]
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert names[5:8] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]


def test_convolution_is_frozen_with_its_batch_norm() -> None:
    resnet = on_meta("resnet18")
    assert freeze(resnet, "2") == 9_408 + 128 + 36_864 + 128
    assert frozen_names(resnet) == [
        f"backbone.{name}"
        for name in (
            "conv1.weight",
            "bn1.weight",
            "bn1.bias",
            "layer1.0.conv1.weight",
            "layer1.0.bn1.weight",
            "layer1.0.bn1.bias",
        )
    ]
    freeze(resnet, "8")
    assert frozen_names(resnet)[-3:] == [
        f"backbone.layer2.0.downsample.{name}" for name in ("0.weight", "1.weight", "1.bias")
    ]
    mobilenet = on_meta("mobilenet_v2")
    freeze(mobilenet, "1")
    assert frozen_names(mobilenet) == [
        f"backbone.features.0.{name}" for name in ("0.weight", "1.weight", "1.bias")
    ]


@pytest.mark.parametrize("name", MODELS)
def test_freezing_all_convolutions_freezes_the_backbone(name: str) -> None:
    model = on_meta(name)
    every = freeze(model, str(len(convolutions(model))))
    assert every == sum(p.numel() for p in model.backbone.parameters())
    assert freeze(model, "all") == every
    assert all(p.requires_grad for p in model.head.parameters())
    assert freeze(model, "none") == 0  # what was frozen before trains again
    assert frozen_names(model) == []


@pytest.mark.parametrize(
    ("how", "fact"),
    [
        ("papr", "'paper'"),
        ("", "all, none, paper"),
        ("1.5", "all, none, paper"),
        ("٣", "all, none, paper"),
        ("-1", "0 to 4"),
        ("5", "0 to 4"),
    ],
)
def test_invalid_freeze_is_an_error_and_changes_nothing(how: str, fact: str) -> None:
    model = on_meta("tiny")
    freeze(model, "1")
    with pytest.raises(ConfigError) as caught:
        freeze(model, how)
    assert caught.value.code == "freeze"
    assert f"--freeze {how}: " in str(caught.value) and fact in str(caught.value)
    assert len(frozen_names(model)) == 2


@pytest.mark.parametrize("freeze_batch_norm", [False, True])
def test_pretrained_norms_keep_their_statistics(freeze_batch_norm: bool) -> None:
    model = on_meta("baseline").eval()
    training_mode(model, freeze_batch_norm=freeze_batch_norm, rows=32)
    assert [n.training for n in norms(model.backbone)] == [not freeze_batch_norm] * 6
    assert all(n.training for n in norms(model.head))
    assert all(m.training for m in model.modules() if isinstance(m, nn.Dropout))


def test_frozen_norms_keep_their_statistics() -> None:
    model = on_meta("baseline")
    freeze(model, "2")
    training_mode(model, freeze_batch_norm=False, rows=2)
    assert [n.training for n in norms(model)] == [False] * 2 + [True] * 7


def test_training_with_one_row_works() -> None:
    class Small(CoverModel):
        def __init__(self) -> None:
            backbone = nn.Sequential(
                nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
            super().__init__("tiny", backbone, nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))

    def step(rows: int) -> Tensor:
        logits: Tensor = model(torch.rand(rows, 3, 4, 4))
        torch.autograd.backward(logits.sum())
        return logits

    model = Small()
    training_mode(model, freeze_batch_norm=False, rows=1)
    assert model.training and not any(n.training for n in norms(model))
    assert step(1).isfinite().all()
    training_mode(model, freeze_batch_norm=False, rows=2)  # and the next step learns again
    step(2)
    assert [int(n.num_batches_tracked) for n in norms(model) if n.num_batches_tracked] == [1, 1]


def test_tiny_learns_in_a_few_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (32, 2), generator=generator).float()
    # Genre 0 is bright, genre 1 has stripes.
    images = torch.randn(32, 3, 64, 64, generator=generator) * 0.3
    images += labels[:, 0, None, None, None]
    images[..., ::4] += 2 * labels[:, 1, None, None, None]
    model = build_model("tiny", 2, seed=0)
    training_mode(model, freeze_batch_norm=True, rows=32)
    adam = torch.optim.Adam(model.parameters(), MODELS["tiny"].learning_rate)
    losses = []
    for _ in range(40):
        adam.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(images), labels)
        torch.autograd.backward(loss)
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
