"""Cost of resuming a run of score: listing its committed output parts, and reading their footers.

    uv run python -m benchmarks.resuming DIRECTORY         # local, or s3://bucket/prefix

Writes 5,000 output parts of 1,024 albums to the directory, and deletes them. Both times are
proportional to the number of parts; 100 million albums have 97,657.
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
from covergenre.inference.parts import finished_parts
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
        score.count_rows(directory, parts, total)
        counted = time.perf_counter()
    finally:
        storage.delete_directory(directory)
    if total["scored"] != args.parts * _ROWS:
        raise SystemExit("the counts in the footers do not add up")
    result = {
        "parts": args.parts,
        "listing_seconds": round(listed - began, 2),
        "listing_peak_mib": round(peak / 2**20, 1),
        "footers_seconds": round(counted - listed, 2),
    }
    print(json.dumps(result))


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
