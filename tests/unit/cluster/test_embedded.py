"""The directory and the environment of a Ray that runs inside this process."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from covergenre.cluster import embedded, ray_runtime
from covergenre.cluster.embedded import MAX_BASE_BYTES, EmbeddedRayDirectory
from covergenre.errors import ConfigError


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a short path; pytest's own are too long."""
    folder = Path("/tmp", f"t{os.getpid()}")
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def directory(base: Path) -> Iterator[EmbeddedRayDirectory]:
    made = EmbeddedRayDirectory()
    yield made
    made.delete()


def test_directory_is_private(directory: EmbeddedRayDirectory, base: Path) -> None:
    assert directory.path.parent == base
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(directory.token.stat().st_mode) == 0o600
    assert len(directory.token.read_text()) == 64


def test_code_directory_contains_only_this_package(directory: EmbeddedRayDirectory) -> None:
    (package,) = directory.code.iterdir()
    assert package.name == "covergenre"
    assert package.resolve() == Path(embedded.__file__).resolve().parents[1]


def test_longest_socket_path_fits() -> None:
    base = "x" * MAX_BASE_BYTES
    socket = f"{base}/cg-12345678{embedded._SOCKET_NAME}"
    assert len(socket) == embedded._SOCKET_PATH_BYTES


def test_delete_removes_all_files(directory: EmbeddedRayDirectory, base: Path) -> None:
    directory.delete()
    assert not list(base.iterdir())


@pytest.mark.parametrize("unusable", ["long", "missing", "file", "full"])
def test_unusable_tmpdir_is_skipped(
    unusable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmpdir = {
        "long": tmp_path / ("x" * 100),
        "missing": Path("/nowhere"),
        "file": Path("/dev/null"),
        "full": Path("/var/tmp"),
    }[unusable]
    if unusable == "long":
        tmpdir.mkdir(parents=True)
    usage = shutil.disk_usage

    def disk_usage(path: str) -> object:
        return SimpleNamespace(free=0) if path == "/var/tmp" else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmpdir))
    made = EmbeddedRayDirectory()
    made.delete()
    assert str(made.path.parent) == "/tmp"


def test_no_usable_directory_is_an_error_with_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_base_directories", lambda: ["/nowhere", "/" + "x" * 99])
    with pytest.raises(ConfigError) as caught:
        EmbeddedRayDirectory()
    text = str(caught.value)
    assert caught.value.code == "no_temporary_directory" and "\n" not in text
    for fact in ("/nowhere: ", "/xx", f" {MAX_BASE_BYTES} bytes", "RAY_TMPDIR"):
        assert fact in text


def test_directories_of_killed_runs_are_removed_and_those_in_use_are_not(
    directory: EmbeddedRayDirectory, base: Path
) -> None:
    code = "from covergenre.cluster.embedded import EmbeddedRayDirectory as D; d = D(); import os;"
    subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), 9)"], check=False)
    assert len(list(base.iterdir())) == 2
    unlocked = base / "cg-12345678"  # as if another run was creating it
    unlocked.mkdir()
    foreign = base / "cg-file"
    foreign.touch()
    other_program = base / "cg-project"
    other_program.mkdir()
    (other_program / "lock").touch()
    another = EmbeddedRayDirectory()
    assert set(base.iterdir()) == {directory.path, another.path, unlocked, foreign, other_program}
    another.delete()


def test_environment_has_no_proxy_and_no_current_directory(
    directory: EmbeddedRayDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":/opt/a::/opt/b:")
    found = embedded.environment(directory)
    assert found["RAY_AUTH_TOKEN_PATH"] == str(directory.token)
    assert found["grpc_proxy"] == ""
    assert found["PYTHONPATH"] == "/opt/a:/opt/b"
    assert "HOME" not in found


@pytest.mark.parametrize("before", ["", "1"])
def test_safe_import_path_is_temporary(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", before)
    (tmp_path / "beside.py").touch()
    command = [sys.executable, "-c", "import beside"]
    with ray_runtime.temporary_environment({"PYTHONSAFEPATH": "1"}):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'beside'" in done.stderr
    assert os.environ["PYTHONSAFEPATH"] == before


def test_user_without_home_directory_gets_one(
    directory: EmbeddedRayDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert embedded.environment(directory)["HOME"] == str(directory.path)
