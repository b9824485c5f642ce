"""Progress of long calls: events for callbacks, and a progress bar or log lines if enabled.

Nothing is shown unless enabled by `reporting(True)`, as in the command line.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 15.0


@dataclass(frozen=True)
class ProgressEvent:
    """Passed to callbacks whenever items are done, and at the end of each epoch."""

    task: str
    """"prepare", "train", "evaluate", "score" or "catalog" (reading it)."""
    done: int
    total: int | None
    """None if it is not known yet."""
    unit: str
    """"covers" or "rows"."""
    rate: float
    """Units per second."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """At the end of a training epoch: its metrics. Empty in all other events."""


Callback = Callable[[ProgressEvent], object]

_show: ContextVar[bool] = ContextVar("covergenre_show_progress", default=False)
_callbacks: ContextVar[tuple[Callback, ...]] = ContextVar("covergenre_callbacks", default=())


@contextlib.contextmanager
def reporting(progress: bool | None, callbacks: Iterable[Callback] = ()) -> Iterator[None]:
    """Settings of every Progress that is created in the `with` block, on this thread.

    progress: True shows a bar on a terminal or in a notebook, and otherwise logs a line every 15
    seconds; False shows nothing; None keeps the setting of the outer block (default: False).
    callbacks: added to those of the outer blocks.
    """
    show = _show.set(_show.get() if progress is None else progress)
    added = _callbacks.set((*_callbacks.get(), *callbacks))
    try:
        yield
    finally:
        _show.reset(show)
        _callbacks.reset(added)


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write the log messages of covergenre to stderr: for programs, as a library must not."""
    package = logging.getLogger("covergenre")
    handler = _StderrHandler()
    level, propagate = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        package.propagate = propagate


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()
        else:
            print(line, file=sys.stderr, flush=True)


class Progress:
    """Counts items towards `total`, and reports the count, the rate and the time left."""

    def __init__(self, task: str, total: int | None, unit: str) -> None:
        self._task, self._total, self._unit = task, total, unit
        self._done = self._not_timed = 0
        self._started = self._logged = 0.0
        self._show, self._callbacks = _show.get(), _callbacks.get()
        self._bar = None
        if self._show and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=total, desc=task, unit=unit, leave=False, dynamic_ncols=True, smoothing=0.1
            )

    def advance(self, count: int, note: str = "") -> None:
        """Report that `count` more items are done."""
        if not self._started:
            # The rate excludes the time to start, until the first items are done.
            self._started = self._logged = time.monotonic()
            self._not_timed = count
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._show and time.monotonic() - self._logged >= _LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            self._log(note)
        self._call({})

    def update_to(self, done: int, note: str = "") -> None:
        """Report that `done` items are done in total. It decreases if work was lost."""
        if done < self._done or not self._started:
            # The rate excludes the items of an earlier run, and those that are processed again.
            self._not_timed += done - self._done
            if not self._started:
                self._started = self._logged = time.monotonic()
        if self._bar is not None and done < self._done:
            self._bar.reset(self._total)
            self._bar.update(done)
            self._done = done
        self.advance(done - self._done, note)

    def epoch_ended(self, metrics: Mapping[str, Any]) -> None:
        """Pass an epoch's metrics to the callbacks."""
        self._call(metrics)

    @property
    def rate(self) -> float:
        """Items per second since the first items were done; 0 before."""
        seconds = time.monotonic() - self._started
        return (self._done - self._not_timed) / seconds if self._started else 0.0

    def _log(self, note: str) -> None:
        rate = self.rate
        left = ""
        if self._total is not None and rate > 0:
            left = f", {(self._total - self._done) / rate:,.0f} s left"
        of = f" of {self._total:,}" if self._total is not None else ""
        note = f", {note}" if note else ""
        logger.info(f"{self._task}: {self._done:,}{of} {self._unit}, {rate:,.1f}/s{left}{note}")

    def _call(self, metrics: Mapping[str, Any]) -> None:
        event = ProgressEvent(
            self._task, self._done, self._total, self._unit, self.rate, dict(metrics)
        )
        for callback in self._callbacks:
            callback(event)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
