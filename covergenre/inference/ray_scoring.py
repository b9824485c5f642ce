"""Scores output parts on the cluster: actors load, score and write; this process counts.

No row passes through this process. It gives each actor a few parts at a time, and gets a report
twice a second: how many rows are scored, and which parts are written.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from covergenre.cluster.ray_runtime import silence_ray_loggers, unwrap_ray_errors
from covergenre.cluster.workers import Workers, use_cores
from covergenre.data.plan import Plan
from covergenre.errors import CovergenreError
from covergenre.inference.batches import Ranges
from covergenre.inference.loader import Loader, rows_per_task
from covergenre.inference.ray_tasks import RayTasks
from covergenre.inference.scorer import Report, Scorer, Write
from covergenre.models.bundle import Bundle

logger = logging.getLogger(__name__)

_MAX_PARTS = 64
"""Parts that an actor gets at a time; fewer near the end, so that all end together."""
_MAX_CRASHES = 3
"""Crashes of actors on the same part, or of one and its replacements while they started."""


class ScoringActor:
    """A Ray actor with a model."""

    def __init__(self, plan: Plan, bundle: Bundle, batch_size: int, workers: Workers) -> None:
        self._plan, self._bundle, self._batch_size = plan, bundle, batch_size
        self._workers = workers

    def start(self) -> None:
        """Load the model; apart from __init__, whose errors Ray reports as a crash."""
        silence_ray_loggers()
        use_cores(self._workers)
        device = "cuda" if self._workers.use_gpu else "cpu"
        self._scorer = Scorer(self._bundle, device, self._batch_size)

    def score(self, ranges: Ranges, write: Write) -> Iterator[Report]:
        """Score and write parts; a report twice a second."""
        report = Report()
        spec = self._bundle.preprocessing
        loader = Loader(
            self._plan,
            spec,
            self._batch_size,
            RayTasks(self._plan, spec),
            report.messages.append,
        )
        task_rows = rows_per_task(self._plan, ranges, self._batch_size)
        ahead = _tasks_ahead(self._workers, task_rows * 3 * spec.side**2)
        stops = dict(ranges[:, [0, 2]].tolist())
        yield from self._scorer.score(loader.batches(ranges, ahead), stops, write, report)


def _tasks_ahead(workers: Workers, task_bytes: int) -> int:
    """Loading tasks that one of `workers` runs at a time: its share of the cluster's CPUs, as far
    as their pixels fit half of its share of the object store."""
    import ray

    has = ray.cluster_resources()
    cpus = (has.get("CPU", 1) - workers.count * workers.cpus) / workers.count
    memory = has.get("object_store_memory", 0) / 2 / workers.count
    return max(1, int(min(cpus + 1, memory / task_bytes)))


@dataclass
class _Actor:
    handle: Any
    waits_for: Any
    """ObjectRef of its start, or generator of its reports."""
    failed_starts: int = 0
    """In a row, of it and the actors that it replaces."""
    started: bool = False
    ranges: dict[int, list[int]] = field(default_factory=dict)
    """The parts that it has and has not written yet."""


def score_parts(
    plan: Plan,
    ranges: Ranges,
    bundle: Bundle,
    write: Write,
    *,
    batch_size: int,
    workers: Workers,
) -> Iterator[Report]:
    """Score ranges of rows of `plan` on the cluster and write each as an output part.

    ranges: int64 [n, 3] of (output part, first row, row after the last one). `write` is called in
    the actors. Yields reports; each part is in one of them.

    Crashed actors are replaced, and parts that were not written are scored again. Rows whose
    loading crashes workers repeatedly are tried again in smaller batches, in the end alone; a row
    whose workers crash then is a poison row, and is rejected.
    """
    import ray

    waiting = deque(ranges.tolist())
    crashes: Counter[int] = Counter()
    actors: list[_Actor] = []

    def new_actor(failed_starts: int = 0) -> _Actor:
        handle: Any = (
            ray.remote(ScoringActor)
            .options(num_cpus=workers.cpus, num_gpus=workers.resources.get("GPU", 0))
            .remote(plan_reference, bundle, batch_size, workers)
        )
        return _Actor(handle, handle.start.remote(), failed_starts)

    plan_reference = ray.put(plan)
    try:
        actors = [new_actor() for _ in range(min(workers.count, len(ranges)))]
        while waiting or any(actor.ranges for actor in actors):
            ready, _ = ray.wait([actor.waits_for for actor in actors], num_returns=1)
            (actor,) = (actor for actor in actors if actor.waits_for is ready[0])
            try:
                with unwrap_ray_errors():
                    report = _next_report(actor)
            except ray.exceptions.RayActorError as error:
                ray.kill(actor.handle)  # it may be only disconnected
                _count_crash(crashes, actor, error)
                logger.warning("a worker crashed: another one is started")
                waiting.extendleft(reversed(actor.ranges.values()))
                actors[actors.index(actor)] = new_actor(actor.failed_starts)
                continue
            if report is not None:
                for part, _ in report.parts:
                    del actor.ranges[part]
                for message in report.messages:
                    logger.warning(message)
                yield report
                continue
            assert not actor.ranges  # all of them were reported
            actor.started, actor.failed_starts = True, 0
            # All at once for one; else half of what is left, so that all end together.
            shares = workers.count if workers.count == 1 else 2 * workers.count
            count = min(_MAX_PARTS, -(-len(waiting) // shares))
            taken = [waiting.popleft() for _ in range(count)]
            if not taken:
                actors.remove(actor)
                ray.kill(actor.handle)
                continue
            actor.ranges = {part: [part, start, stop] for part, start, stop in taken}
            score = actor.handle.score.options(num_returns="streaming")
            actor.waits_for = score.remote(np.array(taken, np.int64), write)
    finally:
        for actor in actors:
            ray.kill(actor.handle)


def _count_crash(crashes: Counter[int], actor: _Actor, error: Exception) -> None:
    """Raises CovergenreError where crashes are repeated: another actor would crash, too."""
    part = next(iter(actor.ranges), None)
    if part is not None:
        crashes[part] += 1
    elif not actor.started:
        actor.failed_starts += 1
    if _MAX_CRASHES in (actor.failed_starts, crashes[part] if part is not None else 0):
        when = "while they started" if part is None else f"on output part {part}"
        raise CovergenreError(
            f"workers crashed {_MAX_CRASHES} times in a row {when}; run the same command again"
            " with --verbose to see the reason; it resumes the run",
            code="workers_crash",
        ) from error


def _next_report(actor: _Actor) -> Report | None:
    """The next report of an actor; None where it has none now and waits for parts."""
    import ray

    if isinstance(actor.waits_for, ray.ObjectRef):
        ray.get(actor.waits_for)
        return None
    try:
        reference = next(actor.waits_for)
    except StopIteration:
        return None
    report: Report = ray.get(reference)
    return report
