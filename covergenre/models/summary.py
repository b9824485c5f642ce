"""A model as a table of its layers, like Keras's model.summary() and the paper's Figure 4."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from covergenre.errors import ConfigError
from covergenre.models.networks import build_model, count_parameters, freeze
from covergenre.registry import model_spec

# Keras also shows an activation as part of the layer before it.
_NOT_SHOWN = (nn.Identity, nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class _Row:
    layer: str
    shape: str
    parameters: str
    trainable: str  # "-" for a layer without parameters


def layer_table(name: str, num_genres: int, freeze_how: str | None = None, side: int = 224) -> str:
    """All layers of the model `name` in order of execution, and the totals. No weights are created.

    freeze_how: argument of `networks.freeze`; None: the default of the model. side: of the square
    images, in pixels. In shapes, None is the batch size. Raises ModelError for an unknown model,
    ConfigError for an invalid freeze_how or a side that is too small for the model.
    """
    with torch.device("meta"):
        model = build_model(name, num_genres)
        images_BCHW = torch.empty(1, 3, side, side)
    freeze(model, model_spec(name).freeze if freeze_how is None else freeze_how)

    rows = [_Row("input", _shape(images_BCHW), "0", "-")]

    def record(layer: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        rows.append(_row(layer, module, output))

    def record_features(module: nn.Module, inputs: Any, output: Tensor) -> None:
        # torchvision's models flatten with a function, which has no hook.
        if rows[-1].shape != _shape(output):
            rows.append(_Row("flat features", _shape(output), "0", "-"))

    for path, module in model.named_modules():
        if next(module.children(), None) is None and not isinstance(module, _NOT_SHOWN):
            module.register_forward_hook(partial(record, path.removeprefix("backbone.")))
    model.backbone.register_forward_hook(record_features)
    try:
        model.eval()(images_BCHW)
    except RuntimeError as error:  # at 224 every model runs, so the side is the cause
        raise ConfigError(
            f"side: {side} pixels are too small for {name}", code="side_too_small"
        ) from error
    return _format(rows, *count_parameters(model))


def _row(layer: str, module: nn.Module, output: Tensor) -> _Row:
    total, trainable, _ = count_parameters(module)
    is_trainable = "-" if total == 0 else "yes" if trainable else "no"
    name = f"{layer} ({type(module).__name__})"
    return _Row(name, _shape(output), f"{total:,}", is_trainable)


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
