"""Networks by name (backbone and head), and which of their layers are trained.

Shapes: B batch size, C = 3 channels, H x W pixels, D features, G genres.
"""

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from covergenre.errors import ConfigError, did_you_mean
from covergenre.registry import model_spec


class CoverModel(nn.Module):
    """`head(backbone(images))`: the backbone may have ImageNet weights, the head is always new."""

    def __init__(self, name: str, backbone: nn.Module, head: nn.Module) -> None:
        """name: key of registry.MODELS; backbone: images -> [B, D]; head: [B, D] -> [B, G]."""
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.head = head

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, G] of normalized float images."""
        features_BD = self.backbone(images_BCHW)
        logits_BG: Tensor = self.head(features_BD)
        return logits_BG

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Penultimate features [B, num_features]: the input of the last layer."""
        features_BD: Tensor = self.backbone(images_BCHW)
        if isinstance(self.head, nn.Sequential):
            features_BD = self.head[:-1](features_BD)
        return features_BD

    @property
    def num_features(self) -> int:
        """Number of features that `embed` returns."""
        last = self.head[-1] if isinstance(self.head, nn.Sequential) else self.head
        assert isinstance(last, nn.Linear)
        return last.in_features


class BatchDropout(nn.Dropout):
    """Dropout that computes the same with any number of workers.

    Every worker generates the mask for all rows of a step, from the same random state, and applies
    the part for its rows.
    """

    offsets: Tensor | None = None
    """Position of each row of the batch in the step; None: same as nn.Dropout."""
    size: int = 0
    """Number of rows in the step."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        """Like nn.Dropout, for input [rows, ...]."""
        if not self.training or self.p == 0 or self.offsets is None:
            return super().forward(input)
        if not len(self.offsets):  # a worker without rows computes a row that is ignored
            return input
        keep = torch.rand((self.size, *input.shape[1:]), device=input.device) >= self.p
        keep = keep[self.offsets.to(input.device)]
        return input * keep.to(input.dtype) / (1 - self.p)


def build_model(name: str, num_genres: int, *, seed: int | None = None) -> CoverModel:
    """The model `name` with random weights, on torch's default device.

    Backbone tensors have torchvision's names. With `seed`, the weights are the same on every device
    and the global random state is not changed; without it, they come from the global state. On the
    meta device only shapes are created.

    Raises ModelError for an unknown model, ValueError if num_genres is less than 1.
    """
    model_spec(name)
    if num_genres < 1:
        raise ValueError(f"num_genres must be at least 1, not {num_genres}")
    device = torch.get_default_device()
    # On meta first: torchvision's VGG would fill a 494 MB classifier that is not used.
    with torch.device("meta"):
        backbone, head = _backbone_and_head(name, num_genres)
    model = CoverModel(name, backbone, head)
    if device.type == "meta":
        return model
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # torch.manual_seed would also reseed the GPUs, whose state is not restored.
            torch.default_generator.manual_seed(seed)
        _initialize(model)
    return model.to(device)


def convolutions(model: CoverModel) -> list[tuple[str, nn.Conv2d]]:
    """The backbone's convolutions and their names, in order of definition: the order of execution,
    except that a ResNet's downsample comes after the convolutions of its block."""
    return [(name, m) for name, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d)]


def freeze(model: CoverModel, how: str) -> int:
    """Freeze the first convolutions, each with the batch norm that follows it.

    how: "none", "all" (the whole backbone), "paper" (the number in the registry) or a number of
    convolutions. Replaces earlier freezing; the head is never frozen. Returns the number of frozen
    parameters. Raises ConfigError (code "freeze") for any other `how`.
    """
    count = _convolutions_to_freeze(model, how)
    model.backbone.requires_grad_(how != "all")
    leaves = [m for m in model.backbone.modules() if next(m.children(), None) is None]
    indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, nn.Conv2d)]
    for index in indices[:count]:
        leaves[index].requires_grad_(False)
        for next_leaf in leaves[index + 1 : index + 2]:
            if isinstance(next_leaf, _BatchNorm):
                next_leaf.requires_grad_(False)
    return count_parameters(model)[2]


def training_mode(model: CoverModel, *, freeze_batch_norm: bool, rows: int) -> None:
    """Put `model` in train mode for a batch of `rows` rows, except frozen batch norms.

    freeze_batch_norm: batch norms of the backbone keep their pretrained statistics. A batch norm
    with frozen parameters always keeps its statistics; with fewer than 2 rows all of them do,
    because one row has no variance.
    """
    model.train()
    for part, freeze_all in ((model.backbone, freeze_batch_norm), (model.head, False)):
        for module in part.modules():
            if isinstance(module, _BatchNorm):
                frozen = not all(p.requires_grad for p in module.parameters())
                module.train(not (freeze_all or frozen or rows < 2))


def share_dropout(model: CoverModel, offsets: NDArray[np.int64], size: int) -> None:
    """For BatchDropout: set the positions of the next batch in a step of `size` rows."""
    for module in model.modules():
        if isinstance(module, BatchDropout):
            module.offsets, module.size = torch.tensor(offsets), size


def count_parameters(model: nn.Module) -> tuple[int, int, int]:
    """(total, trainable, frozen) parameters, without the running statistics of batch norms."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total, trainable, total - trainable


def _convolutions_to_freeze(model: CoverModel, how: str) -> int:
    if how in ("none", "all"):
        return 0
    if how == "paper":
        return model_spec(model.name).paper_frozen_convolutions
    available = len(convolutions(model))
    if not (how.isascii() and how.removeprefix("-").isdecimal()):
        hint = did_you_mean(how, ("paper", "none", "all"))
        raise ConfigError(
            f"--freeze {how}: expected a number of convolutions or a name{hint}", code="freeze"
        )
    if how.startswith("-") or int(how) > available:
        raise ConfigError(
            f"--freeze {how}: {model.name} has {available} convolutions; give 0 to {available}, or"
            " paper, none or all",
            code="freeze",
        )
    return int(how)


def _backbone_and_head(name: str, num_genres: int) -> tuple[nn.Module, nn.Module]:
    if name == "tiny":
        return _tiny(num_genres)
    if name == "baseline":
        return _baseline(num_genres)
    import torchvision  # takes seconds; the models above do not need it

    backbone: nn.Module = torchvision.models.get_model(name, weights=None)
    if name.startswith("resnet"):
        assert isinstance(backbone.fc, nn.Linear)
        width = backbone.fc.in_features
        backbone.fc = nn.Identity()
        return backbone, nn.Linear(width, num_genres)
    backbone.classifier = nn.Identity()
    if name == "vgg16":  # as in the paper's Figure 4: no dropout
        return backbone, nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_genres),
        )
    if name == "alexnet":  # torchvision's classifier
        return backbone, nn.Sequential(
            BatchDropout(0.5),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            BatchDropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_genres),
        )
    assert name == "mobilenet_v2", f"registry.MODELS names {name}, which cannot be built"
    return backbone, nn.Sequential(BatchDropout(0.2), nn.Linear(1280, num_genres))


def _baseline(num_genres: int) -> tuple[nn.Module, nn.Module]:
    """Koenig's network (2017). No bias before a batch norm, which subtracts the mean."""
    channels = [3, 64, 128, 256, 512, 1024, 2048]
    blocks = OrderedDict[str, nn.Module]()
    for i in range(1, len(channels)):
        blocks[f"block{i}"] = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv=nn.Conv2d(channels[i - 1], channels[i], 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(channels[i]),
                relu=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(2),
            )
        )
    backbone = nn.Sequential(
        OrderedDict[str, nn.Module](
            features=nn.Sequential(blocks),
            # At 224 pixels the input is 3 x 3 already; only other sizes need the pooling.
            avgpool=nn.AdaptiveAvgPool2d(3),
            flatten=nn.Flatten(),
        )
    )
    layers: list[nn.Module] = []
    for width in (2048 * 3 * 3, 2048, 2048):
        layers += [
            nn.Linear(width, 2048, bias=False),
            nn.BatchNorm1d(2048),
            nn.ReLU(inplace=True),
            BatchDropout(0.2),
        ]
    return backbone, nn.Sequential(*layers, nn.Linear(2048, num_genres))


def _tiny(num_genres: int) -> tuple[nn.Module, nn.Module]:
    """12 million multiplications for a cover of 224 x 224 pixels; VGG16 needs 15 billion."""
    channels = [3, 16, 32, 64, 128]
    blocks = OrderedDict[str, nn.Module]()
    for i in range(1, len(channels)):
        blocks[f"block{i}"] = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv=nn.Conv2d(
                    channels[i - 1], channels[i], 3, stride=4 if i == 1 else 2, padding=1
                ),
                relu=nn.ReLU(inplace=True),
            )
        )
    backbone = nn.Sequential(
        OrderedDict[str, nn.Module](
            features=nn.Sequential(blocks), avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()
        )
    )
    head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(inplace=True), nn.Linear(64, num_genres))
    return backbone, head


def _initialize(model: nn.Module) -> None:
    """Random weights: He for convolutions, Glorot for dense layers, as Keras and the paper do."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:  # uninitialized memory otherwise
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            assert not own, f"{type(module).__name__} has no initialization"
