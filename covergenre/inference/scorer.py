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
from covergenre.inference.batches import Batch
from covergenre.models.bundle import Bundle, load_model
from covergenre.models.predictor import Predictor, to_device

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
    messages: list[str] = field(default_factory=list)
    """Lines for the user."""

    def take(self) -> "Report":
        """A copy; this one begins anew."""
        taken = Report(self.rows, self.parts, self.messages[:])
        self.rows, self.parts = 0, []
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


class Scorer:
    """A model on a device."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        model = to_device(load_model(bundle), device)
        self._predictor = Predictor(model, bundle.preprocessing, device, bundle.precision)
        self._genres = len(bundle.genres)

    def score(
        self, batches: Iterable[Batch], stops: dict[int, int], write: Write, report: Report
    ) -> Iterator[Report]:
        """Score batches in order of row, and write each part.

        stops: output part -> the row after its last one. report: one that others may add messages
        to. Yields a report at times, and one at the end.
        """
        outcomes: list[pa.Table] = []
        scores: list[NDArray[np.float32]] = []
        writing: deque[tuple[int, Future[dict[str, int]]]] = deque()
        reported = time.monotonic()
        with ThreadPoolExecutor(1) as writer, _cancelled_on_error(writer):
            for batch in batches:
                outcomes.append(batch.outcomes)
                scores.append(self._scores(batch.pixels))
                report.rows += batch.outcomes.num_rows
                if batch.stop == stops[batch.part]:
                    table, values = pa.concat_tables(outcomes), np.concatenate(scores)
                    writing.append((batch.part, writer.submit(write, batch.part, table, values)))
                    outcomes, scores = [], []
                while writing and (len(writing) > _WRITES_AHEAD or writing[0][1].done()):
                    part, counts = writing.popleft()
                    report.parts.append((part, counts.result()))
                if time.monotonic() - reported > _REPORT_SECONDS:
                    yield report.take()
                    reported = time.monotonic()
            for part, counts in writing:
                report.parts.append((part, counts.result()))
        yield report.take()

    def _scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        if not len(pixels):
            return np.empty((0, self._genres), np.float32)
        try:
            return self._predictor(pixels)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                "a batch does not fit in GPU memory; use a lower --batch-size",
                code="gpu_memory",
            ) from error
