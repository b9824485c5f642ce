"""Which rows, and how many bytes, each rank reads; without Ray."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from covergenre import schema
from covergenre.data import dataset
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.io import storage
from covergenre.training import loader
from covergenre.training.loader import TrainingData

GENRES = Genres(("Jazz", "Rock"))
ROWS_PER_SHARD = 64
SHARDS = 8
COVER_BYTES = 40_000  # so that the footers of Parquet files hardly count


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Shards of incompressible covers, in row groups of 8 rows."""
    root = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "ROW_GROUP_ROWS", 8)
        for shard in range(SHARDS):
            rows = [
                {
                    "album_id": f"a{row}",
                    "row": row,
                    "image": rng.bytes(COVER_BYTES),
                    "cover_sha256": "",
                    "genres": ["Jazz"] if row % 3 else ["Jazz", "Rock"],
                    "split": "train",
                }
                for row in range(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD)
            ]
            table = pa.Table.from_pylist(rows, schema=schema.DATASET)
            dataset.write_shard(str(root), f"part-{shard}.parquet", table)
    return tuple(str(root / f"part-{shard}.parquet") for shard in range(SHARDS))


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each read from storage."""
    reads: list[int] = []

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            reads.append(len(data))
            return data

    monkeypatch.setattr(
        storage, "open_input", lambda uri: pa.PythonFile(Counting(Path(uri).read_bytes()), mode="r")
    )
    yield reads
    dataset._open.cache_clear()


def training_data(shards: tuple[str, ...], rank: int, world: int, window: int = 4) -> TrainingData:
    rows = (ROWS_PER_SHARD,) * SHARDS
    return TrainingData(
        train=shards,
        train_rows=rows,
        dev=shards[:3],
        dev_rows=rows[:3],
        genres=GENRES,
        preprocessing=Preprocessing(),
        batch_size=20,
        seed=3,
        shards_per_window=window,
        rank=rank,
        world=world,
    )


def read(data: TrainingData, windows: list[int], **settings: int) -> list[dict[str, Any]]:
    """The shares that one rank reads."""
    item = {"epoch": 0, "first": 0, "steps": 1000} | settings
    items = pa.Table.from_pylist([item | {"window": window} for window in windows])
    dataset._open.cache_clear()  # each rank has its own process, and reads its own footers
    tables = list(loader.read_items(items, data))
    return [row for table in tables for row in table.to_pylist()]


def read_epoch(shards: tuple[str, ...], world: int, **settings: int) -> list[dict[str, Any]]:
    """The shares of all ranks; the dataset has two windows."""
    ranks = [training_data(shards, rank, world) for rank in range(world)]
    return [share for data in ranks for share in read(data, [0, 1], **settings)]


def by_position(shares: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[int, bytes]]:
    """(step, offset) -> (row, image)"""
    found = {}
    for share in shares:
        for offset, row, image in zip(
            share["offsets"], share["rows"], share["images"], strict=True
        ):
            assert (share["step"], offset) not in found
            found[share["step"], offset] = (row, image)
    return found


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_together_read_the_same_batches_as_one_worker(
    shards: tuple[str, ...], world: int
) -> None:
    alone = by_position(read_epoch(shards, 1))
    assert len(alone) == SHARDS * ROWS_PER_SHARD == len({row for row, _ in alone.values()})
    assert by_position(read_epoch(shards, world)) == alone


def test_resumed_and_shortened_epochs_have_the_requested_steps(shards: tuple[str, ...]) -> None:
    alone = by_position(read_epoch(shards, 1))
    part = by_position(read_epoch(shards, 2, first=5, steps=16))
    assert part == {at: value for at, value in alone.items() if 5 <= at[0] < 16}


def test_each_rank_has_a_share_of_each_step_of_a_window_even_if_empty(
    shards: tuple[str, ...],
) -> None:
    """The reader of batches counts shares, not rows."""
    world = 64  # 8 rows of a rank in each window, and 13 steps
    for rank in (0, 20, 63):
        shares = read(training_data(shards, rank, world), [0, 1])
        steps = [share["step"] for share in shares]
        assert steps == [*range(13), *range(12, 26)]  # a step is in both windows
        assert any(not share["rows"] for share in shares)


def test_targets_are_those_of_the_rows(shards: tuple[str, ...]) -> None:
    for share in read_epoch(shards, 2):
        targets = np.frombuffer(share["targets"], np.float32).reshape(-1, 2)
        expected = [[1.0, float(row % 3 == 0)] for row in share["rows"]]
        assert targets.tolist() == expected


@pytest.mark.parametrize("world", [2, 4, 8])
def test_workers_together_read_few_more_bytes_than_one(
    shards: tuple[str, ...], bytes_read: list[int], world: int
) -> None:
    read_epoch(shards, 1)
    alone = sum(bytes_read)
    bytes_read.clear()
    read_epoch(shards, world)
    assert alone > SHARDS * ROWS_PER_SHARD * COVER_BYTES
    assert sum(bytes_read) < 1.1 * alone


def test_ranks_together_read_the_dev_split_once(
    shards: tuple[str, ...], bytes_read: list[int]
) -> None:
    rows: list[int] = []
    for rank in range(3):
        for share in read(training_data(shards, rank, 3), [loader.DEV]):
            rows += share["rows"]
    assert rows == list(range(3 * ROWS_PER_SHARD))
    assert sum(bytes_read) < 1.1 * 3 * ROWS_PER_SHARD * COVER_BYTES
