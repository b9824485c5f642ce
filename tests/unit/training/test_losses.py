"""Losses that count as diverged; see tests/integration/test_divergence.py for real training."""

import math
from pathlib import Path

import pytest

from covergenre.errors import TrainingDivergedError
from covergenre.training.losses import LossHistory, largest_loss
from covergenre.training.sampler import Steps


class Epoch:
    """A loss history with a base-rate loss of 0.5, so a limit of 5, and the steps of an epoch."""

    def __init__(
        self, folder: Path, rows: int = 40, batch_size: int = 10, steps: int = 4, epoch: int = 0
    ) -> None:
        plan = Steps.of(rows, batch_size, epochs=epoch + 1, max_steps=None)
        self.history = LossHistory(plan, 0.5, 0.01, str(folder))
        self.steps, self.epoch, self.done = steps, epoch, 0

    def append(self, *losses: float) -> None:
        self.done += len(losses)
        self.history.append(losses, epoch=self.epoch, done=self.done, steps=self.steps)


def test_limit_is_ten_times_the_base_rate_loss() -> None:
    assert largest_loss(0.5) == pytest.approx(5)


@pytest.mark.parametrize("baseline", [0.0, 0.01, 0.056, 0.5, math.log(2)])
def test_untrained_model_is_below_the_limit_however_rare_the_genres_are(baseline: float) -> None:
    assert largest_loss(baseline) >= 2 * math.log(2)


def test_epoch_at_the_limit_passes_and_above_it_fails(tmp_path: Path) -> None:
    Epoch(tmp_path).append(*[5.0] * 4)
    with pytest.raises(TrainingDivergedError) as caught:
        Epoch(tmp_path).append(5.0, 5.0, 5.0, 5.1)
    assert caught.value.code == "loss_too_large" and caught.value.exit_code == 2


def test_high_first_losses_that_come_down_pass(tmp_path: Path) -> None:
    one_by_one = Epoch(tmp_path)
    for loss in (16.0, 2.0, 0.7, 0.6):
        one_by_one.append(loss)
    Epoch(tmp_path).append(16.0, 2.0, 0.7, 0.6)


def test_losses_of_earlier_epochs_do_not_count(tmp_path: Path) -> None:
    second = Epoch(tmp_path, epoch=1)
    second.history.losses += [0.1] * 4
    with pytest.raises(TrainingDivergedError) as caught:
        second.append(*[6.0] * 4)
    assert caught.value.code == "loss_too_large" and "4 steps of epoch 2" in str(caught.value)


def test_mean_is_over_albums_so_a_short_last_step_counts_less(tmp_path: Path) -> None:
    losses = [4.0, 4.0, 4.0, 30.0]  # of 10, 10, 10 and 1 albums
    short = Epoch(tmp_path, rows=31)
    short.append(*losses)
    assert short.history.epoch_mean(4) == pytest.approx((3 * 40 + 30) / 31)
    with pytest.raises(TrainingDivergedError):
        Epoch(tmp_path, rows=40).append(*losses)


def test_mean_of_a_shortened_epoch_is_over_its_steps(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError):
        Epoch(tmp_path, steps=2).append(1.0, 10.0)
    Epoch(tmp_path).append(1.0, 10.0)


def test_huge_loss_ends_a_long_epoch_at_once(tmp_path: Path) -> None:
    long = Epoch(tmp_path, rows=10_000, steps=1000)
    with pytest.raises(TrainingDivergedError) as caught:
        long.append(0.7, 1e26)
    for fact in ("2 steps of epoch 1", "5e+25", "0.5", "limit 5", "0.01", "--learning-rate"):
        assert fact in str(caught.value)


@pytest.mark.parametrize(
    "losses", [[8.0] * 4, [1.0] * 4, [16.0, 1.0, 1.0, 1.0], [1.0, 1.0, 9, 9.1]]
)
def test_outcome_does_not_depend_on_how_often_losses_are_added(
    losses: list[float], tmp_path: Path
) -> None:
    """Nor, then, on where a run was resumed."""
    failed = []
    for at_a_time in (1, 2, 4):
        epoch = Epoch(tmp_path)
        try:
            for first in range(0, 4, at_a_time):
                epoch.append(*losses[first : first + at_a_time])
            failed.append(False)
        except TrainingDivergedError:
            failed.append(True)
    assert failed == [sum(losses) > 20] * 3


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_its_step(loss: float, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="step 3 of epoch 1") as caught:
        Epoch(tmp_path).append(0.7, 0.7, loss)
    assert caught.value.code == "loss_not_finite"


@pytest.mark.parametrize(
    ("loss", "code"), [(math.nan, "loss_not_finite"), (5.1, "loss_too_large"), (5.0, "")]
)
def test_dev_loss_has_the_same_limit(loss: float, code: str, tmp_path: Path) -> None:
    history = Epoch(tmp_path).history
    if not code:
        history.check_dev(loss, 0)
        return
    with pytest.raises(TrainingDivergedError, match=r"dev loss .*epoch 1") as caught:
        history.check_dev(loss, 0)
    assert caught.value.code == code


def test_message_names_the_last_checkpoint_and_suggests_another_out(tmp_path: Path) -> None:
    assert "--out" not in str(Epoch(tmp_path).history.diverged("x", "loss_too_large"))
    (tmp_path / f"step-000000012-{'0' * 64}.safetensors").write_bytes(b"")
    message = str(Epoch(tmp_path).history.diverged("x", "loss_too_large"))
    assert "step 12" in message and str(tmp_path) in message and "--out" in message
