"""Training that is interrupted for real, and goes on: workers killed, files damaged, ^C sent."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from covergenre.bundle import load_model, read_bundle
from covergenre.config import PrepareConfig, TrainConfig
from covergenre.errors import StorageError
from covergenre.prepare import prepare
from covergenre.storage import read_json
from covergenre.train import train

pytestmark = pytest.mark.usefixtures("local_ray")

EPOCHS = 2


@pytest.fixture(scope="module")
def dataset(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("work") / "dataset"
    prepare(PrepareConfig(catalog=str(drawn), out=str(out), shard_rows=20, min_share=0.0))
    return out


def config(dataset: Path, out: Path, **settings: Any) -> TrainConfig:
    defaults = {"model": "tiny", "epochs": EPOCHS, "batch_size": 9, "shuffle_window": 2}
    return TrainConfig(dataset=str(dataset), out=str(out), **(defaults | settings))


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("models") / "whole"
    train(config(dataset, out))
    return out


def losses(model: Path) -> list[float]:
    import json

    lines = [json.loads(line) for line in (model / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def steps_an_epoch(model: Path) -> int:
    return len(losses(model)) // EPOCHS


def weights_id(model: Path) -> str:
    assert load_model(read_bundle(str(model)))
    return read_bundle(str(model)).weights_id


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.with_name(f"{out.name}.training").glob("checkpoints/step-*"))


def workers() -> list[psutil.Process]:
    """Processes of Ray Train's workers, of this session's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in process.name() + " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Watcher:
    """Acts once, as soon as a run has a checkpoint of `step` steps or more."""

    def __init__(self, out: Path, step: int, act: Callable[[], None]) -> None:
        self.acted = threading.Event()
        self._over = threading.Event()
        self._out, self._step, self._act = out, step, act
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            if any(int(p.name.split("-")[1]) >= self._step for p in checkpoints(self._out)):
                self.acted.set()
                self._act()
                return

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def kill_workers(count: int) -> None:
    for process in workers()[:count]:
        process.kill()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_worker_killed_after_an_epoch_changes_nothing(
    dataset: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    with Watcher(out, steps_an_epoch(whole), lambda: kill_workers(1)) as watcher:
        train(config(dataset, out))
    assert watcher.acted.is_set()
    said = capfd.readouterr().err
    assert f"going on from step {steps_an_epoch(whole)}" in said, said
    assert "Traceback" not in said
    assert weights_id(out) == weights_id(whole)
    assert losses(out) == losses(whole)


def test_a_worker_killed_within_an_epoch_sees_each_sample_once(
    dataset: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    settings = config(dataset, out, workers=2, checkpoint_every=4)
    with Watcher(out, 4, lambda: kill_workers(1)) as watcher:
        train(settings)
    assert watcher.acted.is_set()
    assert "going on from step" in capfd.readouterr().err
    np.testing.assert_allclose(losses(out), losses(whole), atol=1e-4)


@pytest.fixture
def interrupted(
    dataset: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[Path]:
    """Where a run was to write that ^C ended in its second epoch."""
    out = tmp_path / "m"
    with Watcher(out, steps_an_epoch(whole) + 4, interrupt), pytest.raises(KeyboardInterrupt):
        train(config(dataset, out, checkpoint_every=4))
    assert not out.exists()
    capfd.readouterr()
    yield out


def test_an_interrupted_run_goes_on_if_asked_to(
    dataset: Path, whole: Path, interrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StorageError, match=r"unfinished run \(its last checkpoint.*--resume"):
        train(config(dataset, interrupted))
    with pytest.raises(StorageError, match="other settings"):
        train(config(dataset, interrupted, batch_size=8, resume=True))
    newest = checkpoints(interrupted)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    # With another number of workers, and other steps between checkpoints.
    train(config(dataset, interrupted, resume=True, workers=2))
    said = capfd.readouterr().err
    assert f"{newest.name}: damaged (sha256); the checkpoint before it is used" in said
    np.testing.assert_allclose(losses(interrupted), losses(whole), atol=1e-4)
    assert not interrupted.with_name("m.training").exists()
    saved = read_json(str(interrupted / "config.json"))["train"]["settings"]
    assert saved["workers"] == "2"


def test_a_share_in_parts_gives_the_same_gradients(
    dataset: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a GPU's memory was too small for a step."""
    import dataclasses

    from covergenre import train as module
    from covergenre.errors import DeviceMemoryError

    parts: list[int] = []
    run_group = module._run_group

    def small_memory(settings: TrainConfig, job: Any, state: str) -> None:
        parts.append(job.accumulate)
        if job.accumulate < 4:
            raise DeviceMemoryError("a step does not fit the GPU's memory")
        run_group(settings, dataclasses.replace(job), state)

    monkeypatch.setattr(module, "_run_group", small_memory)
    out = tmp_path / "m"
    train(config(dataset, out, max_steps=steps_an_epoch(whole)))
    assert parts == [1, 2, 4]
    np.testing.assert_allclose(losses(out), losses(whole)[: len(losses(out))], atol=1e-5)
