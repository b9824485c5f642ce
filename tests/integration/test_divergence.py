"""Training that diverges fails, and writes no model; training that does not is left alone."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from covergenre.cli import main
from covergenre.config import TrainConfig
from covergenre.data.dataset import read_manifest
from covergenre.errors import TrainingDivergedError
from covergenre.metrics import base_rate_loss, dev_metrics, macro_over
from covergenre.stages.train import train
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
def test_verdict_does_not_depend_on_how_often_losses_are_gathered(
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


# In real workers


def command(dataset: Path, out: Path, *flags: str) -> list[str]:
    return ["train", str(dataset), "--out", str(out), "--model", "tiny", "--epochs", "1", *flags]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_far_too_high_a_learning_rate_fails_in_one_line_without_a_model(
    dataset: Path, tmp_path: Path, workers: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    flags = ("--learning-rate", "1e3", "--workers", workers)
    with pytest.raises(SystemExit) as caught:
        main(command(dataset, out, *flags))
    assert caught.value.code == 2
    said = capfd.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    line = said.err.splitlines()[-1]
    manifest = read_manifest(str(dataset))
    baseline = base_rate_loss(manifest.genre_counts("train"), manifest.rows("train"))
    assert "training diverged: " in line
    assert f"has a loss of {baseline:.3g} (limit {10 * baseline:.3g})" in line
    assert "the learning rate is 1000; there is no checkpoint yet; lower --learning-rate" in line
    assert list(tmp_path.iterdir()) == []


def scale_dev_logits(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Have every worker of a training run multiply the logits of the dev split."""

    def scaled_loop(settings: dict[str, Any]) -> None:
        from covergenre.models import predictor
        from covergenre.training import worker

        of = predictor.Predictor.logits_of

        def scaled(self: Any, images_BCHW: torch.Tensor) -> torch.Tensor:
            return factor * of(self, images_BCHW)

        predictor.Predictor.logits_of = scaled  # type: ignore[method-assign]
        worker.training_loop(settings)

    monkeypatch.setattr("covergenre.training.worker.training_loop", scaled_loop)


def test_dev_loss_that_diverges_alone_fails_without_a_model(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As batch norm can make it, with its running statistics: scores are 0 or 1, logits tell."""
    scale_dev_logits(monkeypatch, 1e6)
    config = TrainConfig(dataset=str(dataset), out=str(tmp_path / "m"), model="tiny", epochs=1)
    with pytest.raises(TrainingDivergedError, match=r"the dev loss after epoch 1 is \S+e\+0"):
        train(config)
    assert list(tmp_path.iterdir()) == []


def test_model_that_scores_all_covers_alike_says_so_in_its_summary_and_its_card(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_dev_logits(monkeypatch, 0.0)
    out = tmp_path / "m"
    config = TrainConfig(dataset=str(dataset), out=str(out), model="tiny", max_steps=1, epochs=1)
    trained = train(config)
    record = json.loads((out / "metrics.json").read_text())
    manifest = read_manifest(str(dataset))
    assert record["dev_macro_genres"] + len(record["dev_genres_without_auc"]) == len(
        manifest.genres
    )
    assert record["dev_better_than_chance"] is False
    assert "no better than chance on the dev split: macro ROC AUC" in trained.account()
    assert "best of 1 epoch, by micro PR AUC" in trained.account()
    card = (out / "README.md").read_text()
    assert "**No better than chance on the dev split: macro ROC AUC" in card
    over = macro_over(dev_metrics(record), most=len(manifest.genres))
    assert f"macro is the plain mean over\n{over}" in card
