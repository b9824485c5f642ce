"""Output parts: OUT/part-<number>.parquet has the rows number * part_rows to the next part's."""

import re

import numpy as np
from numpy.typing import NDArray

from covergenre.inference.batches import Ranges
from covergenre.io import storage


def part_name(part: int) -> str:
    """Name of a part's files without their extension. Alphabetical order is the order of rows."""
    return f"part-{part:08d}"


def finished_parts(out: str) -> NDArray[np.int64]:
    """Numbers of the parts that are written, ascending."""
    names = storage.list_sizes(out)
    found = (re.fullmatch(r"part-([0-9]{8,})\.parquet", name) for name in names)
    return np.array(sorted(int(match[1]) for match in found if match), np.int64)


def pending_ranges(rows: int, part_rows: int, finished: NDArray[np.int64]) -> Ranges:
    """The rows of the parts that are not written yet."""
    pending = np.setdiff1d(np.arange(-(-rows // part_rows)), finished, assume_unique=True)
    starts = pending * part_rows
    return np.stack([pending, starts, np.minimum(starts + part_rows, rows)], axis=1)
