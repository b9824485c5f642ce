"""Training and scoring in this process: all is real, but Ray is not started for it."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest

from covergenre.config import TrainConfig
from covergenre.training import loader
from covergenre.training.job import Job


class LocalStream(loader.BatchStream):
    """A BatchStream that reads and decodes in this process."""

    def __init__(
        self, data: loader.TrainingData, epochs: Sequence[tuple[int, int]], *, first_step: int = 0
    ) -> None:
        self._data = data
        self._shares = self._read(loader.items_of_epochs(data, epochs, first_step))

    def _read(self, items: list[dict[str, int]]) -> Generator[Any, None, None]:
        for item in items:
            for shares in loader.read_items(pa.Table.from_pylist([item]), self._data):
                for decoded in loader._decode(shares, self._data.preprocessing):
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
        monkeypatch.setattr("covergenre.training.worker.BatchStream", LocalStream)
        yield


@contextlib.contextmanager
def scoring_without_ray() -> Iterator[None]:
    """Meanwhile `score` and `evaluate` do without Ray, also if this process has one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("covergenre.inference.here.is_small_job", lambda *_: True)
        yield
