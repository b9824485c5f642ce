"""Which rows of a run have yet to come, where workers have died."""

import numpy as np
import pyarrow as pa

from covergenre.inference import OUTCOMES, Scored, _chunks, _Missing


def part(unit: int, start: int, stop: int) -> Scored:
    """What came of some rows; only their numbers matter here."""
    outcomes = pa.Table.from_pylist([{"row": row} for row in range(start, stop)], schema=OUTCOMES)
    return Scored(unit, outcomes, np.empty((0, 1), np.float32))


def test_what_did_not_come_is_left_in_ranges_that_cross_no_chunk() -> None:
    units = np.array([[3, 30, 40], [5, 50, 57]])
    chunks = _chunks(units, 4)
    assert chunks.tolist() == [[3, 30, 34], [3, 34, 38], [3, 38, 40], [5, 50, 54], [5, 54, 57]]
    missing = _Missing(chunks)
    assert missing.none_came and missing.rows().tolist() == chunks.tolist()
    for unit, start, stop in ((5, 54, 57), (3, 36, 37), (3, 34, 35), (3, 38, 39), (3, 39, 40)):
        missing.remove(part(unit, start, stop))
    assert not missing.none_came
    assert missing.rows().tolist() == [
        *([3, 30, 34], [3, 35, 36], [3, 37, 38]),
        [5, 50, 54],
    ]
    for unit, start, stop in ((3, 30, 34), (3, 35, 36), (3, 37, 38), (5, 50, 54)):
        missing.remove(part(unit, start, stop))
    assert missing.rows().shape == (0, 3)
