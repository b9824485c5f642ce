"""The cache of frozen features (--cache-features): computed once, read in every epoch.

    OUT.training/features/train/part-00003-000320.bin   rows from 320 of shard 3 of the train split

A file has the output of the frozen stages for consecutive rows of a shard: records of equal size,
without a header. It is written atomically and depends only on the dataset and the frozen weights,
so any worker may write it, a resumed run keeps it, and any number of workers can read it, each the
rows that it trains on.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from covergenre.data import dataset
from covergenre.formatting import plural
from covergenre.io import storage
from covergenre.models.predictor import autocast, normalise, to_unit
from covergenre.training import loader, sampler
from covergenre.training.loader import Batch, TrainingData
from covergenre.training.ranks import Ranks

_FILE_BYTES = 256 * 2**20
_IN_MEMORY_BYTES = 256 * 2**20
"""A rank's features of a window are read as a whole up to this size, and row by row above."""
_CONCURRENT_READS = 8
_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Features:
    """The form of an album's features: the output of the frozen stages."""

    shape: tuple[int, ...]
    """[C, H, W], or [D]"""
    dtype: torch.dtype

    @property
    def record_bytes(self) -> int:
        """Bytes of the features of an album."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def file_rows(self) -> int:
        """The maximum number of rows in a file: a multiple of the batch that computes them."""
        batch = loader.EVAL_BATCH
        return max(1, _FILE_BYTES // self.record_bytes // batch) * batch

    def to_bytes(self, features: torch.Tensor) -> bytes:
        """Features [B, *shape] as records. Images are stored channels-last, as they are laid out
        in memory, so that the layers that follow compute the same bits."""
        if len(self.shape) == 3:
            features = features.permute(0, 2, 3, 1)
        array = features.detach().cpu().contiguous().view(torch.uint8).numpy()
        return bytes(array.tobytes())

    def to_tensor(self, records: NDArray[np.uint8], device: str) -> torch.Tensor:
        """The inverse of to_bytes, on `device`; records: [B, record_bytes]."""
        features = torch.from_numpy(records).to(device, non_blocking=True).view(self.dtype)
        if len(self.shape) == 3:
            channels, height, width = self.shape
            return features.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return features.view(-1, *self.shape)


@dataclass(frozen=True)
class _File:
    split: str
    shard: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}/part-{self.shard:05d}-{self.start:06d}.bin"


@dataclass(frozen=True)
class FeatureCache:
    """The features of a dataset in a folder, or where they will be."""

    folder: str
    features: Features
    data: TrainingData

    def _files(self) -> list[_File]:
        rows = self.features.file_rows
        return [
            _File(split, shard, start, min(start + rows, count))
            for split, counts in (("train", self.data.train_rows), ("dev", self.data.dev_rows))
            for shard, count in enumerate(counts)
            for start in range(0, count, rows)
        ]

    def missing(self) -> list[Any]:
        """The files that are not written yet, for `write`."""
        sizes = storage.list_sizes(self.folder)
        size = self.features.record_bytes
        return [f for f in self._files() if sizes.get(f.name) != (f.stop - f.start) * size]

    def write(
        self, first: nn.Module, ranks: Ranks, precision: str, log: Callable[[str], None]
    ) -> None:
        """Compute what is missing; the ranks share the work, and all return when it is done.

        first: the frozen stages, in eval mode.
        """
        # Rank 0's list: another rank may list the folder when files have already been added.
        missing = ranks.from_first(self.missing() if ranks.rank == 0 else None)
        mine = missing[ranks.rank :: ranks.world]
        if missing and ranks.rank == 0:
            rows = sum(file.stop - file.start for file in missing)
            log(f"caching the output of the frozen layers for {plural(rows, 'album')}")
        if mine:
            self._write_files(mine, first, ranks.device, precision)
        ranks.sum(torch.zeros(1, device=ranks.device))  # waits for the other ranks

    def _write_files(
        self, files: list[_File], first: nn.Module, device: str, precision: str
    ) -> None:
        items = [
            {"uri": self._shards(file.split)[file.shard], "start": file.start, "stop": file.stop}
            for file in files
        ]
        read = partial(loader.read_ranges, genres=self.data.genres)
        shares = loader.decoded_shares(items, read, self.data.preprocessing, self.data.world)
        for file in files:
            records: list[bytes] = []
            rows = 0
            while rows < file.stop - file.start:
                batch = loader.to_batch(next(shares), self.data)
                images = normalise(to_unit(batch.inputs, device), self.data.preprocessing)
                with torch.no_grad(), autocast(device, precision):
                    records.append(self.features.to_bytes(first(images)))
                rows += len(batch)
            storage.put(storage.join(self.folder, file.name), b"".join(records))

    def _shards(self, split: str) -> tuple[str, ...]:
        return self.data.train if split == "train" else self.data.dev

    def batches(
        self, epochs: Sequence[tuple[int, int]], first_step: int
    ) -> Iterator[tuple[int, Batch]]:
        """Like loader.pixel_batches, with features as inputs; read ahead in a thread."""
        batches = self._read(epochs, first_step)
        with ThreadPoolExecutor(1) as thread:
            pending = deque(thread.submit(next, batches, None) for _ in range(_BATCHES_AHEAD))
            while (batch := pending.popleft().result()) is not None:
                pending.append(thread.submit(next, batches, None))
                yield batch

    def _read(
        self, epochs: Sequence[tuple[int, int]], first_step: int
    ) -> Iterator[tuple[int, Batch]]:
        with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
            for item in loader.items_of_epochs(self.data, epochs, first_step):
                if item["window"] == loader.DEV:
                    yield from self._read_dev(pool)
                else:
                    yield from self._read_window(item, pool)

    def _read_window(
        self, item: dict[str, int], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, Batch]]:
        data, epoch = self.data, item["epoch"]
        window = data.windows(epoch)[item["window"]]
        samples = data.samples(window, epoch)
        parts = sampler.owned(window, data.train_rows, data.rank, data.world)
        rows = _Rows(self, "train", parts, pool)
        for step in window.steps(data.batch_size):
            if item["first"] <= step < item["steps"]:
                low, high = np.searchsorted(samples.step, (step, step + 1))
                yield step, rows.take(samples.row[low:high], samples.offset[low:high])

    def _read_dev(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Batch]]:
        rows = _Rows(self, "dev", self.data.dev_parts(), pool)
        for start in range(0, len(rows), loader.EVAL_BATCH):
            index = np.arange(start, min(start + loader.EVAL_BATCH, len(rows)))
            yield loader.DEV, rows.take(index, index - start)


class _Rows:
    """Contiguous rows of some shards: row numbers, targets, and their features on demand."""

    def __init__(
        self, cache: FeatureCache, split: str, parts: list[sampler.Part], pool: ThreadPoolExecutor
    ) -> None:
        genres = cache.data.genres
        self._cache, self._split, self._pool = cache, split, pool
        shards = cache._shards(split)
        tables = [
            dataset.read_rows(shards[part.shard], part.start, part.stop, ["row", "genres"])
            for part in parts
        ]
        columns = [(table["row"].to_numpy(), table["genres"].to_pylist()) for table in tables]
        self._row = np.concatenate([np.empty(0, np.int64), *(row for row, _ in columns)])
        self._targets = genres.multi_hot([names for _, column in columns for names in column])
        self._at = [(part.shard, row) for part in parts for row in range(part.start, part.stop)]
        self._open = lru_cache(maxsize=None)(storage.open_input)
        self._records: NDArray[np.uint8] | None = None
        size = cache.features.record_bytes
        if len(self) * size <= _IN_MEMORY_BYTES:
            self._records = np.concatenate(
                [np.empty((0, size), np.uint8), *(self._read(part) for part in parts)]
            )

    def __len__(self) -> int:
        return len(self._row)

    def take(self, index: NDArray[np.int64], offsets: NDArray[np.int64]) -> Batch:
        """The rows `index`, at positions `offsets` of their step."""
        if self._records is not None:
            records = self._records[index]
        else:
            found = [self._at[i] for i in index]
            parts = [sampler.Part(shard, row, row + 1) for shard, row in found]
            empty = np.empty((0, self._cache.features.record_bytes), np.uint8)
            records = np.concatenate([empty, *self._pool.map(self._read, parts)])
        return Batch(self._row[index], offsets, records, self._targets[index])

    def _read(self, part: sampler.Part) -> NDArray[np.uint8]:
        """The records of rows of a shard, [rows, record_bytes]."""
        size, rows = self._cache.features.record_bytes, self._cache.features.file_rows
        pieces = []
        for first in range(part.start // rows * rows, part.stop, rows):
            low, high = max(part.start, first), min(part.stop, first + rows)
            file = _File(self._split, part.shard, first, first + rows)
            uri = storage.join(self._cache.folder, file.name)
            with storage.translate_errors(uri, "read"):
                data = self._open(uri).read_at((high - low) * size, (low - first) * size)
            pieces.append(np.frombuffer(data, np.uint8).reshape(high - low, size))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
