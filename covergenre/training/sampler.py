"""The order of training samples: a pure function of (rows of each shard, seed, epoch).

Shards are shuffled and cut into windows of a few; the rows of a window are shuffled together. Step
s trains on positions s*B to (s+1)*B of that order, whatever the number of workers, so training can
resume at any step with any number of workers.

Each rank owns a contiguous part of the rows of a window. It reads only those, and computes those
of them that are in a step. The shuffle is stratified so that a rank's share of every step is nearly
equal: a window's rows are cut into 64 strata, and the order takes one row of each stratum, then
another of each, and so on. Within such a round of 64, the two halves of the window alternate, and
so do the two halves of each half, and so on (a scrambled van der Corput sequence).

    rows of a window     [ stratum 0 | stratum 1 | ... | stratum 63 ]   ranks own contiguous parts
    positions            [ round 0: a row of each | round 1: a row of each | ... ]
    steps                [     step 0     |     step 1     |     step 2     | ... ]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STRATA_BITS = 6  # 64 strata: their tree has 63 inner nodes, one random bit each
_STRATA = 2**_STRATA_BITS


@dataclass(frozen=True)
class Steps:
    """The steps of a training run."""

    rows: int
    """Of an epoch."""
    batch_size: int
    epochs: tuple[int, ...]
    """Steps of each epoch: the same number, except that --max-steps may shorten the last one."""

    @classmethod
    def of(cls, rows: int, batch_size: int, epochs: int, max_steps: int | None) -> "Steps":
        """The steps of `epochs` epochs, of which there are at most `max_steps`."""
        per_epoch = -(-rows // batch_size)
        total = min(epochs * per_epoch, max_steps or epochs * per_epoch)
        starts = range(0, total, per_epoch)
        return cls(rows, batch_size, tuple(min(per_epoch, total - start) for start in starts))

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return sum(self.epochs)

    @property
    def total_rows(self) -> int:
        """Rows of the whole run."""
        return sum(map(self.rows_in, self.epochs))

    def rows_in(self, steps: int) -> int:
        """Rows in the first `steps` steps of an epoch."""
        return min(steps * self.batch_size, self.rows)

    def size(self, step: int) -> int:
        """Rows of step `step` of an epoch; the last step may be short."""
        return self.rows_in(step + 1) - self.rows_in(step)

    def rows_before(self, epoch: int, step: int) -> int:
        """Rows of the whole run before step `step` of epoch `epoch`."""
        return sum(map(self.rows_in, self.epochs[:epoch])) + self.rows_in(step)


@dataclass(frozen=True)
class Window:
    """Shards whose rows are shuffled together."""

    index: int
    shards: tuple[int, ...]
    start: int
    """Position of its first row in the epoch's order."""
    rows: int

    def steps(self, batch_size: int) -> range:
        """The steps that have rows of this window."""
        if not self.rows:
            return range(0)
        return range(self.start // batch_size, (self.start + self.rows - 1) // batch_size + 1)


@dataclass(frozen=True)
class Part:
    """Contiguous rows of one shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Samples:
    """A rank's samples of a window, in order of training."""

    row: NDArray[np.int64]
    """Index among the rows that the rank owns: see `owned`."""
    step: NDArray[np.int64]
    offset: NDArray[np.int64]
    """Position in the step."""


def windows(
    shard_rows: Sequence[int], *, seed: int, epoch: int, shards_per_window: int
) -> list[Window]:
    """The windows of an epoch, in order; together they have every shard once."""
    order = np.argsort(_random_bits(len(shard_rows), seed, epoch, 0), kind="stable")
    out: list[Window] = []
    start = 0
    for index, first in enumerate(range(0, len(order), shards_per_window)):
        shards = tuple(int(s) for s in order[first : first + shards_per_window])
        rows = sum(shard_rows[s] for s in shards)
        out.append(Window(index, shards, start, rows))
        start += rows
    return out


def owned(window: Window, shard_rows: Sequence[int], rank: int, world: int) -> list[Part]:
    """The rows of `window` that `rank` of `world` reads and computes."""
    first, last = _owned_range(window, rank, world)
    parts: list[Part] = []
    start = 0
    for shard in window.shards:
        rows = shard_rows[shard]
        low, high = max(first - start, 0), min(last - start, rows)
        if low < high:
            parts.append(Part(shard, low, high))
        start += rows
    return parts


def samples(
    window: Window, *, seed: int, epoch: int, batch_size: int, rank: int = 0, world: int = 1
) -> Samples:
    """The samples of `window` that `rank` of `world` computes."""
    first, last = _owned_range(window, rank, world)
    order = _stratified_order(window.rows, seed, epoch, window.index)
    # Rounds begin at multiples of 64 of the epoch's order, as steps of 32, 64, 128 and so on do.
    order = np.roll(order, -(window.start % _STRATA))
    position = window.start + np.flatnonzero((order >= first) & (order < last))
    step, offset = np.divmod(position, batch_size)
    return Samples(order[position - window.start] - first, step, offset)


def _owned_range(window: Window, rank: int, world: int) -> tuple[int, int]:
    return window.rows * rank // world, window.rows * (rank + 1) // world


def _stratified_order(rows: int, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """A random order of range(rows) in which every run of positions has a proportional share of any
    contiguous part of range(rows): see the docstring of the module."""
    rounds = -(-rows // _STRATA)
    index = np.arange(rows, dtype=np.int64)
    stratum = index * _STRATA // max(rows, 1)
    starts = np.searchsorted(stratum, np.arange(_STRATA))
    # Random streams: 0 for the order of the shards, then two for each window.
    bits = _random_bits(_STRATA * rounds, seed, epoch, 2 * window + 1).reshape(_STRATA, rounds)
    turns = np.argsort(bits, axis=1, kind="stable")  # of each stratum's rows
    turn = turns[stratum, index - starts[stratum]]
    scramble = _random_bits(rounds, seed, epoch, 2 * window + 2)[turn]
    position = np.zeros(rows, np.uint64)  # in the round: the bits of the stratum, reversed
    for level in range(_STRATA_BITS):
        half = stratum >> (_STRATA_BITS - 1 - level)
        node = (2**level + (half >> 1)).astype(np.uint64)
        flip = (scramble >> node) & np.uint64(1)
        position |= ((half & 1).astype(np.uint64) ^ flip) << np.uint64(level)
    return np.lexsort((position, turn)).astype(np.int64)


def _random_bits(n: int, seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    """`n` random integers, the same on every machine and in every release of numpy.

    Generator's methods may change between releases; Philox's raw stream may not.
    """
    bits: NDArray[np.uint64] = np.random.Philox(
        counter=[0, 0, stream, epoch], key=[seed, 0]
    ).random_raw(n)
    return bits
