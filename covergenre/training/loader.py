"""Shards -> Ray Data -> batches, inside a training worker, in the planned order.

Each worker runs one ordered pipeline for its part of all epochs: windows of encoded rows are read
by few tasks, decoded by many, and arrive one step at a time. The row numbers travel with the
pixels, so that a batch can be checked against the plan.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre.cluster.ray_runtime import data_context
from covergenre.data import dataset
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing, decode
from covergenre.training import sampler

EVAL_BATCH = 32
"""Rows of a batch of the dev split. VGG16 holds 26 MB of activations an image at its widest, so 64
would need more memory than a training step."""

_READS_AT_A_TIME = 2  # the window in use and the next: each holds its shards in memory
_CPUS_A_READ = 0.25
READING_CPUS = _READS_AT_A_TIME * _CPUS_A_READ
"""CPUs that a worker's readers hold all the while."""


@dataclass(frozen=True)
class Batch:
    """Decoded rows, in order."""

    rows: NDArray[np.int64]
    """Place of each in the catalog."""
    pixels: NDArray[np.uint8]
    """[batch, side, side, 3]"""
    targets: NDArray[np.float32]
    """Multi-hot, [batch, genres]"""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What one rank reads in a whole training run."""

    train: tuple[str, ...]
    """Shards of the training split."""
    train_rows: tuple[int, ...]
    dev: tuple[str, ...]
    dev_rows: tuple[int, ...]
    genres: Genres
    preprocessing: Preprocessing
    batch_size: int
    seed: int
    shards_per_window: int
    rank: int
    world: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return sampler.steps_in_epoch(sum(self.train_rows), self.batch_size)

    def dev_range(self) -> tuple[int, int]:
        """This rank's contiguous part of the dev split; the parts together are all of it."""
        total = sum(self.dev_rows)
        return total * self.rank // self.world, total * (self.rank + 1) // self.world


# One row a step's share: no block boundary can cut a batch.
_ENCODED = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("rows", pa.list_(pa.int64())),
        pa.field("targets", pa.large_binary()),
        pa.field("images", pa.large_list(pa.large_binary())),
    ]
)


class BatchStream:
    """This rank's batches: all steps of an epoch, its part of the dev split, the next epoch..."""

    def __init__(
        self, data: TrainingData, epochs: Sequence[tuple[int, int]], *, first_step: int = 0
    ) -> None:
        """epochs: (epoch, how many steps of it), in order; of the first, from `first_step` on."""
        import ray.data
        from ray.data import TaskPoolStrategy

        items = [
            {"epoch": epoch, "first": first, "steps": steps, "window": window}
            for (epoch, steps), first in zip(epochs, chain([first_step], repeat(0)), strict=False)
            for window in [*_window_numbers(data, epoch, first, steps), _DEV]
        ]
        self._data = data
        with data_context(ordered=True):
            windows = ray.data.from_items(items, override_num_blocks=len(items))
        decoded = windows.map_batches(
            partial(_read, data=data),
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=_READS_AT_A_TIME),
            num_cpus=_CPUS_A_READ,
        ).map_batches(
            partial(_decode, spec=data.preprocessing),
            batch_size=None,
            batch_format="pyarrow",
        )
        blocks: Iterable[Any] = decoded.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=4
        )
        self._parts = (part for block in blocks for part in block.to_batches(max_chunksize=1))

    def step(self, step: int) -> tuple[Batch, int]:
        """(this rank's share of the next step, rows of the whole step). The share may be empty."""
        data = self._data
        mine, size = sampler.share(
            sum(data.train_rows), data.batch_size, step, data.rank, data.world
        )
        return self._take(mine, step), size

    def dev(self) -> Iterator[Batch]:
        """This rank's part of the dev split, in order."""
        start, stop = self._data.dev_range()
        while start < stop:
            batch = self._take(min(EVAL_BATCH, stop - start), _DEV)
            start += len(batch.rows)
            yield batch

    def _take(self, rows: int, step: int) -> Batch:
        """The next `rows` rows. A step that straddles two windows comes in two parts."""
        parts: list[Batch] = []
        have = 0
        while have < rows:
            part = next(self._parts)
            if part["step"][0].as_py() != step:
                raise AssertionError(f"step {part['step'][0]} came where {step} was planned")
            parts.append(self._batch(part))
            have += len(parts[-1].rows)
        if have != rows:
            raise AssertionError(f"step {step}: {have} rows came where {rows} were planned")
        if not parts:
            side = self._data.preprocessing.side
            empty = np.empty((0, len(self._data.genres)), np.float32)
            return Batch(np.empty(0, np.int64), np.empty((0, side, side, 3), np.uint8), empty)
        if len(parts) == 1:
            return parts[0]
        return Batch(
            np.concatenate([p.rows for p in parts]),
            np.concatenate([p.pixels for p in parts]),
            np.concatenate([p.targets for p in parts]),
        )

    def _batch(self, part: pa.RecordBatch) -> Batch:
        side = self._data.preprocessing.side
        pixels = np.frombuffer(part["pixels"][0].as_buffer(), np.uint8)
        targets = np.frombuffer(part["targets"][0].as_buffer(), np.float32)
        return Batch(
            part["rows"].flatten().to_numpy(),
            pixels.reshape(-1, side, side, 3),
            targets.reshape(-1, len(self._data.genres)),
        )


_DEV = -1  # in place of a window or a step: the dev split


def _windows(data: TrainingData, epoch: int) -> list[sampler.Window]:
    return sampler.windows(
        data.train_rows, seed=data.seed, epoch=epoch, shards_per_window=data.shards_per_window
    )


def _window_numbers(data: TrainingData, epoch: int, first: int, steps: int) -> list[int]:
    """The windows that steps `first` to `steps` of an epoch need."""
    start, stop = first * data.batch_size, steps * data.batch_size
    return [w.index for w in _windows(data, epoch) if w.start < stop and w.start + w.rows > start]


def _read(items: pa.Table, data: TrainingData) -> Iterator[pa.Table]:
    """(epoch, window) -> this rank's encoded rows of it, a share of a step at a time."""
    for item in items.to_pylist():
        if item["window"] == _DEV:
            yield from _read_dev(data)
            continue
        window = _windows(data, item["epoch"])[item["window"]]
        picks = sampler.picks(
            window,
            data.train_rows,
            seed=data.seed,
            epoch=item["epoch"],
            batch_size=data.batch_size,
            rank=data.rank,
            world=data.world,
            first_step=item["first"],
        )
        tables = [_read_shard(data.train[s], 0, data.train_rows[s]) for s in window.shards]
        table = pa.concat_tables(tables)
        base = np.zeros(len(data.train), np.int64)  # where each shard begins in `table`
        base[list(window.shards)] = np.cumsum([0, *(t.num_rows for t in tables[:-1])])
        at = base[picks.shard] + picks.row
        at = at[picks.step < item["steps"]]
        edges = np.flatnonzero(np.diff(picks.step[: len(at)])) + 1
        for part in np.split(np.arange(len(at)), edges):
            if len(part):
                yield _encoded(table.take(at[part]), int(picks.step[part[0]]), data.genres)


def _read_dev(data: TrainingData) -> Iterator[pa.Table]:
    start, stop = data.dev_range()
    first = 0
    pending: list[pa.Table] = []
    for uri, rows in zip(data.dev, data.dev_rows, strict=True):
        low, high = max(start - first, 0), min(stop - first, rows)
        first += rows
        if low < high:
            pending.append(_read_shard(uri, low, high))
        # Batches are cut across shards, so that their rows do not depend on where shards end.
        while sum(t.num_rows for t in pending) >= EVAL_BATCH:
            table = pa.concat_tables(pending)
            yield _encoded(table.slice(0, EVAL_BATCH), _DEV, data.genres)
            pending = [table.slice(EVAL_BATCH)]
    rest = pa.concat_tables(pending) if pending else None
    if rest is not None and rest.num_rows:
        yield _encoded(rest, _DEV, data.genres)


def _read_shard(uri: str, start: int, stop: int) -> pa.Table:
    return dataset.read_rows(uri, start, stop, ["row", "image", "genres"])


def _encoded(table: pa.Table, step: int, genres: Genres) -> pa.Table:
    targets = genres.multi_hot(table["genres"].to_pylist())
    return pa.table(
        [
            [step],
            [table["row"].to_numpy()],
            [targets.tobytes()],
            [table["image"].to_pylist()],
        ],
        schema=_ENCODED,
    )


def _decode(parts: pa.Table, spec: Preprocessing) -> Iterator[pa.Table]:
    for row in range(parts.num_rows):
        images = parts["images"][row].as_py()
        pixels = np.stack([decode(image, spec) for image in images])
        yield (
            parts.slice(row, 1)
            .drop_columns(["images"])
            .append_column("pixels", pa.array([pixels.tobytes()], pa.large_binary()))
        )
