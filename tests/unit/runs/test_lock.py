"""Leases: of two runs the second is refused, and a dead one's claim does not last."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from covergenre.errors import StorageError
from covergenre.io import storage
from covergenre.runs import lock
from covergenre.runs.lock import FOLDER, lease

# A process that is at work in a place until its standard input ends.
AT_WORK = """
import sys
from covergenre.runs.lock import lease
with lease(sys.argv[1]) as held:
    print("held", flush=True)
    sys.stdin.read()
"""


def at_work(place: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK, place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def holders(place: str) -> list[str]:
    return sorted(storage.list_sizes(storage.join(place, FOLDER)))


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_a_lease_is_given_back(place: str) -> None:
    for _ in range(2):
        with lease(place):
            assert holders(place) == ["00000001"]
        assert holders(place) == []
    with pytest.raises(KeyError), lease(place):
        raise KeyError
    assert holders(place) == []


def test_the_second_of_two_is_refused(place: str) -> None:
    process = at_work(place)
    with pytest.raises(StorageError) as caught, lease(place):
        pass
    assert f"process {process.pid} on" in str(caught.value) and "\n" not in str(caught.value)
    process.communicate("")
    assert process.returncode == 0
    with lease(place):
        pass


def test_a_dead_process_holds_nothing(place: str) -> None:
    process = at_work(place)
    process.send_signal(signal.SIGKILL)
    # Not waited for: what is dead and not yet buried is dead.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with lease(place):
        assert holders(place) == ["00000002"]
    process.communicate()


def elsewhere(place: str) -> str:
    """Make the holder of the lease one of another machine; the file."""
    uri = storage.join(place, FOLDER, "00000001")
    storage.put_json(uri, storage.read_json(uri) | {"boot": "another", "host": "there"})
    return uri


def test_a_holder_elsewhere_is_watched(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = at_work(place)
    process.kill()
    process.communicate()
    uri = elsewhere(place)
    record = storage.read_json(uri)

    # It beats: refused.
    looks: list[None] = []

    def beat() -> None:
        looks.append(None)
        storage.put_json(uri, record | {"beat": len(looks)})

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_pause", beat)
        with pytest.raises(StorageError, match=r"another run is at work here .* on there"):
            lock.Lease(place)
    assert len(looks) == 1

    # It does not: taken over.
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_DEAD_SECONDS", 0.05)
    with lease(place):
        assert holders(place) == ["00000002"]
    assert "looking whether it still is" in caplog.text


def test_who_was_taken_for_dead_is_told(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_DEAD_SECONDS", 0.0)
    first = lock.Lease(place)
    monkeypatch.setattr(lock, "_this_machine", lambda: {"boot": "another", "namespace": ""})
    with lease(place):
        first._thread.join(60)
        with pytest.raises(StorageError, match="another run has taken over here"):
            first.check()
        first.release()
        assert len(holders(place)) == 1


def test_a_beat_that_comes_late_takes_nothing_back(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks, is taken for dead, and then writes."""
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_DEAD_SECONDS", 0.0)
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 3600.0)
    first = lock.Lease(place)
    monkeypatch.setattr(lock, "_this_machine", lambda: {"boot": "another", "namespace": ""})
    with lease(place) as second:
        storage.put(first._uri, first._text())
        first._beat()
        with pytest.raises(StorageError, match="another run has taken over here"):
            first.check()
        second._beat()
        second.check()
        assert holders(place) == ["00000002"]
    first.release()
    assert holders(place) == []


def test_a_lease_says_who_holds_it(tmp_path: Path) -> None:
    with lease(str(tmp_path)):
        (name,) = holders(str(tmp_path))
        record = json.loads((tmp_path / FOLDER / name).read_text())
    assert record["pid"] == os.getpid() and record["host"] and record["since"]
