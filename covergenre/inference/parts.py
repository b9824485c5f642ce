"""Output parts: OUT/part-<number>.parquet has the rows number * part_rows to the next part's."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covergenre.inference.batches import Ranges
from covergenre.io import storage

_MIN_PARTS = 256
_STEP = 64
_MAX_PART_ROWS = 1024


def part_name(part: int) -> str:
    """Name of a part's files without their extension. Alphabetical order is the order of rows."""
    return f"part-{part:08d}"


def default_part_rows(rows: int) -> int:
    """Rows per output part for a catalog of `rows` rows: small jobs have small parts, so that all
    workers have some, and large jobs few objects."""
    return min(max(rows // _MIN_PARTS // _STEP * _STEP, _STEP), _MAX_PART_ROWS)


@dataclass(frozen=True)
class FinishedParts:
    """The parts that are written."""

    parts: NDArray[np.int64]
    """Their numbers, ascending."""
    sizes: NDArray[np.int64]
    """Bytes of each."""

    def __len__(self) -> int:
        return len(self.parts)


def finished_parts(out: str) -> FinishedParts:
    """The parts that are written. One listing, of OUT without its subdirectories."""
    sizes = storage.list_sizes(out, recursive=False)
    found = ((re.fullmatch(r"part-([0-9]{8,})\.parquet", name), n) for name, n in sizes.items())
    table = sorted((int(match[1]), n) for match, n in found if match)
    parts, lengths = np.array(table, np.int64).reshape(-1, 2).T
    return FinishedParts(parts, lengths)


def pending_ranges(rows: int, part_rows: int, finished: NDArray[np.int64]) -> Ranges:
    """The rows of the parts that are not written yet."""
    pending = np.setdiff1d(np.arange(-(-rows // part_rows)), finished, assume_unique=True)
    starts = pending * part_rows
    return np.stack([pending, starts, np.minimum(starts + part_rows, rows)], axis=1)
