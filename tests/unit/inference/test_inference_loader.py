"""Loading rows ahead of the model: order, and rows that crash their workers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from images import encoded
from PIL import Image
from rows import TableReader, plan_table

from covergenre.data import plan as plans
from covergenre.data.image_decoding import Preprocessing
from covergenre.data.plan import Plan
from covergenre.errors import CovergenreError, StorageError
from covergenre.inference import batches
from covergenre.inference.batches import Loaded
from covergenre.inference.loader import Loader, WorkerCrashedError
from covergenre.inference.local_tasks import LocalTasks

ROWS = 24
BATCH_SIZE = 4
SPEC = Preprocessing(side=8)
RANGES = np.array([[0, 0, 10], [1, 10, 20], [3, 20, 24]])


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Covers of one color each, whose red is the number of their row; that of row 7 is missing."""
    folder = tmp_path_factory.mktemp("plan")
    rows = []
    for row in range(ROWS):
        cover = folder / f"{row}.png"
        if row != 7:
            cover.write_bytes(encoded(Image.new("RGB", (8, 8), (row, 0, 0))))
        rows.append({"album_id": f"a{row}", "cover": str(cover)})
    table = plan_table(rows)
    table = table.select([name for name in table.column_names if not name.startswith("first_")])
    return plans.write_plan(str(folder / "plan"), TableReader([table]))


class CrashingTasks:
    """Tasks in this process; those that load one of the `poison` rows crash before their end."""

    def __init__(self, plan: Plan, poison: set[int]) -> None:
        self._plan, self._poison = plan, poison

    def start(self, start: int, stop: int, batch_size: int) -> Iterator[Loaded]:
        for loaded in batches.load(self._plan, start, stop, SPEC, batch_size):
            if self._poison & set(loaded.outcomes["row"].to_pylist()):
                raise WorkerCrashedError
            yield loaded


def loaded(loader: Loader) -> tuple[pa.Table, list[int]]:
    """(outcomes of all rows, red of the covers that decode)"""
    found = list(loader.batches(RANGES, ahead=3))
    assert [(batch.part, batch.stop) for batch in found] == [
        *((0, 4), (0, 8), (0, 10)),
        *((1, 14), (1, 18), (1, 20)),
        (3, 24),
    ]
    reds = [int(image[0, 0, 0]) for batch in found for image in batch.pixels]
    return pa.concat_tables([batch.outcomes for batch in found]), reds


@pytest.mark.parametrize("poison", [set(), {0}, {9}, {5, 13}, {20, 21, 22, 23}])
def test_only_rows_that_crash_workers_alone_are_rejected(plan: Plan, poison: set[int]) -> None:
    messages: list[str] = []
    tasks = CrashingTasks(plan, poison)
    outcomes, reds = loaded(Loader(plan, SPEC, BATCH_SIZE, tasks, messages.append))
    assert outcomes["row"].to_pylist() == list(range(ROWS))
    assert reds == [row for row in range(ROWS) if row != 7 and row not in poison]
    reasons = dict(zip(range(ROWS), outcomes["reason"].to_pylist(), strict=True))
    expected = dict.fromkeys(poison, "worker_died") | {7: "missing_file"}
    assert {row: reason for row, reason in reasons.items() if reason} == expected
    assert bool(messages) == bool(poison)


def test_crashes_whatever_the_rows_are_an_error(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covergenre.inference.loader._MAX_POISON_ROWS", 10)
    loader = Loader(plan, SPEC, BATCH_SIZE, CrashingTasks(plan, set(range(ROWS))), print)
    with pytest.raises(CovergenreError) as caught:
        list(loader.batches(RANGES, ahead=3))
    assert caught.value.code == "workers_crash"


def child_processes() -> set[psutil.Process]:
    return set(psutil.Process().children())


def test_killed_child_processes_are_replaced(plan: Plan) -> None:
    before = child_processes()
    tasks = LocalTasks(plan, SPEC, 2)
    loader = Loader(plan, SPEC, BATCH_SIZE, tasks, print)
    try:
        outcomes, reds = loaded(loader)
        assert reds == [row for row in range(ROWS) if row != 7]
        for child in child_processes() - before:
            child.kill()
        again, others = loaded(loader)
        assert again.equals(outcomes) and others == reds
        # A batch that nobody takes keeps no child: more tasks than children, and then the end.
        for row in range(ROWS):
            tasks.start(row, row + 1, 1)
    finally:
        tasks.close()
    assert child_processes() <= before


def test_error_of_a_child_process_keeps_its_type_and_code(plan: Plan, tmp_path: Path) -> None:
    other = plans.write_plan(str(tmp_path / "plan"), TableReader([]))
    tasks = LocalTasks(other, SPEC, 1)
    try:
        with pytest.raises(StorageError) as caught:
            list(tasks.start(0, 4, 4))
        assert caught.value.code == "not_found"
    finally:
        tasks.close()
