"""Checkpoints: what is written is what is read, damage is found, and a crash costs nothing old."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from covergenre.errors import StorageError
from covergenre.training import checkpoints

STATE = {"step": 3, "history": [{"epoch": 1, "best": True}]}


def save(folder: Path, step: int, kind: str = "step") -> str:
    tensors = {"model.w": torch.full((40, 30), float(step)), "adam.step.w": torch.tensor(step)}
    return checkpoints.save(str(folder), kind, step, tensors, STATE if kind == "step" else None)


def test_what_is_saved_is_read(tmp_path: Path) -> None:
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


def test_the_newest_is_of_the_most_steps(tmp_path: Path) -> None:
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
def test_the_one_before_a_damaged_one_is_used(damage: Damage, tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    names = [save(tmp_path / "c", step) for step in (4, 8)]
    best = save(tmp_path / "c", 8, "best")
    for name in (names[1], best):
        path = tmp_path / "c" / name
        path.write_bytes(damage(path.read_bytes()))
    said: list[str] = []
    found = checkpoints.newest(folder, tmp_path, said.append)
    assert found is not None and found.name == names[0] and found.state() == STATE
    assert said == [f"{folder}/{names[1]}: damaged (sha256); the checkpoint before it is used"]
    assert checkpoints.latest_step(folder) == 4
    assert checkpoints.fetch(folder, best, tmp_path) is None
    assert not (tmp_path / best).exists()
    # And where none is whole, training begins anew.
    path = tmp_path / "c" / names[0]
    path.write_bytes(damage(path.read_bytes()))
    assert checkpoints.newest(folder, tmp_path, said.append) is None
    assert checkpoints.latest_step(folder) == 0 and len(said) == 2


def test_old_ones_are_pruned_and_the_best_kept(tmp_path: Path) -> None:
    best = save(tmp_path, 2, "best")
    later = save(tmp_path, 6, "best")
    names = [save(tmp_path, step) for step in (2, 4, 6, 8)]
    checkpoints.prune(str(tmp_path), {best, later, None})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([best, later, *names[2:]])
    checkpoints.prune(str(tmp_path), {later})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([later, *names[2:]])


def test_a_name_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "step-x.safetensors").touch()
    with pytest.raises(StorageError, match=r"step-x\.safetensors: no name of a checkpoint"):
        checkpoints.latest_step(str(tmp_path))


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
def test_writer_killed_at_any_moment_leaves_the_last_good_checkpoint(
    kills: int, tmp_path: Path
) -> None:
    """kill -9; nothing that can be seen is ever half written."""
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
