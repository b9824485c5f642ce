"""Locks on output directories: one run at a time writes to each.

    OUT/_state/lock/<N>   the process that holds the lock; the largest N counts

A run acquires the lock by creating the next N, which only one of several runs can do, and rewrites
that file every few seconds: the heartbeat. A second run is refused, unless the lock is stale: its
process, on this machine, no longer runs, or the file of a process on another machine does not
change for a while. Clocks of different machines are never compared. If that process was only
suspended, both runs write the same bytes under the same names: the lock saves work, the results do
not depend on it.
"""

import contextlib
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

from covergenre.errors import StorageError
from covergenre.io import storage
from covergenre.polling import polling

logger = logging.getLogger(__name__)

LOCK_DIRECTORY = "_state/lock"
_HEARTBEAT_SECONDS = 5.0
_STALE_SECONDS = 30.0
"""Time without a heartbeat after which the lock of another machine's process is stale."""
_POLL_SECONDS = 1.0


class OutputLock:
    """The lock on an output directory, held while the `with` block runs."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._directory = storage.join(out, LOCK_DIRECTORY)
        self._holder: dict[str, Any] = {
            **_this_process(),
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
            "heartbeat": 0,
        }
        self._uri = ""
        self._is_lost = False
        self._heartbeats = contextlib.ExitStack()

    def __enter__(self) -> "OutputLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Raises StorageError (code "locked") if another run holds the lock.

        Returns at once, or after 30 s where the holder may be a dead process of another machine.
        """
        while True:
            newest = self._newest()
            if newest:
                self._wait_until_stale(storage.join(self._directory, newest))
            self._uri = storage.join(self._directory, f"{int(newest or 0) + 1:08d}")
            if storage.put_if_absent(self._uri, storage.json_bytes(self._holder)):
                break
        if newest:
            storage.delete_file(storage.join(self._directory, newest))
        self._heartbeats.enter_context(polling(self._heartbeat, _HEARTBEAT_SECONDS))

    def release(self) -> None:
        """Let other runs acquire the lock."""
        self._heartbeats.close()
        if not self._is_lost:
            with contextlib.suppress(StorageError):  # the lock is stale once this process has ended
                storage.delete_file(self._uri)

    def check(self) -> None:
        """Raises StorageError (code "lock_lost") if another run has taken over the lock."""
        if self._is_lost:
            raise StorageError(
                f"{self._out}: another run took over the lock, because this one sent no heartbeat"
                f" for {_STALE_SECONDS:g} s; let that run finish",
                code="lock_lost",
            )

    def _newest(self) -> str | None:
        names = [name for name in storage.list_sizes(self._directory) if name.isdecimal()]
        return max(names, default=None)

    def _wait_until_stale(self, uri: str) -> None:
        """Return if the lock at `uri` is stale or released. Raises StorageError if it is held."""
        holder = _read(uri)
        if holder is None:
            return
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
        held = StorageError(
            f"{self._out}: locked by another run ({who}); wait until it ends, or end it",
            code="locked",
        )
        if {key: holder.get(key) for key in ("boot", "namespace")} == _this_machine():
            if _is_alive(holder.get("pid"), holder.get("started")):
                raise held
            return
        logger.info(
            f"{self._out}: locked by a run on another machine ({who}); waiting up to"
            f" {_STALE_SECONDS:g} s for its heartbeat"
        )
        deadline = time.monotonic() + _STALE_SECONDS
        while time.monotonic() < deadline:
            _pause()
            now = _read(uri)
            if now is None:
                return
            if now != holder:
                raise held

    def _heartbeat(self) -> bool:
        """Send a heartbeat; returns whether the lock is lost."""
        with contextlib.suppress(StorageError):  # unavailable for now: the next one may arrive
            self._send_heartbeat()
        return self._is_lost

    def _send_heartbeat(self) -> None:
        # A newer file, not the absence of our own, shows that the lock is lost: our previous
        # heartbeat may have rewritten the file after the run that took over deleted it.
        self._is_lost = self._newest() != storage.name(self._uri)
        if self._is_lost:
            storage.delete_file(self._uri)
            return
        self._holder["heartbeat"] += 1
        storage.put_json(self._uri, self._holder)


def _pause() -> None:
    time.sleep(_POLL_SECONDS)


def _read(uri: str) -> dict[str, Any] | None:
    """The holder's record; None if the file is missing or contains something else."""
    try:
        value = storage.read_json(uri)
    except StorageError as error:
        if error.code == "not_found":
            return None
        raise
    return value if isinstance(value, dict) else None


def _this_machine() -> dict[str, str]:
    """Identifies the machine, its boot and the process namespace."""
    if not Path("/proc/self/ns/pid").exists():  # not Linux
        return {"boot": platform.node(), "namespace": ""}
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}


def _this_process() -> dict[str, Any]:
    return {**_this_machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def _start_time(pid: int) -> str | None:
    """When the process started, in ticks since boot, because process ids are reused.

    "" if there is no /proc; None if the process has ended, zombies included.
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
    return isinstance(started, str) and _start_time(pid) == started
