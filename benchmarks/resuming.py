"""Cost of resuming a run of score: listing its finished output parts, and reading their counts.

    uv run python -m benchmarks.resuming DIRECTORY         # local, or s3://bucket/prefix

Writes 5,000 output parts of 1,024 albums to the directory, and deletes them. The times are
proportional to the number of parts; 100 million albums have 97,657. The counts are in the journal,
or, for the parts of the last minute before a crash, in the parts' footers.
"""

import argparse
import json
import time
import tracemalloc
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from benchmarks import run_benchmark
from covergenre import schema
from covergenre.data import dataset
from covergenre.inference.journal import Journal
from covergenre.inference.parts import FinishedParts, finished_parts
from covergenre.io import storage
from covergenre.stages import score

_ROWS = 1024


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", help="a directory or prefix to write to")
    parser.add_argument("--parts", type=int, default=5000)
    args = parser.parse_args()
    directory = storage.join(storage.absolute(args.directory), f"resuming-{uuid.uuid4().hex}")
    data = _part()
    names = [f"part-{part:08d}.parquet" for part in range(args.parts)]
    try:
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda n: storage.put(storage.join(directory, n), data), names))
        tracemalloc.start()
        finished_parts(directory)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        began = time.perf_counter()  # again, because tracing is slow
        parts = finished_parts(directory)
        listed = time.perf_counter()
        total: Counter[str] = Counter()
        score.count_rows(directory, parts.parts, total)
        counted = time.perf_counter()
        _write_journal(storage.join(directory, "counts"), parts)
        read: Counter[str] = Counter()
        started = time.perf_counter()
        missing = Journal(storage.join(directory, "counts")).sum(parts, read)
        journal = time.perf_counter() - started
    finally:
        storage.delete_directory(directory)
    if len(missing) or not total["scored"] == read["scored"] == args.parts * _ROWS:
        raise SystemExit("the counts do not add up")
    result = {
        "parts": args.parts,
        "listing_seconds": round(listed - began, 2),
        "listing_peak_mib": round(peak / 2**20, 1),
        "journal_seconds": round(journal, 2),
        "footers_seconds": round(counted - listed, 2),
    }
    print(json.dumps(result))


def _write_journal(folder: str, parts: FinishedParts) -> None:
    """As a run does that writes 120 parts a minute: 100 million albums in 14 hours."""
    journal = Journal(folder)
    for number, (part, size) in enumerate(zip(parts.parts, parts.sizes, strict=True), 1):
        journal.add([(int(part), {"scored": _ROWS, "bytes": int(size)})])
        if number % 120 == 0:
            journal.flush()
    journal.flush()


def _part() -> pa.Buffer:
    names = [f"genre {n}" for n in range(20)]
    scores = np.random.default_rng(0).random((len(names), _ROWS), np.float32)
    ids = [f"album-{row:09d}" for row in range(_ROWS)]
    columns = {
        "album_id": ids,
        "title": [f"Title {row}" for row in range(_ROWS)],
        "artist": [f"Artist {row % 100}" for row in range(_ROWS)],
        "top_genre": names[:1] * _ROWS,
        "top_score": scores[0],
        "genres": [names[:2]] * _ROWS,
        "scores": [list(zip(names, row, strict=True)) for row in scores.T],
        "row": range(_ROWS),
        "cover_sha256": [f"{row:064x}" for row in range(_ROWS)],
        "weights_id": ["0" * 16] * _ROWS,
        "decision_id": ["0" * 16] * _ROWS,
    }
    table = pa.table(columns, schema=schema.LABELS)
    return dataset.to_parquet(table, {"covergenre": json.dumps({"scored": _ROWS})})


if __name__ == "__main__":
    run_benchmark(main)
