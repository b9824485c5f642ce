"""The supervisor's decisions; for real worker groups see tests/integration/test_resume.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from covergenre.errors import CovergenreError, StorageError
from covergenre.training import supervisor
from covergenre.training.checkpoints import save

Weights = dict[str, torch.Tensor]


def finished_run(folder: str) -> tuple[dict[str, object], Weights, Weights]:
    """(state, weights of the best epoch, which is the first, weights of the last)."""
    first, last = ({"w": torch.full((3,), float(epoch))} for epoch in (1, 2))
    best = save(folder, "best", 5, first)
    records = [{"epoch": 1, "best": True}, {"epoch": 2, "best": False}]
    state = {"best_weights": best, "history": records, "steps_done": 10}
    save(folder, "step", 10, {"model.w": last["w"], "adam.step.w": torch.tensor(10)}, state)
    return state, first, last


def test_best_weights_are_those_of_the_best_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "c")
    state, first, _ = finished_run(folder)
    found = load(supervisor._best_weights(folder, state, tmp_path))
    assert torch.equal(found["w"], first["w"])
    assert caplog.text == ""


def test_damaged_best_weights_are_replaced_by_those_of_the_last_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "c")
    state, _, last = finished_run(folder)
    best = Path(folder, str(state["best_weights"]))
    best.write_bytes(b"")
    found = load(supervisor._best_weights(folder, state, tmp_path))
    assert list(found) == ["w"] and torch.equal(found["w"], last["w"])
    assert str(best) in caplog.text and "epoch 2" in caplog.text
    assert [record["best"] for record in state["history"]] == [True, True]  # type: ignore[attr-defined]


def test_best_weights_and_last_checkpoint_damaged_is_an_error(tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    state, *_ = finished_run(folder)
    for file in Path(folder).iterdir():
        file.write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        supervisor._best_weights(folder, state, tmp_path)
    assert caught.value.code == "checkpoint_damaged"


def test_training_fails_after_three_failures_without_a_new_checkpoint() -> None:
    error = RuntimeError("worker lost")
    failures = supervisor._count_failures(0, error, 4, 4)
    failures = supervisor._count_failures(failures, None, 4, 4)
    assert failures == 2
    assert supervisor._count_failures(failures, error, 4, 8) == 0
    with pytest.raises(CovergenreError, match=r"RuntimeError: worker lost") as caught:
        supervisor._count_failures(failures, error, 4, 4)
    assert caught.value.code == "workers_failed"
