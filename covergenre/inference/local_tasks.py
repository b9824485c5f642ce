"""Loads and decodes rows in child processes of this one, for small jobs without Ray.

A cover or a library that crashes a child does not crash this process: the child is replaced, as
Ray replaces a worker.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from covergenre.data.image_decoding import Preprocessing
from covergenre.data.plan import Plan
from covergenre.errors import CovergenreError
from covergenre.inference import batches
from covergenre.inference.batches import Loaded
from covergenre.inference.loader import BATCHES_AHEAD, WorkerCrashedError

_ATTEMPTS = 3
"""Of a task whose children crash before its first batch; as with Ray."""

# -P: nothing is imported from the current directory. This package by its path, as it may not be
# installed.
_SERVE = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location(
    "covergenre", {directory!r} + "/__init__.py", submodule_search_locations=[{directory!r}]
)
sys.modules["covergenre"] = module = module_from_spec(spec)
spec.loader.exec_module(module)
from covergenre.inference import local_tasks
local_tasks.serve()
"""

Request = tuple[int, int, int]
"""(first row, row after the last one, batch size)"""


class LocalTasks:
    """See loader.Tasks. Runs one task at a time in each of its children."""

    def __init__(self, plan: Plan, spec: Preprocessing, count: int) -> None:
        """count: children, which are started here."""
        self._requests: queue.SimpleQueue[tuple[Request, _Results] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        children = [_Child(plan, spec) for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._run, args=(child,), daemon=True) for child in children
        ]
        for thread in self._threads:
            thread.start()

    def start(self, start: int, stop: int, batch_size: int) -> Iterator[Loaded]:
        """Start a task; returns its batches."""
        results = _Results(self._closed)
        self._requests.put(((start, stop, batch_size), results))
        return results.received()

    def close(self) -> None:
        """Kill the children."""
        self._closed.set()
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, child: "_Child") -> None:
        """Of a thread, for one child."""
        try:
            while (task := self._requests.get()) is not None and not self._closed.is_set():
                request, results = task
                results.put(_end_of(child, request, results))
        finally:
            child.kill()


class _Results:
    """What a task has loaded so far; a few batches at most."""

    def __init__(self, closed: threading.Event) -> None:
        self._queue: queue.Queue[Loaded | Exception | None] = queue.Queue(BATCHES_AHEAD)
        self._closed = closed

    def put(self, value: Loaded | Exception | None) -> None:
        """A batch; or the end: None, or why it came early."""
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(value, timeout=0.1)
                return

    def received(self) -> Iterator[Loaded]:
        """The batches. Raises the exception at their end."""
        while (value := self._queue.get()) is not None:
            if isinstance(value, Exception):
                raise value
            yield value


def _end_of(child: "_Child", request: Request, results: _Results) -> Exception | None:
    """Run a task; returns its exception."""
    for _ in range(_ATTEMPTS):
        any_loaded = False
        try:
            for loaded in child.load(request):
                results.put(loaded)
                any_loaded = True
        except (EOFError, OSError):  # the child crashed
            child.restart()
            if any_loaded:
                break
        except Exception as error:
            return error
        else:
            return None
    return WorkerCrashedError()


class _Child:
    """A child process, and the connection to it."""

    def __init__(self, plan: Plan, spec: Preprocessing) -> None:
        self._arguments = plan, spec
        self._start()

    def _start(self) -> None:
        code = _SERVE.format(directory=str(Path(__file__).resolve().parents[1]))
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code], stdin=theirs.fileno(), stdout=subprocess.DEVNULL
            )
        self._connection = Connection(ours.detach())
        self._connection.send(self._arguments)

    def load(self, request: Request) -> Iterator[Loaded]:
        """Raises EOFError or OSError when the child crashes, and what it raised."""
        self._connection.send(request)
        while (answer := self._connection.recv()) is not None:
            if isinstance(answer, Exception):
                raise answer
            outcomes, pixels = answer
            yield batches.from_stream(outcomes), pixels

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def restart(self) -> None:
        self.kill()
        self._start()


def serve() -> None:
    """Run by a child: its standard input is the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends the child
    connection: Any = Connection(os.dup(0))
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        plan, spec = connection.recv()
        while True:
            _answer(connection, plan, spec, connection.recv())


def _answer(connection: Any, plan: Plan, spec: Preprocessing, request: Request) -> None:
    start, stop, batch_size = request
    try:
        for outcomes, pixels in batches.load(plan, start, stop, spec, batch_size):
            connection.send((batches.to_stream(outcomes), pixels))
        connection.send(None)
    except MemoryError:  # as a crash: perhaps of these rows only
        os._exit(1)
    except CovergenreError as error:
        connection.send(error)
    except Exception as error:
        connection.send(RuntimeError("".join(traceback.format_exception(error))))
