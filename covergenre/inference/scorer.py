"""Scores batches. A thread writes each complete output part while the next one is scored."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre.errors import DeviceMemoryError
from covergenre.inference.batches import Batch, Seconds, add_seconds
from covergenre.models.bundle import Bundle

Write = Callable[[int, pa.Table, NDArray[np.float32]], dict[str, int]]
"""(output part, outcomes, scores of the rows with a cover_sha256) -> counts; writes the part."""

_REPORT_SECONDS = 0.5
_WRITES_AHEAD = 2


@dataclass
class Report:
    """What was done since the last report: counts only, no rows."""

    rows: int = 0
    parts: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    """Output parts that were written, and what `write` returned for each."""
    seconds: Seconds = field(default_factory=dict)
    """What took how long; see bottleneck.py."""
    messages: list[str] = field(default_factory=list)
    """Lines for the user."""

    def take(self) -> "Report":
        """A copy; this one begins anew."""
        taken = Report(self.rows, self.parts, self.seconds, self.messages[:])
        self.rows, self.parts, self.seconds = 0, [], {}
        self.messages.clear()  # others hold a reference to this list
        return taken


@contextlib.contextmanager
def _cancelled_on_error(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Only what runs already is waited for when the body fails or is interrupted."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


_Written = tuple[dict[str, int], float]
"""(counts of an output part, seconds)"""


def _timed(write: Write, part: int, outcomes: pa.Table, scores: NDArray[np.float32]) -> _Written:
    began = time.perf_counter()
    counts = write(part, outcomes, scores)
    return counts, time.perf_counter() - began


def _add_written(report: Report, part: int, written: Future[_Written]) -> None:
    counts, seconds = written.result()
    report.parts.append((part, counts))
    add_seconds(report.seconds, {"write": seconds})


class Scorer:
    """A model on a device."""

    def __init__(self, bundle: Bundle, device: str, batch_size: int) -> None:
        from covergenre.models.inference import load_for_inference

        self._model = load_for_inference(bundle, device)
        self._batch_size = batch_size
        self._genres = len(bundle.genres)
        self._has_started = False

    def score(
        self, batches: Iterable[Batch], stops: dict[int, int], write: Write, report: Report
    ) -> Iterator[Report]:
        """Score batches in order of row, and write each part.

        stops: output part -> the row after its last one. report: one that others may add messages
        to. Yields a report at times, and one at the end.
        """
        outcomes: list[pa.Table] = []
        scores: list[NDArray[np.float32]] = []
        writing: deque[tuple[int, Future[_Written]]] = deque()
        reported = time.monotonic()
        with ThreadPoolExecutor(1) as writer, _cancelled_on_error(writer):
            for batch in self._waited_for(batches, report):
                outcomes.append(batch.outcomes)
                began = time.perf_counter()
                scores.append(self._scores(batch.pixels))
                add_seconds(report.seconds, batch.seconds | {"model": time.perf_counter() - began})
                report.rows += batch.outcomes.num_rows
                if batch.stop == stops[batch.part]:
                    table, values = pa.concat_tables(outcomes), np.concatenate(scores)
                    writes = writer.submit(_timed, write, batch.part, table, values)
                    writing.append((batch.part, writes))
                    outcomes, scores = [], []
                began = time.perf_counter()
                while writing and (len(writing) > _WRITES_AHEAD or writing[0][1].done()):
                    _add_written(report, *writing.popleft())
                add_seconds(report.seconds, {"write_wait": time.perf_counter() - began})
                if time.monotonic() - reported > _REPORT_SECONDS:
                    yield report.take()
                    reported = time.monotonic()
            for part, written in writing:
                _add_written(report, part, written)
        yield report.take()

    def _waited_for(self, batches: Iterable[Batch], report: Report) -> Iterator[Batch]:
        """The batches; how long each was waited for is added to the report, but not the start of
        the processes that load them."""
        began = time.perf_counter()
        for batch in batches:
            if self._has_started:
                add_seconds(report.seconds, {"wait": time.perf_counter() - began})
            self._has_started = True
            yield batch
            began = time.perf_counter()

    def _scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        if not len(pixels):
            return np.empty((0, self._genres), np.float32)
        try:
            return self._model.scores(pixels, self._batch_size)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                "a batch does not fit in GPU memory; use a lower --batch-size",
                code="gpu_memory",
            ) from error
