"""Loads and decodes rows in child processes of this one, for small jobs without Ray.

A cover or a library that crashes a child does not crash this process: the child is replaced, as
Ray replaces a worker.
"""

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from covergenre.cluster.embedded import python_path
from covergenre.data.decoder_process import child_code
from covergenre.data.image_decoding import Preprocessing
from covergenre.data.plan import Plan
from covergenre.errors import CovergenreError
from covergenre.inference import batches
from covergenre.inference.batches import Loaded
from covergenre.inference.loader import WorkerCrashedError

_ATTEMPTS = 3
"""Of a task whose children crash before its first batch; as with Ray."""

Request = tuple[int, int, int]
"""(first row, row after the last one, batch size)"""
_Results = queue.SimpleQueue[Loaded | Exception | None]
"""The batches of a task; at the end None, or the exception that came instead."""


class LocalTasks:
    """See loader.Tasks. Runs one task at a time in each of its children."""

    def __init__(self, plan: Plan, spec: Preprocessing, count: int) -> None:
        """count: children, which are started here."""
        self._requests: queue.SimpleQueue[tuple[Request, _Results] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._children = [_Child(plan, spec) for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._run, args=(child,), daemon=True)
            for child in self._children
        ]
        for thread in self._threads:
            thread.start()

    def start(self, start: int, stop: int, batch_size: int) -> Iterator[Loaded]:
        """Start a task; returns its batches."""
        results: _Results = queue.SimpleQueue()
        self._requests.put(((start, stop, batch_size), results))
        return _received(results)

    def close(self) -> None:
        """Kill the children."""
        self._closed.set()
        for _ in self._threads:
            self._requests.put(None)
        for child, thread in zip(self._children, self._threads, strict=True):
            while thread.is_alive():  # it may be replacing a child that crashed
                child.kill()
                thread.join(0.1)
            child.kill()

    def _run(self, child: "_Child") -> None:
        """Of a thread, for one child."""
        while (task := self._requests.get()) is not None and not self._closed.is_set():
            request, results = task
            try:
                results.put(self._load(child, request, results))
            except Exception as error:
                results.put(error)

    def _load(self, child: "_Child", request: Request, results: _Results) -> Exception | None:
        """Run a task. Returns WorkerCrashedError if its child crashed."""
        for _ in range(_ATTEMPTS):
            any_loaded = False
            try:
                for loaded in child.load(request):
                    results.put(loaded)
                    any_loaded = True
            except (EOFError, OSError):
                if self._closed.is_set():
                    break
                child.restart()
                if any_loaded:
                    break
            else:
                return None
        return WorkerCrashedError()


def _received(results: _Results) -> Iterator[Loaded]:
    while (value := results.get()) is not None:
        if isinstance(value, Exception):
            raise value
        yield value


class _Child:
    """A child process, and the connection to it."""

    def __init__(self, plan: Plan, spec: Preprocessing) -> None:
        self._arguments = plan, spec
        self._failed_starts = 0
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: nothing is imported from the current directory.
                [sys.executable, "-P", "-c", child_code(__name__)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=os.environ | python_path(),
                process_group=0,  # Ctrl-C is for the parent, which ends its children
            )
        self._connection = Connection(ours.detach())
        self._is_ready, self._has_answered = False, True

    def load(self, request: Request) -> Iterator[Loaded]:
        """Raises EOFError or OSError when the child crashes, and what the task raised."""
        if not self._has_answered:  # the last request failed here: the rest of it would come now
            self.restart()
        self._await_start()
        self._has_answered = False
        self._connection.send(request)
        while not isinstance(answer := self._connection.recv(), Exception | None):
            stream, pixels, seconds, sent = answer
            outcomes = batches.from_stream(stream)
            # All processes of a machine have the same monotonic clock.
            yield Loaded(outcomes, pixels, seconds | {"transfer": time.monotonic() - sent})
        self._has_answered = True
        if answer is not None:
            raise answer

    def _await_start(self) -> None:
        if self._is_ready:
            return
        try:
            self._connection.send(self._arguments)
            self._connection.recv()
        except (EOFError, OSError):
            self._failed_starts += 1
            if self._failed_starts == _ATTEMPTS:
                raise CovergenreError(
                    f"a process to load covers did not start in {_ATTEMPTS} attempts; see its"
                    " error above, then run the same command again",
                    code="workers_crash",
                ) from None
            raise
        self._failed_starts, self._is_ready = 0, True

    def kill(self) -> None:
        """Kill the process; a thread that waits for it gets an EOFError."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Replace a process that crashed."""
        self.kill()
        self._connection.close()
        self._start()


def serve() -> None:
    """Run by a child: its standard input is the connection."""
    connection: Any = Connection(os.dup(0))
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        plan, spec = connection.recv()
        connection.send("ready")
        while True:
            _answer(connection, plan, spec, connection.recv())


def _answer(connection: Any, plan: Plan, spec: Preprocessing, request: Request) -> None:
    start, stop, batch_size = request
    try:
        for outcomes, pixels, seconds in batches.load(plan, start, stop, spec, batch_size):
            stream = batches.to_stream(outcomes)
            connection.send((stream, pixels, seconds, time.monotonic()))
        connection.send(None)
    except MemoryError:  # as a crash: perhaps of these rows only
        os._exit(1)
    except CovergenreError as error:
        connection.send(error)
    except Exception as error:
        connection.send(RuntimeError("".join(traceback.format_exception(error))))
