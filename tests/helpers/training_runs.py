"""Small training runs and their output files."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from covergenre.config import TrainConfig

if TYPE_CHECKING:
    import torch

BATCH_SIZE = 9
"""The last step of the 118 training rows has one row, so that the second of two ranks has none."""
EPOCHS = 2
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "epochs": EPOCHS,
    "batch_size": BATCH_SIZE,
    "shuffle_window": 2,
}
FLAGS = ("--model", "tiny", "--epochs", "2", "--batch-size", "9", "--shuffle-window", "2")
"""The same settings for the command line."""


def train_config(dataset: Path, out: Path, **settings: Any) -> TrainConfig:
    """SETTINGS, overridden by `settings`."""
    return TrainConfig(dataset=str(dataset), out=str(out), **(SETTINGS | settings))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(model: Path) -> list[float]:
    """The training loss of every step. Each step must be recorded exactly once."""
    lines = read_jsonl(model / "steps.jsonl")
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


@contextlib.contextmanager
def scaled_dev_logits(factor: float) -> Iterator[None]:
    """Meanwhile the logits of the dev split, in this process, are multiplied by `factor`."""
    from covergenre.models.predictor import Predictor

    logits_of = Predictor.logits_of

    def scaled(self: Predictor, images_BCHW: "torch.Tensor") -> "torch.Tensor":
        return factor * logits_of(self, images_BCHW)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Predictor, "logits_of", scaled)
        yield
