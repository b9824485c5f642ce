"""What every training worker runs: its share of each step, and of each dev evaluation."""

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from covergenre import models, storage
from covergenre.augment import augment
from covergenre.config import TrainConfig
from covergenre.covers import Preprocessing
from covergenre.dataset import Batch, BatchStream, TrainingData
from covergenre.errors import TrainingDivergedError
from covergenre.metrics import multilabel_metrics, nan_to_none
from covergenre.predict import Predictor, autocast, normalise, to_device, to_unit
from covergenre.runtime import Workers, quieten, use_cores
from covergenre.shards import Manifest

BETAS = (0.9, 0.999)
EPSILON = 1e-7
"""Of Adam: Keras's default, which the paper used; torch's is 1e-8."""
_REPORT_EVERY_SECONDS = 1.0
_CHECK_EVERY_STEPS = 16  # the loss for NaN: on a GPU each look waits for the step


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker is told. Pickled to each; the trunk goes by reference."""

    config: TrainConfig
    """Resolved: nothing is None but max_steps and workers."""
    manifest: Manifest
    preprocessing: Preprocessing
    workers: Workers
    trunk: Any
    """ObjectRef of the trunk's weights, in a list (a bare reference would be resolved), or None."""
    state: str
    """Folder for history.jsonl and steps.jsonl while training goes on."""
    monitor: Any
    """Actor that takes progress for the user's terminal."""

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
    trunk = ray.get(job.trunk[0]) if job.trunk else None
    worker = _Worker(
        job,
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=str(ray.train.torch.get_device()),
        trunk=trunk,
    )
    for epoch, steps in job.epochs():
        record = worker.run_epoch(epoch, steps)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if record["best"] and worker.rank == 0:
                worker.save(Path(folder) / "model.safetensors")
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            if worker.rank == 0:
                job.monitor.epoch.remote(record)
            ray.train.report({"epoch": epoch + 1}, checkpoint=checkpoint)


class _Worker:
    """One rank's model, optimizer and data."""

    def __init__(
        self, job: Job, *, rank: int, world: int, device: str, trunk: dict[str, torch.Tensor] | None
    ) -> None:
        config = job.config
        manifest = job.manifest
        self.rank, self.world = rank, world
        self._job, self._config, self._device = job, config, device
        self._model = models.build_model(config.model, len(manifest.genres), seed=config.seed)
        if trunk is not None:
            self._model.trunk.load_state_dict(trunk)
        models.freeze(self._model, config.freeze or "none")
        self._freeze_batch_norm = trunk is not None and config.batch_norm == "auto"
        self._model = to_device(self._model, device)
        self._net: nn.Module = self._model
        if world > 1:
            self._net = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        # Dropout may differ between ranks; weights, order and augmentation may not.
        torch.manual_seed(config.seed * 1_000_003 + rank)
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
        self._all_steps = sum(steps for _, steps in job.epochs())
        self._steps_done = 0
        self._best = -math.inf
        self._history: list[dict[str, Any]] = []
        self._step_losses: list[dict[str, Any]] = []
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
        self._stream = BatchStream(data, job.epochs())

    def run_epoch(self, epoch: int, steps: int) -> dict[str, Any]:
        """Train `steps` steps, then evaluate the dev split; the same record on every rank."""
        began = reported = time.monotonic()
        rows, unreported = 0, 0
        losses: list[torch.Tensor] = []
        for step in range(steps):
            batch, size = self._stream.step(step)
            losses.append(self._train_step(batch, size, epoch))
            rows += size
            unreported += size
            if step % _CHECK_EVERY_STEPS == 0:
                self._check_finite(losses, epoch)
            now = time.monotonic()
            if self.rank == 0 and now - reported > _REPORT_EVERY_SECONDS:
                # This rank's share of the loss, scaled up: near enough for a progress bar.
                self._job.monitor.steps.remote(epoch, unreported, float(losses[-1]) * self.world)
                reported, unreported = now, 0
        self._check_finite(losses, epoch)
        step_losses = self._sum(torch.stack(losses).double()).tolist()
        seconds = time.monotonic() - began
        if self.rank == 0:
            self._job.monitor.steps.remote(epoch, unreported, step_losses[-1])
        sizes = [
            min(self._config.batch_size, rows - s * self._config.batch_size) for s in range(steps)
        ]
        record = {
            "epoch": epoch + 1,
            "steps": steps,
            "train_loss": float(np.average(step_losses, weights=sizes)),
            **self._evaluate(),
            "images_per_second": rows / seconds,
            "seconds": time.monotonic() - began,
        }
        score = record["dev_pr_auc_micro"]
        # A dev split of one class has no PR AUC: then the latest epoch counts as the best.
        record["best"] = math.isnan(score) or score > self._best
        self._best = score if record["best"] else self._best
        self._history.append(record)
        first = self._steps_done - steps
        self._step_losses += [
            {"epoch": epoch + 1, "step": first + s, "loss": loss}
            for s, loss in enumerate(step_losses)
        ]
        if self.rank == 0:
            for name, records in (("history", self._history), ("steps", self._step_losses)):
                text = "".join(json.dumps(nan_to_none(r)) + "\n" for r in records)
                storage.put(storage.join(self._job.state, f"{name}.jsonl"), text.encode())
        return record

    def _train_step(self, batch: Batch, size: int, epoch: int) -> torch.Tensor:
        """One step; gives this rank's part of the step's mean loss, detached."""
        config = self._config
        mine = len(batch.rows)
        models.training_mode(self._model, freeze_batch_norm=self._freeze_batch_norm, rows=mine)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        pixels = batch.pixels if mine else np.zeros((1, *batch.pixels.shape[1:]), np.uint8)
        images = to_unit(pixels, self._device)
        images = augment(
            images, batch.rows, kind=config.augment or "none", seed=config.seed, epoch=epoch
        )
        with autocast(self._device, config.precision):
            logits = self._net(normalise(images, self._job.preprocessing)).float()
        if mine:
            targets = torch.from_numpy(batch.targets.copy()).to(self._device)
            by_row = functional.binary_cross_entropy_with_logits(
                logits, targets, reduction="none"
            ).mean(1)
            loss = by_row.sum() / size
        else:
            # A short last step can leave a rank without rows; the others wait for its gradients.
            loss = logits.sum() * 0.0
        total = loss * self.world  # DDP takes the mean over ranks; the sum is wanted
        if config.l2:
            total = total + config.l2 * torch.stack([w.square().sum() for w in self._decayed]).sum()
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        self._optimizer.step()
        self._steps_done += 1
        return loss.detach()

    def _check_finite(self, losses: list[torch.Tensor], epoch: int) -> None:
        """Raises TrainingDivergedError, and Ray ends the other ranks, which may wait for this."""
        if not bool(torch.isfinite(losses[-1])):  # once it is no number it stays so
            step = int(torch.isfinite(torch.stack(losses)).sum())
            raise self._diverged(f"from step {step + 1} of epoch {epoch + 1} on")

    def _diverged(self, when: str) -> TrainingDivergedError:
        rate = self._config.learning_rate
        return TrainingDivergedError(
            f"the loss is no number {when}; lower --learning-rate (it is {rate:g})"
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
        if self.world > 1:
            # Each rank's batch norm has seen its own rows last; rank 0's is what is saved.
            for buffer in self._model.buffers():
                distributed.broadcast(buffer, 0)
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

    def save(self, path: Path) -> None:
        """Write the weights of trunk and head as safetensors, float32."""
        from safetensors.torch import save_file

        state = {k: v.detach().cpu().contiguous() for k, v in self._model.state_dict().items()}
        save_file(state, path)
