"""train: a dataset becomes a MODEL. The driver's part; training.py is the workers'.

    OUT.training/_state/        whose run this is, and who is at work
    OUT.training/checkpoints/   see checkpoints.py
    OUT.training/ray/           Ray Train's own notes

The driver starts a group of workers, and starts it anew from the newest checkpoint when one of
them is lost, in other numbers if need be, until the run is at its end. Ray Train would do the
first by itself; but it also repeats what can never succeed, and resizes a group by abandoning the
steps since the last checkpoint, down to machines without a CPU to spare for decoding.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covergenre.cluster import ray_runtime
from covergenre.cluster.workers import Workers, log_pending_resources, place_workers, polling
from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest, read_manifest
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import (
    ConfigError,
    CovergenreError,
    DeviceMemoryError,
    StorageError,
    TrainingDivergedError,
)
from covergenre.formatting import plural
from covergenre.io import storage
from covergenre.metrics import base_rate_loss, chance_warning, dev_metrics, macro_over
from covergenre.models.bundle import BUNDLE_FILES, is_bundle, read_bundle, write_bundle
from covergenre.models.model_card import model_card
from covergenre.progress import Progress
from covergenre.report import plots
from covergenre.runs import output_dir
from covergenre.runs.stage_run import stage_run
from covergenre.training import checkpoints
from covergenre.training.loader import READING_CPUS

if TYPE_CHECKING:
    from covergenre.training.worker import Job

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.3
_ROOM_SECONDS = 15.0
_CHECKPOINTS = "checkpoints"
_RAY = "ray"
_MOST_LOST = 3
"""Groups of workers lost one after the other without a new checkpoint, before it is given up."""


@dataclass(frozen=True)
class Trained:
    """A finished MODEL and how it came about."""

    uri: str
    weights_id: str
    best: dict[str, Any]
    """The record of the best epoch."""
    epochs: int
    remark: str = ""

    def summary(self) -> str:
        """What the user is told at the end."""
        best = self.best
        lines = [
            f"MODEL {self.uri} ({self.weights_id}){self.remark}",
            f"  best of {plural(self.epochs, 'epoch')}, by micro PR AUC over all genres on dev:"
            f" epoch {best['epoch']}, {_figures(best)}",
        ]
        if warning := chance_warning(dev_metrics(best), "dev"):
            lines.append(f"  {warning}")
        pictures = [storage.join(self.uri, name) for name in ("loss.png", "README.md")]
        return "\n".join([*lines, f"  see {' and '.join(pictures)}"])


def train(config: TrainConfig, *, verbose: bool = False) -> Trained:
    """Fine-tune as `config` says and write the MODEL. Raises UserError for a user's mistake."""
    config = config.resolved()
    out = storage.absolute(config.out)
    state = f"{out}.training"
    try:
        with stage_run(
            "train",
            config,
            out,
            sources={"dataset": config.dataset},
            read_inputs=lambda: _read_inputs(config, out, state),
            identify=lambda inputs: inputs.identity,
            is_finished=lambda: is_bundle(out),
            state=state,
            verbose=verbose,
        ) as run:
            inputs = run.inputs
            made_by = {"fingerprint": config.fingerprint(), "inputs": inputs.identity}
            if run.is_finished:
                trained = _already(out, made_by)
            else:
                run.start_ray({"--out": out, "dataset": inputs.manifest.uri})
                workers = _place(config)
                _check_batch_size(config, workers)
                run.record()
                logger.info(_opening(config, inputs.manifest, workers, inputs.origin))
                trained = _train(
                    *(config, inputs.manifest, workers, inputs.backbone, inputs.origin),
                    *(out, made_by),
                )
    except TrainingDivergedError:
        if not checkpoints.latest_step(storage.join(state, _CHECKPOINTS)):
            storage.delete_directory(state)  # nothing there is worth keeping
        raise
    storage.delete_directory(state)
    return trained


@dataclass(frozen=True)
class _Inputs:
    manifest: Manifest
    backbone: dict[str, Any] | None
    """Pretrained weights; None: the model starts from random ones."""
    origin: str
    """Where the backbone's weights come from."""
    identity: dict[str, str]


def _read_inputs(config: TrainConfig, out: str, state: str) -> _Inputs:
    if not is_bundle(out):  # before weights are loaded, which takes seconds
        _check_free(out, state, resume=config.resume)
    manifest = read_manifest(config.dataset)
    for split in ("train", "dev"):
        manifest.require(split)
    backbone, origin = _backbone(config, len(manifest.genres))
    identity = {"dataset_id": manifest.dataset_id, "backbone": _digest(backbone)}
    return _Inputs(manifest, backbone, origin, identity)


def _train(
    config: TrainConfig,
    manifest: Manifest,
    workers: Workers,
    backbone: dict[str, Any] | None,
    origin: str,
    out: str,
    run: dict[str, Any],
) -> Trained:
    """Train to the end and write the MODEL. backbone, origin: see _backbone."""
    preprocessing = Preprocessing()
    with tempfile.TemporaryDirectory() as temporary:
        last, weights = _fit(
            config, manifest, preprocessing, workers, backbone, f"{out}.training", Path(temporary)
        )
    history = last["history"]
    losses = [
        {"epoch": record["epoch"], "step": step, "loss": loss}
        for (step, loss), record in zip(
            enumerate(last["step_losses"]),
            (record for record in history for _ in range(record["steps"])),
            strict=True,
        )
    ]
    best = [record for record in history if record["best"]][-1]
    shown = config.saved()
    del shown["out"]
    bundle = write_bundle(
        out,
        weights=weights,
        model=config.model,
        genres=manifest.genres,
        preprocessing=preprocessing,
        precision=config.precision,
        config={"settings": shown, "weights_origin": origin, "run": run},
        thresholds=dict.fromkeys(manifest.genres.names, 0.5),
        others={
            "history.jsonl": _jsonl(history),
            "steps.jsonl": _jsonl(losses),
            "metrics.json": json.dumps(best, indent=2).encode(),
            "loss.png": plots.loss_curve(history),
            "README.md": model_card(config, manifest, best, len(history), origin).encode(),
        },
    )
    return Trained(bundle.uri, bundle.weights_id, best, len(history))


def _already(out: str, run: dict[str, Any]) -> Trained:
    """The finished MODEL at `out`, if this same command made it. Raises StorageError if not."""
    bundle = read_bundle(out)
    made_by = storage.read_json(storage.join(out, "config.json")).get("train")
    if not isinstance(made_by, dict) or made_by.get("run") != run:
        raise StorageError(
            f"{out}: holds a MODEL made with other settings or from another dataset;"
            " choose another --out"
        )
    best = storage.read_json(storage.join(out, "metrics.json"))
    epochs = len(_lines(out, "history"))
    return Trained(out, bundle.weights_id, best, epochs, ": already trained by this same command")


def _check_free(out: str, state: str, *, resume: bool) -> None:
    """Raises StorageError where `out` holds more than a MODEL that was not written to its end, and
    where an unfinished run is to be gone on with only if the user says so."""
    if storage.is_uri(out) and "/" not in out.partition("://")[2]:
        raise StorageError(f"{out}: is a whole bucket; choose a prefix in it for --out")
    output_dir.check_is_directory(out)
    held = storage.list_sizes(out)
    step = checkpoints.latest_step(storage.join(state, _CHECKPOINTS))
    if step and not resume:
        raise StorageError(
            f"{state}: holds an unfinished run (its last checkpoint is of step {step:,}); go on"
            " with --resume, or remove it"
        )
    if step:
        held = {name: size for name, size in held.items() if name not in BUNDLE_FILES}
    if held:
        raise StorageError(
            f"{out}: is not empty (holds {next(iter(held))}); choose another --out, or empty it"
        )


def _place(config: TrainConfig) -> Workers:
    return place_workers(
        config.worker_range(), config.device, config.cpus_per_worker, reading=READING_CPUS
    )


def _check_batch_size(config: TrainConfig, workers: Workers) -> None:
    if config.batch_size < workers.count:
        raise ConfigError(
            f"--batch-size {config.batch_size}: each of {plural(workers.count, 'worker')} needs at"
            " least one album of each step; raise it, or ask for fewer --workers"
        )


def _backbone(config: TrainConfig, num_genres: int) -> tuple[dict[str, Any] | None, str]:
    """(pretrained backbone weights or None, where they come from). Mistakes surface here, early."""
    from covergenre.models.networks import build_model, freeze
    from covergenre.models.pretrained import load_backbone_weights

    assert config.weights is not None and config.freeze is not None  # resolved
    model = build_model(config.model, num_genres, seed=config.seed)
    freeze(model, config.freeze)
    if config.weights == "none":
        return None, "random"
    loaded = load_backbone_weights(
        model, config.weights, allow_partial=config.allow_partial_weights
    )
    if loaded.left_out:
        logger.info(
            f"weights: {loaded.origin} lacks {len(loaded.left_out)} of the backbone's tensors;"
            f" these keep their random values: {', '.join(loaded.left_out)}"
        )
    return model.backbone.state_dict(), loaded.origin


def _digest(backbone: dict[str, Any] | None) -> str:
    """Identity of the backbone's weights, by content."""
    if backbone is None:
        return "random"
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _opening(config: TrainConfig, manifest: Manifest, workers: Workers, origin: str) -> str:
    kind = "GPU" if workers.use_gpu else "CPU"
    return (
        f"train {config.model} ({origin} weights, freeze {config.freeze}) on"
        f" {plural(manifest.rows('train'), 'album')}, {plural(len(manifest.genres), 'genre')};"
        f" {plural(workers.count, f'{kind} worker')}, {plural(config.epochs or 0, 'epoch')},"
        f" batch {config.batch_size}, Adam {config.learning_rate:g}"
    )


def _fit(
    config: TrainConfig,
    manifest: Manifest,
    preprocessing: Preprocessing,
    workers: Workers,
    backbone: dict[str, Any] | None,
    state: str,
    temporary: Path,
) -> tuple[dict[str, Any], bytes]:
    """Train to the end: (state of the last checkpoint, weights of the best epoch)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from covergenre.training.worker import Job

    folder = storage.join(state, _CHECKPOINTS)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = ray.remote(_Monitor).options(num_cpus=0, scheduling_strategy=here).remote()
    job = Job(
        config=config,
        manifest=manifest,
        preprocessing=preprocessing,
        baseline_loss=base_rate_loss(manifest.genre_counts("train"), manifest.rows("train")),
        workers=workers,
        backbone=[ray.put(backbone)] if backbone is not None else None,
        checkpoints=folder,
        monitor=monitor,
    )
    steps = sum(steps for _, steps in job.epochs())
    step = checkpoints.latest_step(folder)
    if 0 < step < steps:
        logger.info(f"going on from step {step:,} of {steps:,}")
    shown = _shown(monitor, job.epochs(), manifest.rows("train"), config.batch_size)
    lost = 0
    with shown, _machines_asked_for(config, workers):
        while (last := _finished(folder, steps, temporary)) is None:
            step = checkpoints.latest_step(folder)
            why: Exception | str = "it ended before its time"
            try:
                _run_group(config, job, state)
            except DeviceMemoryError as error:
                job = _smaller_parts(job, error)
                continue
            except CovergenreError:
                raise
            except Exception as error:  # workers and machines can be lost in many ways
                why = error
            now = checkpoints.latest_step(folder)
            if not _machines_did_not_come(why):
                lost = 0 if now > step else lost + 1
                if lost == _MOST_LOST:
                    raise CovergenreError(
                        f"training was lost {lost} times in a row after step {now:,}: {_why(why)};"
                        " go on with --resume, and with --verbose to see more"
                    )
                if isinstance(why, Exception):
                    logger.info(f"workers were lost ({_why(why)}): going on from step {now:,}")
            job = dataclasses.replace(job, workers=_place_again(config))
    return last, _best_weights(folder, last, temporary)


def _best_weights(folder: str, last: dict[str, Any], temporary: Path) -> bytes:
    """Weights of the best epoch. Where their file is damaged, of the last epoch, which then counts
    as the best in `last`: its weights are in the last checkpoint too."""
    from safetensors.torch import save

    found = checkpoints.fetch(folder, last["best_weights"], temporary)
    if found is not None:
        return found.file.read_bytes()
    uri = storage.join(folder, last["best_weights"])
    best = [record["epoch"] for record in last["history"] if record["best"]][-1]
    end = last["history"][-1]
    newest = checkpoints.newest(folder, temporary, logger.info)
    if newest is None or newest.step != last["steps_done"]:
        raise StorageError(f"{uri}: damaged or gone, and so is the last checkpoint; train again")
    end["best"] = True
    logger.info(
        f"{uri}: damaged or gone (sha256); the MODEL has the weights of epoch {end['epoch']}, from"
        f" the last checkpoint{'' if best == end['epoch'] else f', and not of {best}, the best'}"
    )
    tensors = newest.tensors().items()
    return save({n.removeprefix("model."): t for n, t in tensors if n.startswith("model.")})


def _finished(folder: str, steps: int, temporary: Path) -> dict[str, Any] | None:
    """The state of the last checkpoint, where that is the run's end."""
    if checkpoints.latest_step(folder) < steps:
        return None
    found = checkpoints.newest(folder, temporary, logger.info)
    if found is None or found.step < steps:
        return None
    return found.state()


def _run_group(config: TrainConfig, job: "Job", state: str) -> None:
    """One group of workers, from the newest checkpoint to the end, to its loss, or until it is to
    have another size."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from covergenre.training.worker import training_loop

    class _Trainer(TorchTrainer):
        """One that leaves ^C to Python: Ray Train's own answer waits for its controller, which may
        take as long as it likes, and trains on meanwhile."""

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    # Ray Train would take up what an ended run of this name left there, unasked.
    storage.delete_directory(storage.join(state, _RAY))
    filesystem, path = storage.filesystem(state)
    elastic = _is_elastic(config)
    # Machines that do not come are waited for, unless fewer may do.
    failures: dict[str, Any] = {"controller_failure_limit": 0 if elastic else -1}
    failures["max_preemption_failures"] = 0
    trainer = _Trainer(
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
    resizing = _resizes(config, job) if elastic else contextlib.nullcontext()
    pending = log_pending_resources(*job.workers.required_resource)
    with resizing, pending, ray_runtime.unwrap_ray_errors():
        try:
            trainer.fit()
        except KeyboardInterrupt:
            if trainer.controller is not None:
                ray.kill(trainer.controller)  # and with it its workers
            raise


def _is_elastic(config: TrainConfig) -> bool:
    low, high = config.worker_range() or (1, 1)
    return low < high


@contextlib.contextmanager
def _machines_asked_for(config: TrainConfig, workers: Workers) -> Iterator[None]:
    """Have an autoscaler start, and start again, what the most workers need."""
    if not _is_elastic(config):
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
def _resizes(config: TrainConfig, job: "Job") -> Iterator[None]:
    """While a group trains, look whether there is room for more workers, or for fewer alone; if so
    it is to end at a checkpoint, for one of that size.

    Where machines are lost that no worker was on, those that are left may have no CPU to read with:
    such a group comes to no checkpoint, and is ended.
    """
    asked = 0

    def look() -> bool:
        nonlocal asked
        with contextlib.suppress(ConfigError):
            count = _place(config).count
            if count == job.workers.count:
                return False
            if count != asked:
                only = "only " if count < job.workers.count else ""
                room = f"{only}{plural(count, 'worker')}"
                job.monitor.log.remote(f"there is room for {room}: regrouping")
                job.monitor.regroup.remote()
                asked = count
            elif count < job.workers.count:
                job.monitor.end_group.remote()
        return False

    try:
        with polling(look):
            yield
    finally:
        job.monitor.regrouped.remote()


def _place_again(config: TrainConfig) -> Workers:
    """Workers for the next group; waits where the machines that are left are too few."""
    told = False
    while True:
        try:
            return _place(config)
        except ConfigError as error:
            if not told:
                logger.info(f"waiting for machines: {error}")
                told = True
            threading.Event().wait(_ROOM_SECONDS)


def _machines_did_not_come(why: Exception | str) -> bool:
    """Whether a group ended because an autoscaler's machines take longer than Ray Train waits."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    failure = getattr(why, "controller_failure", None)
    return isinstance(failure, WorkerGroupStartupTimeoutError)


def _smaller_parts(job: "Job", error: DeviceMemoryError) -> "Job":
    """The same job, each worker's share of a step in twice as many parts."""
    share = -(-job.config.batch_size // job.workers.count)
    if job.accumulate >= share:
        raise DeviceMemoryError(f"{error}, not even a cover at a time; choose a smaller --model")
    accumulate = min(2 * job.accumulate, share)
    logger.info(
        f"{error}: computing it {plural(-(-share // accumulate), 'cover')} at a time, gradients"
        " accumulated;"
        f" the batch stays {job.config.batch_size}"
    )
    return dataclasses.replace(job, accumulate=accumulate)


def _why(error: Exception | str) -> str:
    """What Ray knows about the loss of a group, in one line."""
    from ray.exceptions import RayActorError

    failures = list(getattr(error, "worker_failures", {}).values())
    # When one is lost the others complain too; its own end is the cause.
    failures.sort(key=lambda failure: not isinstance(failure, RayActorError))
    cause = (failures or [getattr(error, "controller_failure", error)])[0]
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    kind = "" if isinstance(cause, str) else f"{type(cause).__name__}: "
    return f"{kind}{lines[-1] if lines else ''}"[:200]


class _Monitor:
    """An actor between the workers and the user's terminal."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._regroup = False
        self._group: list[Any] = []

    def at(self, epoch: int, rows: int, loss: float) -> None:
        self._events.append(("at", (epoch, rows, loss)))

    def log(self, line: str) -> None:
        self._events.append(("log", line))

    def regroup(self) -> None:
        self._regroup = True

    def regrouped(self) -> None:
        self._regroup = False
        self._group = []

    def enlist(self, worker: Any) -> None:
        self._group.append(worker)

    def end_group(self) -> None:
        import ray

        for worker in self._group:
            ray.kill(worker)

    def wants_regroup(self) -> bool:
        return self._regroup

    def epoch(self, record: dict[str, Any]) -> None:
        self._events.append(("epoch", record))

    def drain(self) -> list[tuple[str, Any]]:
        events, self._events = self._events, []
        return events


class _shown:  # noqa: N801 - reads as a verb where it is used
    """Show what the monitor gathers, on a thread, while training runs."""

    def __init__(
        self, monitor: Any, epochs: list[tuple[int, int]], rows: int, batch_size: int
    ) -> None:
        total = sum(min(rows, steps * batch_size) for _, steps in epochs)
        self._monitor, self._epochs = monitor, len(epochs)
        self._progress = Progress("train", total, "covers")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._drain()
        self._progress.__exit__(None, None, None)

    def _run(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._drain()

    def _drain(self) -> None:
        import ray

        for kind, value in ray.get(self._monitor.drain.remote()):
            if kind == "at":
                epoch, rows, loss = value
                self._progress.update_to(rows, f"epoch {epoch + 1}/{self._epochs} loss {loss:.3f}")
            elif kind == "log":
                logger.info(value)
            else:
                self._progress.epoch_ended(value)
                best = "  (best so far)" if value["best"] else ""
                logger.info(
                    f"epoch {value['epoch']}/{self._epochs}: loss {value['train_loss']:.4f},"
                    f" dev {_figures(value)}, {value['images_per_second']:.1f} covers/s{best}"
                )


def _figures(record: dict[str, Any]) -> str:
    """The dev metrics of an epoch's record, and which genres the macro means are over."""

    def shown(name: str) -> str:
        value = record[f"dev_{name}"]
        return "n/a" if value is None or math.isnan(value) else f"{value:.3f}"

    over = macro_over(dev_metrics(record))
    return (
        f"loss {shown('loss')}, PR AUC {shown('pr_auc_micro')} micro {shown('pr_auc_macro')} macro,"
        f" ROC AUC {shown('roc_auc_micro')} micro {shown('roc_auc_macro')} macro"
        f"{f' (macro over {over})' if over else ''}"
    )


def _jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _lines(folder: str, name: str) -> list[dict[str, Any]]:
    text = storage.read_bytes(storage.join(folder, f"{name}.jsonl")).decode()
    return [json.loads(line) for line in text.splitlines()]
