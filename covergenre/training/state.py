"""The content of a checkpoint: weights, Adam's state, and the position in the run."""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from covergenre.metrics import nan_to_none
from covergenre.training import checkpoints
from covergenre.training.ranks import Ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """The position in a run, and its results so far."""

    epoch: int = 0
    step: int = 0
    """Index in the epoch of the next step."""
    steps_done: int = 0
    """Steps done in the whole run."""
    best_weights: str | None = None
    """Name of the file with the weights of the best epoch."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A record for each finished epoch, as in history.jsonl."""
    step_losses: list[float] = field(default_factory=list)
    """Mean loss of every step of the run, over all ranks."""

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the best epoch; None before the end of the first."""
        return next((record for record in reversed(self.history) if record["best"]), None)

    def to_json(self) -> dict[str, Any]:
        """With null for NaN, which is not valid JSON."""
        return {**asdict(self), "history": [nan_to_none(record) for record in self.history]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainingState":
        """The inverse of to_json."""
        history = [
            {key: math.nan if entry is None else entry for key, entry in record.items()}
            for record in value["history"]
        ]
        return cls(**{**value, "history": history})


def save(
    folder: str,
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    best: bool,
) -> None:
    """Write a checkpoint and, if the epoch is the `best` so far, first its weights."""
    weights = model.state_dict()
    best_before = state.best_weights  # the previous checkpoint refers to it
    if best:
        state.best_weights = checkpoints.save(folder, "best", state.steps_done, weights)
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, parameter in _trained(model):
        for key, value in optimizer.state[parameter].items():
            tensors[f"adam.{key}.{name}"] = value
    checkpoints.save(folder, "step", state.steps_done, tensors, state.to_json())
    checkpoints.prune(folder, {best_before, state.best_weights})


def resume(
    folder: str,
    ranks: Ranks,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    log: Callable[[str], None],
) -> TrainingState:
    """Load the newest intact checkpoint into model and optimizer, the same one on every rank.

    Without one, model and optimizer are not changed, and the state is that of a new run.
    """
    with tempfile.TemporaryDirectory() as temporary:
        found: checkpoints.Checkpoint | None = None
        if ranks.rank == 0:
            found = checkpoints.newest(folder, Path(temporary), log)
        name = ranks.from_first(found.name if found else None)
        if name is None:
            return TrainingState()
        if ranks.rank != 0:
            found = checkpoints.fetch(folder, name, Path(temporary))
        if found is None:
            raise RuntimeError(f"{folder}/{name}: was damaged or deleted after rank 0 read it")
        state, tensors = TrainingState.from_json(found.state()), found.tensors()
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    for parameter_name, parameter in _trained(model):
        # The moments in the memory layout of the parameter, as Adam creates them.
        moments = {
            key: torch.empty_like(parameter).copy_(tensors[f"adam.{key}.{parameter_name}"])
            for key in _MOMENTS
        }
        step = tensors[f"adam.step.{parameter_name}"].to(ranks.device)
        optimizer.state[parameter] = {"step": step, **moments}
    return state


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
