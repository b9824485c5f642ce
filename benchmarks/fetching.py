"""Covers downloaded per second from a store, with 1, 8 and 32 requests in parallel.

    uv run python -m benchmarks.fetching s3://bucket/prefix

Writes 400 synthetic covers to the prefix, downloads them as prepare and score do (in one process; a
cluster has one such process per CPU), and deletes them. Ratios are relative to one request at once.
"""

import argparse
import json
import time
import uuid

import pyarrow as pa

from benchmarks import run_benchmark
from covergenre.data import covers
from covergenre.data.covers import Cover, Source
from covergenre.demo.run import make_sample
from covergenre.io import storage

IN_FLIGHT = (1, 8, 32)


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", help="a prefix to write to")
    parser.add_argument("--covers", type=int, default=400)
    args = parser.parse_args()
    folder = storage.join(storage.absolute(args.directory), f"fetching-{uuid.uuid4().hex}")
    try:
        make_sample(folder, args.covers, 0)
        uris = storage.list_files(storage.join(folder, "covers"))
        records = [{"row": n, "album_id": uri, "cover": uri} for n, uri in enumerate(uris)]
        plan = pa.Table.from_pylist(records, schema=covers.PLAN)
        rates = {n: _measure(plan, n) for n in (8, *IN_FLIGHT)}  # the first run warms up
        sizes = storage.list_sizes(storage.join(folder, "covers")).values()
    finally:
        storage.delete_directory(folder)
    shown = {
        str(n): {"covers_per_second": round(rates[n], 1), "ratio": round(rates[n] / rates[1], 2)}
        for n in IN_FLIGHT
    }
    print(json.dumps({"covers": len(uris), "mean_bytes": sum(sizes) // len(uris), **shown}))


def _measure(plan: pa.Table, in_flight: int) -> float:
    began = time.perf_counter()
    for _, outcomes in covers.load(plan, Source(download_concurrency=in_flight), plan.num_rows):
        if not all(isinstance(outcome, Cover) for outcome in outcomes):
            raise SystemExit("some covers could not be downloaded, so the rate is meaningless")
    return int(plan.num_rows) / (time.perf_counter() - began)


if __name__ == "__main__":
    run_benchmark(main)
