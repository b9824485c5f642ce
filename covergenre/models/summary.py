"""A model as a table of its layers, in the way of Keras and of the paper's Figure 4."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from covergenre.errors import ConfigError
from covergenre.models.networks import build_model, count_parameters, freeze
from covergenre.registry import model_spec

# Keras too shows an activation with the layer before it.
_NOT_SHOWN = (nn.Identity, nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class _Row:
    layer: str
    shape: str
    parameters: str
    trainable: str  # "-" where there is nothing to train


def layer_table(name: str, num_genres: int, freeze_how: str | None = None, side: int = 224) -> str:
    """Every layer of the model `name` in order of execution, then the totals. Takes no memory.

    freeze_how: as `models.freeze` takes it; None is the model's default. side: of the square
    images, in pixels. In a shape, None stands for the albums of a batch. Raises ModelError for an
    unknown model, ConfigError for an unusable freeze_how or a side too small for the model.
    """
    with torch.device("meta"):
        model = build_model(name, num_genres)
        images_BCHW = torch.empty(1, 3, side, side)
    freeze(model, model_spec(name).freeze if freeze_how is None else freeze_how)

    rows = [_Row("input", _shape(images_BCHW), "0", "-")]

    def record(layer: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        rows.append(_row(layer, module, output))

    def record_features(module: nn.Module, inputs: Any, output: Tensor) -> None:
        # torchvision's models flatten in a function, which has no hook.
        if rows[-1].shape != _shape(output):
            rows.append(_Row("flat features", _shape(output), "0", "-"))

    for path, module in model.named_modules():
        if next(module.children(), None) is None and not isinstance(module, _NOT_SHOWN):
            module.register_forward_hook(partial(record, path.removeprefix("backbone.")))
    model.backbone.register_forward_hook(record_features)
    try:
        model.eval()(images_BCHW)
    except RuntimeError as error:  # the only thing that differs from a run at 224 is the side
        raise ConfigError(f"a side of {side} pixels is too small for {name}") from error
    return _format(rows, *count_parameters(model))


def _row(layer: str, module: nn.Module, output: Tensor) -> _Row:
    total, trainable, _ = count_parameters(module)
    answer = "-" if total == 0 else "yes" if trainable else "no"
    return _Row(f"{layer} ({type(module).__name__})", _shape(output), f"{total:,}", answer)


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(['None', *map(str, tensor.shape[1:])])})"


def _format(rows: list[_Row], total: int, trainable: int, frozen: int) -> str:
    rows = [_Row("Layer (type)", "Output shape", "Param #", "Trainable"), *rows]
    layer = max(len(row.layer) for row in rows)
    shape = max(len(row.shape) for row in rows)
    number = max(len(row.parameters) for row in rows)
    lines = [
        f"{row.layer:{layer}}  {row.shape:{shape}}  {row.parameters:>{number}}  {row.trainable}"
        for row in rows
    ]
    rule = "=" * max(map(len, lines))
    return "\n".join(
        [
            rule,
            lines[0],
            rule,
            *lines[1:],
            rule,
            f"Total params: {total:,}",
            f"Trainable params: {trainable:,}",
            f"Non-trainable (frozen) params: {frozen:,}",
        ]
    )
