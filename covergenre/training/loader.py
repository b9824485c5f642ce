"""The batches of a training worker: shards -> Ray Data -> decoded rows, in the order of training.

Each worker runs one ordered pipeline for its rows of all epochs: few tasks read the rows that the
rank owns, many tasks decode them, and the batches arrive step by step, with their row numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre import schema
from covergenre.cluster.ray_runtime import data_context
from covergenre.data import dataset
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing, decode
from covergenre.training import sampler

EVAL_BATCH = 32
"""Rows in a batch of the dev split. VGG16 has up to 26 MB of activations per image: 64 would need
more memory than a training step."""

_CONCURRENT_READS = 2  # the current window and the next
_CPUS_PER_READ = 0.25
READING_CPUS = _CONCURRENT_READS * _CPUS_PER_READ
"""CPUs that a worker's readers occupy throughout training."""


@dataclass(frozen=True)
class Batch:
    """Decoded rows, in order."""

    rows: NDArray[np.int64]
    """Row number of each in the catalog."""
    offsets: NDArray[np.int64]
    """Position of each in its training step."""
    inputs: NDArray[np.uint8]
    """Pixels, [batch, side, side, 3]; or cached features, [batch, bytes]: see features.py."""
    targets: NDArray[np.float32]
    """Multi-hot, [batch, genres]"""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(self.rows[part], self.offsets[part], self.inputs[part], self.targets[part])


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What one rank reads in a training run."""

    train: tuple[str, ...]
    """URIs of the training split's shards."""
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

    def windows(self, epoch: int) -> list[sampler.Window]:
        """The windows of an epoch, in order."""
        return sampler.windows(
            self.train_rows, seed=self.seed, epoch=epoch, shards_per_window=self.shards_per_window
        )

    def samples(self, window: sampler.Window, epoch: int) -> sampler.Samples:
        """This rank's samples of a window."""
        return sampler.samples(
            window,
            seed=self.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            rank=self.rank,
            world=self.world,
        )

    def dev_parts(self) -> list[sampler.Part]:
        """This rank's rows of the dev split, by shard."""
        start, stop = self.dev_range()
        firsts = np.cumsum([0, *self.dev_rows]).tolist()
        parts = [
            sampler.Part(shard, max(start - first, 0), min(stop - first, rows))
            for shard, (first, rows) in enumerate(zip(firsts, self.dev_rows, strict=False))
        ]
        return [part for part in parts if part.start < part.stop]

    def dev_range(self) -> tuple[int, int]:
        """(start, stop) of this rank's rows of the dev split; together the ranks have every row."""
        total = sum(self.dev_rows)
        return total * self.rank // self.world, total * (self.rank + 1) // self.world


# A table row is a rank's share of a step in a window, so that no block boundary can split it.
_SHARES = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("rows", pa.list_(pa.int64())),
        pa.field("offsets", pa.list_(pa.int64())),
        pa.field("targets", pa.large_binary()),
        pa.field("images", pa.large_list(pa.large_binary())),
    ]
)
DEV = -1
"""Stands for the window and the step of rows of the dev split."""


class BatchStream:
    """Batches of a rank: the steps of an epoch, its part of the dev split, the next epoch, ..."""

    def __init__(self, data: TrainingData, batches: Iterator[tuple[int, Batch]]) -> None:
        """batches: (step or DEV, this rank's rows of it in one window), of pixel_batches or
        FeatureCache.batches."""
        self._data, self._batches = data, batches

    def step(self, epoch: int, step: int) -> Batch:
        """This rank's share of the next step, `step` of `epoch`; it may be empty."""
        windows = _windows_of_steps(self._data, epoch, range(step, step + 1))
        shares = [self._next(step) for _ in windows]
        return shares[0] if len(shares) == 1 else _concatenated(shares)

    def dev(self) -> Iterator[Batch]:
        """This rank's part of the dev split, in order."""
        start, stop = self._data.dev_range()
        while start < stop:
            batch = self._next(DEV)
            start += len(batch)
            yield batch

    def _next(self, step: int) -> Batch:
        found, batch = next(self._batches)
        if found != step:
            raise AssertionError(f"expected step {step}, got step {found}")
        return batch


def pixel_batches(
    data: TrainingData, epochs: Sequence[tuple[int, int]], first_step: int = 0
) -> Iterator[tuple[int, Batch]]:
    """(step or DEV, the rank's rows of it in one window) of these epochs, in order.

    epochs: (epoch, number of steps), in order; the first starts at step `first_step`.
    """
    items = items_of_epochs(data, epochs, first_step)
    for share in decoded_shares(
        items, partial(read_items, data=data), data.preprocessing, data.world
    ):
        yield share["step"][0].as_py(), to_batch(share, data)


def decoded_shares(
    items: list[dict[str, Any]],
    read: Callable[[pa.Table], Iterator[pa.Table]],
    spec: Preprocessing,
    pipelines: int,
) -> Iterator[pa.RecordBatch]:
    """Read and decode items in Ray Data tasks; yields shares one by one, in order.

    read: a table of items -> tables of _SHARES. pipelines: how many of these run at a time.
    """
    import ray.data
    from ray.data import TaskPoolStrategy

    with data_context(pipelines=pipelines):
        inputs = ray.data.from_items(items, override_num_blocks=len(items))
    decoded = inputs.map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=_CONCURRENT_READS),
        num_cpus=_CPUS_PER_READ,
    ).map_batches(partial(decode_shares, spec=spec), batch_size=None, batch_format="pyarrow")
    blocks: Iterable[Any] = decoded.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=4
    )
    for block in blocks:
        yield from block.to_batches(max_chunksize=1)


def to_batch(share: pa.RecordBatch, data: TrainingData) -> Batch:
    """One decoded share as a batch."""
    side = data.preprocessing.side
    pixels = np.frombuffer(share["pixels"][0].as_buffer(), np.uint8)
    targets = np.frombuffer(share["targets"][0].as_buffer(), np.float32)
    return Batch(
        share["rows"].flatten().to_numpy(),
        share["offsets"].flatten().to_numpy(),
        pixels.reshape(-1, side, side, 3),
        targets.reshape(-1, len(data.genres)),
    )


def _concatenated(batches: Sequence[Batch]) -> Batch:
    return Batch(
        np.concatenate([b.rows for b in batches]),
        np.concatenate([b.offsets for b in batches]),
        np.concatenate([b.inputs for b in batches]),
        np.concatenate([b.targets for b in batches]),
    )


def _windows_of_steps(data: TrainingData, epoch: int, steps: range) -> list[int]:
    """Indices of the windows with rows of `steps` of an epoch, in order."""
    return [
        window.index
        for window in data.windows(epoch)
        if (found := window.steps(data.batch_size))
        and found.start < steps.stop
        and found.stop > steps.start
    ]


def items_of_epochs(
    data: TrainingData, epochs: Sequence[tuple[int, int]], first_step: int
) -> list[dict[str, int]]:
    """Input of `read_items` for these epochs: the windows of each, then the dev split."""
    return [
        {"epoch": epoch, "first": first, "steps": steps, "window": window}
        for (epoch, steps), first in zip(epochs, chain([first_step], repeat(0)), strict=False)
        for window in [*_windows_of_steps(data, epoch, range(first, steps)), DEV]
    ]


def read_items(items: pa.Table, data: TrainingData) -> Iterator[pa.Table]:
    """(epoch, first, steps, window) -> the rank's encoded rows of the window, step by step."""
    for item in items.to_pylist():
        if item["window"] == DEV:
            yield from _read_dev(data)
        else:
            window = data.windows(item["epoch"])[item["window"]]
            yield from _read_window(window, item["epoch"], item["first"], item["steps"], data)


def _read_window(
    window: sampler.Window, epoch: int, first: int, steps: int, data: TrainingData
) -> Iterator[pa.Table]:
    samples = data.samples(window, epoch)
    parts = sampler.owned(window, data.train_rows, data.rank, data.world)
    tables = [_read_shard(data.train[part.shard], part.start, part.stop) for part in parts]
    table = pa.concat_tables(tables) if tables else _SHARD_COLUMNS.empty_table()
    for step in window.steps(data.batch_size):
        if first <= step < steps:
            low, high = np.searchsorted(samples.step, (step, step + 1))
            rows = table.take(pa.array(samples.row[low:high]))
            yield _encoded(rows, step, samples.offset[low:high], data.genres)


def _read_dev(data: TrainingData) -> Iterator[pa.Table]:
    pending: list[pa.Table] = []
    for part in data.dev_parts():
        pending.append(_read_shard(data.dev[part.shard], part.start, part.stop))
        # Batches span shards, so that their rows do not depend on the size of shards.
        while sum(t.num_rows for t in pending) >= EVAL_BATCH:
            table = pa.concat_tables(pending)
            yield _encoded_dev(table.slice(0, EVAL_BATCH), data.genres)
            pending = [table.slice(EVAL_BATCH)]
    rest = pa.concat_tables(pending) if pending else None
    if rest is not None and rest.num_rows:
        yield _encoded_dev(rest, data.genres)


def read_ranges(items: pa.Table, genres: Genres) -> Iterator[pa.Table]:
    """(uri, start, stop) of rows of a shard -> its encoded rows, EVAL_BATCH at a time."""
    for item in items.to_pylist():
        table = _read_shard(item["uri"], item["start"], item["stop"])
        for first in range(0, table.num_rows, EVAL_BATCH):
            yield _encoded_dev(table.slice(first, EVAL_BATCH), genres)


_SHARD_COLUMNS = pa.schema([schema.DATASET.field(name) for name in ("row", "image", "genres")])


def _read_shard(uri: str, start: int, stop: int) -> pa.Table:
    return dataset.read_rows(uri, start, stop, _SHARD_COLUMNS.names)


def _encoded_dev(table: pa.Table, genres: Genres) -> pa.Table:
    return _encoded(table, DEV, np.arange(table.num_rows), genres)


def _encoded(table: pa.Table, step: int, offsets: NDArray[np.int64], genres: Genres) -> pa.Table:
    targets = genres.multi_hot(table["genres"].to_pylist())
    return pa.table(
        [
            [step],
            [table["row"].to_numpy()],
            [offsets],
            [targets.tobytes()],
            [table["image"].to_pylist()],
        ],
        schema=_SHARES,
    )


def decode_shares(shares: pa.Table, spec: Preprocessing) -> Iterator[pa.Table]:
    """Shares with `images` -> shares with `pixels`, one by one."""
    for i in range(shares.num_rows):
        pixels = b"".join(decode(image, spec).tobytes() for image in shares["images"][i].as_py())
        yield (
            shares.slice(i, 1)
            .drop_columns(["images"])
            .append_column("pixels", pa.array([pixels], pa.large_binary()))
        )
