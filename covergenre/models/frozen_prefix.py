"""The frozen first stages of a backbone, whose output is the same in every epoch.

    images -> prefix(model, n) -> features -> Tail(model, n) -> logits

The stages of a backbone are modules that run one after another: single layers, or the blocks of a
network with shortcuts.
"""

import torch
from torch import Tensor, nn

from covergenre.models.networks import BatchDropout, CoverModel
from covergenre.models.predictor import autocast


def stages(model: CoverModel) -> list[nn.Module]:
    """The stages of the backbone of `model`, which together compute what the backbone computes."""
    backbone = model.backbone
    if model.name.startswith("resnet"):
        names = ("layer1", "layer2", "layer3", "layer4")
        blocks = [block for name in names for block in backbone.get_submodule(name).children()]
        first = [backbone.get_submodule(name) for name in ("conv1", "bn1", "relu", "maxpool")]
        return [*first, *blocks, backbone.get_submodule("avgpool"), nn.Flatten()]
    features = list(backbone.get_submodule("features").children())
    if model.name == "mobilenet_v2":  # pools in its forward method
        return [*features, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [*features, backbone.get_submodule("avgpool"), nn.Flatten()]


def count_frozen(model: CoverModel) -> int:
    """The number of first stages that compute the same in every step: all their parameters are
    frozen, and `networks.training_mode` keeps the statistics of batch norms with frozen parameters.

    0 if the first stage that has parameters is trained.
    """
    count, has_parameters = 0, False
    for stage in stages(model):
        parameters = list(stage.parameters())
        is_random = any(isinstance(m, nn.Dropout | BatchDropout) for m in stage.modules())
        if is_random or any(p.requires_grad for p in parameters):
            break
        has_parameters = has_parameters or bool(parameters)
        count += 1
    return count if has_parameters else 0


def prefix(model: CoverModel, count: int) -> nn.Module:
    """The first `count` stages of the backbone; shares the parameters of `model`."""
    return nn.Sequential(*stages(model)[:count])


class Tail(nn.Module):
    """What follows the first `count` stages of a model, head included; shares its parameters."""

    def __init__(self, model: CoverModel, count: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages(model)[count:])
        self.head = model.head

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, G] of the output of `prefix`."""
        logits_BG: Tensor = self.head(self.stages(features))
        return logits_BG


def feature_shape(
    model: CoverModel, count: int, side: int, precision: str
) -> tuple[tuple[int, ...], torch.dtype]:
    """(shape of one album's features: [C, H, W] or [D]; their type), for images of side x side."""
    first = prefix(model, count).eval()
    device = next(model.parameters()).device
    with torch.no_grad(), autocast(device.type, precision):
        features = first(torch.zeros(1, 3, side, side, device=device))
    return tuple(features.shape[1:]), features.dtype
