"""A full disk: an error of one line, no partial files, and resuming once there is space."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import TableReader
from training_runs import FLAGS

from covergenre.cli import main
from covergenre.data import plan
from covergenre.data.dataset import read_manifest
from covergenre.errors import StorageError
from covergenre.models.bundle import read_bundle
from covergenre.training import checkpoints

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.chaos]

DISK = 16 * 2**20
TRAIN = (*FLAGS, "--checkpoint-every", "4")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        if os.environ.get("COVERGENRE_CI"):
            pytest.fail("CI has to be allowed to mount")
        pytest.skip("needs root, to mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # workers may look at it yet


def leave(disk: Path, free: int) -> None:
    """Fill the disk, but for `free` bytes."""
    with (disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(shutil.disk_usage(disk).free - free))


def make_space(disk: Path) -> None:
    (disk / "ballast").unlink()


Command = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command; what it said on stderr. `fails`: it must end in one line, with exit code 2."""

    def command(*args: Any, fails: bool = False) -> str:
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr().err
        assert code == (2 if fails else 0), said
        assert "Traceback" not in said
        if fails:
            last = said.splitlines()[-1]
            assert last.startswith("covergenre: ") and "No space left on device" in last, said
        return said

    return command


def files(place: Path) -> dict[str, bytes]:
    """All of a result but notes of the run itself, such as the parts that it has counted."""
    return {
        str(file.relative_to(place)): file.read_bytes()
        for file in sorted(place.rglob("*"))
        if file.is_file()
        and file.name not in ("run.json", "plan.json", "_ledger.json")
        and file.parent.name != "counts"
    }


def assert_nothing_torn(place: Path) -> None:
    for file in files(place):
        assert not Path(file).name.startswith("."), "a temporary file was left"
        if file.endswith(".parquet"):
            pq.read_table(place / file)


def test_prepare(synthetic_catalog: Path, dataset: Path, disk: Path, run: Command) -> None:
    command = (
        "prepare",
        synthetic_catalog,
        "--out",
        disk / "d",
        "--shard-rows",
        "20",
        "--min-share",
        "0",
    )
    size = sum(map(len, files(dataset).values()))
    leave(disk, size // 2)
    run(*command, fails=True)
    assert_nothing_torn(disk / "d")
    made = {file: file.stat().st_ino for file in (disk / "d").glob("*/part-*.parquet")}
    assert not (disk / "d" / "_manifest.json").exists()
    make_space(disk)
    said = run(*command)
    assert f"{len(made):,} of" in said and "shards" in said
    assert made.items() <= {file: file.stat().st_ino for file in made}.items()
    assert files(disk / "d") == {
        **files(dataset),
        "_manifest.json": (disk / "d" / "_manifest.json").read_bytes(),
    }
    assert read_manifest(str(disk / "d")).dataset_id == read_manifest(str(dataset)).dataset_id


@pytest.mark.usefixtures("local_training")
def test_train(dataset: Path, trained_model: Path, disk: Path, run: Command) -> None:
    command = ("train", dataset, "--out", disk / "m", *TRAIN)
    leave(disk, 3 * 2**19)  # a checkpoint and a bit
    run(*command, fails=True)
    (kept,) = (disk / "m.training" / "checkpoints").iterdir()
    found = checkpoints.fetch(str(kept.parent), kept.name, disk.parent)
    assert found is not None and found.step == 4
    assert not (disk / "m").exists()
    make_space(disk)
    run(*command, "--resume")
    assert read_bundle(str(disk / "m")).weights_id == read_bundle(str(trained_model)).weights_id


def test_score(
    synthetic_catalog: Path, trained_model: Path, disk: Path, tmp_path: Path, run: Command
) -> None:
    command = ("score", trained_model, synthetic_catalog, "--part-rows", "16", "--out")
    run(*command, tmp_path / "whole")
    leave(disk, sum(map(len, files(tmp_path / "whole").values())) * 2 // 3)
    run(*command, disk / "labels", fails=True)
    assert_nothing_torn(disk / "labels")
    assert not (disk / "labels" / "_SUCCESS").exists()
    made = {file: file.stat().st_ino for file in (disk / "labels").glob("*.parquet")}
    assert 0 < len(made) < 10
    make_space(disk)
    said = run(*command, disk / "labels")
    assert f"{len(made)} of 10 output parts" in said
    assert made.items() <= {file: file.stat().st_ino for file in made}.items()
    assert files(disk / "labels") == files(tmp_path / "whole")


def test_temporary_files(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only needed for a while lies where TMPDIR says; that may be full, too."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    leave(disk, 100_000)
    rows = 20_000
    ids = [str(row) for row in range(rows)]
    columns = [range(rows), ids, ids, [None] * rows, [None] * rows]
    part = pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, plan.ROWS, strict=True)], plan.ROWS
    )
    with pytest.raises(StorageError, match=r"cannot write: No space left on device"):
        plan.write_plan(str(tmp_path / "plan"), TableReader([part]))
    assert plan.read_plan(str(tmp_path / "plan")) is None
    import torch

    with pytest.raises(StorageError, match=r"cannot write: .*No space left on device"):
        checkpoints.save(str(tmp_path / "c"), "step", 1, {"w": torch.zeros(10**6)}, {})
    assert [file.name for file in disk.iterdir()] == ["ballast"]
