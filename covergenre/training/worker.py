"""The training loop of a worker: its share of each step and of each evaluation of the dev split."""

import contextlib
import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from covergenre.cluster.ray_runtime import silence_ray_loggers
from covergenre.cluster.workers import use_cores
from covergenre.errors import DeviceMemoryError
from covergenre.models import frozen_prefix, networks
from covergenre.models.predictor import Predictor, autocast, normalise, to_device, to_unit
from covergenre.training import state as training_state
from covergenre.training.augment import augment
from covergenre.training.dev_evaluation import evaluate_dev
from covergenre.training.features import FeatureCache, Features
from covergenre.training.job import Job
from covergenre.training.loader import Batch, BatchStream, TrainingData, pixel_batches
from covergenre.training.losses import LossHistory
from covergenre.training.ranks import Ranks

BETAS = (0.9, 0.999)
EPSILON = 1e-7
"""Of Adam: the default of Keras, which the paper used; torch's default is 1e-8."""
_REPORT_EVERY_SECONDS = 1.0
_SYNC_EVERY_STEPS = 16
"""Steps between checks of the losses and of resize requests, which wait for the device."""


_SLOW_BF16 = (
    "--precision bf16: this CPU has no instructions for it (AVX-512), and a training step takes"
    " several times as long as with --precision fp32"
)


def training_loop(settings: dict[str, Any]) -> None:
    """Run by Ray Train in every worker. settings: {"job": Job}."""
    import ray
    import ray.train
    import ray.train.torch

    job: Job = settings["job"]
    silence_ray_loggers()
    use_cores(job.workers)
    context = ray.train.get_context()
    job.monitor.add_worker.remote(ray.get_runtime_context().current_actor)
    backbone = ray.get(job.backbone[0]) if job.backbone else None
    device = str(ray.train.torch.get_device())
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    Worker(job, ranks, backbone).run()


class Worker:
    """One rank's model, optimizer and data."""

    def __init__(self, job: Job, ranks: Ranks, backbone: dict[str, torch.Tensor] | None) -> None:
        """backbone: pretrained weights, or None."""
        config = job.config
        assert config.learning_rate is not None  # resolved
        self._job, self._config, self._ranks, self._steps = job, config, ranks, job.steps
        self._model = _build_model(job, ranks.device, backbone)
        self._freeze_batch_norm = backbone is not None and config.batch_norm == "auto"
        self._data = _training_data(job, ranks)
        self._net: nn.Module = self._model  # computes the inputs of a batch
        self._cache: FeatureCache | None = None
        if config.cache_features:
            frozen = frozen_prefix.count_frozen(self._model)
            self._frozen_layers = frozen_prefix.prefix(self._model, frozen)
            self._net = frozen_prefix.Tail(self._model, frozen)
            form = frozen_prefix.feature_shape(
                self._model, frozen, job.preprocessing.side, config.precision
            )
            self._cache = FeatureCache(job.features, Features(*form), self._data)
        self._ddp: DistributedDataParallel | None = None
        if ranks.world > 1:
            self._ddp = DistributedDataParallel(self._net, gradient_as_bucket_view=True)
        self._decayed = [
            module.weight
            for module in self._model.modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.requires_grad
        ]
        self._optimizer = torch.optim.Adam(
            [p for p in self._model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )
        self._predictor = Predictor(self._model, job.preprocessing, ranks.device, config.precision)
        self._state = training_state.resume(
            job.checkpoints, ranks, self._model, self._optimizer, self._log
        )
        self._losses = LossHistory(
            self._steps,
            job.baseline_loss,
            config.learning_rate,
            job.checkpoints,
            self._state.step_losses,
        )
        self._cache_seconds = 0.0
        """Spent on computing features, which counts for the epoch that follows."""
        self._waits: list[float] = []
        """Seconds that each step of the epoch has waited for its batch."""
        self._start_wait: float | None = None
        """The wait for the first batch, while the loading tasks start."""

    def run(self) -> None:
        """Train until complete, or until a requested resize of the group."""
        try:
            is_bf16 = self._config.precision == "bf16" and self._ranks.rank == 0
            if is_bf16 and _is_bf16_slow(self._ranks.device):
                self._log(_SLOW_BF16)
            self._stream = self._open_stream()
            while self._state.epoch < len(self._steps.epochs):
                if not self._run_epoch(self._state.epoch):
                    return
        except torch.OutOfMemoryError as error:
            # The ranks are in different states: the driver restarts them, with smaller batches.
            raise DeviceMemoryError("a training step does not fit in GPU memory") from error

    def _open_stream(self) -> BatchStream:
        epochs = list(enumerate(self._steps.epochs))[self._state.epoch :]
        if self._cache is None:
            batches = pixel_batches(self._data, epochs, self._state.step)
        else:
            began = time.monotonic()
            self._model.eval()
            self._cache.write(self._frozen_layers, self._ranks, self._config.precision, self._log)
            self._cache_seconds = time.monotonic() - began
            batches = self._cache.batches(epochs, self._state.step)
        return BatchStream(self._data, batches)

    def _run_epoch(self, epoch: int) -> bool:
        """Train the rest of an epoch and evaluate the dev split. False: exit for a resize."""
        steps = self._steps.epochs[epoch]
        start, first = time.monotonic(), self._state.step
        self._waits, self._start_wait = [], None if self._start_wait is None else 0.0
        if not self._train_steps(epoch, steps):
            return False
        seconds = time.monotonic() - start
        self._report_progress(epoch, self._losses.losses[-1])
        self._ranks.share_buffers(self._model)
        dev = evaluate_dev(self._stream, self._dev_logits, self._job.manifest, self._ranks)
        self._losses.check_dev(dev["dev_loss"], epoch)
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "steps": steps,
            "train_loss": self._losses.epoch_mean(steps),
            **dev,
            "images_per_second": (self._steps.rows_in(steps) - self._steps.rows_in(first))
            / seconds,
            "data_wait_share": self._data_wait_share(seconds),
            "seconds": time.monotonic() - start + self._cache_seconds,
        }
        self._cache_seconds = 0.0
        record["best"] = self._is_best(record["dev_pr_auc_micro"])
        self._state.history.append(record)
        self._state.epoch, self._state.step = epoch + 1, 0
        self._save(best=record["best"])
        if self._ranks.rank == 0:
            self._job.monitor.report_epoch.remote(record)
        return True

    def _is_best(self, score: float) -> bool:
        """Whether an epoch is the best so far. If PR AUC is undefined on the dev split (NaN), the
        latest epoch is the best."""
        best = self._state.best
        return best is None or math.isnan(score) or not score <= best["dev_pr_auc_micro"]

    def _train_steps(self, epoch: int, steps: int) -> bool:
        """Train the remaining steps of an epoch. False: a checkpoint was saved for a resize."""
        state, first, reported = self._state, self._state.step, time.monotonic()
        every = self._config.checkpoint_every
        pending: list[torch.Tensor] = []
        while state.step < steps:
            loss = self._train_step(epoch, state.step)
            pending.append(loss)
            state.step += 1
            state.steps_done += 1
            if state.step == steps:
                break  # a separate checkpoint is saved at the end of the epoch
            resize = False
            if (state.step - first) % _SYNC_EVERY_STEPS == 1:
                self._record(pending, epoch, steps)
                resize = self._is_resize_requested()
            now = time.monotonic()
            if self._ranks.rank == 0 and now - reported > _REPORT_EVERY_SECONDS:
                # An estimate from this rank's part of the loss, for the progress bar.
                self._report_progress(epoch, float(loss) * self._ranks.world)
                reported = now
            if resize or (every and state.steps_done % every == 0):
                self._record(pending, epoch, steps)
                if self._losses.losses[-1] <= self._losses.limit:  # else do not resume from here
                    self._save()
                    if resize:
                        return False
        self._record(pending, epoch, steps)
        return True

    def _next_batch(self, epoch: int, step: int) -> Batch:
        began = time.monotonic()
        batch = self._stream.step(epoch, step)
        wait = time.monotonic() - began
        if self._start_wait is None:
            self._start_wait = wait
        else:
            self._waits.append(wait)
        return batch

    def _data_wait_share(self, seconds: float) -> float:
        """The share of the `seconds` of an epoch's steps that the rank which waited longest has
        waited for batches, without the wait for the first batch of the worker group."""
        share = sum(self._waits) / max(seconds - (self._start_wait or 0.0), 1e-9)
        return float(max(self._ranks.gather(share)))

    def _train_step(self, epoch: int, step: int) -> torch.Tensor:
        """Train one step; returns this rank's part of the step's mean loss, detached."""
        batch = self._next_batch(epoch, step)
        networks.training_mode(
            self._model, freeze_batch_norm=self._freeze_batch_norm, rows=len(batch)
        )
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad(set_to_none=True)
        parts = -(-len(batch) // (self._job.microbatch or len(batch) or 1)) or 1
        cuts = np.linspace(0, len(batch), parts + 1).astype(int)
        losses: list[torch.Tensor] = []
        for start, stop in pairwise(cuts):
            last = stop == len(batch)
            # Gradients are summed over ranks once per step, in the last part.
            local = self._ddp.no_sync() if self._ddp and not last else contextlib.nullcontext()
            with local:
                part = batch[start:stop]
                losses.append(self._backward(part, self._steps.size(step), epoch, last=last))
        self._optimizer.step()
        return torch.stack(losses).sum()

    def _backward(self, part: Batch, size: int, epoch: int, *, last: bool) -> torch.Tensor:
        """Compute gradients for rows of a step of `size` rows; returns their part of the loss."""
        config = self._config
        # The same on every rank, and a function of the step alone: see networks.BatchDropout.
        torch.manual_seed((config.seed * 1_000_003 + self._state.steps_done) % 2**63)
        networks.share_dropout(self._model, part.offsets, size)
        inputs = self._input_tensor(part, epoch)
        with autocast(self._ranks.device, config.precision):
            logits = (self._ddp or self._net)(inputs).float()
        if len(part):
            targets = torch.from_numpy(part.targets.copy()).to(self._ranks.device)
            by_row = functional.binary_cross_entropy_with_logits(
                logits, targets, reduction="none"
            ).mean(1)
            loss = by_row.sum() / size
        else:
            loss = logits.sum() * 0.0
        total = loss * self._ranks.world  # DDP averages gradients over ranks; this makes it a sum
        if config.l2 and last:
            total = total + config.l2 * torch.stack([w.square().sum() for w in self._decayed]).sum()
        total.backward()
        return loss.detach()

    def _input_tensor(self, part: Batch, epoch: int) -> torch.Tensor:
        """What the network computes: normalized images, or cached features."""
        # A rank without rows computes an ignored row, because the others wait for its gradients.
        values = part.inputs if len(part) else np.zeros((1, *part.inputs.shape[1:]), np.uint8)
        if self._cache is not None:
            return self._cache.features.to_tensor(values, self._ranks.device)
        images = augment(
            to_unit(values, self._ranks.device),
            part.rows,
            kind=self._config.augment or "none",
            seed=self._config.seed,
            epoch=epoch,
        )
        return normalise(images, self._job.preprocessing)

    def _dev_logits(self, batch: Batch) -> torch.Tensor:
        """Logits in float32 of a batch of the dev split."""
        device = self._ranks.device
        if self._cache is None:
            return self._predictor.logits_of(to_unit(batch.inputs, device))
        self._model.eval()
        with torch.inference_mode(), autocast(device, self._config.precision):
            features = self._cache.features.to_tensor(batch.inputs, device)
            logits_BG: torch.Tensor = self._net(features)
            return logits_BG.float()

    def _learning_rate(self) -> float:
        base = self._config.learning_rate or 0.0
        if self._config.schedule == "constant":
            return base
        return base * 0.5 * (1 + math.cos(math.pi * self._state.steps_done / self._steps.total))

    def _record(self, pending: list[torch.Tensor], epoch: int, steps: int) -> None:
        """Sum the pending losses over ranks and add them to the loss history. Raises
        TrainingDivergedError, on all ranks if on one."""
        if pending:
            losses = self._ranks.sum(torch.stack(pending).double()).tolist()
            pending.clear()
            self._losses.append(losses, epoch=epoch, done=self._state.step, steps=steps)

    def _is_resize_requested(self) -> bool:
        """Whether the driver has requested a resize of the group; the same on every rank."""
        if not self._config.is_elastic:
            return False
        import ray

        request = self._job.monitor.is_resize_requested.remote
        return self._ranks.first_decides(self._ranks.rank == 0 and ray.get(request()))

    def _report_progress(self, epoch: int, loss: float) -> None:
        if self._ranks.rank == 0:
            done = self._steps.rows_before(epoch, self._state.step)
            self._job.monitor.report_progress.remote(epoch, done, loss)

    def _log(self, line: str) -> None:
        self._job.monitor.report_message.remote(line)

    def _save(self, *, best: bool = False) -> None:
        """Write a checkpoint; every rank calls it, rank 0 writes."""
        self._ranks.share_buffers(self._model)
        if not all(bool(torch.isfinite(w).all()) for w in self._model.state_dict().values()):
            what = f"weights are not finite (NaN or Inf) after step {self._state.steps_done}"
            raise self._losses.diverged(f"{what} of the run", "weights_not_finite")
        if self._ranks.rank == 0:
            self._state.step_losses = self._losses.losses
            training_state.save(
                self._job.checkpoints, self._state, self._model, self._optimizer, best=best
            )


def _is_bf16_slow(device: str) -> bool:
    """Whether torch computes bf16 convolutions on this device in its reference implementation."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _build_model(
    job: Job, device: str, backbone: dict[str, torch.Tensor] | None
) -> networks.CoverModel:
    config = job.config
    model = networks.build_model(config.model, len(job.manifest.genres), seed=config.seed)
    if backbone is not None:
        model.backbone.load_state_dict(backbone)
    networks.freeze(model, config.freeze or "none")
    return to_device(model, device)


def _training_data(job: Job, ranks: Ranks) -> TrainingData:
    manifest, config = job.manifest, job.config
    return TrainingData(
        train=tuple(manifest.shard_uris("train")),
        train_rows=tuple(shard.rows for shard in manifest.shards["train"]),
        dev=tuple(manifest.shard_uris("dev")),
        dev_rows=tuple(shard.rows for shard in manifest.shards["dev"]),
        genres=manifest.genres,
        preprocessing=job.preprocessing,
        batch_size=config.batch_size,
        seed=config.seed,
        shards_per_window=config.shuffle_window,
        rank=ranks.rank,
        world=ranks.world,
    )
