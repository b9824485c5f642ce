"""Batches of rows of a plan, in order, loaded some tasks ahead of the model that takes them."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import pyarrow as pa

from covergenre.data import dataset
from covergenre.data.image_decoding import Preprocessing
from covergenre.data.plan import Plan
from covergenre.errors import CovergenreError
from covergenre.inference import batches
from covergenre.inference.batches import Batch, Loaded, Ranges, split_ranges

TASK_ROWS = dataset.ROW_GROUP_ROWS
"""Rows that one task loads: a row group of a dataset. Where the covers are in Parquet files of a
catalog, whose row groups may be larger, a task loads a whole output part."""
_MAX_POISON_ROWS = 100
"""Successive rows whose workers crash, after which the rows are not to blame."""


class WorkerCrashedError(Exception):
    """The worker of a task crashed, each time it was tried."""


class Tasks(Protocol):
    """Runs `batches.load` elsewhere: in Ray tasks, or in processes of this machine.

    A task does not wait until its batches are taken: those that are ahead of the model would keep
    all processes, and the loader waits for another one when a worker crashed.
    """

    def start(self, start: int, stop: int, batch_size: int) -> Iterator[Loaded]:
        """Start a task; returns its batches, which raise WorkerCrashedError when its worker
        crashes."""


def rows_per_task(plan: Plan, ranges: Ranges, batch_size: int) -> int:
    """The most rows that a task loads, whole batches."""
    if plan.source.files and not plan.source.prepared:
        return int((ranges[:, 2] - ranges[:, 1]).max())
    return -(-TASK_ROWS // batch_size) * batch_size


class Loader:
    """Batches of rows of a plan."""

    def __init__(
        self,
        plan: Plan,
        spec: Preprocessing,
        batch_size: int,
        tasks: Tasks,
        warn: Callable[[str], None],
    ) -> None:
        """warn: takes a line for the user."""
        self._plan, self._spec, self._batch_size = plan, spec, batch_size
        self._tasks, self._warn = tasks, warn
        self._poison_rows = 0

    def batches(self, ranges: Ranges, ahead: int) -> Iterator[Batch]:
        """The rows of `ranges`, in order. A batch ends where its range ends.

        ahead: how many tasks run at a time, or have batches that the model has not taken yet.
        """
        task_rows = rows_per_task(self._plan, ranges, self._batch_size)
        waiting = deque(split_ranges(ranges, task_rows).tolist())
        running: deque[tuple[int, int, int, Iterator[Loaded]]] = deque()
        while waiting or running:
            while waiting and len(running) < ahead:
                part, start, stop = waiting.popleft()
                task = self._tasks.start(start, stop, self._batch_size)
                running.append((part, start, stop, task))
            part, start, stop, task = running.popleft()
            for outcomes, pixels, seconds in self._results(task, start, stop):
                start += outcomes.num_rows
                yield Batch(part, start, outcomes, pixels, seconds)

    def _results(self, task: Iterator[Loaded], start: int, stop: int) -> Iterator[Loaded]:
        """The batches of a task. Where its worker crashes, the rest is loaded batch by batch."""
        try:
            for loaded in task:
                self._poison_rows = 0
                yield loaded
                start += loaded.outcomes.num_rows
            if start < stop:  # it ended early
                raise WorkerCrashedError
        except WorkerCrashedError:
            if rows := stop - start:
                self._warn(f"a worker crashed on {rows:,} rows; trying them in smaller batches")
            for at in range(start, stop, self._batch_size):
                yield self._batch(at, min(at + self._batch_size, stop))

    def _batch(self, start: int, stop: int) -> Loaded:
        """A batch, loaded in a separate task, or row by row if that task also crashes."""
        try:
            (loaded,) = self._tasks.start(start, stop, self._batch_size)
        except WorkerCrashedError:
            tables, images, _ = zip(*map(self._row, range(start, stop)), strict=True)
            return Loaded(pa.concat_tables(tables), np.concatenate(images), {})
        return loaded

    def _row(self, row: int) -> Loaded:
        try:
            (loaded,) = self._tasks.start(row, row + 1, 1)
        except WorkerCrashedError:
            self._poison_rows += 1
            if self._poison_rows == _MAX_POISON_ROWS:
                raise CovergenreError(
                    "all workers crash, whatever rows they are given; run the same command again"
                    " with --verbose to see the reason; it resumes the run",
                    code="workers_crash",
                ) from None
            return batches.poison_row(self._plan, row, self._spec)
        self._poison_rows = 0
        return loaded
