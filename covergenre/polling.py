"""Calls a function regularly on a thread."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def polling(function: Callable[[], bool], seconds: float) -> Iterator[None]:
    """While the body runs, call `function` every `seconds` on a thread, until it returns True."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(seconds) and not function():
            pass

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
