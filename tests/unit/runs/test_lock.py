"""Locks on output directories: a second run is refused, a stale lock is taken over."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from covergenre.errors import StorageError
from covergenre.io import storage
from covergenre.runs import lock
from covergenre.runs.lock import LOCK_DIRECTORY, OutputLock

# A process that holds the lock on a directory until its standard input ends.
HOLDER = """
import sys
from covergenre.runs.lock import OutputLock
with OutputLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def start_holder(out: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def lock_files(out: str) -> list[str]:
    return sorted(storage.list_sizes(storage.join(out, LOCK_DIRECTORY)))


def refused(out: str) -> str:
    """The message of the refusal, one line."""
    with pytest.raises(StorageError) as caught:
        OutputLock(out).acquire()
    assert caught.value.code == "locked" and "\n" not in str(caught.value)
    return str(caught.value)


def assert_lost(held: OutputLock) -> None:
    with pytest.raises(StorageError) as caught:
        held.check()
    assert caught.value.code == "lock_lost"


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_lock_is_released_after_the_block_and_after_an_error(out: str) -> None:
    for _ in range(2):
        with OutputLock(out) as held:
            assert lock_files(out) == ["00000001"]
            held.check()
        assert lock_files(out) == []
    with pytest.raises(KeyError), OutputLock(out):
        raise KeyError
    assert lock_files(out) == []


def test_second_run_is_refused_while_the_first_holds_the_lock(out: str) -> None:
    process = start_holder(out)
    assert f"process {process.pid} on" in refused(out)
    process.communicate("")
    assert process.returncode == 0
    with OutputLock(out):
        pass


def test_stale_lock_of_a_dead_process_is_taken_over(out: str) -> None:
    process = start_holder(out)
    process.send_signal(signal.SIGKILL)
    # Its exit status is not collected: a zombie counts as dead.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with OutputLock(out):
        assert lock_files(out) == ["00000002"]
    process.communicate()


def on_another_machine(out: str) -> str:
    """Change the lock file to one of another machine; returns its URI."""
    uri = storage.join(out, LOCK_DIRECTORY, "00000001")
    storage.put_json(uri, storage.read_json(uri) | {"boot": "another", "host": "there"})
    return uri


def test_lock_of_another_machine_is_stale_without_a_heartbeat(
    out: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = start_holder(out)
    process.kill()
    process.communicate()
    uri = on_another_machine(out)
    holder = storage.read_json(uri)

    # With a heartbeat: refused.
    polls: list[None] = []

    def send_heartbeat() -> None:
        polls.append(None)
        storage.put_json(uri, holder | {"heartbeat": len(polls)})

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_pause", send_heartbeat)
        assert " on there" in refused(out)
    assert len(polls) == 1

    # Without one: taken over.
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_STALE_SECONDS", 0.05)
    with caplog.at_level(logging.INFO, "covergenre"), OutputLock(out):
        assert lock_files(out) == ["00000002"]
    assert any(out in message and " on there" in message for message in caplog.messages)


@pytest.fixture
def instantly_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of any other machine is stale at once."""
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_STALE_SECONDS", 0.0)


@pytest.mark.usefixtures("instantly_stale")
def test_run_notices_that_its_lock_was_taken_over(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_HEARTBEAT_SECONDS", 0.01)
    first = OutputLock(out)
    first.acquire()
    monkeypatch.setattr(lock, "_this_machine", lambda: {"boot": "another", "namespace": ""})
    with OutputLock(out):
        deadline = time.monotonic() + 60
        while not first._is_lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert_lost(first)
        first.release()
        assert len(lock_files(out)) == 1


@pytest.mark.usefixtures("instantly_stale")
def test_late_heartbeat_does_not_take_the_lock_back(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run lists the lock files, is taken over, and only then writes."""
    monkeypatch.setattr(lock, "_HEARTBEAT_SECONDS", 3600.0)
    first = OutputLock(out)
    first.acquire()
    monkeypatch.setattr(lock, "_this_machine", lambda: {"boot": "another", "namespace": ""})
    with OutputLock(out) as second:
        storage.put_json(first._uri, first._holder)
        first._send_heartbeat()
        assert_lost(first)
        second._send_heartbeat()
        second.check()
        assert lock_files(out) == ["00000002"]
    first.release()
    assert lock_files(out) == []


def test_lock_file_names_its_holder(tmp_path: Path) -> None:
    with OutputLock(str(tmp_path)):
        (name,) = lock_files(str(tmp_path))
        holder = json.loads((tmp_path / LOCK_DIRECTORY / name).read_text())
    assert holder["pid"] == os.getpid() and holder["host"] and holder["since"]
