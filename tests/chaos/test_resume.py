"""Resuming training: killed workers, damaged files, Ctrl-C, and too little GPU memory."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from training_runs import EPOCHS, losses, train_config

from covergenre.errors import StorageError, TrainingDivergedError
from covergenre.io import storage
from covergenre.io.storage import read_json
from covergenre.models.bundle import load_model, read_bundle
from covergenre.stages.train import train
from covergenre.training import supervisor
from covergenre.training.checkpoints import fetch

pytestmark = pytest.mark.usefixtures("local_ray")


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


@pytest.mark.slow
def test_killed_training_worker_repeats_and_skips_no_sample(
    dataset: Path, trained_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "m"
    settings = train_config(dataset, out, workers=2, checkpoint_every=4)
    with Watcher(out, 4, lambda: kill_workers(1)) as watcher:
        train(settings)
    assert watcher.acted.is_set()
    assert "workers failed" in caplog.text
    np.testing.assert_allclose(losses(out), losses(trained_model), atol=1e-4)


@pytest.fixture
def interrupted(dataset: Path, trained_model: Path, tmp_path: Path) -> Iterator[Path]:
    """The output directory of a run that ^C ended in its second epoch."""
    out = tmp_path / "m"
    with (
        Watcher(out, steps_an_epoch(trained_model) + 4, interrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        train(train_config(dataset, out, checkpoint_every=4))
    assert not out.exists()
    yield out


@pytest.mark.chaos
def test_interrupted_run_resumes_on_request(
    dataset: Path, trained_model: Path, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StorageError) as caught:
        train(train_config(dataset, interrupted))
    assert caught.value.code == "unfinished_run"
    with pytest.raises(StorageError) as caught:
        train(train_config(dataset, interrupted, batch_size=8, resume=True))
    assert caught.value.code == "other_run"
    newest = checkpoints(interrupted)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    # With another number of workers, and other steps between checkpoints.
    train(train_config(dataset, interrupted, resume=True, workers=2))
    assert f"quarantine/{newest.name}" in caplog.text
    np.testing.assert_allclose(losses(interrupted), losses(trained_model), atol=1e-4)
    assert not interrupted.with_name("m.training").exists()
    saved = read_json(str(interrupted / "config.json"))["train"]["settings"]
    assert saved["workers"] == "2"


@pytest.mark.chaos
@pytest.mark.usefixtures("local_training")
def test_run_interrupted_while_writing_the_model_resumes_without_training(
    dataset: Path,
    trained_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is trained again; and a damaged file of the best weights is made up for."""
    out = tmp_path / "m"
    put_json = storage.put_json

    def interrupted(uri: str, value: Any) -> None:
        if storage.name(uri) == "bundle.json":  # all else is written
            raise KeyboardInterrupt
        put_json(uri, value)  # heartbeats of the lock

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "put_json", interrupted)
        train(train_config(dataset, out))
    assert (out / "model.safetensors").exists()
    with pytest.raises(StorageError) as caught:
        train(train_config(dataset, out))
    assert caught.value.code == "unfinished_run"
    *_, best = sorted(checkpoints(out)[0].parent.glob("best-*"))
    best.write_bytes(best.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        patch.delattr(supervisor, "_run_group")
        train(train_config(dataset, out, resume=True))
    assert str(best) in caplog.text
    assert weights_id(out) == weights_id(trained_model)
    assert losses(out) == losses(trained_model)
    assert not out.with_name("m.training").exists()


@pytest.mark.chaos
def test_damaged_shard_fails_in_one_line(dataset: Path, tmp_path: Path) -> None:
    """Found by a task on the cluster, and reported as if it had been found here."""
    broken = tmp_path / "dataset"
    shutil.copytree(dataset, broken)
    shard = broken / "train" / "part-00001.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:200] + bytes(len(data) - 400) + data[-200:])
    with pytest.raises(StorageError) as caught:
        train(train_config(broken, tmp_path / "m"))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert str(shard) in str(caught.value)


@pytest.mark.chaos
@pytest.mark.usefixtures("local_training")
def test_non_finite_loss_names_the_last_checkpoint(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    with pytest.raises(TrainingDivergedError) as caught:
        train(train_config(dataset, out, learning_rate=1e30, checkpoint_every=1))
    assert not out.exists()
    folder = tmp_path / "m.training" / "checkpoints"
    (kept,) = checkpoints(out)
    for fact in ("step 2 of epoch 1", "1e+30", f"step 1, in {folder}", "--learning-rate", "--out"):
        assert fact in str(caught.value)
    assert caught.value.code == "loss_not_finite" and caught.value.exit_code == 2
    found = fetch(str(folder), kept.name, tmp_path)
    assert found is not None and all(t.isfinite().all() for t in found.tensors().values())


@pytest.mark.chaos
@pytest.mark.usefixtures("local_training")
def test_step_too_large_for_gpu_memory_accumulates_gradients(
    dataset: Path,
    trained_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All is real but the GPU, which raises the error where rows are too many."""
    from covergenre.training.worker import Worker

    backward = Worker._backward

    def limited(worker: Worker, part: Any, *args: Any, **others: Any) -> Any:
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return backward(worker, part, *args, **others)

    monkeypatch.setattr(Worker, "_backward", limited)
    out = tmp_path / "m"
    train(train_config(dataset, out))
    counts = [caplog.text.count(f"computing {n} covers at a time") for n in (5, 3)]
    assert counts == [1, 1] and "workers failed" not in caplog.text
    # The same sums in another order. Adam divides by what is nearly nothing at first, and so the
    # last digits grow from step to step.
    np.testing.assert_allclose(losses(out)[:9], losses(trained_model)[:9], atol=1e-6)
    np.testing.assert_allclose(losses(out), losses(trained_model), atol=5e-3)
