"""The order of training samples: a pure function of (rows of each shard, seed, epoch).

Shards are shuffled, cut into windows of a few, and the rows of a window are shuffled together.
Step s holds places s*B to (s+1)*B of that order, over all workers; each rank takes a contiguous
part of every step. So the samples of a step depend on neither the number of workers nor on
timing, and any step can be entered directly.

    places   0 ............... B ............... 2B ......... total
    step     [      step 0     ][     step 1     ][ short last ]
    rank     [ rank 0 | rank 1 ][ rank 0 | rank 1 ][ r0 | r1   ]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    """Shards whose rows are shuffled together."""

    index: int
    shards: tuple[int, ...]
    start: int
    """Place of its first row in the epoch's order."""
    rows: int


@dataclass(frozen=True)
class Picks:
    """Rows to read from a window, in order."""

    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    """Row within that shard."""
    step: NDArray[np.int64]


def windows(
    shard_rows: Sequence[int], *, seed: int, epoch: int, shards_per_window: int
) -> list[Window]:
    """The windows of an epoch, in order; together they hold every shard once."""
    order = _shuffled(len(shard_rows), (seed, epoch, 0))
    out: list[Window] = []
    start = 0
    for index, first in enumerate(range(0, len(order), shards_per_window)):
        shards = tuple(int(s) for s in order[first : first + shards_per_window])
        rows = sum(shard_rows[s] for s in shards)
        out.append(Window(index, shards, start, rows))
        start += rows
    return out


def picks(
    window: Window,
    shard_rows: Sequence[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    first_step: int = 0,
) -> Picks:
    """What `rank` of `world` reads from `window`, from `first_step` on, in order."""
    shard = np.repeat(np.array(window.shards, np.int64), [shard_rows[s] for s in window.shards])
    row = np.concatenate([np.arange(shard_rows[s], dtype=np.int64) for s in window.shards])
    # + 1: the shards' own shuffle has stream 0
    order = _shuffled(window.rows, (seed, epoch, window.index + 1))
    total = sum(shard_rows)
    place = window.start + np.arange(window.rows, dtype=np.int64)
    step = place // batch_size
    size = np.minimum(batch_size, total - step * batch_size)
    offset = place - step * batch_size
    mine = (offset >= size * rank // world) & (offset < size * (rank + 1) // world)
    mine &= step >= first_step
    return Picks(shard[order][mine], row[order][mine], step[mine])


def steps_in_epoch(total_rows: int, batch_size: int) -> int:
    """Steps of one pass; the last may be short."""
    return -(-total_rows // batch_size)


def share(total_rows: int, batch_size: int, step: int, rank: int, world: int) -> tuple[int, int]:
    """(rows of `step` that `rank` computes, rows of the whole step)."""
    size = min(batch_size, total_rows - step * batch_size)
    return size * (rank + 1) // world - size * rank // world, size


def _shuffled(n: int, key: tuple[int, int, int]) -> NDArray[np.int64]:
    """A permutation of range(n), the same on every machine and in every release of numpy.

    Generator.permutation may change between releases; Philox's raw stream may not.
    """
    seed, epoch, stream = key
    bits = np.random.Philox(counter=[0, 0, stream, epoch], key=[seed, 0]).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)
