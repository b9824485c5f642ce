"""Training that diverges fails, and writes no model; training that does not is left alone."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from covergenre.config import TrainConfig
from covergenre.errors import TrainingDivergedError
from covergenre.training.worker import _Worker, largest_loss


def worker(folder: Path, rows: int = 40, batch_size: int = 10) -> _Worker:
    """One that has yet to record a loss; with a base-rate loss of 0.5, its limit is 5."""
    made = object.__new__(_Worker)
    made.rank, made.world = 0, 1
    made._config = TrainConfig(dataset="d", out="o", batch_size=batch_size, learning_rate=0.01)
    manifest = SimpleNamespace(rows=lambda split: rows)
    job = {"manifest": manifest, "baseline_loss": 0.5, "checkpoints": str(folder)}
    made._job = SimpleNamespace(**job)  # type: ignore[assignment]
    made._largest_loss = largest_loss(0.5)
    made._step_losses = []
    made._step = 0
    return made


def record(made: _Worker, losses: list[float], steps: int = 4, epoch: int = 0) -> None:
    """As if steps with these losses had been computed, of an epoch with `steps` steps."""
    made._step += len(losses)
    made._gather([torch.tensor(loss) for loss in losses], epoch, steps)


def test_limit_is_ten_times_the_base_rate_loss() -> None:
    assert largest_loss(0.5) == pytest.approx(5)


def test_untrained_model_is_below_the_limit_however_rare_the_genres_are() -> None:
    for baseline in (0.0, 0.01, 0.056, 0.5, math.log(2)):
        assert largest_loss(baseline) >= 2 * math.log(2)


def test_epoch_at_the_limit_passes_and_above_it_fails(tmp_path: Path) -> None:
    record(worker(tmp_path), [5.0] * 4)
    with pytest.raises(TrainingDivergedError):
        record(worker(tmp_path), [5.0, 5.0, 5.0, 5.1])


def test_high_first_losses_that_come_down_pass(tmp_path: Path) -> None:
    made = worker(tmp_path)
    for loss in (16.0, 2.0, 0.7, 0.6):
        record(made, [loss])
    record(worker(tmp_path), [16.0, 2.0, 0.7, 0.6])


def test_losses_of_earlier_epochs_do_not_count(tmp_path: Path) -> None:
    made = worker(tmp_path)
    record(made, [0.1] * 4)
    made._step = 0
    with pytest.raises(TrainingDivergedError, match="4 steps of epoch 2 is 6, where"):
        record(made, [6.0] * 4, epoch=1)


def test_mean_is_over_albums_so_a_short_last_step_counts_less(tmp_path: Path) -> None:
    losses = [4.0, 4.0, 4.0, 30.0]  # of 10, 10, 10 and 1 albums
    record(worker(tmp_path, rows=31), losses)
    with pytest.raises(TrainingDivergedError):
        record(worker(tmp_path, rows=40), losses)


def test_epoch_that_max_steps_ends_early_is_judged_by_the_steps_it_has(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError):
        record(worker(tmp_path), [1.0, 10.0], steps=2)
    record(worker(tmp_path), [1.0, 10.0], steps=4)


def test_huge_loss_ends_a_long_epoch_at_once(tmp_path: Path) -> None:
    made = worker(tmp_path, rows=10_000)
    with pytest.raises(TrainingDivergedError) as caught:
        record(made, [0.7, 1e26], steps=1000)
    assert str(caught.value) == (
        "training diverged: the mean training loss over 2 steps of epoch 1 is 5e+25, where always"
        " predicting the base rates of the genres has a loss of 0.5 (limit 5); the learning rate is"
        " 0.01; there is no checkpoint yet; lower --learning-rate"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "losses", [[8.0] * 4, [1.0] * 4, [16.0, 1.0, 1.0, 1.0], [1.0, 1.0, 9, 9.1]]
)
def test_genres_under_cover_does_not_depend_on_how_often_losses_are_gathered(
    losses: list[float], tmp_path: Path
) -> None:
    """Nor, then, on where a run was resumed."""
    failed = []
    for at_a_time in (1, 2, 4):
        made = worker(tmp_path)
        try:
            for first in range(0, 4, at_a_time):
                record(made, losses[first : first + at_a_time])
            failed.append(False)
        except TrainingDivergedError:
            failed.append(True)
    assert failed == [sum(losses) > 20] * 3


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_its_step(loss: float, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="not finite from step 3 of epoch 1 on"):
        record(worker(tmp_path), [0.7, 0.7, loss])


def test_last_good_checkpoint_is_named_and_another_out_asked_for(tmp_path: Path) -> None:
    (tmp_path / f"step-000000012-{'0' * 64}.safetensors").write_bytes(b"")
    with pytest.raises(TrainingDivergedError) as caught:
        record(worker(tmp_path), [1e9])
    assert str(caught.value).endswith(
        f"the last good checkpoint is of step 12, in {tmp_path}; lower --learning-rate, and choose"
        " another --out"
    )
