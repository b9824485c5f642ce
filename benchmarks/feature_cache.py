"""Epochs of `train --cache-features`, relative to the first one and to epochs without the cache.

    uv run python -m benchmarks.feature_cache --model vgg16 --freeze paper --albums 256
    uv run python -m benchmarks.feature_cache --model mobilenet_v2 --freeze all --albums 1024

Random weights and synthetic covers, in this process, with the loading tasks on Ray. An epoch is all
of it: training steps, evaluation of the dev split (4 % of the albums) and checkpoint; with the
cache, the first one also computes the features. The first epoch of each run also waits for the
loading tasks to start. The steps alone are listed, too (the first one taken as the mean of the
others): in a small dataset the checkpoint of VGG16, 2 GB, is a large part of an epoch. Runs with
and without the cache alternate, --rounds times.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks import run_benchmark
from benchmarks.training import (
    TimedWorker,
    Times,
    add_arguments,
    make_job,
    middle,
    ray_monitor,
    synthetic_dataset,
    times,
)
from covergenre.cluster.ray_runtime import start_ray
from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest
from covergenre.training.ranks import Ranks

logger = logging.getLogger(__name__)


class EpochWorker(TimedWorker):
    """Notes the time after each epoch, too, and that of the steps of each epoch."""

    ends: list[Times]
    steps: list[Times]

    def _run_epoch(self, epoch: int) -> bool:
        self.marks = []
        finished = super()._run_epoch(epoch)
        self.ends.append(times())
        count = len(self.marks)
        wall, cpu = (b - a for a, b in zip(self.marks[0], self.marks[-1], strict=True))
        self.steps.append((wall * count / (count - 1), cpu * count / (count - 1)))
        return finished


def train(manifest: Manifest, folder: Path, settings: dict[str, object]) -> EpochWorker:
    """A whole run in this process."""
    config = TrainConfig(dataset=manifest.uri, out=str(folder), **settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    worker = EpochWorker(
        make_job(manifest, folder, config, ray_monitor()), Ranks(0, 1, device), None
    )
    worker.ends, worker.steps = [times()], []
    worker.run()
    return worker


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--freeze", default="paper")
    parser.add_argument("--albums", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    start_ray()
    found: dict[str, list[Times]] = {}
    difference = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        manifest = synthetic_dataset(root, args.albums)
        settings = {
            "model": args.model,
            "weights": "none",
            "freeze": args.freeze,
            "augment": "none",
            "learning_rate": 1e-6,  # random weights would diverge at the default of vgg16
            "precision": args.precision,
            "batch_size": args.batch_size,
            "epochs": args.epochs,
        }
        for round_ in range(args.rounds):
            losses = []
            for cache in (False, True):
                folder = root / f"{round_}-{cache}"
                worker = train(manifest, folder, settings | {"cache_features": cache})
                losses.append(worker._losses.losses)
                logger.info(f"cache {cache}: (wall, CPU) of steps {worker.steps}")
                for epoch in range(args.epochs):
                    name = f"{'with' if cache else 'without'} the cache, epoch {epoch + 1}"
                    start, stop = worker.ends[epoch : epoch + 2]
                    used = (stop[0] - start[0], stop[1] - start[1])
                    found.setdefault(name, []).append(used)
                    found.setdefault(f"{name}, steps only", []).append(worker.steps[epoch])
            pairs = zip(*losses, strict=True)
            difference = max(difference, *(abs(a - b) / abs(a) for a, b in pairs))
    whole = [
        statistics.median(used[index] for used in found["with the cache, epoch 1"])
        for index in (0, 1)
    ]
    print(f"{args.model}, freeze {args.freeze}, {args.precision}, {args.albums} albums\n")
    print("| | wall time, s | of the first with the cache | CPU time, s | of the first |")
    print("|---|---|---|---|---|")
    for name, measured in found.items():
        cells = [name]
        for index in (0, 1):
            column = [used[index] for used in measured]
            cells += [middle(column), f"{statistics.median(column) / whole[index]:.3f}"]
        print(f"| {' | '.join(cells)} |")
    print(f"\nLargest relative difference of a step's loss: {difference:.1e}")


if __name__ == "__main__":
    run_benchmark(main)
