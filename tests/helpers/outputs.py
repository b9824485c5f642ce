"""Rows of a run's output directory, as records."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


def read_labels(out: Path) -> Rows:
    """Rows of OUT/part-*.parquet: of score's labels or evaluate's predictions."""
    files = sorted(out.glob("*.parquet"))
    return [
        row for file in files for row in pq.read_table(file).to_pylist(maps_as_pydicts="strict")
    ]


def read_rejected(out: Path) -> Rows:
    files = sorted((out / "_rejected").glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def read_duplicates(out: Path) -> Rows:
    files = sorted((out / "_state" / "duplicates").glob("part-*.arrow"))
    return [row for file in files for row in pa.ipc.open_file(file).read_all().to_pylist()]
