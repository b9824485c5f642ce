"""Two training workers on two cores, relative to one worker on one core.

    uv run python -m benchmarks.training_workers

Each worker is a process with one torch thread that is pinned to its core; two exchange gradients
with gloo, as the workers of `train` do. The loop is that of a worker of `train`, but each worker
reads and decodes its covers itself, between the steps, so that no other process uses the cores.
CPU time per album shows what the second worker costs on a machine that is shared with others: on
an idle machine, the speedup is about twice the ratio.
"""

import argparse
import logging
import multiprocessing
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import torch
from torch import distributed

from benchmarks import run_benchmark
from benchmarks.training import (
    TimedWorker,
    Times,
    add_arguments,
    make_job,
    middle,
    synthetic_dataset,
)
from covergenre.cluster.ray_runtime import start_ray
from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest
from covergenre.training import loader
from covergenre.training.loader import BatchStream
from covergenre.training.ranks import Ranks

logger = logging.getLogger(__name__)


class Silent:
    """Takes the reports of a worker, as the monitor's actor does."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_: None)


class LocalWorker(TimedWorker):
    """Reads and decodes in this process."""

    def _open_stream(self) -> BatchStream:
        items = loader.items_of_epochs(self._data, [(0, self._steps.epochs[0])], 0)
        return BatchStream(
            self._data,
            (
                (share["step"][0].as_py(), loader.to_batch(share, self._data))
                for item in items
                for shares in loader.read_items(pa.Table.from_pylist([item]), self._data)
                for decoded in loader.decode_shares(shares, self._data.preprocessing)
                for share in decoded.to_batches()
            ),
        )


def train_rank(rank: int, world: int, manifest: Manifest, folder: str, settings: Any) -> Times:
    """(wall time, CPU time of this worker) per step."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    if world > 1:
        store = f"file://{folder}.rendezvous"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    config = TrainConfig(dataset=manifest.uri, out=folder, **settings)
    job = make_job(manifest, Path(folder), config, Silent())
    worker = LocalWorker(job, Ranks(rank, world, "cpu"), None)
    worker.marks = []
    worker.run()
    if world > 1:
        distributed.destroy_process_group()
    steps = len(worker.marks) - 1
    wall, cpu = ((b - a) / steps for a, b in zip(worker.marks[0], worker.marks[-1], strict=True))
    return wall, cpu


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=10, help="steps of each measurement")
    args = parser.parse_args()
    measured: dict[int, list[Times]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        start_ray()
        manifest = synthetic_dataset(root, round((args.steps + 2) * args.batch_size / 0.9) + 20)
        import ray

        ray.shutdown()
        settings = {
            "model": args.model,
            "weights": "none",
            "precision": args.precision,
            "batch_size": args.batch_size,
            "epochs": 1,
            "max_steps": args.steps + 1,
        }
        for round_ in range(args.rounds):
            for world in measured:
                folder = str(root / f"{round_}-{world}")
                jobs = [(rank, world, manifest, folder, settings) for rank in range(world)]
                with multiprocessing.get_context("spawn").Pool(world) as pool:
                    ranks = pool.starmap(train_rank, jobs, chunksize=1)
                wall, cpu = (list(values) for values in zip(*ranks, strict=True))
                measured[world].append((max(wall), sum(cpu)))
                logger.info(f"{world} worker(s): (wall, CPU) {measured[world][-1]}")
    print(f"{args.model}, {args.precision}, batch size {args.batch_size}\n")
    print("| | one worker, s per step | two workers, s per step | one / two |\n|---|---|---|---|")
    for index, name in enumerate(("wall time", "CPU time, all workers")):
        one, two = ([values[index] for values in measured[world]] for world in (1, 2))
        ratio = middle([a / b for a, b in zip(one, two, strict=True)])
        print(f"| {name} | {middle(one)} | {middle(two)} | {ratio} |")


if __name__ == "__main__":
    run_benchmark(main)
