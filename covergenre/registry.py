"""The models by name: facts and default settings. No torch here, so that --help stays fast.

Where the paper gives a number it stands here (see docs/paper.md for the sources); the other
models take the usual fine-tuning settings: Adam at 1e-4 with light augmentation.
"""

from dataclasses import dataclass

from covergenre.errors import ModelError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is known of a model before it is built."""

    about: str
    """One phrase for people."""
    imagenet: str | None = None
    """torchvision's name of its ImageNet weights, e.g. VGG16_Weights.IMAGENET1K_V1."""
    paper_frozen_convolutions: int = 0
    """How many leading convolutions `--freeze paper` freezes."""
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
        about="the paper's: VGG16 with a new head of two dense layers of 4096",
        imagenet="VGG16_Weights.IMAGENET1K_V1",
        # The paper counts "12 layers" the Keras way, with input and pooling: eight convolutions.
        paper_frozen_convolutions=8,
        freeze="paper",
        learning_rate=1e-3,
        augment="none",
    ),
    "baseline": ModelSpec(
        about="the paper's baseline: six convolution blocks from random weights (Koenig 2017)",
        epochs=20,
        learning_rate=1e-5,
        l2=1e-3,
        augment="color",
    ),
    "mobilenet_v2": ModelSpec(
        about="small and fast, for CPUs", imagenet="MobileNet_V2_Weights.IMAGENET1K_V1"
    ),
    "alexnet": ModelSpec(
        about="compared with by the paper", imagenet="AlexNet_Weights.IMAGENET1K_V1"
    ),
    "resnet18": ModelSpec(
        about="compared with by the paper", imagenet="ResNet18_Weights.IMAGENET1K_V1"
    ),
    "resnet34": ModelSpec(
        about="compared with by the paper", imagenet="ResNet34_Weights.IMAGENET1K_V1"
    ),
    "resnet101": ModelSpec(
        about="compared with by the paper (Oramas 2017)",
        imagenet="ResNet101_Weights.IMAGENET1K_V1",
    ),
    "resnet152": ModelSpec(
        about="compared with by the paper", imagenet="ResNet152_Weights.IMAGENET1K_V1"
    ),
    "tiny": ModelSpec(
        about="four small convolutions for the demo and the tests; not from the paper",
        learning_rate=1e-3,
    ),
}


def model_spec(name: str) -> ModelSpec:
    """The spec of `name`. Raises ModelError, naming the nearest model, where there is none."""
    if name not in MODELS:
        raise ModelError(f"no model {name!r}{did_you_mean(name, MODELS)}")
    return MODELS[name]
