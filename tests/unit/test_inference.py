"""Rows that are missing after crashes of workers."""

import numpy as np

from covergenre.inference.missing_rows import MissingRows, split_ranges


def test_missing_rows_are_subranges_of_the_submitted_ranges() -> None:
    ranges = split_ranges(np.array([[3, 30, 40], [5, 50, 57]]), 4)
    assert ranges.tolist() == [[3, 30, 34], [3, 34, 38], [3, 38, 40], [5, 50, 54], [5, 54, 57]]
    missing = MissingRows(ranges)
    assert not missing.any_received and missing.ranges().tolist() == ranges.tolist()
    for start, stop in ((54, 57), (36, 37), (34, 35), (38, 39), (39, 40)):
        missing.remove(start, stop)
    assert missing.any_received
    assert missing.ranges().tolist() == [
        *([3, 30, 34], [3, 35, 36], [3, 37, 38]),
        [5, 50, 54],
    ]
    for start, stop in ((30, 34), (35, 36), (37, 38), (50, 54)):
        missing.remove(start, stop)
    assert missing.ranges().shape == (0, 3)
