"""The order of training samples: every position of it, for many tiny datasets."""

from collections import Counter
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from covergenre.training.sampler import Steps, owned, samples, windows

Sample = tuple[int, int, int]
"""(step, shard, row of the shard)"""
Owned = list[tuple[int, Sample]]
"""(position in the step, sample) of a rank, in order."""

SHARDS = [(1,), (7,), (5, 3, 7, 1), (4, 4, 4), (2, 9, 1, 1, 6), (3, 0, 2), (70, 61), (1,) * 6]
BATCHES = [1, 2, 3, 5, 8, 100]
PER_WINDOW = [1, 2, 3, 100]
WORLDS = [1, 2, 3, 5]


def samples_of_rank(
    shard_rows: tuple[int, ...],
    *,
    batch_size: int,
    per_window: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    epoch: int = 0,
) -> Owned:
    """All that `rank` computes in an epoch, in order."""
    out: Owned = []
    for window in windows(shard_rows, seed=seed, epoch=epoch, shards_per_window=per_window):
        parts = owned(window, shard_rows, rank, world)
        rows = [(part.shard, row) for part in parts for row in range(part.start, part.stop)]
        found = samples(
            window, seed=seed, epoch=epoch, batch_size=batch_size, rank=rank, world=world
        )
        assert sorted(found.row.tolist()) == list(range(len(rows)))
        steps = set(found.step.tolist())
        assert steps <= set(window.steps(batch_size))
        for row, step, offset in zip(
            found.row.tolist(), found.step.tolist(), found.offset.tolist(), strict=True
        ):
            out.append((offset, (step, *rows[row])))
    return out


def epoch_order(shard_rows: tuple[int, ...], **settings: int) -> list[Sample]:
    """The order with one worker."""
    return [sample for _, sample in samples_of_rank(shard_rows, **settings)]


def by_step(order: Owned) -> dict[int, Owned]:
    steps: dict[int, Owned] = {}
    for offset, sample in order:
        steps.setdefault(sample[0], []).append((offset, sample))
    return steps


def cases() -> Iterator[tuple[tuple[int, ...], int, int, int, int]]:
    """(rows of each shard, batch size, shards per window, seed, epoch)"""
    yield from (
        (*case, seed, epoch)
        for case in product(SHARDS, BATCHES, PER_WINDOW)
        for seed, epoch in ((0, 0), (7, 3))
    )


def test_epoch_has_every_row_once_and_only_the_last_step_is_short() -> None:
    for shard_rows, batch_size, per_window, seed, epoch in cases():
        order = samples_of_rank(
            shard_rows, batch_size=batch_size, per_window=per_window, seed=seed, epoch=epoch
        )
        every = [(shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows)]
        assert sorted((shard, row) for _, (_, shard, row) in order) == every
        for position, (offset, (step, _, _)) in enumerate(order):
            assert (step, offset) == divmod(position, batch_size)


def test_ranks_together_compute_the_steps_of_one_worker() -> None:
    for shard_rows, batch_size, per_window, seed, epoch in cases():
        settings = {
            "batch_size": batch_size,
            "per_window": per_window,
            "seed": seed,
            "epoch": epoch,
        }
        alone = by_step(samples_of_rank(shard_rows, **settings))
        for world in WORLDS:
            together: Owned = []
            for rank in range(world):
                together += samples_of_rank(shard_rows, rank=rank, world=world, **settings)
            found = {step: sorted(part) for step, part in by_step(together).items()}
            assert found == alone


def test_rank_owns_contiguous_rows_of_each_window() -> None:
    """Otherwise it would have to read more than its rows."""
    for shard_rows, per_window, world in product(SHARDS, PER_WINDOW, WORLDS):
        for window in windows(shard_rows, seed=0, epoch=1, shards_per_window=per_window):
            rows = [(s, row) for s in window.shards for row in range(shard_rows[s])]
            found = []
            for rank in range(world):
                parts = owned(window, shard_rows, rank, world)
                assert len({part.shard for part in parts}) == len(parts)
                found += [(p.shard, row) for p in parts for row in range(p.start, p.stop)]
            assert found == rows


@pytest.mark.parametrize("batch_size", [32, 64, 100, 128, 256])
@pytest.mark.parametrize("world", [2, 3, 4, 8, 16, 32])
def test_ranks_have_nearly_equal_shares_of_each_step(batch_size: int, world: int) -> None:
    """A step takes as long as its largest share."""
    shard_rows = (*[256] * 40, 131)
    shares = np.zeros((sum(shard_rows) // batch_size, world), np.int64)  # of full steps
    for rank in range(world):
        for window in windows(shard_rows, seed=5, epoch=0, shards_per_window=8):
            found = samples(window, seed=5, epoch=0, batch_size=batch_size, rank=rank, world=world)
            np.add.at(shares[:, rank], found.step[found.step < len(shares)], 1)
    assert (shares.sum(1) == batch_size).all()
    assert shares.max(1).mean() <= -(-batch_size // world) + 0.6


def test_windows_have_every_shard_once_and_are_consecutive() -> None:
    for shard_rows, per_window, epoch in product(SHARDS, PER_WINDOW, range(3)):
        found = windows(shard_rows, seed=1, epoch=epoch, shards_per_window=per_window)
        assert sorted(s for w in found for s in w.shards) == list(range(len(shard_rows)))
        assert [w.index for w in found] == list(range(len(found)))
        assert all(len(w.shards) == per_window for w in found[:-1])
        assert 1 <= len(found[-1].shards) <= per_window
        start = 0
        for window in found:
            assert window.start == start
            assert window.rows == sum(shard_rows[s] for s in window.shards)
            for batch_size in BATCHES:
                positions = range(start, start + window.rows)
                assert list(window.steps(batch_size)) == sorted(
                    {p // batch_size for p in positions}
                )
            start += window.rows


def test_windows_differ_between_epochs() -> None:
    """Otherwise the same shards would be shuffled together in every epoch."""
    orders = {
        tuple(w.shards for w in windows((1,) * 6, seed=seed, epoch=epoch, shards_per_window=2))
        for seed, epoch in product(range(3), range(4))
    }
    assert len(orders) == 12


def test_rows_are_shuffled_only_within_a_window() -> None:
    shard_rows = (400, 400, 400, 400)
    order = epoch_order(shard_rows, batch_size=1, per_window=2)
    for window in windows(shard_rows, seed=0, epoch=0, shards_per_window=2):
        part = order[window.start : window.start + window.rows]
        assert {shard for _, shard, _ in part} == set(window.shards)
        for shard in window.shards:
            # each half of the window has half of each shard, and not in its order
            rows = [row for _, s, row in part if s == shard]
            assert 190 < sum(s == shard for _, s, _ in part[: window.rows // 2]) < 210
            assert abs(np.corrcoef(rows, np.arange(400))[0, 1]) < 0.2  # deviation 0.05


def test_batches_differ_between_epochs() -> None:
    """Rows that are neighbours in the dataset are no more often in one batch than by chance."""
    shard_rows, batch_size, epochs = (64,) * 8, 32, 200
    together = np.zeros(8 * 64 - 1)
    for epoch in range(epochs):
        step_of = np.empty(8 * 64, np.int64)
        for step, shard, row in epoch_order(
            shard_rows, batch_size=batch_size, per_window=8, epoch=epoch
        ):
            step_of[shard * 64 + row] = step
        together += step_of[1:] == step_of[:-1]
    # 16 steps: by chance in one of 16 epochs, 12.5 of 200
    assert together.mean() < 13.5 and together.max() < 40


def rows_alone(order: list[Sample]) -> list[tuple[int, int]]:
    return [(shard, row) for _, shard, row in order]


def test_only_seed_and_epoch_determine_the_order() -> None:
    shard_rows = (9, 8, 7, 6)
    orders = {
        (seed, epoch): rows_alone(
            epoch_order(shard_rows, batch_size=4, per_window=2, seed=seed, epoch=epoch)
        )
        for seed, epoch in product((0, 1, 2, 2**40, 2**63 - 1), range(4))
    }
    distinct = {tuple(order) for order in orders.values()}
    assert len(distinct) == len(orders)
    for (seed, epoch), order in orders.items():
        for batch_size in (1, 7, 30):  # the batch size only cuts the order
            again = epoch_order(
                shard_rows, batch_size=batch_size, per_window=2, seed=seed, epoch=epoch
            )
            assert rows_alone(again) == order


def test_windows_of_one_epoch_are_shuffled_differently() -> None:
    order = epoch_order((30, 30, 30), batch_size=1, per_window=1)
    by_window = [[row for _, _, row in order[at : at + 30]] for at in (0, 30, 60)]
    assert by_window[0] != by_window[1] != by_window[2] != by_window[0]


@pytest.mark.parametrize("shard_rows", [(2, 2), (15, 15)])
def test_every_row_comes_first_about_equally_often(shard_rows: tuple[int, ...]) -> None:
    rows, epochs = sum(shard_rows), 100 * sum(shard_rows)
    first = Counter(
        rows_alone(epoch_order(shard_rows, batch_size=1, per_window=2, epoch=epoch))[0]
        for epoch in range(epochs)
    )
    counts = np.array(list(first.values()))
    assert len(counts) == rows
    assert counts.min() > 55 and counts.max() < 150, counts  # 100 expected, deviation 10


def test_empty_split_has_no_windows() -> None:
    assert windows((), seed=0, epoch=0, shards_per_window=3) == []


@pytest.mark.parametrize("total", range(1, 10))
def test_steps_of_a_run(total: int) -> None:
    """The last step may be short, and max_steps may end the last epoch."""
    for max_steps in (None, 1, 3, 4, 5, 100):
        steps = Steps.of(total, 4, epochs=2, max_steps=max_steps)
        an_epoch = -(-total // 4)
        assert steps.total == min(2 * an_epoch, max_steps or 100) == sum(steps.epochs)
        assert all(count == an_epoch for count in steps.epochs[:-1])
        sizes = [[steps.size(step) for step in range(count)] for count in steps.epochs]
        assert steps.total_rows == sum(map(sum, sizes))
        assert [sum(size) for size in sizes] == [steps.rows_in(count) for count in steps.epochs]
        assert all(sum(size) == total for size in sizes if len(size) == an_epoch)
        done = 0
        for epoch, size in enumerate(sizes):
            for step, rows in enumerate(size):
                assert steps.rows_before(epoch, step) == done
                done += rows


def test_golden_order() -> None:
    """A change of numpy, of Philox's use or of the arithmetic would break resumed runs."""
    order = epoch_order((5, 4, 6), batch_size=4, per_window=2, seed=42, epoch=3)
    assert order == [
        *[(0, 0, 2), (0, 1, 3), (0, 0, 3), (0, 0, 1)],
        *[(1, 1, 0), (1, 1, 2), (1, 0, 0), (1, 0, 4)],
        *[(2, 1, 1), (2, 2, 3), (2, 2, 4), (2, 2, 0)],
        *[(3, 2, 2), (3, 2, 5), (3, 2, 1)],
    ]
    raw = np.random.Philox(counter=[0, 0, 1, 3], key=[42, 0]).random_raw(2)
    assert [int(value) for value in raw] == [0xBF1422CEC878E18D, 0xD646A2B3DE59A95D]
