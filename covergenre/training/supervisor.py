"""Start the group of training workers, restart it after failures, and resize it.

When a group fails, the driver starts another one from the newest checkpoint, with another number of
workers if necessary, until training is complete. Ray Train's restarts are disabled, because they
would also repeat runs that cannot succeed, and its resizing discards all steps since the last
checkpoint and may leave machines without a CPU for decoding.
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covergenre.cluster.ray_runtime import unwrap_ray_errors
from covergenre.cluster.workers import (
    POLL_SECONDS,
    Workers,
    choose_workers,
    log_pending_resources,
)
from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import ConfigError, CovergenreError, DeviceMemoryError, StorageError
from covergenre.formatting import plural
from covergenre.io import storage
from covergenre.metrics import base_rate_loss
from covergenre.polling import polling
from covergenre.training import checkpoints
from covergenre.training.job import Job
from covergenre.training.loader import READING_CPUS
from covergenre.training.monitor import Monitor, progress_reported

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
FEATURES = "features"
_RAY = "ray"
_RETRY_SECONDS = 15.0
_MAX_FAILURES = 3
"""Consecutive failures of groups, without a new checkpoint, after which training fails."""


@dataclass(frozen=True)
class TrainingResult:
    """A complete training run."""

    state: dict[str, Any]
    """Of the last checkpoint: TrainingState as JSON."""
    weights: bytes
    """Weights of the best epoch, as safetensors."""


def training_workers(config: TrainConfig) -> Workers:
    """The workers for these settings. Raises ConfigError if the cluster is too small."""
    return choose_workers(
        config.worker_range(), config.device, config.cpus_per_worker, reading=READING_CPUS
    )


def run_training(
    config: TrainConfig,
    manifest: Manifest,
    preprocessing: Preprocessing,
    workers: Workers,
    backbone: dict[str, Any] | None,
    state_folder: str,
    temporary: Path,
) -> TrainingResult:
    """Train until complete, from the newest checkpoint in `state_folder` if it has one.

    backbone: pretrained weights, or None. temporary: an empty local folder.
    """
    job = _make_job(config, manifest, preprocessing, workers, backbone, state_folder)
    folder, steps = job.checkpoints, job.steps.total
    step = checkpoints.latest_step(folder)
    if 0 < step < steps:
        logger.info(f"resuming from step {step:,} of {steps:,}")
    failures = 0
    reporting = progress_reported(job.monitor, len(job.steps.epochs), job.steps.total_rows)
    with reporting, _machines_requested(config, workers):
        while (last := _final_state(folder, steps, temporary)) is None:
            step = checkpoints.latest_step(folder)
            error: Exception | None = None
            try:
                _run_group(config, job, state_folder)
            except DeviceMemoryError as memory_error:
                job = _with_smaller_microbatch(job, memory_error)
                continue
            except CovergenreError:
                raise
            except Exception as group_error:  # workers and machines fail in many ways
                error = group_error
            failures = _count_failures(failures, error, step, checkpoints.latest_step(folder))
            job = dataclasses.replace(job, workers=_wait_for_workers(config))
    return TrainingResult(last, _best_weights(folder, last, temporary))


def _make_job(
    config: TrainConfig,
    manifest: Manifest,
    preprocessing: Preprocessing,
    workers: Workers,
    backbone: dict[str, Any] | None,
    state_folder: str,
) -> Job:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Job(
        config=config,
        manifest=manifest,
        preprocessing=preprocessing,
        baseline_loss=base_rate_loss(manifest.genre_counts("train"), manifest.rows("train")),
        workers=workers,
        backbone=[ray.put(backbone)] if backbone is not None else None,
        checkpoints=storage.join(state_folder, CHECKPOINTS),
        features=storage.join(state_folder, FEATURES),
        monitor=ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=this_node).remote(),
        microbatch=config.microbatch,
    )


def _count_failures(failures: int, error: Exception | None, before: int, now: int) -> int:
    """The number of consecutive failures after a group has ended, `failures` before it.

    error: of the group; None if it ended without one. before, now: step of the last checkpoint when
    the group started, and now. Raises CovergenreError after too many failures.
    """
    from covergenre.cluster.ray_internals import is_startup_timeout

    if error is not None and is_startup_timeout(error):
        return failures
    failures = 0 if now > before else failures + 1
    reason = "the workers exited early" if error is None else _failure_reason(error)
    if failures == _MAX_FAILURES:
        raise CovergenreError(
            f"training failed {failures} times in a row after step {now:,}: {reason}; run the same"
            " command again with --resume; add --verbose to see the details",
            code="workers_failed",
        )
    if error is not None:
        logger.warning(f"workers failed ({reason}): restarting from step {now:,}")
    return failures


def _run_group(config: TrainConfig, job: Job, state_folder: str) -> None:
    """Run one group of workers from the newest checkpoint, until training is complete, the group
    fails, or a resize is requested."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from covergenre.cluster.ray_internals import run_torch_trainer
    from covergenre.training.worker import training_loop

    # Ray Train would silently continue an earlier run with this name.
    storage.delete_directory(storage.join(state_folder, _RAY))
    filesystem, path = storage.filesystem(state_folder)
    elastic = config.is_elastic
    failures: dict[str, Any] = {
        # A group of fixed size waits for its machines without a time limit.
        "controller_failure_limit": 0 if elastic else -1,
        "max_preemption_failures": 0,
    }
    resizing = _resizing(config, job) if elastic else contextlib.nullcontext()
    waiting = log_pending_resources(*job.workers.required_resource)
    with resizing, waiting, unwrap_ray_errors():
        run_torch_trainer(
            training_loop,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=job.workers.count,
                use_gpu=job.workers.use_gpu,
                resources_per_worker=job.workers.resources,
            ),
            run_config=RunConfig(
                name=_RAY,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0, **failures),
            ),
        )


@contextlib.contextmanager
def _machines_requested(config: TrainConfig, workers: Workers) -> Iterator[None]:
    """Request machines for the largest group from the autoscaler, which also replaces lost ones."""
    if not config.is_elastic:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    _, high = config.worker_range() or (1, 1)
    request_resources(bundles=[workers.resources] * high)
    try:
        yield
    finally:
        request_resources(bundles=[])


@contextlib.contextmanager
def _resizing(config: TrainConfig, job: Job) -> Iterator[None]:
    """While a group trains, compare its size with the number of workers that the cluster can run.

    If they differ, the group is asked to save a checkpoint and exit. If only a smaller group fits,
    at two checks in a row, it is killed: after the loss of machines without a worker, there may be
    no CPU left for decoding, and the group would never reach a checkpoint.
    """
    requested = 0

    def check() -> bool:
        nonlocal requested
        with contextlib.suppress(ConfigError):
            count = training_workers(config).count
            if count == job.workers.count:
                return False
            if count != requested:
                only = "only " if count < job.workers.count else ""
                job.monitor.report_message.remote(
                    f"resources for {only}{plural(count, 'worker')}: resizing the worker group"
                )
                job.monitor.request_resize.remote()
                requested = count
            elif count < job.workers.count:
                job.monitor.kill_workers.remote()
        return False

    try:
        with polling(check, POLL_SECONDS):
            yield
    finally:
        job.monitor.end_group.remote()


def _wait_for_workers(config: TrainConfig) -> Workers:
    """Workers for the next group; waits until the cluster has enough machines for the smallest."""
    logged = False
    while True:
        try:
            return training_workers(config)
        except ConfigError as error:
            if not logged:
                logger.info(f"waiting for machines: {error}")
                logged = True
            threading.Event().wait(_RETRY_SECONDS)


def _with_smaller_microbatch(job: Job, error: DeviceMemoryError) -> Job:
    """The job with half the microbatch. Raises DeviceMemoryError if it is one cover already."""
    share = -(-job.config.batch_size // job.workers.count)
    current = min(job.microbatch or share, share)
    if current == 1:
        raise DeviceMemoryError(f"{error}, even with one cover at a time; choose a smaller --model")
    microbatch = -(-current // 2)
    logger.warning(
        f"GPU out of memory: computing {plural(microbatch, 'cover')} at a time, with gradient"
        f" accumulation; the batch size stays {job.config.batch_size}"
    )
    return dataclasses.replace(job, microbatch=microbatch)


def _failure_reason(error: Exception) -> str:
    """The cause of a group's failure in one line."""
    from ray.exceptions import RayActorError

    failures = list(getattr(error, "worker_failures", {}).values())
    # If one worker crashes, the others report errors too; the crash is the cause.
    failures.sort(key=lambda failure: not isinstance(failure, RayActorError))
    cause = (failures or [getattr(error, "controller_failure", error)])[0]
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:200]


def _final_state(folder: str, steps: int, temporary: Path) -> dict[str, Any] | None:
    """The state of the checkpoint after all `steps`; None if training is not complete."""
    if checkpoints.latest_step(folder) < steps:
        return None
    found = checkpoints.newest(folder, temporary)
    if found is None or found.step < steps:
        return None
    return found.state()


def _best_weights(folder: str, last: dict[str, Any], temporary: Path) -> bytes:
    """Weights of the best epoch. If their file is damaged or missing: those of the last epoch, from
    the last checkpoint, and `last` is changed to make that epoch the best."""
    from safetensors.torch import save

    found = checkpoints.fetch(folder, last["best_weights"], temporary)
    if found is not None:
        return found.file.read_bytes()
    uri = storage.join(folder, last["best_weights"])
    best = [record["epoch"] for record in last["history"] if record["best"]][-1]
    final = last["history"][-1]
    newest = checkpoints.newest(folder, temporary)
    if newest is None or newest.step != last["steps_done"]:
        raise StorageError(
            f"{uri}: damaged or missing, and so is the last checkpoint; train again",
            code="checkpoint_damaged",
        )
    final["best"] = True
    logger.warning(
        f"{uri}: damaged or missing; the model has the weights of epoch {final['epoch']}, from the"
        f" last checkpoint{'' if best == final['epoch'] else f', instead of {best}, the best'}"
    )
    tensors = newest.tensors().items()
    return save({n.removeprefix("model."): t for n, t in tensors if n.startswith("model.")})
