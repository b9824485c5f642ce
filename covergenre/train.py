"""train: a dataset becomes a MODEL. The driver's part; training.py is the workers'."""

import hashlib
import json
import math
import threading
from dataclasses import dataclass
from typing import Any

from covergenre import places, report, runtime, storage
from covergenre.bundle import BUNDLE_FILES, is_bundle, read_bundle, write_bundle
from covergenre.config import TrainConfig
from covergenre.covers import Preprocessing
from covergenre.dataset import READING_CPUS
from covergenre.errors import ConfigError, CovergenreError, StorageError, TrainingDivergedError
from covergenre.metrics import nan_to_none
from covergenre.model_card import model_card
from covergenre.progress import Progress, say
from covergenre.shards import Manifest, read_manifest

_POLL_SECONDS = 0.3
_CHECKPOINTS = "checkpoints"
_TRAINED = "model.safetensors"  # in the state folder: training is over


@dataclass(frozen=True)
class Trained:
    """A finished MODEL and how it came about."""

    uri: str
    weights_id: str
    best: dict[str, Any]
    """The record of the best epoch."""
    epochs: int
    remark: str = ""

    def account(self) -> str:
        """What the user is told at the end."""
        best = self.best
        return (
            f"MODEL {self.uri} ({self.weights_id}){self.remark}\n"
            f"  best of {self.epochs} epochs: {best['epoch']}, on dev: {_figures(best)}\n"
            f"  look at {storage.join(self.uri, 'loss.png')}"
            f" and {storage.join(self.uri, 'README.md')}"
        )


def train(config: TrainConfig, *, verbose: bool = False) -> Trained:
    """Fine-tune as `config` says and write the MODEL. Raises UserError for a user's mistake."""
    config = config.resolved()
    out = storage.absolute(config.out)
    manifest = read_manifest(config.dataset)
    for split in ("train", "dev"):
        manifest.require(split)
    trunk, origin = _trunk(config, len(manifest.genres))
    inputs = {"dataset_id": manifest.dataset_id, "trunk": _digest(trunk)}
    run = {"fingerprint": config.fingerprint(), "inputs": inputs}
    if is_bundle(out):
        return _already(out, run)
    state = f"{out}.training"
    _check_free(out, state)
    if storage.is_uri(out) and "/" not in out.partition("://")[2]:
        raise StorageError(f"{out}: is a whole bucket; choose a prefix in it for --out")
    runtime.start_ray(verbose=verbose)
    places.check_shared({"--out": out, "DATASET": manifest.uri}, config.shared_filesystem)
    workers = runtime.place_workers(
        config.workers, config.device, config.cpus_per_worker, reading=READING_CPUS
    )
    if config.batch_size < workers.count:
        raise ConfigError(
            f"--batch-size {config.batch_size}: each of {workers.count} workers needs a row a step"
        )
    places.claim(state, "train", config, inputs)
    preprocessing = Preprocessing()
    trained = storage.join(state, _TRAINED)
    if not storage.exists(trained):  # else only the MODEL was not written to its end
        say(_opening(config, manifest, workers, origin))
        try:
            storage.put(trained, _fit(config, manifest, preprocessing, workers, trunk, state))
        except TrainingDivergedError:
            storage.delete_folder(state)  # other settings are next; nothing here is worth keeping
            raise
    weights = storage.read_bytes(trained)
    history = _lines(state, "history")
    best = [record for record in history if record["best"]][-1]
    shown = config.model_dump(mode="json", exclude={"out"})
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
            "history.jsonl": storage.read_bytes(storage.join(state, "history.jsonl")),
            "steps.jsonl": storage.read_bytes(storage.join(state, "steps.jsonl")),
            "metrics.json": json.dumps(nan_to_none(best), indent=2).encode(),
            "loss.png": report.loss_curve(history),
            "README.md": model_card(config, manifest, best, len(history), origin).encode(),
        },
    )
    storage.delete_folder(state)
    return Trained(bundle.uri, bundle.weights_id, best, len(history))


def _already(out: str, run: dict[str, Any]) -> Trained:
    """The finished MODEL at `out`, if this same command made it. Raises StorageError if not."""
    bundle = read_bundle(out)
    if storage.read_json(storage.join(out, "config.json"))["train"].get("run") != run:
        raise StorageError(
            f"{out}: holds a MODEL made with other settings or from another dataset;"
            " choose another --out"
        )
    best = storage.read_json(storage.join(out, "metrics.json"))
    epochs = len(_lines(out, "history"))
    return Trained(out, bundle.weights_id, best, epochs, ": already trained by this same command")


def _check_free(out: str, state: str) -> None:
    """Raises StorageError where `out` holds more than a MODEL that was not written to its end."""
    held = storage.list_sizes(out)
    if storage.exists(storage.join(state, _TRAINED)):
        held = {name: size for name, size in held.items() if name not in BUNDLE_FILES}
    if held or (storage.exists(out) and not storage.is_folder(out)):
        what = f"is not empty (holds {next(iter(held))})" if held else "is a file"
        raise StorageError(f"{out}: {what}; choose another --out, or empty it")


def _trunk(config: TrainConfig, num_genres: int) -> tuple[dict[str, Any] | None, str]:
    """(pretrained trunk weights or None, where they come from). Mistakes surface here, early."""
    from covergenre.models import build_model, freeze
    from covergenre.weights import load_trunk_weights

    assert config.weights is not None and config.freeze is not None  # resolved
    model = build_model(config.model, num_genres, seed=config.seed)
    freeze(model, config.freeze)
    if config.weights == "none":
        return None, "random"
    loaded = load_trunk_weights(model, config.weights, allow_partial=config.allow_partial_weights)
    if loaded.left_out:
        say(
            f"weights: {loaded.origin} lacks {len(loaded.left_out)} of the trunk's tensors; these"
            f" stay random: {', '.join(loaded.left_out)}"
        )
    return model.trunk.state_dict(), loaded.origin


def _digest(trunk: dict[str, Any] | None) -> str:
    """Identity of the trunk's weights, by content."""
    if trunk is None:
        return "random"
    digest = hashlib.sha256()
    for name, tensor in sorted(trunk.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _opening(config: TrainConfig, manifest: Manifest, workers: runtime.Workers, origin: str) -> str:
    kind = "GPU" if workers.use_gpu else "CPU"
    return (
        f"train {config.model} ({origin} weights, freeze {config.freeze}) on"
        f" {manifest.rows('train'):,} albums, {len(manifest.genres)} genres; {workers.count} {kind}"
        f" worker{'s' if workers.count > 1 else ''}, {config.epochs} epochs,"
        f" batch {config.batch_size}, Adam {config.learning_rate:g}"
    )


def _fit(
    config: TrainConfig,
    manifest: Manifest,
    preprocessing: Preprocessing,
    workers: runtime.Workers,
    trunk: dict[str, Any] | None,
    state: str,
) -> bytes:
    """Train, and give the weights of the best epoch as safetensors."""
    import ray
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from covergenre.training import Job, training_loop

    monitor = ray.remote(num_cpus=0)(_Monitor).remote()
    job = Job(
        config=config,
        manifest=manifest,
        preprocessing=preprocessing,
        workers=workers,
        trunk=[ray.put(trunk)] if trunk is not None else None,
        state=state,
        monitor=monitor,
    )
    # Ray Train would take up what an ended run of this name left there, unasked.
    storage.delete_folder(storage.join(state, _CHECKPOINTS))
    filesystem, path = storage.filesystem(state)
    trainer = TorchTrainer(
        training_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.resources,
        ),
        run_config=RunConfig(
            name=_CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            # A worker reports weights only when they are the best so far: the latest is the best.
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    shown = _shown(monitor, job.epochs(), manifest.rows("train"), config.batch_size)
    with shown, runtime.waiting_said(workers), runtime.own_errors():
        result = trainer.fit()
    if result.checkpoint is None:
        raise CovergenreError("training ended without a checkpoint; run again with --verbose")
    with result.checkpoint.as_directory() as folder:
        return storage.read_bytes(storage.join(str(folder), "model.safetensors"))


class _Monitor:
    """An actor between the workers and the user's terminal."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []

    def steps(self, epoch: int, rows: int, loss: float) -> None:
        self._events.append(("steps", (epoch, rows, loss)))

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
            if kind == "steps":
                epoch, rows, loss = value
                self._progress.advance(rows, f"epoch {epoch + 1}/{self._epochs} loss {loss:.3f}")
            else:
                best = "  (best so far)" if value["best"] else ""
                self._progress.say(
                    f"epoch {value['epoch']}/{self._epochs}: loss {value['train_loss']:.4f},"
                    f" dev {_figures(value)}, {value['images_per_second']:.1f} covers/s{best}"
                )


def _figures(record: dict[str, Any]) -> str:
    def shown(name: str) -> str:
        value = record[f"dev_{name}"]
        return "n/a" if value is None or math.isnan(value) else f"{value:.3f}"

    return (
        f"loss {shown('loss')}, PR AUC {shown('pr_auc_micro')} micro {shown('pr_auc_macro')} macro,"
        f" ROC AUC {shown('roc_auc_micro')} micro {shown('roc_auc_macro')} macro"
    )


def _lines(folder: str, name: str) -> list[dict[str, Any]]:
    text = storage.read_bytes(storage.join(folder, f"{name}.jsonl")).decode()
    return [json.loads(line) for line in text.splitlines()]
