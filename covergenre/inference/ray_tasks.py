"""Loads and decodes rows in Ray tasks."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covergenre.data.image_decoding import Preprocessing
from covergenre.data.plan import Plan
from covergenre.inference import batches
from covergenre.inference.batches import Loaded, Seconds
from covergenre.inference.loader import WorkerCrashedError

_MAX_RETRIES = 2
"""Of a task whose worker crashed."""


class RayTasks:
    """See loader.Tasks."""

    def __init__(self, plan: Plan, spec: Preprocessing) -> None:
        import ray

        self._arguments = ray.put(plan), spec
        self._load: Any = ray.remote(_load).options(
            num_cpus=1,
            num_returns="streaming",
            max_retries=_MAX_RETRIES,
        )

    def start(self, start: int, stop: int, batch_size: int) -> Iterator[Loaded]:
        """Start a task; returns its batches."""
        plan, spec = self._arguments
        return _received(self._load.remote(plan, start, stop, spec, batch_size))


def _received(task: Any) -> Iterator[Loaded]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        for reference in task:
            began = time.perf_counter()
            stream, pixels, seconds = ray.get(reference)
            outcomes = batches.from_stream(stream)
            yield Loaded(outcomes, pixels, seconds | {"transfer": time.perf_counter() - began})
    except RayTaskError as error:
        # As a crash: perhaps of these rows only, and the others can be scored.
        if isinstance(error.cause, MemoryError):
            raise WorkerCrashedError from error
        raise
    except RayError as error:  # of a worker, its machine, or the memory of that
        raise WorkerCrashedError from error


def _load(
    plan: Plan, start: int, stop: int, spec: Preprocessing, batch_size: int
) -> Iterator[tuple[bytes, NDArray[np.uint8], Seconds]]:
    """The task."""
    for outcomes, pixels, seconds in batches.load(plan, start, stop, spec, batch_size):
        yield batches.to_stream(outcomes), pixels, seconds
