"""The training loop, relative to the bare training step on tensors in memory.

    uv run python -m benchmarks.training                       # mobilenet_v2
    uv run python -m benchmarks.training --model vgg16         # with the paper's frozen layers
    uv run python -m benchmarks.training --precision bf16

The loop is that of a worker of `train`, with its loading tasks on Ray, in this process; the bare
step has the same model, loss, optimizer and batch size. They alternate, --rounds times. The first
step of the loop, which waits for the loading tasks to start, does not count, nor do evaluation and
checkpoints at the end of an epoch. Both are measured in wall time and in CPU time of all processes:
on a machine where all cores are busy the two ratios agree, and on a shared machine the ratio of CPU
time is the more reliable one.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional

from benchmarks import run_benchmark
from covergenre.cluster.ray_runtime import start_ray
from covergenre.cluster.workers import Workers
from covergenre.config import PrepareConfig, TrainConfig
from covergenre.data.dataset import Manifest, read_manifest
from covergenre.data.image_decoding import Preprocessing
from covergenre.demo.sample import write_sample
from covergenre.metrics import base_rate_loss
from covergenre.models import networks
from covergenre.models.predictor import autocast, normalise, to_device, to_unit
from covergenre.registry import MODELS
from covergenre.stages.prepare import prepare
from covergenre.training.job import Job
from covergenre.training.monitor import Monitor
from covergenre.training.ranks import Ranks
from covergenre.training.worker import BETAS, EPSILON, Worker

logger = logging.getLogger(__name__)

Times = tuple[float, float]
"""(wall time, CPU time of all processes), in seconds."""


def times() -> Times:
    """Now. CPU time is that of this process and of its children: Ray and its tasks."""
    me = psutil.Process()
    cpu = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return time.perf_counter(), sum(used.user + used.system for used in cpu)


class TimedWorker(Worker):
    """Notes the time after each step."""

    marks: list[Times]

    def _train_step(self, epoch: int, step: int) -> torch.Tensor:
        loss = super()._train_step(epoch, step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(times())
        return loss


def synthetic_dataset(folder: Path, albums: int) -> Manifest:
    """A dataset of synthetic covers, nearly all of them to train on."""
    catalog = write_sample(folder / "catalog", albums)
    out = str(folder / "dataset")
    fractions = (0.95, 0.04, 0.01)
    prepare(PrepareConfig(catalog=str(catalog), out=out, min_share=0.0, split_fractions=fractions))
    return read_manifest(out)


def make_job(manifest: Manifest, folder: Path, config: TrainConfig, monitor: Any) -> Job:
    """A training run as the driver describes it to a worker."""
    return Job(
        config=config.resolved(),
        manifest=manifest,
        preprocessing=Preprocessing(),
        baseline_loss=base_rate_loss(manifest.genre_counts("train"), manifest.rows("train")),
        workers=Workers(1, torch.cuda.is_available(), 0.5, 1),
        backbone=None,
        checkpoints=str(folder / "checkpoints"),
        features=str(folder / "features"),
        monitor=monitor,
        microbatch=config.microbatch,
    )


def ray_monitor() -> Any:
    """The actor that workers report to."""
    import ray

    return ray.remote(Monitor).options(num_cpus=0).remote()


def loop_step(job: Job, device: str) -> tuple[Times, float]:
    """(time per step of the loop, share of data wait), for one run of `job`."""
    worker = TimedWorker(job, Ranks(0, 1, device), None)
    worker.marks = []
    worker.run()
    first, last = worker.marks[0], worker.marks[-1]
    steps = len(worker.marks) - 1
    wall, cpu = ((b - a) / steps for a, b in zip(first, last, strict=True))
    return (wall, cpu), worker._state.history[-1]["data_wait_share"]


def bare_step(config: TrainConfig, genres: int, device: str) -> Callable[[], None]:
    """A training step on tensors in memory."""
    config, spec = config.resolved(), Preprocessing()
    model = to_device(networks.build_model(config.model, genres, seed=0), device)
    networks.freeze(model, config.freeze or "none")
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate or 0.0,
        betas=BETAS,
        eps=EPSILON,
        fused=True,
    )
    shape = (config.batch_size, spec.side, spec.side, 3)
    images = to_unit(np.random.default_rng(0).integers(0, 255, shape, np.uint8), device)
    targets = torch.rand(config.batch_size, genres, device=device)
    networks.training_mode(model, freeze_batch_norm=False, rows=config.batch_size)

    def step() -> None:
        with autocast(device, config.precision):
            logits = model(normalise(images, spec)).float()
        optimizer.zero_grad(set_to_none=True)
        functional.binary_cross_entropy_with_logits(logits, targets).backward()
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def time_step(step: Callable[[], None], steps: int) -> Times:
    """Time per call, after one that does not count."""
    step()
    first = times()
    for _ in range(steps):
        step()
    wall, cpu = ((b - a) / steps for a, b in zip(first, times(), strict=True))
    return wall, cpu


def middle(values: list[float], digits: int = 2) -> str:
    """Median, and the range in brackets."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that the benchmarks of training share."""
    parser.add_argument("--model", default="mobilenet_v2", choices=sorted(MODELS))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--augment", choices=("none", "color", "light"), help="of the loop")
    parser.add_argument("--steps", type=int, default=20, help="steps of each measurement")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start_ray()
    bare: list[Times] = []
    loop: list[Times] = []
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        manifest = synthetic_dataset(root, round((args.steps + 2) * args.batch_size / 0.9) + 20)
        config = TrainConfig(
            dataset=manifest.uri,
            out=str(root),
            model=args.model,
            weights="none",
            augment=args.augment,
            precision=args.precision,
            batch_size=args.batch_size,
            epochs=1,
            max_steps=args.steps + 1,
        )
        step = bare_step(config, len(manifest.genres), device)
        for round_ in range(args.rounds):
            bare.append(time_step(step, args.steps))
            job = make_job(manifest, root / str(round_), config, ray_monitor())
            found, wait = loop_step(job, device)
            loop.append(found)
            waits.append(100 * wait)
            logger.info(
                f"round {round_ + 1}: (wall, CPU) bare {bare[-1]}, loop {found}, wait {wait}"
            )
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPUs"
    print(f"{args.model}, {args.precision}, batch size {args.batch_size}, {where}\n")
    print("| | bare step, s | loop, s per step | bare / loop |\n|---|---|---|---|")
    for index, name in enumerate(("wall time", "CPU time, all processes")):
        columns = [[found[index] for found in measured] for measured in (bare, loop)]
        ratios = [b / found for b, found in zip(*columns, strict=True)]
        print(f"| {name} | " + " | ".join(middle(values) for values in (*columns, ratios)) + " |")
    print(f"\nThe loop waited for covers during {middle(waits, 1)} % of its time.")


if __name__ == "__main__":
    run_benchmark(main)
