"""The order of training samples, every place of it, for many tiny datasets."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from covergenre.training.sampler import picks, share, steps_in_epoch, windows

Place = tuple[int, int, int]
"""(step, shard, row of the shard)"""

SHARDS = [(1,), (7,), (5, 3, 7, 1), (4, 4, 4), (2, 9, 1, 1, 6), (3, 0, 2), (1, 1, 1, 1, 1, 1)]
BATCHES = [1, 2, 3, 5, 8, 100]
PER_WINDOW = [1, 2, 3, 100]
WORLDS = [1, 2, 3, 5]


def places(
    shard_rows: tuple[int, ...],
    *,
    batch_size: int,
    per_window: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    epoch: int = 0,
    first_step: int = 0,
) -> list[Place]:
    """All that `rank` reads in an epoch, in order."""
    out: list[Place] = []
    for window in windows(shard_rows, seed=seed, epoch=epoch, shards_per_window=per_window):
        part = picks(
            window,
            shard_rows,
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            rank=rank,
            world=world,
            first_step=first_step,
        )
        triples = (part.step.tolist(), part.shard.tolist(), part.row.tolist())
        out += zip(*triples, strict=True)
    return out


def by_step(order: list[Place]) -> dict[int, list[Place]]:
    steps: dict[int, list[Place]] = {}
    for place in order:
        steps.setdefault(place[0], []).append(place)
    return steps


def cases() -> Iterator[tuple[tuple[int, ...], int, int, int, int]]:
    """(rows of each shard, batch size, shards a window, seed, epoch)"""
    yield from (
        (*case, seed, epoch)
        for case in product(SHARDS, BATCHES, PER_WINDOW)
        for seed, epoch in ((0, 0), (7, 3))
    )


def test_an_epoch_holds_every_row_once_and_full_steps_but_the_last() -> None:
    for shard_rows, batch_size, per_window, seed, epoch in cases():
        order = places(
            shard_rows, batch_size=batch_size, per_window=per_window, seed=seed, epoch=epoch
        )
        every = [(shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows)]
        assert sorted((shard, row) for _, shard, row in order) == every
        total = sum(shard_rows)
        assert [step for step, _, _ in order] == [at // batch_size for at in range(total)]
        assert order[-1][0] == steps_in_epoch(total, batch_size) - 1


def test_the_ranks_together_take_each_step_as_one_worker_would() -> None:
    for shard_rows, batch_size, per_window, seed, epoch in cases():
        alone = by_step(
            places(shard_rows, batch_size=batch_size, per_window=per_window, seed=seed, epoch=epoch)
        )
        for world in WORLDS:
            parts = [
                by_step(
                    places(
                        shard_rows,
                        batch_size=batch_size,
                        per_window=per_window,
                        rank=rank,
                        world=world,
                        seed=seed,
                        epoch=epoch,
                    )
                )
                for rank in range(world)
            ]
            for step, rows in alone.items():
                assert [place for part in parts for place in part.get(step, [])] == rows
            assert {step for part in parts for step in part} == set(alone)


def test_a_rank_reads_what_its_share_says() -> None:
    for shard_rows, batch_size, per_window in product(SHARDS, BATCHES, PER_WINDOW):
        total = sum(shard_rows)
        for world in WORLDS:
            shares = [
                [share(total, batch_size, step, rank, world) for rank in range(world)]
                for step in range(steps_in_epoch(total, batch_size))
            ]
            for rank in range(world):
                mine = by_step(
                    places(
                        shard_rows,
                        batch_size=batch_size,
                        per_window=per_window,
                        rank=rank,
                        world=world,
                    )
                )
                for step, of_step in enumerate(shares):
                    assert of_step[rank][0] == len(mine.get(step, []))
            for step, of_step in enumerate(shares):
                size = min(batch_size, total - step * batch_size)
                assert {whole for _, whole in of_step} == {size}
                own = [rows for rows, _ in of_step]
                assert sum(own) == size
                assert max(own) - min(own) <= 1


@pytest.mark.parametrize("world", WORLDS)
def test_any_step_can_be_entered(world: int) -> None:
    for shard_rows, batch_size, rank in product(SHARDS, BATCHES, range(world)):
        whole = places(shard_rows, batch_size=batch_size, per_window=2, rank=rank, world=world)
        for first in range(steps_in_epoch(sum(shard_rows), batch_size) + 1):
            entered = places(
                shard_rows,
                batch_size=batch_size,
                per_window=2,
                rank=rank,
                world=world,
                first_step=first,
            )
            assert entered == [place for place in whole if place[0] >= first]


def test_windows_hold_every_shard_once_end_to_end() -> None:
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
            start += window.rows


def test_every_epoch_has_other_windows() -> None:
    """Or the same shards would meet in every epoch, and no others."""
    orders = {
        tuple(w.shards for w in windows((1,) * 6, seed=seed, epoch=epoch, shards_per_window=2))
        for seed, epoch in product(range(3), range(4))
    }
    assert len(orders) == 12


def test_rows_are_shuffled_within_a_window_and_not_beyond() -> None:
    shard_rows = (40, 40, 40, 40)
    order = places(shard_rows, batch_size=1, per_window=2)
    for window in windows(shard_rows, seed=0, epoch=0, shards_per_window=2):
        part = order[window.start : window.start + window.rows]
        assert {shard for _, shard, _ in part} == set(window.shards)
        # mixed: each shard is in each half of the window, about 20 of its rows
        for shard in window.shards:
            assert 10 < sum(s == shard for _, s, _ in part[: window.rows // 2]) < 30
            rows = [row for _, s, row in part if s == shard]
            assert rows != sorted(rows)


def rows_alone(order: list[Place]) -> list[tuple[int, int]]:
    return [(shard, row) for _, shard, row in order]


def test_seed_and_epoch_and_they_alone_choose_the_order() -> None:
    shard_rows = (9, 8, 7, 6)
    orders = {
        (seed, epoch): rows_alone(
            places(shard_rows, batch_size=4, per_window=2, seed=seed, epoch=epoch)
        )
        for seed, epoch in product((0, 1, 2, 2**40, 2**63 - 1), range(4))
    }
    distinct = {tuple(order) for order in orders.values()}
    assert len(distinct) == len(orders)
    for (seed, epoch), order in orders.items():
        for batch_size in (1, 7, 30):  # the batch size only cuts the order
            again = places(shard_rows, batch_size=batch_size, per_window=2, seed=seed, epoch=epoch)
            assert rows_alone(again) == order


def test_windows_of_one_epoch_are_shuffled_differently() -> None:
    order = places((30, 30, 30), batch_size=1, per_window=1)
    by_window = [[row for _, _, row in order[at : at + 30]] for at in (0, 30, 60)]
    assert by_window[0] != by_window[1] != by_window[2] != by_window[0]


def test_every_row_comes_first_about_equally_often() -> None:
    first = [places((2, 2), batch_size=1, per_window=2, epoch=epoch)[0] for epoch in range(400)]
    counts = [first.count((0, shard, row)) for shard in (0, 1) for row in (0, 1)]
    assert sum(counts) == 400
    assert all(70 < n < 130 for n in counts), counts  # 100 expected, deviation 8.7


def test_steps_in_epoch_counts_a_short_last_step() -> None:
    counted = [steps_in_epoch(total, 4) for total in range(10)]
    assert counted == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_an_empty_split_has_no_window() -> None:
    assert windows((), seed=0, epoch=0, shards_per_window=3) == []


def test_golden_order() -> None:
    """A change of numpy, of Philox's use or of the arithmetic would break runs taken up again."""
    order = places((5, 4, 6), batch_size=4, per_window=2, seed=42, epoch=3)
    assert order[:10] == [
        *[(0, 0, 4), (0, 1, 2), (0, 1, 0), (0, 0, 0)],
        *[(1, 1, 3), (1, 1, 1), (1, 0, 1), (1, 0, 2)],
        *[(2, 0, 3), (2, 2, 4)],
    ]
    raw = np.random.Philox(counter=[0, 0, 1, 3], key=[42, 0]).random_raw(2)
    assert [int(value) for value in raw] == [0xBF1422CEC878E18D, 0xD646A2B3DE59A95D]
