"""What it costs score to find out where a run stands: listing its finished units, and reading what
each has in its footer.

    uv run python -m benchmarks.resuming PLACE             # a folder, or s3://bucket/prefix

Puts 5,000 finished units of 1,024 albums there, and deletes them again. A hundred million albums
are 97,657 units; both costs grow with their number.
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

from benchmarks import told
from covergenre import schema
from covergenre.data import dataset
from covergenre.io import storage
from covergenre.stages import score

_ROWS = 1024


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("place", help="a folder or prefix to write to")
    parser.add_argument("--units", type=int, default=5000)
    args = parser.parse_args()
    place = storage.join(storage.absolute(args.place), f"resuming-{uuid.uuid4().hex}")
    data = _unit()
    names = [f"part-{unit:08d}.parquet" for unit in range(args.units)]
    try:
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda n: storage.put(storage.join(place, "labels", n), data), names))
        tracemalloc.start()
        score.finished_units(place)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        began = time.perf_counter()  # again: what is traced is slow
        units = score.finished_units(place)
        listed = time.perf_counter()
        total: Counter[str] = Counter()
        score.count_rows(place, units, total)
        counted = time.perf_counter()
    finally:
        storage.delete_directory(place)
    if total["scored"] != args.units * _ROWS:
        raise SystemExit("the footers do not add up")
    result = {
        "units": args.units,
        "listing_seconds": round(listed - began, 2),
        "listing_peak_mib": round(peak / 2**20, 1),
        "footers_seconds": round(counted - listed, 2),
    }
    print(json.dumps(result))


def _unit() -> pa.Buffer:
    names = [f"genre {n}" for n in range(20)]
    scores = np.random.default_rng(0).random((len(names), _ROWS), np.float32)
    ids = [f"album-{row:09d}" for row in range(_ROWS)]
    columns = [
        pa.array(ids),
        pa.array(range(_ROWS), pa.int64()),
        pa.array([f"{row:064x}" for row in range(_ROWS)]),
        pa.array([names[:2]] * _ROWS),
        pa.StructArray.from_arrays(list(map(pa.array, scores)), names=names),
        *[pa.array(["0" * 16] * _ROWS)] * 2,
    ]
    table = pa.table(columns, schema=schema.labels(names))
    return dataset.to_parquet(table, {"covergenre": json.dumps({"scored": _ROWS})})


if __name__ == "__main__":
    told(main)
