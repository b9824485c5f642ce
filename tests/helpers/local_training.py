"""Training and scoring in this process: all is real, but Ray is not started for it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from covergenre.config import TrainConfig
from covergenre.data.image_decoding import Preprocessing
from covergenre.training import loader
from covergenre.training.job import Job


def local_shares(
    items: list[dict[str, Any]],
    read: Callable[[pa.Table], Iterator[pa.Table]],
    spec: Preprocessing,
    pipelines: int = 1,
) -> Iterator[pa.RecordBatch]:
    """loader.decoded_shares, but read and decoded in this process."""
    for item in items:
        for shares in read(pa.Table.from_pylist([item])):
            for decoded in loader.decode_shares(shares, spec):
                yield from decoded.to_batches()


@contextlib.contextmanager
def training_in_this_process() -> Iterator[None]:
    """Meanwhile `train` runs its group of workers as one rank here; all else is as ever."""

    def run_group(config: TrainConfig, job: Job, state_folder: str) -> None:
        import ray

        from covergenre.training.ranks import Ranks
        from covergenre.training.worker import Worker

        backbone = ray.get(job.backbone[0]) if job.backbone else None
        Worker(job, Ranks(0, 1, "cpu"), backbone).run()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("covergenre.training.supervisor._run_group", run_group)
        monkeypatch.setattr(loader, "decoded_shares", local_shares)
        yield


@contextlib.contextmanager
def scoring_without_ray() -> Iterator[None]:
    """Meanwhile `score` and `evaluate` do without Ray, also if this process has one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("covergenre.inference.local_scoring.is_small_job", lambda *_: True)
        yield
