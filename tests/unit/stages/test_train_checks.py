"""What train refuses before it starts Ray, and what it tells the user at the end."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest, Shard, write_manifest
from covergenre.data.genres import Genres
from covergenre.errors import ConfigError
from covergenre.stages.train import _data_wait, train


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of 30 albums, of which only the manifest exists."""
    shards: dict[str, tuple[Shard, ...]] = {
        split: (Shard(f"{split}/part", 10, 1, ""),) for split in ("train", "dev", "test")
    }
    root = tmp_path / "dataset"
    write_manifest(Manifest(str(root), Genres(("Jazz", "Rock")), shards, "id", {}), {})
    return root


def refused(dataset: Path, **settings: Any) -> str:
    config = TrainConfig(
        dataset=str(dataset), out=str(dataset.with_name("model")), model="tiny", **settings
    )
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert caught.value.code == "cache_features"
    return str(caught.value)


def test_features_are_not_cached_if_they_change_in_training(dataset: Path) -> None:
    line = refused(dataset, cache_features=True, freeze="all")
    assert "--augment light" in line and "--augment none" in line
    line = refused(dataset, cache_features=True, augment="none")
    assert "--freeze none" in line and "--freeze all" in line


def test_cache_of_features_must_fit_on_the_disk(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from covergenre.cluster.workers import Workers
    from covergenre.stages import train as stage

    monkeypatch.setattr("covergenre.runs.stage_run.StageRun.start_ray", lambda *_: None)
    monkeypatch.setattr(stage, "_choose_workers", lambda _: Workers(1, False, 0.5, 1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = refused(dataset, cache_features=True, augment="none", freeze="all")
    assert "needs 10.0 KiB" in line  # 20 albums of 128 features
    assert "1.0 KiB are free" in line


def test_data_wait_is_that_of_all_epochs() -> None:
    history = [{"seconds": 30.0, "data_wait_share": 0.1}, {"seconds": 10.0, "data_wait_share": 0.5}]
    assert "waited for covers during 20.0% of the training steps" in _data_wait(history)
