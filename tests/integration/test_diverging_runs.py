"""Training that diverges fails in one line, and writes no model."""

import json
from pathlib import Path

import pytest
from training_runs import scaled_dev_logits

from covergenre.cli import main
from covergenre.config import TrainConfig
from covergenre.data.dataset import read_manifest
from covergenre.errors import TrainingDivergedError
from covergenre.metrics import base_rate_loss, dev_metrics, macro_over
from covergenre.stages.train import Trained, train
from covergenre.training.losses import largest_loss

pytestmark = pytest.mark.usefixtures("local_training")


def command(dataset: Path, out: Path, *flags: str) -> list[str]:
    return ["train", str(dataset), "--out", str(out), "--model", "tiny", "--epochs", "1", *flags]


def test_far_too_high_a_learning_rate_fails_in_one_line_without_a_model(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    with pytest.raises(SystemExit) as caught:
        main(command(dataset, out, "--learning-rate", "1e3", "--workers", "1"))
    assert caught.value.code == 2
    said = capfd.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    line = said.err.splitlines()[-1]
    manifest = read_manifest(str(dataset))
    baseline = base_rate_loss(manifest.genre_counts("train"), manifest.rows("train"))
    limit = largest_loss(baseline)
    for fact in ("diverged", f"{baseline:.3g}", f"{limit:.3g}", " 1000;", "--learning-rate"):
        assert fact in line
    assert list(tmp_path.iterdir()) == []


def test_dev_loss_that_diverges_alone_fails_without_a_model(dataset: Path, tmp_path: Path) -> None:
    """As batch norm can make it, with its running statistics: scores are 0 or 1, logits tell."""
    config = TrainConfig(dataset=str(dataset), out=str(tmp_path / "m"), model="tiny", epochs=1)
    with scaled_dev_logits(1e6), pytest.raises(TrainingDivergedError) as caught:
        train(config)
    assert caught.value.code == "loss_too_large"
    assert list(tmp_path.iterdir()) == []


def test_model_that_scores_all_covers_alike_says_so_in_its_summary_and_its_card(
    dataset: Path, frozen_run: Trained
) -> None:
    trained, out = frozen_run, Path(frozen_run.uri)
    record = json.loads((out / "metrics.json").read_text())
    manifest = read_manifest(str(dataset))
    assert record["dev_macro_genres"] + len(record["dev_genres_without_auc"]) == len(
        manifest.genres
    )
    assert record["dev_better_than_chance"] is False
    assert "no better than chance on the dev split: macro ROC AUC" in trained.summary()
    assert "best of 1 epoch, by micro PR AUC" in trained.summary()
    card = (out / "README.md").read_text()
    assert "**No better than chance on the dev split: macro ROC AUC" in card
    over = macro_over(dev_metrics(record), most=len(manifest.genres))
    assert f"macro is the plain mean over\n{over}" in card
