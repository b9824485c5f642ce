"""train: fine-tune a model on a dataset and write the model directory.

    OUT.training/_state/        the run record and the lock
    OUT.training/checkpoints/   see training/checkpoints.py
    OUT.training/features/      see training/features.py
    OUT.training/ray/           Ray Train's files

The stage checks settings and inputs, loads the pretrained weights and writes the model directory;
training/supervisor.py runs the workers. OUT.training is deleted once the model is complete.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covergenre.cluster.workers import Workers
from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest, read_manifest
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import ConfigError, StorageError, TrainingDivergedError
from covergenre.formatting import file_size, plural
from covergenre.io import storage
from covergenre.metrics import chance_warning, dev_metrics
from covergenre.models.bundle import (
    BUNDLE_FILES,
    BundleContents,
    is_bundle,
    read_bundle,
    write_bundle,
)
from covergenre.models.model_card import model_card
from covergenre.report import plots
from covergenre.runs import output_dir
from covergenre.runs.stage_run import stage_run
from covergenre.training import checkpoints
from covergenre.training.monitor import format_dev_metrics
from covergenre.training.sampler import Steps
from covergenre.training.supervisor import (
    CHECKPOINTS,
    FEATURES,
    TrainingResult,
    run_training,
    training_workers,
)

if TYPE_CHECKING:
    from covergenre.models.networks import CoverModel
    from covergenre.training.features import Features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A complete model directory, and how it was trained."""

    uri: str
    weights_id: str
    best: dict[str, Any]
    """The record of the best epoch."""
    history: list[dict[str, Any]]
    """The records of all epochs."""
    note: str = ""

    def summary(self) -> str:
        """The text that the command prints at the end."""
        best = self.best
        lines = [
            f"model {self.uri} ({self.weights_id}){self.note}",
            f"  best of {plural(len(self.history), 'epoch')}, by micro PR AUC over all genres on"
            f" dev: epoch {best['epoch']}, {format_dev_metrics(best)}",
        ]
        lines.append(f"  {_data_wait(self.history)}")
        if warning := chance_warning(dev_metrics(best), "dev"):
            lines.append(f"  {warning}")
        files = [storage.join(self.uri, name) for name in ("loss.png", "README.md")]
        return "\n".join([*lines, f"  see {' and '.join(files)}"])


@dataclass(frozen=True)
class _Backbone:
    """The backbone's initial weights."""

    weights: dict[str, Any] | None
    """By name; None: random."""
    origin: str
    """Where they come from, for messages."""
    features: "Features | None" = None
    """What --cache-features keeps for each album; None without it."""

    @property
    def digest(self) -> str:
        """Identity of the weights, by content."""
        if self.weights is None:
            return "random"
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


def train(config: TrainConfig, *, verbose: bool = False) -> Trained:
    """Fine-tune a model and write the model directory. Raises UserError for an invalid setting or
    input, TrainingDivergedError and DeviceMemoryError among them."""
    config = config.resolved()
    out = storage.absolute(config.out)
    state = f"{out}.training"
    with stage_run(
        "train",
        config,
        out,
        sources={"dataset": config.dataset},
        read_inputs=lambda: _read_inputs(config, out, state),
        identify=_identity,
        is_finished=lambda: is_bundle(out),
        state=state,
        verbose=verbose,
    ) as run:
        manifest, backbone = run.inputs
        origin = {"fingerprint": config.fingerprint(), "inputs": _identity(run.inputs)}
        if run.is_finished:
            trained = _already_trained(out, origin)
        else:
            run.start_ray({"--out": out, "dataset": manifest.uri})
            workers = _choose_workers(config)
            run.record()
            logger.info(_headline(config, manifest, workers, backbone.origin))
            if backbone.features is not None:
                _check_space(backbone.features, manifest, storage.join(state, FEATURES))
            try:
                trained = _train(config, manifest, workers, backbone, out, origin)
            except TrainingDivergedError:
                if not checkpoints.latest_step(storage.join(state, CHECKPOINTS)):
                    storage.delete_directory(state)  # it has nothing to resume from
                raise
    storage.delete_directory(state)
    return trained


_Inputs = tuple[Manifest, _Backbone]


def _read_inputs(config: TrainConfig, out: str, state: str) -> _Inputs:
    if not is_bundle(out):
        _check_output(out, state, resume=config.resume)
    manifest = read_manifest(config.dataset)
    for split in ("train", "dev"):
        manifest.require(split)
    return manifest, _load_backbone(config, len(manifest.genres))


def _identity(inputs: _Inputs) -> dict[str, Any]:
    manifest, backbone = inputs
    return {"dataset_id": manifest.dataset_id, "backbone": backbone.digest}


def _train(
    config: TrainConfig,
    manifest: Manifest,
    workers: Workers,
    backbone: _Backbone,
    out: str,
    run: dict[str, Any],
) -> Trained:
    """Train until complete and write the model directory."""
    preprocessing = Preprocessing()
    with tempfile.TemporaryDirectory() as temporary:
        result = run_training(
            config,
            manifest,
            preprocessing,
            workers,
            backbone.weights,
            f"{out}.training",
            Path(temporary),
        )
    history = result.state["history"]
    best = [record for record in history if record["best"]][-1]
    settings = config.saved()
    del settings["out"]
    bundle = write_bundle(
        out,
        BundleContents(
            weights=result.weights,
            model=config.model,
            genres=manifest.genres,
            preprocessing=preprocessing,
            precision=config.precision,
            training={"settings": settings, "weights_origin": backbone.origin, "run": run},
            thresholds=dict.fromkeys(manifest.genres.names, 0.5),
            other_files={
                "history.jsonl": _jsonl(history),
                "steps.jsonl": _jsonl(_step_records(result, config, manifest)),
                "metrics.json": json.dumps(best, indent=2).encode(),
                "loss.png": plots.loss_curve(history),
                "README.md": model_card(
                    config, manifest, best, len(history), backbone.origin
                ).encode(),
            },
        ),
    )
    return Trained(bundle.uri, bundle.weights_id, best, history)


def _data_wait(history: list[dict[str, Any]]) -> str:
    seconds = sum(record["seconds"] for record in history)
    waited = sum(record["data_wait_share"] * record["seconds"] for record in history)
    return f"the workers waited for covers during {waited / seconds:.1%} of the training steps"


def _step_records(
    result: TrainingResult, config: TrainConfig, manifest: Manifest
) -> list[dict[str, Any]]:
    """A record for each step of the run: its epoch from 1, its number from 0, and its loss."""
    rows, epochs = manifest.rows("train"), config.epochs or 0
    steps = Steps.of(rows, config.batch_size, epochs, config.max_steps)
    epoch_of = [epoch for epoch, count in enumerate(steps.epochs, 1) for _ in range(count)]
    losses = result.state["step_losses"]
    return [
        {"epoch": epoch, "step": step, "loss": loss}
        for step, (epoch, loss) in enumerate(zip(epoch_of, losses, strict=True))
    ]


def _already_trained(out: str, run: dict[str, Any]) -> Trained:
    """The complete model at `out`. Raises StorageError unless this same command wrote it."""
    bundle = read_bundle(out)
    training = storage.read_json(storage.join(out, "config.json")).get("train")
    if not isinstance(training, dict) or training.get("run") != run:
        raise StorageError(
            f"{out}: contains a model trained with other settings or on another dataset; choose"
            " another --out",
            code="other_run",
        )
    best = storage.read_json(storage.join(out, "metrics.json"))
    lines = storage.read_bytes(storage.join(out, "history.jsonl")).splitlines()
    history = [json.loads(line) for line in lines]
    return Trained(out, bundle.weights_id, best, history, ": already trained by this command")


def _check_output(out: str, state: str, *, resume: bool) -> None:
    """Raises StorageError if `out` has files other than those of an incomplete model, or if it has
    an unfinished run and `resume` is not set."""
    if storage.is_uri(out) and "/" not in out.partition("://")[2]:
        raise StorageError(
            f"{out}: is a bucket; choose a prefix in it for --out", code="whole_bucket"
        )
    output_dir.check_is_directory(out)
    files = set(storage.list_sizes(out))
    step = checkpoints.latest_step(storage.join(state, CHECKPOINTS))
    if step and not resume:
        raise StorageError(
            f"{state}: has an unfinished run (last checkpoint at step {step:,}); resume it with"
            " --resume, or remove the directory",
            code="unfinished_run",
        )
    if step:
        files -= BUNDLE_FILES
    if files:
        raise StorageError(
            f"{out}: is not empty (contains {min(files)}); choose another --out, or empty it",
            code="not_empty",
        )


def _choose_workers(config: TrainConfig) -> Workers:
    workers = training_workers(config)
    if config.batch_size < workers.count:
        raise ConfigError(
            f"--batch-size {config.batch_size}: must be at least the number of workers"
            f" ({workers.count}); use a larger --batch-size, or fewer --workers",
            code="batch_size",
        )
    return workers


def _load_backbone(config: TrainConfig, num_genres: int) -> _Backbone:
    """The weights of --weights. Raises UserError for invalid settings of the model."""
    from covergenre.models.networks import build_model, freeze
    from covergenre.models.pretrained import load_backbone_weights

    assert config.weights is not None and config.freeze is not None  # resolved
    model = build_model(config.model, num_genres, seed=config.seed)
    freeze(model, config.freeze)
    features = _cached_features(config, model) if config.cache_features else None
    if config.weights == "none":
        return _Backbone(None, "random", features)
    loaded = load_backbone_weights(
        model, config.weights, allow_partial=config.allow_partial_weights
    )
    if loaded.missing:
        logger.warning(
            f"weights: {loaded.origin} lacks {plural(len(loaded.missing), 'tensor')} of the"
            f" backbone, which keep random values: {', '.join(loaded.missing)}"
        )
    return _Backbone(model.backbone.state_dict(), loaded.origin, features)


def _cached_features(config: TrainConfig, model: "CoverModel") -> "Features":
    """What --cache-features keeps. Raises ConfigError if that would change in training."""
    from covergenre.models.frozen_prefix import count_frozen, feature_shape
    from covergenre.training.features import Features

    if config.augment != "none":
        raise ConfigError(
            f"--cache-features: --augment {config.augment} changes the images in every epoch, so"
            " nothing can be cached; add --augment none",
            code="cache_features",
        )
    if not (count := count_frozen(model)):
        raise ConfigError(
            f"--cache-features: --freeze {config.freeze} trains the first layers of {config.model},"
            " so nothing can be cached; use --freeze all, or freeze the first convolutions",
            code="cache_features",
        )
    return Features(*feature_shape(model, count, Preprocessing().side, config.precision))


def _check_space(features: "Features", manifest: Manifest, folder: str) -> None:
    """Log the size of the cache. Raises ConfigError if a local disk has too little space for it."""
    albums = manifest.rows("train") + manifest.rows("dev")
    total = albums * features.record_bytes
    logger.info(
        f"--cache-features: {file_size(features.record_bytes)} per album, {file_size(total)} for"
        f" {plural(albums, 'album')} of train and dev, in {folder} until training is complete"
    )
    needed = total - sum(storage.list_sizes(folder).values())
    if storage.scheme(folder) == "" and needed > (free := _free_bytes(folder)):
        raise ConfigError(
            f"--cache-features: needs {file_size(needed)} in {folder}, where only"
            f" {file_size(free)} are free; use another --out, or freeze all layers (--freeze all),"
            " which needs less",
            code="cache_features",
        )


def _free_bytes(folder: str) -> int:
    existing = next(path for path in Path(folder).parents if path.exists())
    return shutil.disk_usage(existing).free


def _headline(config: TrainConfig, manifest: Manifest, workers: Workers, origin: str) -> str:
    kind = "GPU" if workers.use_gpu else "CPU"
    return (
        f"train {config.model} ({origin} weights, freeze {config.freeze}) on"
        f" {plural(manifest.rows('train'), 'album')}, {plural(len(manifest.genres), 'genre')};"
        f" {plural(workers.count, f'{kind} worker')}, {plural(config.epochs or 0, 'epoch')},"
        f" batch size {config.batch_size}, Adam, learning rate {config.learning_rate:g}"
    )


def _jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
