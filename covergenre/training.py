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

from covergenre import checkpoints, models
from covergenre.augment import augment
from covergenre.config import TrainConfig
from covergenre.covers import Preprocessing
from covergenre.dataset import Batch, BatchStream, TrainingData
from covergenre.errors import DeviceMemoryError, TrainingDivergedError
from covergenre.metrics import multilabel_metrics, nan_to_none
from covergenre.predict import Predictor, autocast, normalise, to_device, to_unit
from covergenre.runtime import Workers, quieten, use_cores
from covergenre.shards import Manifest

BETAS = (0.9, 0.999)
EPSILON = 1e-7
"""Of Adam: Keras's default, which the paper used; torch's is 1e-8."""
_TELL_EVERY_SECONDS = 1.0
_CHECK_EVERY_STEPS = 16  # the loss for NaN, and the driver's wishes: each look waits for the step


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker is told. Pickled to each; the trunk goes by reference."""

    config: TrainConfig
    """Resolved: nothing is None but max_steps, workers and checkpoint_every."""
    manifest: Manifest
    preprocessing: Preprocessing
    workers: Workers
    trunk: Any
    """ObjectRef of the trunk's weights, in a list (a bare reference would be resolved), or None."""
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
    quieten()
    use_cores(job.workers)
    context = ray.train.get_context()
    job.monitor.enlist.remote(ray.get_runtime_context().current_actor)
    trunk = ray.get(job.trunk[0]) if job.trunk else None
    worker = _Worker(
        job,
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=str(ray.train.torch.get_device()),
        trunk=trunk,
    )
    worker.run()


class _Worker:
    """One rank's model, optimizer and data."""

    def __init__(
        self, job: Job, *, rank: int, world: int, device: str, trunk: dict[str, torch.Tensor] | None
    ) -> None:
        config = job.config
        manifest = job.manifest
        self.rank, self.world = rank, world
        self._job, self._config, self._device = job, config, device
        self._epochs = job.epochs()
        self._model = models.build_model(config.model, len(manifest.genres), seed=config.seed)
        if trunk is not None:
            self._model.trunk.load_state_dict(trunk)
        models.freeze(self._model, config.freeze or "none")
        self._freeze_batch_norm = trunk is not None and config.batch_norm == "auto"
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
            losses.append(self._train_step(batch, size, epoch))
            self._step += 1
            self._steps_done += 1
            rows += size
            if self._step == steps:
                break
            regroup = False
            if (self._step - first) % _CHECK_EVERY_STEPS == 1:
                regroup = self._agree(losses, epoch)
            now = time.monotonic()
            if self.rank == 0 and now - told > _TELL_EVERY_SECONDS:
                # This rank's share of the loss, scaled up: near enough for a progress bar.
                self._tell(epoch, float(losses[-1]) * self.world)
                told = now
            if regroup or (every and self._steps_done % every == 0):
                self._gather(losses, epoch)
                self._save()
            if regroup:
                return False
        self._gather(losses, epoch)
        seconds = time.monotonic() - began
        if self.rank == 0:
            self._tell(epoch, self._step_losses[-1])
        sizes = [self._rows_of(step) for step in range(steps)]
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "steps": steps,
            "train_loss": float(np.average(self._step_losses[-steps:], weights=sizes)),
            **self._evaluate(),
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

    def _rows_of(self, step: int) -> int:
        size = self._config.batch_size
        return min(size, self._job.manifest.rows("train") - step * size)

    def _tell(self, epoch: int, loss: float) -> None:
        """Where the run stands, for the progress bar."""
        rows, size = self._job.manifest.rows("train"), self._config.batch_size
        steps = [*(steps for _, steps in self._epochs[:epoch]), self._step]
        done = sum(min(rows, count * size) for count in steps)
        self._job.monitor.at.remote(epoch, done, loss)

    def _gather(self, losses: list[torch.Tensor], epoch: int) -> None:
        """Move this rank's parts of the steps' losses, summed over ranks, into the run's record."""
        if not losses:
            return
        summed = self._sum(torch.stack(losses).double()).tolist()
        losses.clear()
        for step, loss in enumerate(summed, self._step - len(summed)):
            if not math.isfinite(loss):
                raise self._diverged(f"from step {step + 1} of epoch {epoch + 1} on")
            self._step_losses.append(loss)

    def _agree(self, losses: list[torch.Tensor], epoch: int) -> bool:
        """Whether the driver wants the run regrouped; the same on every rank.

        Raises TrainingDivergedError, on every rank, where the loss is no number.
        """
        import ray

        wish = self.rank == 0 and ray.get(self._job.monitor.wants_regroup.remote())
        flags = torch.tensor([float(losses[-1]) * 0.0, float(wish)], dtype=torch.float64)
        diverged, regroup = self._sum(flags.to(self._device)).tolist()
        if math.isnan(diverged):
            self._gather(losses, epoch)
        return bool(regroup)

    def _train_step(self, batch: Batch, size: int, epoch: int) -> torch.Tensor:
        """One step; gives this rank's part of the step's mean loss, detached."""
        mine = len(batch.rows)
        models.training_mode(self._model, freeze_batch_norm=self._freeze_batch_norm, rows=mine)
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
        models.share_dropout(self._model, first, size)
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

    def _diverged(self, when: str) -> TrainingDivergedError:
        rate = self._learning_rate()
        kept = checkpoints.latest_step(self._job.checkpoints)
        last = (
            f"the last good checkpoint is of step {kept}, in {self._job.checkpoints}"
            if kept
            else "there is no checkpoint yet"
        )
        return TrainingDivergedError(
            f"the loss is no number {when}, at learning rate {rate:g}; {last};"
            " lower --learning-rate"
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

    def _evaluate(self) -> dict[str, float]:
        """Metrics of the whole dev split, every album once; the same on every rank."""
        genres = len(self._job.manifest.genres)
        rows, scores, targets = [np.empty(0, np.int64)], [], []
        scores.append(np.empty((0, genres), np.float32))
        targets.append(np.empty((0, genres), np.float32))
        self._share_buffers()
        for batch in self._stream.dev():
            rows.append(batch.rows)
            scores.append(self._predictor(batch.pixels))
            targets.append(batch.targets)
        mine = (np.concatenate(rows), np.concatenate(scores), np.concatenate(targets))
        parts: list[Any] = [mine]
        if self.world > 1:
            parts = [None] * self.world
            distributed.all_gather_object(parts, mine)
        seen, y_score, y_true = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(seen) != self._job.manifest.rows("dev") or len(np.unique(seen)) != len(seen):
            raise AssertionError(f"dev split: {len(seen)} rows were evaluated")
        if not np.isfinite(y_score).all():
            raise self._diverged("after the last step")
        measured = multilabel_metrics(y_true, y_score, self._job.manifest.genres.names)
        names = ("roc_auc_micro", "roc_auc_macro", "pr_auc_micro", "pr_auc_macro")
        p = np.clip(y_score.astype(np.float64), EPSILON, 1 - EPSILON)
        loss = -np.mean(y_true * np.log(p) + (1 - y_true) * np.log(1 - p))
        return {
            "dev_loss": float(loss),
            **{f"dev_{name}": measured[name] for name in (*names, "precision", "recall")},
        }

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
            raise self._diverged(f"after step {self._steps_done} of the run")
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
                found = checkpoints.newest(folder, Path(temporary), self._say)
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

    def _say(self, line: str) -> None:
        self._job.monitor.say.remote(line)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
