"""Loads and decodes rows in Ray tasks, in order, some tasks ahead of the model that takes them."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre.data import dataset
from covergenre.data.image_decoding import Preprocessing
from covergenre.data.plan import Plan
from covergenre.errors import CovergenreError
from covergenre.inference import batches
from covergenre.inference.batches import Batch, Ranges, split_ranges

TASK_ROWS = dataset.ROW_GROUP_ROWS
"""Rows that one task loads: a row group of a dataset. Where the covers are in Parquet files of a
catalog, whose row groups may be larger, a task loads a whole output part."""
_MAX_RETRIES = 2
"""Of a task whose worker crashed."""
_MAX_POISON_ROWS = 100
"""Rows in a row whose workers crash, after which the rows are not to blame."""
BATCHES_AHEAD = 2
"""Batches of a task in the object store before it waits for the model."""

Loaded = tuple[bytes, NDArray[np.uint8]]
"""(outcomes as an Arrow stream, pixels)"""


class TaskLoader:
    """Batches of rows of a plan, loaded by tasks on the cluster."""

    def __init__(
        self,
        plan: Plan,
        spec: Preprocessing,
        batch_size: int,
        *,
        tasks: int,
        warn: Callable[[str], None],
    ) -> None:
        """tasks: how many run or wait at a time. warn: takes a line for the user."""
        import ray

        self._plan, self._spec, self._batch_size = plan, spec, batch_size
        self._max_tasks, self._warn = tasks, warn
        in_files = bool(plan.source.files) and not plan.source.prepared
        self._task_rows = None if in_files else -(-TASK_ROWS // batch_size) * batch_size
        self._poison_rows = 0
        self._arguments = ray.put(plan), spec
        self._load = ray.remote(_load).options(
            num_cpus=1,
            num_returns="streaming",
            max_retries=_MAX_RETRIES,
            _generator_backpressure_num_objects=BATCHES_AHEAD,
        )

    def batches(self, ranges: Ranges) -> Iterator[Batch]:
        """The rows of `ranges`, in order. A batch ends where its range ends."""
        if self._task_rows is not None:
            ranges = split_ranges(ranges, self._task_rows)
        waiting = deque(ranges.tolist())
        running: deque[tuple[int, int, int, Any]] = deque()
        while waiting or running:
            while waiting and len(running) < self._max_tasks:
                part, start, stop = waiting.popleft()
                running.append((part, start, stop, self._start(start, stop, self._batch_size)))
            part, start, stop, task = running.popleft()
            for outcomes, pixels in self._results(task, start, stop):
                start += outcomes.num_rows
                yield Batch(part, start, outcomes, pixels)

    def _start(self, start: int, stop: int, batch_size: int) -> Any:
        plan, spec = self._arguments
        return self._load.remote(plan, start, stop, spec, batch_size)

    def _results(self, task: Any, start: int, stop: int) -> Iterator[tuple[pa.Table, Any]]:
        """The batches of a task. Where its worker crashes, the rest is loaded batch by batch."""
        try:
            for outcomes, pixels in _received(task):
                yield outcomes, pixels
                start += outcomes.num_rows
        except _WorkerCrashedError:
            rows = stop - start
            self._warn(f"a worker crashed on {rows:,} rows; trying them in smaller batches")
            for at in range(start, stop, self._batch_size):
                yield self._batch(at, min(at + self._batch_size, stop))

    def _batch(self, start: int, stop: int) -> tuple[pa.Table, NDArray[np.uint8]]:
        """A batch in a task of its own, or row by row if that crashes, too."""
        try:
            ((outcomes, pixels),) = _received(self._start(start, stop, self._batch_size))
        except _WorkerCrashedError:
            tables, images = zip(*map(self._row, range(start, stop)), strict=True)
            return pa.concat_tables(tables), np.concatenate(images)
        return outcomes, pixels

    def _row(self, row: int) -> tuple[pa.Table, NDArray[np.uint8]]:
        try:
            ((outcomes, pixels),) = _received(self._start(row, row + 1, 1))
        except _WorkerCrashedError:
            self._poison_rows += 1
            if self._poison_rows == _MAX_POISON_ROWS:
                raise CovergenreError(
                    "all workers crash, whatever rows they are given; run the same command again"
                    " with --verbose to see the reason; it resumes the run",
                    code="workers_crash",
                ) from None
            return batches.poison_row(self._plan, row, self._spec)
        self._poison_rows = 0
        return outcomes, pixels


class _WorkerCrashedError(Exception):
    """The worker of a task crashed, each time it was tried."""


def _received(task: Any) -> Iterator[tuple[pa.Table, NDArray[np.uint8]]]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        for reference in task:
            outcomes, pixels = ray.get(reference)
            yield pa.ipc.open_stream(outcomes).read_all(), pixels
    except RayTaskError as error:
        # As a crash: perhaps of these rows only, and the others can be scored.
        if isinstance(error.cause, MemoryError):
            raise _WorkerCrashedError from error
        raise
    except RayError as error:  # of a worker, its machine, or the memory of that
        raise _WorkerCrashedError from error


def _load(
    plan: Plan, start: int, stop: int, spec: Preprocessing, batch_size: int
) -> Iterator[Loaded]:
    """The task."""
    for outcomes, pixels in batches.load(plan, start, stop, spec, batch_size):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, outcomes.schema) as writer:
            writer.write_table(outcomes)
        yield bytes(sink.getvalue()), pixels
