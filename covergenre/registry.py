"""The models with their default settings. Does not import torch, so that --help is fast.

The settings of vgg16 and baseline are the paper's (see docs/paper.md). The other models have usual
fine-tuning settings: Adam with a learning rate of 1e-4, and light augmentation.
"""

from dataclasses import dataclass

from covergenre.errors import ModelError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Description and default settings of a model."""

    about: str
    """Description, for the model card."""
    imagenet: str | None = None
    """torchvision's name of the ImageNet weights, such as VGG16_Weights.IMAGENET1K_V1."""
    paper_frozen_convolutions: int = 0
    """Number of convolutions, from the first, that `--freeze paper` freezes."""
    freeze: str = "none"
    """Default of --freeze."""
    epochs: int = 10
    learning_rate: float = 1e-4
    l2: float = 0.0
    """L2 penalty on the weights of convolutions and dense layers, added to the loss."""
    augment: str = "light"
    """Default of --augment: none, color or light."""


MODELS: dict[str, ModelSpec] = {
    "vgg16": ModelSpec(
        about="the paper's model: VGG16 with a new head of two dense layers of 4096",
        imagenet="VGG16_Weights.IMAGENET1K_V1",
        # The paper's "first 12 layers" include input and pooling layers: eight convolutions.
        paper_frozen_convolutions=8,
        freeze="paper",
        learning_rate=1e-3,
        augment="none",
    ),
    "baseline": ModelSpec(
        about="the paper's baseline: six convolution blocks, random initial weights (Koenig 2017)",
        epochs=20,
        learning_rate=1e-5,
        l2=1e-3,
        augment="color",
    ),
    "mobilenet_v2": ModelSpec(
        about="small and fast, for CPUs", imagenet="MobileNet_V2_Weights.IMAGENET1K_V1"
    ),
    "alexnet": ModelSpec(
        about="a comparison in the paper", imagenet="AlexNet_Weights.IMAGENET1K_V1"
    ),
    "resnet18": ModelSpec(
        about="a comparison in the paper", imagenet="ResNet18_Weights.IMAGENET1K_V1"
    ),
    "resnet34": ModelSpec(
        about="a comparison in the paper", imagenet="ResNet34_Weights.IMAGENET1K_V1"
    ),
    "resnet101": ModelSpec(
        about="a comparison in the paper (Oramas 2017)",
        imagenet="ResNet101_Weights.IMAGENET1K_V1",
    ),
    "resnet152": ModelSpec(
        about="a comparison in the paper", imagenet="ResNet152_Weights.IMAGENET1K_V1"
    ),
    "tiny": ModelSpec(
        about="four small convolutions, for the demo and the tests; not in the paper",
        learning_rate=1e-3,
    ),
}


def model_spec(name: str) -> ModelSpec:
    """The spec of the model `name`. Raises ModelError if there is no such model."""
    if name not in MODELS:
        raise ModelError(f"no model {name!r}{did_you_mean(name, MODELS)}")
    return MODELS[name]
