"""The training loop in this process, and in two that exchange gradients; without Ray."""

import io
import multiprocessing
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from covergenre import schema
from covergenre.config import TrainConfig
from covergenre.data import dataset
from covergenre.data.dataset import Manifest
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.training import checkpoints, loader
from covergenre.training.job import Job

GENRES = Genres(("Jazz", "Rock"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """43 albums in shards of 10 to train with, 12 for dev."""
    root = str(tmp_path_factory.mktemp("dataset"))
    rng = np.random.default_rng(0)
    shards: dict[str, tuple[dataset.Shard, ...]] = {"test": ()}
    row = 0
    for split, sizes in (("train", (10, 10, 10, 10, 3)), ("dev", (12,))):
        found = []
        for part, size in enumerate(sizes):
            rows = []
            for _ in range(size):
                cover = io.BytesIO()
                pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(cover, "PNG")
                genres = [["Jazz"], ["Rock"], ["Jazz", "Rock"]][row % 3]
                rows.append(
                    {"album_id": f"a{row}", "row": row, "image": cover.getvalue()}
                    | {"cover_sha256": "", "genres": genres, "split": split}
                )
                row += 1
            table = pa.Table.from_pylist(rows, schema=schema.DATASET)
            found.append(dataset.write_shard(root, f"{split}/part-{part:05d}.parquet", table))
        shards[split] = tuple(found)
    return Manifest(root, GENRES, shards, "id", {})


class LocalStream(loader.BatchStream):
    """A BatchStream that reads and decodes in this process."""

    def __init__(
        self, data: loader.TrainingData, epochs: Sequence[tuple[int, int]], *, first_step: int = 0
    ) -> None:
        self._data = data
        items = loader.items_of_epochs(data, epochs, first_step)
        self._shares = self._read(items)

    def _read(self, items: list[dict[str, int]]) -> Generator[Any, None, None]:
        for item in items:
            for shares in loader.read_items(pa.Table.from_pylist([item]), self._data):
                for decoded in loader._decode(shares, self._data.preprocessing):
                    yield from decoded.to_batches()


class Ignored:
    """Stands for the monitor: takes every report."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_: None)


def run(
    manifest: Manifest, folder: str, rank: int = 0, world: int = 1, stop: int = 0, **settings: Any
) -> list[float]:
    """Train, on `rank` of `world`; the losses of all steps. stop: step before which to fail."""
    from covergenre.training import worker
    from covergenre.training.ranks import Ranks

    worker.BatchStream = LocalStream  # type: ignore[attr-defined]
    worker.Worker._is_resize_requested = lambda self: False  # type: ignore[method-assign]
    defaults = {"model": "tiny", "epochs": 2, "batch_size": 6, "shuffle_window": 2}
    config = TrainConfig(dataset="d", out="o", **(defaults | settings)).resolved()
    job = Job(
        config=config,
        manifest=manifest,
        preprocessing=Preprocessing(side=32),
        baseline_loss=0.6,
        workers=None,  # type: ignore[arg-type]
        backbone=None,
        checkpoints=folder,
        monitor=Ignored(),
    )
    subject = worker.Worker(job, Ranks(rank, world, "cpu"), None)
    if stop:
        train_step = subject._train_step

        def failing(epoch: int, step: int) -> Any:
            if subject._state.steps_done == stop:
                raise InterruptedError
            return train_step(epoch, step)

        subject._train_step = failing  # type: ignore[method-assign]
    subject.run()
    return subject._losses.losses


def run_rank(manifest: Manifest, folder: str, rank: int, settings: dict[str, Any]) -> list[float]:
    from torch import distributed

    store = f"file://{folder}.rendezvous"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        return run(manifest, folder, rank, 2, **settings)
    finally:
        distributed.destroy_process_group()


def final_state(folder: str, into: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = checkpoints.newest(folder, into, pytest.fail)
    assert found is not None
    state = found.state()
    for record in state["history"]:
        del record["seconds"], record["images_per_second"]
    return state, found.tensors()


@pytest.mark.parametrize("stop", [3, 8, 13])
def test_resumed_run_is_bit_for_bit_as_an_uninterrupted_one(
    manifest: Manifest, stop: int, tmp_path: Path
) -> None:
    whole = run(manifest, str(tmp_path / "whole"))
    assert len(whole) == 16 and np.isfinite(whole).all()
    folder = str(tmp_path / "resumed")
    with pytest.raises(InterruptedError):
        run(manifest, folder, stop=stop, checkpoint_every=2)
    assert 0 < checkpoints.latest_step(folder) < 16
    assert run(manifest, folder, checkpoint_every=5) == whole
    (state, tensors), (other, others) = (
        final_state(str(tmp_path / name), tmp_path) for name in ("whole", "resumed")
    )
    assert state == other and tensors.keys() == others.keys()
    assert all(tensors[name].equal(others[name]) for name in tensors)


def test_two_workers_compute_the_losses_of_one(manifest: Manifest, tmp_path: Path) -> None:
    alone = run(manifest, str(tmp_path / "one"), l2=1e-3)
    settings = {"l2": 1e-3}
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        arguments = [(manifest, str(tmp_path / "two"), rank, settings) for rank in range(2)]
        first, second = pool.starmap(run_rank, arguments, chunksize=1)
    assert first == second
    np.testing.assert_allclose(first, alone, atol=1e-4)
