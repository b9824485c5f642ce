"""Workers, the processes that hold a model: how many fit the cluster, with which resources."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from covergenre.cluster import autoscaling
from covergenre.errors import ConfigError
from covergenre.formatting import plural
from covergenre.polling import polling

logger = logging.getLogger(__name__)

_MAX_DEFAULT_GPUS = 64
"""GPUs that are used without --workers; an autoscaler may have no limit."""
POLL_SECONDS = 15.0
"""Between checks of the resources of the cluster."""


@dataclass(frozen=True)
class Workers:
    """Number and resources of the workers."""

    count: int
    use_gpu: bool
    cpus: float
    """CPUs that Ray reserves for each worker."""
    per_node: int
    """The largest number of workers that share the cores of a machine."""

    @property
    def resources(self) -> dict[str, float]:
        """Resources of each worker, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.use_gpu else {})}

    @property
    def required_resource(self) -> tuple[str, float]:
        """("GPU" or "CPU", how many of them all workers need together)"""
        kind = "GPU" if self.use_gpu else "CPU"
        return kind, self.count * self.resources[kind]


def choose_workers(
    workers: int | tuple[int, int] | None,
    device: str,
    cpus_per_worker: float,
    *,
    reading: float = 0.0,
) -> Workers:
    """The workers for these settings. Raises ConfigError (code "too_many_workers") if the cluster
    is too small.

    workers: their number; (minimum, maximum): as many as can be scheduled now, but not fewer than
    the minimum; None: one per GPU, or one on CPU.
    reading: CPUs that the reading tasks of each worker occupy permanently. In addition, one CPU is
    kept free to decode covers.
    """
    import ray

    low, high = workers if isinstance(workers, tuple) else (workers, workers)
    max_cpus = autoscaling.max_resources("CPU")
    each = cpus_per_worker + reading
    nodes = max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
    max_gpus = int(autoscaling.max_resources("GPU"))
    use_gpu = device == "gpu" or (device == "auto" and max_gpus > 0)
    if use_gpu:
        low = low or min(max(1, max_gpus), _MAX_DEFAULT_GPUS)
        if low > max_gpus:
            raise ConfigError(
                f"--workers {low}: needs {plural(low, 'GPU')} (1 per worker), but the cluster has"
                f" at most {max_gpus}; use fewer workers, or --device cpu",
                code="too_many_workers",
            )
        _check_cpus(low, each, max_cpus)
        count = max(low, min(high or low, int(ray.cluster_resources().get("GPU", 0))))
        return Workers(count, True, cpus_per_worker, -(-count // nodes))
    low = low or 1
    _check_cpus(low, each, max_cpus)
    fitting = int((float(ray.cluster_resources().get("CPU", 0)) - 1) / each)
    count = max(low, min(high or low, fitting))
    return Workers(count, False, cpus_per_worker, -(-count // nodes))


def _check_cpus(workers: int, each: float, max_cpus: float) -> None:
    if workers * each > max_cpus - 1:
        raise ConfigError(
            f"--workers {workers}: needs {workers * each + 1:g} CPUs ({each:g} per worker, plus 1"
            f" to decode covers), but the cluster has at most {max_cpus:g}; use fewer workers, or a"
            " lower --cpus-per-worker",
            code="too_many_workers",
        )


def check_task_limit(workers: int | None) -> None:
    """Raises ConfigError if the cluster can never run this many one-CPU tasks in parallel."""
    if workers and workers > (max_cpus := autoscaling.max_resources("CPU")):
        raise ConfigError(
            f"--workers {workers}: needs {plural(workers, 'CPU')} (1 per worker), but the cluster"
            f" has at most {max_cpus:g}; use fewer workers",
            code="too_many_workers",
        )


def node_count() -> int:
    """Machines of the cluster; at least 2 where an autoscaler may start more."""
    import ray

    now = sum(bool(node["Alive"]) for node in ray.nodes())
    has = ray.cluster_resources()
    grows = any(autoscaling.max_resources(kind) > has.get(kind, 0.0) for kind in ("CPU", "GPU"))
    return max(now, 2 if grows else 1)


@contextlib.contextmanager
def log_pending_resources(kind: str, need: float) -> Iterator[None]:
    """While the body runs and the cluster has fewer than `need` of `kind` ("CPU" or "GPU"), log it
    every 15 seconds: the autoscaler has not started all machines yet."""
    import ray

    def available() -> bool:
        have = ray.cluster_resources().get(kind, 0.0)
        if have < need:
            needed = plural(need, f"{kind} is", f"{kind}s are")
            logger.info(f"waiting for machines: {needed} needed, {have:g} available")
        return bool(have >= need)

    # Checked here first, so that the first line is logged at once.
    with contextlib.nullcontext() if available() else polling(available, POLL_SECONDS):
        yield


def use_cores(workers: Workers) -> None:
    """Let torch in this worker use its share of the machine's cores.

    Ray would limit it to the reserved CPUs, which are few, to leave some for decoding.
    """
    import torch

    torch.set_num_threads(max(1, available_cores() // workers.per_node))


def available_cores() -> int:
    """Cores that this process may use; in a container often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
