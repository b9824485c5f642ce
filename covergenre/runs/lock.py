"""Leases: one run at a time in a place. Of two the second is refused; a dead one's does not last.

    PLACE/_state/at-work/<N>   who is at work; the largest N counts; written anew every few seconds

A lease is taken by creating the next N, which one of several can do. No clock is compared with
another: a holder whose process is gone from this machine is dead at once, and one elsewhere when
its lease does not change for a while. Should it only have been asleep, both would write the same
bytes under the same names: a lease saves work, and the result does not hang on it.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from covergenre.errors import StorageError
from covergenre.io import storage

logger = logging.getLogger(__name__)

FOLDER = "_state/at-work"
_BEAT_SECONDS = 5.0
_DEAD_SECONDS = 30.0
_LOOK_SECONDS = 1.0


@contextlib.contextmanager
def lease(place: str) -> Iterator["Lease"]:
    """Be the one run that is at work in `place`. Raises StorageError where another is."""
    held = Lease(place)
    try:
        yield held
    finally:
        held.release()


class Lease:
    """That this process is at work in a place."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._folder = storage.join(place, FOLDER)
        self._record: dict[str, Any] = {
            **_this_process(),
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
            "beat": 0,
        }
        self._over = threading.Event()
        self._lost = False
        self._uri = self._take()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StorageError where another run took the place over, having found this one dead."""
        if self._lost:
            raise StorageError(
                f"{self._place}: another run has taken over here, as this one showed no sign of"
                " life; let that one finish"
            )

    def release(self) -> None:
        """Let others work there."""
        self._over.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(StorageError):  # then it dies with this process
                storage.delete_file(self._uri)

    def _take(self) -> str:
        while True:
            last = self._last()
            if last:
                self._wait_for_end(storage.join(self._folder, last))
            name = f"{int(last or 0) + 1:08d}"
            uri = storage.join(self._folder, name)
            if storage.put_if_absent(uri, self._text()):
                if last:
                    storage.delete_file(storage.join(self._folder, last))
                return uri

    def _last(self) -> str | None:
        names = [name for name in storage.list_sizes(self._folder) if name.isdecimal()]
        return max(names, default=None)

    def _wait_for_end(self, uri: str) -> None:
        """Come back when the holder of the lease is dead. Raises StorageError where it is not."""
        first = _read(uri)
        if first is None:
            return
        who = f"process {first.get('pid')} on {first.get('host')}, since {first.get('since')}"
        refused = StorageError(
            f"{self._place}: another run is at work here ({who}); wait for it, or end it"
        )
        if {key: first.get(key) for key in ("boot", "namespace")} == _this_machine():
            if _is_alive(first.get("pid"), first.get("started")):
                raise refused
            return
        logger.info(f"{self._place}: a run was at work here ({who}); looking whether it still is")
        deadline = time.monotonic() + _DEAD_SECONDS
        while time.monotonic() < deadline:
            _pause()
            now = _read(uri)
            if now is None:
                return
            if now != first:
                raise refused

    def _keep(self) -> None:
        while not self._lost and not self._over.wait(_BEAT_SECONDS):
            # A store that fails for a moment is met again at the next beat.
            with contextlib.suppress(StorageError):
                self._beat()

    def _beat(self) -> None:
        # Not whether the own file is there: the beat before may have written it anew when whoever
        # took over had deleted it.
        self._lost = self._last() != storage.name(self._uri)
        if self._lost:
            storage.delete_file(self._uri)
            return
        self._record["beat"] += 1
        storage.put(self._uri, self._text())

    def _text(self) -> bytes:
        return json.dumps(self._record).encode()


def _pause() -> None:
    time.sleep(_LOOK_SECONDS)


def _read(uri: str) -> dict[str, Any] | None:
    try:
        value = storage.read_json(uri)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    return value if isinstance(value, dict) else None


def _this_machine() -> dict[str, str]:
    """What tells apart two machines, two boots of one, and two tables of processes on one."""
    if not Path("/proc/self/ns/pid").exists():  # not Linux
        return {"boot": platform.node(), "namespace": ""}
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}


def _this_process() -> dict[str, Any]:
    return {**_this_machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When the process started, in ticks since boot: a number may be given to another one later.

    "" where there is no /proc, None where the process is no more, or waits to be buried.
    """
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _is_alive(pid: Any, started: Any) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return isinstance(started, str) and _started(pid) == started
