"""Which weights a finished training run writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from covergenre.stages import train as train_module
from covergenre.training.checkpoints import save


def test_damaged_weights_of_an_epoch_that_is_not_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "c")
    first, last = ({"w": torch.full((3,), float(epoch))} for epoch in (1, 2))
    best = save(folder, "best", 5, first)
    records = [{"epoch": 1, "best": True}, {"epoch": 2, "best": False}]
    state = {"best_weights": best, "history": records, "steps_done": 10}
    save(folder, "step", 10, {"model.w": last["w"], "adam.step.w": torch.tensor(10)}, state)
    assert torch.equal(load(train_module._best_weights(folder, state, tmp_path))["w"], first["w"])
    assert caplog.text == ""
    (tmp_path / "c" / best).write_bytes(b"")
    found = load(train_module._best_weights(folder, state, tmp_path))
    assert list(found) == ["w"] and torch.equal(found["w"], last["w"])
    assert "has the weights of epoch 2, from the last checkpoint, and not of 1, the best" in (
        caplog.text
    )
    assert records[1]["best"]
