"""Rows of a plan in batches: loaded and decoded, ready for the model."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre.data import covers
from covergenre.data.image_decoding import CoverError, Preprocessing
from covergenre.data.plan import Plan
from covergenre.inference.outcomes import decode_rows

Ranges = NDArray[np.int64]
"""[n, 3]: (output part, first row, row after the last one), in order of row."""

Seconds = dict[str, float]
"""What took how long, for example {"fetch": 0.2, "decode": 1.1}."""


def add_seconds(sums: Seconds, more: Seconds) -> None:
    """Add `more` to `sums`."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


class Loaded(NamedTuple):
    """Some rows, loaded."""

    outcomes: pa.Table
    """A row for each; see outcomes.py."""
    pixels: NDArray[np.uint8]
    """uint8 [rows that decode, side, side, 3]"""
    seconds: Seconds
    """fetch and decode: in the task that loaded them. transfer: from there to the model."""


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one output part."""

    part: int
    stop: int
    """Number of the row after the last one."""
    outcomes: pa.Table
    """A row for each; see outcomes.py."""
    pixels: NDArray[np.uint8]
    """uint8 [rows that decode, side, side, 3]"""
    seconds: Seconds


def split_ranges(ranges: Ranges, rows: int) -> Ranges:
    """`ranges` cut into pieces of at most `rows` rows, counted from the start of each range."""
    counts = -(-(ranges[:, 2] - ranges[:, 1]) // rows)
    range_of = np.repeat(np.arange(len(ranges)), counts)
    piece = np.arange(len(range_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = ranges[range_of, 1] + piece * rows
    stop = np.minimum(start + rows, ranges[range_of, 2])
    return np.stack([ranges[range_of, 0], start, stop], axis=1)


def load(
    plan: Plan, start: int, stop: int, spec: Preprocessing, batch_size: int
) -> Iterator[Loaded]:
    """Rows `start` to `stop` in batches."""
    began = time.perf_counter()
    rows = plan.read(start, stop)
    at = 0
    for _, found in covers.load(rows.select(covers.LOADED_COLUMNS), plan.source, batch_size):
        fetched = time.perf_counter()
        outcomes, pixels = decode_rows(rows.slice(at, len(found)), found, spec)
        decoded = time.perf_counter()
        yield Loaded(outcomes, pixels, {"fetch": fetched - began, "decode": decoded - fetched})
        at += len(found)
        began = time.perf_counter()


def poison_row(plan: Plan, row: int, spec: Preprocessing) -> Loaded:
    """The outcome of a row whose workers crash, also where they have no other row."""
    error = CoverError("worker_died", "each worker that was given this row alone crashed")
    return Loaded(*decode_rows(plan.read(row, row + 1), [error], spec), {})


def decoded(plan: Plan, rows: list[int], spec: Preprocessing) -> list[NDArray[np.uint8]]:
    """Pixels of a few rows, uint8 [side, side, 3] each; every row must have a good cover."""
    return [
        image for row in rows for part in load(plan, row, row + 1, spec, 1) for image in part.pixels
    ]


def to_stream(table: pa.Table) -> bytes:
    """A table as an Arrow stream, without the rows around it of which it is a slice."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_stream(stream: bytes) -> pa.Table:
    """The table of `to_stream`."""
    return pa.ipc.open_stream(stream).read_all()
