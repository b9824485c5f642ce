"""What every training worker runs: its share of each step, and of each dev evaluation."""

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from covergenre.cluster.ray_runtime import silence_ray_loggers
from covergenre.cluster.workers import Workers, use_cores
from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import DeviceMemoryError, TrainingDivergedError
from covergenre.formatting import plural
from covergenre.metrics import multilabel_metrics, nan_to_none
from covergenre.models import networks
from covergenre.models.predictor import Predictor, autocast, normalise, to_device, to_unit
from covergenre.training import checkpoints
from covergenre.training.augment import augment
from covergenre.training.loader import Batch, BatchStream, TrainingData

BETAS = (0.9, 0.999)
EPSILON = 1e-7
"""Of Adam: Keras's default, which the paper used; torch's is 1e-8."""
DEV_METRICS = (
    *("roc_auc_micro", "roc_auc_macro", "pr_auc_micro", "pr_auc_macro", "precision", "recall"),
    *("macro_genres", "genres_without_auc", "chance_standard_error", "better_than_chance"),
)
"""What the record of an epoch has of the dev split, each name with dev_ before it."""
_TELL_EVERY_SECONDS = 1.0
_CHECK_EVERY_STEPS = 16  # the losses, and the driver's wishes: each look waits for the step
_DIVERGED = 10.0
"""Times the loss of always predicting the base rates: beyond that, training has diverged."""
_UNTRAINED_LOSS = math.log(2)
"""Of a model that scores everything 0.5, as an untrained one nearly does."""


def largest_loss(baseline: float) -> float:
    """The mean loss of an epoch, or of the dev split, over which training counts as diverged.

    baseline: the loss of always predicting the base rates. Where genres are very rare (or all
    albums have them) it is near 0, and a model that has yet to learn that is far above it: the
    limit is at least twice the loss of an untrained model.
    """
    return max(_DIVERGED * baseline, 2 * _UNTRAINED_LOSS)


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker is told. Pickled to each; the backbone goes by reference."""

    config: TrainConfig
    """Resolved: nothing is None but max_steps, workers and checkpoint_every."""
    manifest: Manifest
    preprocessing: Preprocessing
    baseline_loss: float
    """Of always predicting the training split's base rates: see metrics.base_rate_loss."""
    workers: Workers
    backbone: Any
    """ObjectRef of its weights, in a list (a bare reference would be resolved), or None."""
    checkpoints: str
    """Folder that checkpoints are written to, and the newest taken up from."""
    monitor: Any
    """Actor that takes progress for the user's terminal, and has the driver's wishes."""
    accumulate: int = 1
    """Parts that a worker computes its share of a step in, where the device's memory is short."""

    def epochs(self) -> list[tuple[int, int]]:
        """(epoch, its steps) of the whole run; --max-steps may end it early."""
        config = self.config
        rows = self.manifest.rows("train")
        steps = -(-rows // config.batch_size)
        left = config.max_steps or math.inf
        out: list[tuple[int, int]] = []
        for epoch in range(config.epochs or 0):
            if left > 0:
                out.append((epoch, int(min(steps, left))))
                left -= steps
        return out


def training_loop(settings: dict[str, Any]) -> None:
    """Run by Ray Train in every worker. settings: {"job": Job}."""
    import ray
    import ray.train
    import ray.train.torch

    job: Job = settings["job"]
    silence_ray_loggers()
    use_cores(job.workers)
    context = ray.train.get_context()
    job.monitor.enlist.remote(ray.get_runtime_context().current_actor)
    backbone = ray.get(job.backbone[0]) if job.backbone else None
    worker = _Worker(
        job,
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=str(ray.train.torch.get_device()),
        backbone=backbone,
    )
    worker.run()


class _Worker:
    """One rank's model, optimizer and data."""

    def __init__(
        self,
        job: Job,
        *,
        rank: int,
        world: int,
        device: str,
        backbone: dict[str, torch.Tensor] | None,
    ) -> None:
        config = job.config
        manifest = job.manifest
        self.rank, self.world = rank, world
        self._job, self._config, self._device = job, config, device
        self._epochs = job.epochs()
        self._model = networks.build_model(config.model, len(manifest.genres), seed=config.seed)
        if backbone is not None:
            self._model.backbone.load_state_dict(backbone)
        networks.freeze(self._model, config.freeze or "none")
        self._freeze_batch_norm = backbone is not None and config.batch_norm == "auto"
        self._model = to_device(self._model, device)
        self._net: nn.Module = self._model
        if world > 1:
            self._net = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        self._decayed = [
            module.weight
            for module in self._model.modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.requires_grad
        ]
        self._optimizer = torch.optim.Adam(
            [p for p in self._model.parameters() if p.requires_grad],
            lr=config.learning_rate or 0.0,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )
        self._predictor = Predictor(self._model, job.preprocessing, device, config.precision)
        self._largest_loss = largest_loss(job.baseline_loss)
        self._all_steps = sum(steps for _, steps in self._epochs)
        self._steps_done = 0
        # Where training stands, beside weights and Adam's state; what a checkpoint keeps of it.
        self._epoch = self._step = 0
        self._history: list[dict[str, Any]] = []
        self._step_losses: list[float] = []
        """Of the whole run, over all ranks."""
        self._best: dict[str, Any] | None = None
        self._best_weights: str | None = None
        self._resume()
        data = TrainingData(
            train=tuple(manifest.shard_uris("train")),
            train_rows=tuple(shard.rows for shard in manifest.shards["train"]),
            dev=tuple(manifest.shard_uris("dev")),
            dev_rows=tuple(shard.rows for shard in manifest.shards["dev"]),
            genres=manifest.genres,
            preprocessing=job.preprocessing,
            batch_size=config.batch_size,
            seed=config.seed,
            shards_per_window=config.shuffle_window,
            rank=rank,
            world=world,
        )
        self._stream = BatchStream(data, self._epochs[self._epoch :], first_step=self._step)

    def run(self) -> None:
        """Train from where the run stands to its end, or to the driver's wish to regroup."""
        try:
            while self._epoch < len(self._epochs):
                if not self._run_epoch(*self._epochs[self._epoch]):
                    return
        except torch.OutOfMemoryError as error:
            # The ranks are no longer in step: the driver starts the group anew, in more parts.
            raise DeviceMemoryError("a step does not fit the GPU's memory") from error

    def _run_epoch(self, epoch: int, steps: int) -> bool:
        """The rest of an epoch, and the evaluation of the dev split. False: regroup first."""
        began = told = time.monotonic()
        first, rows = self._step, 0
        every = self._config.checkpoint_every
        losses: list[torch.Tensor] = []
        while self._step < steps:
            batch, size = self._stream.step(self._step)
            loss = self._train_step(batch, size, epoch)
            losses.append(loss)
            self._step += 1
            self._steps_done += 1
            rows += size
            if self._step == steps:
                break
            regroup = False
            if (self._step - first) % _CHECK_EVERY_STEPS == 1:
                self._gather(losses, epoch, steps)
                regroup = self._wants_regroup()
            now = time.monotonic()
            if self.rank == 0 and now - told > _TELL_EVERY_SECONDS:
                # This rank's share of the loss, scaled up: near enough for a progress bar.
                self._tell(epoch, float(loss) * self.world)
                told = now
            if regroup or (every and self._steps_done % every == 0):
                self._gather(losses, epoch, steps)
                if self._step_losses[-1] <= self._largest_loss:  # else nothing to resume from
                    self._save()
                    if regroup:
                        return False
        self._gather(losses, epoch, steps)
        seconds = time.monotonic() - began
        if self.rank == 0:
            self._tell(epoch, self._step_losses[-1])
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "steps": steps,
            "train_loss": self._loss_sum(steps) / self._rows_in(steps),
            **self._evaluate(epoch),
            "images_per_second": rows / seconds,
            "seconds": time.monotonic() - began,
        }
        score = record["dev_pr_auc_micro"]
        # A dev split of one class has no PR AUC: then the latest epoch counts as the best.
        record["best"] = (
            self._best is None or math.isnan(score) or not score <= self._best["dev_pr_auc_micro"]
        )
        self._history.append(record)
        if record["best"]:
            self._best = record
        self._epoch, self._step = self._epoch + 1, 0
        self._save(best=record["best"])
        if self.rank == 0:
            self._job.monitor.epoch.remote(record)
        return True

    def _rows_in(self, steps: int) -> int:
        """Albums in the first `steps` steps of an epoch."""
        return min(steps * self._config.batch_size, self._job.manifest.rows("train"))

    def _loss_sum(self, steps: int) -> float:
        """Sum of the losses of all albums in the `steps` steps of this epoch that are recorded."""
        size = self._config.batch_size
        sizes = np.full(steps, size)
        sizes[-1] = self._rows_in(steps) - (steps - 1) * size
        return float(np.dot(self._step_losses[-steps:], sizes))

    def _tell(self, epoch: int, loss: float) -> None:
        """Where the run stands, for the progress bar."""
        rows, size = self._job.manifest.rows("train"), self._config.batch_size
        steps = [*(steps for _, steps in self._epochs[:epoch]), self._step]
        done = sum(min(rows, count * size) for count in steps)
        self._job.monitor.at.remote(epoch, done, loss)

    def _gather(self, losses: list[torch.Tensor], epoch: int, steps: int) -> None:
        """Move this rank's parts of the steps' losses, summed over ranks, into the run's record.

        Raises TrainingDivergedError, on every rank, where a loss is not finite, or as soon as the
        mean loss of the epoch, which has `steps` steps, is bound to be too large: no loss is
        negative, so what is gathered already can be enough. Where a run is resumed, and how often
        this is called, makes no difference to whether an epoch passes.
        """
        if not losses:
            return
        summed = self._sum(torch.stack(losses).double()).tolist()
        losses.clear()
        for step, loss in enumerate(summed, self._step - len(summed)):
            if not math.isfinite(loss):
                raise self._diverged(
                    f"the loss is not finite from step {step + 1} of epoch {epoch + 1} on"
                )
            self._step_losses.append(loss)
        total = self._loss_sum(self._step)
        if total > self._largest_loss * self._rows_in(steps):
            raise self._diverged(
                f"the mean training loss over {plural(self._step, 'step')} of epoch {epoch + 1} is"
                f" {total / self._rows_in(self._step):.3g}"
            )

    def _wants_regroup(self) -> bool:
        """Whether the driver wants the run regrouped; the same on every rank."""
        import ray

        wish = self.rank == 0 and ray.get(self._job.monitor.wants_regroup.remote())
        return bool(self._sum(torch.tensor(float(wish), device=self._device)).item())

    def _train_step(self, batch: Batch, size: int, epoch: int) -> torch.Tensor:
        """One step; gives this rank's part of the step's mean loss, detached."""
        mine = len(batch.rows)
        networks.training_mode(self._model, freeze_batch_norm=self._freeze_batch_norm, rows=mine)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad(set_to_none=True)
        first = size * self.rank // self.world  # of this rank, among the rows of the step
        cuts = np.linspace(0, mine, min(self._job.accumulate, max(mine, 1)) + 1).astype(int)
        losses: list[torch.Tensor] = []
        for start, stop in pairwise(cuts):
            part = Batch(
                batch.rows[start:stop], batch.pixels[start:stop], batch.targets[start:stop]
            )
            last = stop == mine
            # Gradients meet once a step, with those of the last part.
            ranks = self._net if isinstance(self._net, DistributedDataParallel) else None
            with ranks.no_sync() if ranks and not last else contextlib.nullcontext():
                losses.append(self._backward(part, first + int(start), size, epoch, last=last))
        self._optimizer.step()
        return torch.stack(losses).sum()

    def _backward(
        self, part: Batch, first: int, size: int, epoch: int, *, last: bool
    ) -> torch.Tensor:
        """Gradients of some rows of a step, `first` of `size` and those that follow."""
        config = self._config
        rows = len(part.rows)
        # The same on every rank, and a function of the step alone: see models.shared_dropout.
        torch.manual_seed((config.seed * 1_000_003 + self._steps_done) % 2**63)
        networks.share_dropout(self._model, first, size)
        pixels = part.pixels if rows else np.zeros((1, *part.pixels.shape[1:]), np.uint8)
        images = to_unit(pixels, self._device)
        images = augment(
            images, part.rows, kind=config.augment or "none", seed=config.seed, epoch=epoch
        )
        with autocast(self._device, config.precision):
            logits = self._net(normalise(images, self._job.preprocessing)).float()
        if rows:
            targets = torch.from_numpy(part.targets.copy()).to(self._device)
            by_row = functional.binary_cross_entropy_with_logits(
                logits, targets, reduction="none"
            ).mean(1)
            loss = by_row.sum() / size
        else:
            # A short last step can leave a rank without rows; the others wait for its gradients.
            loss = logits.sum() * 0.0
        total = loss * self.world  # DDP takes the mean over ranks; the sum is wanted
        if config.l2 and last:
            total = total + config.l2 * torch.stack([w.square().sum() for w in self._decayed]).sum()
        total.backward()
        return loss.detach()

    def _diverged(self, what: str) -> TrainingDivergedError:
        kept = checkpoints.latest_step(self._job.checkpoints)
        last = (
            f"the last good checkpoint is of step {kept}, in {self._job.checkpoints}; lower"
            " --learning-rate, and choose another --out"
            if kept
            else "there is no checkpoint yet; lower --learning-rate"
        )
        return TrainingDivergedError(
            f"training diverged: {what}, where always predicting the base rates of the genres has"
            f" a loss of {self._job.baseline_loss:.3g} (limit {self._largest_loss:.3g}); the"
            f" learning rate is {self._config.learning_rate:g}; {last}"
        )

    def _learning_rate(self) -> float:
        base = self._config.learning_rate or 0.0
        if self._config.schedule == "constant":
            return base
        return base * 0.5 * (1 + math.cos(math.pi * self._steps_done / self._all_steps))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def _evaluate(self, epoch: int) -> dict[str, Any]:
        """Metrics of the whole dev split, every album once; the same on every rank.

        Raises TrainingDivergedError, on every rank, where the loss is not finite or too large.
        """
        genres = len(self._job.manifest.genres)
        rows, scores, targets = [np.empty(0, np.int64)], [], []
        scores.append(np.empty((0, genres), np.float32))
        targets.append(np.empty((0, genres), np.float32))
        # From logits, not from scores: those of a diverged model round to 0 and 1.
        losses = [np.empty(0)]
        self._share_buffers()
        for batch in self._stream.dev():
            logits = self._predictor.logits_of(to_unit(batch.pixels, self._device))
            rows.append(batch.rows)
            scores.append(logits.sigmoid().cpu().numpy())
            targets.append(batch.targets)
            by_pair = functional.binary_cross_entropy_with_logits(
                logits.cpu().double(),
                torch.from_numpy(batch.targets.astype(np.float64)),
                reduction="none",
            )
            losses.append(by_pair.mean(1).numpy())
        columns = (rows, scores, targets, losses)
        mine = tuple(np.concatenate(column) for column in columns)
        parts: list[Any] = [mine]
        if self.world > 1:
            parts = [None] * self.world
            distributed.all_gather_object(parts, mine)
        seen, y_score, y_true, losses_by_album = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        if len(seen) != self._job.manifest.rows("dev") or len(np.unique(seen)) != len(seen):
            raise AssertionError(f"dev split: {len(seen)} rows were evaluated")
        loss = float(losses_by_album.mean())
        if not math.isfinite(loss):
            raise self._diverged(f"the dev loss is not finite after epoch {epoch + 1}")
        if loss > self._largest_loss:
            raise self._diverged(f"the dev loss after epoch {epoch + 1} is {loss:.3g}")
        measured = multilabel_metrics(y_true, y_score, self._job.manifest.genres.names)
        return {"dev_loss": loss, **{f"dev_{name}": measured[name] for name in DEV_METRICS}}

    def _share_buffers(self) -> None:
        """Each rank's batch norm has seen its own rows last; rank 0's is what is saved."""
        if self.world > 1:
            for buffer in self._model.buffers():
                distributed.broadcast(buffer, 0)

    def _save(self, *, best: bool = False) -> None:
        """Write where the run stands; every rank calls it, rank 0 writes."""
        self._share_buffers()
        weights = self._model.state_dict()
        if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
            raise self._diverged(f"weights are not finite after step {self._steps_done} of the run")
        if self.rank != 0:
            return
        folder = self._job.checkpoints
        named = {self._best_weights}  # by the checkpoint before this
        if best:
            self._best_weights = checkpoints.save(folder, "best", self._steps_done, weights)
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        for name, parameter in self._trained():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        state = {
            "epoch": self._epoch,
            "step": self._step,
            "steps_done": self._steps_done,
            "best_weights": self._best_weights,
            "history": [nan_to_none(record) for record in self._history],
            "step_losses": self._step_losses,
        }
        checkpoints.save(folder, "step", self._steps_done, tensors, state)
        checkpoints.prune(folder, named | {self._best_weights})

    def _resume(self) -> None:
        """Take up the newest good checkpoint, the same one on every rank; none: begin."""
        folder = self._job.checkpoints
        with tempfile.TemporaryDirectory() as temporary:
            found: checkpoints.Checkpoint | None = None
            if self.rank == 0:
                found = checkpoints.newest(folder, Path(temporary), self._log)
            name = [found.name if found else None]
            if self.world > 1:
                distributed.broadcast_object_list(name, 0)
            if name[0] is None:
                return
            if self.rank != 0:
                found = checkpoints.fetch(folder, name[0], Path(temporary))
            if found is None:
                raise RuntimeError(f"{folder}/{name[0]}: gone or damaged since rank 0 read it")
            state, tensors = found.state(), found.tensors()
        self._model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        for parameter_name, parameter in self._trained():
            self._optimizer.state[parameter] = {
                "step": tensors[f"adam.step.{parameter_name}"].to(self._device),
                # In the layout of the parameter, as Adam itself makes them.
                **{
                    key: torch.empty_like(parameter).copy_(tensors[f"adam.{key}.{parameter_name}"])
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }
        self._epoch, self._step = state["epoch"], state["step"]
        self._steps_done = state["steps_done"]
        self._history = [
            {key: math.nan if value is None else value for key, value in record.items()}
            for record in state["history"]
        ]
        self._step_losses = state["step_losses"]
        self._best_weights = state["best_weights"]
        self._best = next((r for r in reversed(self._history) if r["best"]), None)

    def _log(self, line: str) -> None:
        self._job.monitor.log.remote(line)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
