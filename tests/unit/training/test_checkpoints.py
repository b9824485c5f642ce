"""Checkpoints: a round trip, damage, and writers that are killed."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from covergenre.errors import StorageError
from covergenre.io import storage
from covergenre.training import checkpoints

STATE = {"step": 3, "history": [{"epoch": 1, "best": True}]}


def save(folder: Path, step: int, kind: str = "step") -> str:
    tensors = {"model.w": torch.full((40, 30), float(step)), "adam.step.w": torch.tensor(step)}
    return checkpoints.save(str(folder), kind, step, tensors, STATE if kind == "step" else None)


def test_round_trip(tmp_path: Path) -> None:
    name = save(tmp_path / "c", 7)
    into = tmp_path / "local"
    into.mkdir()
    found = checkpoints.newest(str(tmp_path / "c"), into, pytest.fail)
    assert found is not None
    assert (found.name, found.step, found.state()) == (name, 7, STATE)
    assert found.file.parent == into
    tensors = found.tensors()
    assert torch.equal(tensors["model.w"], torch.full((40, 30), 7.0))
    assert tensors["adam.step.w"].item() == 7
    assert checkpoints.newest(str(tmp_path / "none"), into, pytest.fail) is None
    assert checkpoints.latest_step(str(tmp_path / "none")) == 0


def test_newest_checkpoint_has_the_most_steps(tmp_path: Path) -> None:
    for step in (999, 10_000, 5):
        save(tmp_path, step)
    assert checkpoints.latest_step(str(tmp_path)) == 10_000


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "a bit of the weights": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "a bit of the header": lambda data: data[:20] + bytes([data[20] ^ 64]) + data[21:],
    "truncated": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "another file": lambda data: b"PK\x03\x04 a zip, by its first bytes",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_is_quarantined_and_the_one_before_it_used(
    damage: Damage, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    names = [save(folder, step) for step in (4, 8)]
    damaged = damage((folder / names[1]).read_bytes())
    (folder / names[1]).write_bytes(damaged)
    messages: list[str] = []
    found = checkpoints.newest(str(folder), tmp_path, messages.append)
    assert found is not None and found.name == names[0] and found.state() == STATE
    (message,) = messages
    assert str(folder / names[1]) in message
    assert (folder / "quarantine" / names[1]).read_bytes() == damaged
    assert not (folder / names[1]).exists() and not (tmp_path / names[1]).exists()
    assert checkpoints.latest_step(str(folder)) == 4
    checkpoints.prune(str(folder), set())
    assert (folder / "quarantine" / names[1]).exists()
    # Without any intact checkpoint training starts from the beginning.
    (folder / names[0]).write_bytes(damage((folder / names[0]).read_bytes()))
    assert checkpoints.newest(str(folder), tmp_path, messages.append) is None
    assert checkpoints.latest_step(str(folder)) == 0 and len(messages) == 2
    assert len(list((folder / "quarantine").iterdir())) == 2


def corrupt_downloads(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Flip a bit in the first `count` downloads; returns the URIs of all downloads as they come."""
    downloads: list[str] = []
    get_file = storage.get_file

    def corrupting(uri: str, file: Path) -> None:
        get_file(uri, file)
        downloads.append(uri)
        if len(downloads) <= count:
            file.write_bytes(DAMAGES["a bit of the weights"](file.read_bytes()))

    monkeypatch.setattr(storage, "get_file", corrupting)
    return downloads


def test_corrupted_download_is_repeated_and_nothing_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    names = [save(folder, step) for step in (4, 8)]
    best = save(folder, 8, "best")
    downloads = corrupt_downloads(monkeypatch, 1)
    found = checkpoints.newest(str(folder), tmp_path, pytest.fail)
    assert found is not None and found.name == names[1] and found.state() == STATE
    assert downloads == [f"{folder}/{names[1]}"] * 2
    downloads.clear()
    assert checkpoints.fetch(str(folder), best, tmp_path) is not None
    assert len(downloads) == 2
    assert sorted(file.name for file in folder.iterdir()) == sorted([*names, best])


def test_damaged_or_missing_best_weights_are_not_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    best = save(folder, 8, "best")
    (folder / best).write_bytes(DAMAGES["a byte short"]((folder / best).read_bytes()))
    assert checkpoints.fetch(str(folder), best, tmp_path) is None
    assert not (tmp_path / best).exists()
    (folder / best).unlink()
    assert checkpoints.fetch(str(folder), best, tmp_path) is None


def test_prune_keeps_two_checkpoints_and_the_best_weights(tmp_path: Path) -> None:
    best = save(tmp_path, 2, "best")
    later = save(tmp_path, 6, "best")
    names = [save(tmp_path, step) for step in (2, 4, 6, 8)]
    checkpoints.prune(str(tmp_path), {best, later, None})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([best, later, *names[2:]])
    checkpoints.prune(str(tmp_path), {later})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([later, *names[2:]])


def test_file_with_a_wrong_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "step-x.safetensors").touch()
    with pytest.raises(StorageError, match=r"step-x\.safetensors") as caught:
        checkpoints.latest_step(str(tmp_path))
    assert caught.value.code == "checkpoint_name"


WRITER = """
import sys, torch
from covergenre.training import checkpoints
step = int(sys.argv[2])
while True:
    step += 1
    tensors = {"model.w": torch.full((1_000_000,), float(step))}
    checkpoints.save(sys.argv[1], "step", step, tensors, {"step": step})
    checkpoints.prune(sys.argv[1], set())
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_writer_leaves_the_last_checkpoint_intact(kills: int, tmp_path: Path) -> None:
    """kill -9; no checkpoint is ever half written."""
    folder = tmp_path / "c"
    draw = random.Random(0)
    step = 0
    for _ in range(kills):
        command = [sys.executable, "-c", WRITER, str(folder), str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(draw.randrange(2, 5)):
                told = int(writer.stdout.readline())
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(draw.uniform(0, 0.02))
            writer.kill()
            told = max([told, *map(int, writer.stdout.read().split())])
        found = checkpoints.newest(str(folder), tmp_path, pytest.fail)
        assert found is not None and found.step in (told, told + 1)
        assert found.state() == {"step": found.step}
        assert (found.tensors()["model.w"] == found.step).all()
        step = found.step
