"""Scores output parts in this process: small jobs on one machine are done before Ray has started.

The same loading, model and writing as in the actors of a cluster.
"""

import logging
import os
import sys
from collections.abc import Iterator

from covergenre.cluster.workers import available_cores
from covergenre.data.plan import Plan
from covergenre.errors import ConfigError
from covergenre.inference.batches import Ranges, split_ranges
from covergenre.inference.loader import Loader, rows_per_task
from covergenre.inference.local_tasks import LocalTasks
from covergenre.inference.scorer import Report, Scorer, Write
from covergenre.models.bundle import Bundle

logger = logging.getLogger(__name__)

MAX_ROWS = 20_000
"""Rows of a small job."""
_BYTES_AHEAD = 2**30
"""Of pixels that wait for the model; a single task may have more."""


def is_small_job(rows: int, workers: int | None) -> bool:
    """Whether to score `rows` rows here: no cluster is configured, this process has no Ray, and no
    number of workers is given."""
    has_ray = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    address = os.environ.get("RAY_ADDRESS", "")
    return rows <= MAX_ROWS and workers is None and not has_ray and address in ("", "local")


def score_parts_locally(
    plan: Plan, ranges: Ranges, bundle: Bundle, write: Write, *, batch_size: int, device: str
) -> Iterator[Report]:
    """As score_parts, on this process's device. device: "auto", "cpu" or "gpu"."""
    spec = bundle.preprocessing
    task_rows = rows_per_task(plan, ranges, batch_size)
    processes = min(available_cores(), len(split_ranges(ranges, task_rows)))
    ahead = max(1, min(processes + 1, _BYTES_AHEAD // (task_rows * 3 * spec.side**2)))
    tasks = LocalTasks(plan, spec, processes)  # first: the children start while torch is imported
    try:
        scorer = Scorer(bundle, _torch_device(device), batch_size)
        loader = Loader(plan, spec, batch_size, tasks, logger.warning)
        stops = dict(ranges[:, [0, 2]].tolist())
        yield from scorer.score(loader.batches(ranges, ahead), stops, write, Report())
    finally:
        tasks.close()


def uses_gpu(device: str) -> bool:
    """Whether `score_parts_locally` uses a GPU. device: "auto", "cpu" or "gpu"."""
    return _torch_device(device) == "cuda"


def _torch_device(device: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if device == "gpu" and not available:
        raise ConfigError("--device gpu: this machine has no GPU; use --device cpu", code="no_gpu")
    return "cuda" if available and device != "cpu" else "cpu"
