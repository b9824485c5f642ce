"""Rows without a result: those whose workers crashed are computed again."""

import numpy as np
from numpy.typing import NDArray

Ranges = NDArray[np.int64]
"""[n, 3]: (output part, first row, row after the last one), in order of row."""


def split_ranges(ranges: Ranges, rows: int) -> Ranges:
    """`ranges` cut into pieces of at most `rows` rows, counted from the start of each range."""
    counts = -(-(ranges[:, 2] - ranges[:, 1]) // rows)
    range_of = np.repeat(np.arange(len(ranges)), counts)
    piece = np.arange(len(range_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = ranges[range_of, 1] + piece * rows
    stop = np.minimum(start + rows, ranges[range_of, 2])
    return np.stack([ranges[range_of, 0], start, stop], axis=1)


class MissingRows:
    """The rows of some ranges that have no result yet. No result crosses the end of a range."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._missing = ranges[:, 2] - ranges[:, 1]
        self._received: dict[int, list[tuple[int, int]]] = {}  # of partly received ranges
        self.any_received = False

    def remove(self, start: int, stop: int) -> None:
        """Rows `start` to `stop` have a result."""
        index = int(np.searchsorted(self._ranges[:, 1], start, side="right")) - 1
        self._missing[index] -= stop - start
        self._received.setdefault(index, []).append((start, stop))
        if not self._missing[index]:
            del self._received[index]
        self.any_received = True

    def ranges(self) -> Ranges:
        """The ranges that are missing. None crosses the end of an original range."""
        missing = []
        for index in np.flatnonzero(self._missing).tolist():
            part, start, stop = self._ranges[index].tolist()
            for begin, end in sorted(self._received.get(index, ())):
                if begin > start:
                    missing.append((part, start, begin))
                start = end
            if start < stop:
                missing.append((part, start, stop))
        return np.array(missing, np.int64).reshape(-1, 3)
