"""Covers downloaded per second from S3, with 1, 8 and 32 requests in parallel.

    uv run python -m benchmarks.fetching s3://bucket/prefix

Writes 400 synthetic covers to the prefix, downloads them in one process (a cluster has one such
process per CPU), and deletes them. The clients take turns: as prepare and score download; the same
with all requests sent by boto3; boto3's `get_object` alone; Arrow's filesystem; and obstore, if it
is installed. CPU times are those of this process, per request. Medians, with the range.
"""

import argparse
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any
from unittest import mock

import pyarrow.fs

from benchmarks import run_benchmark
from covergenre.data.covers import Source, fetch
from covergenre.demo.run import make_sample
from covergenre.errors import ConfigError
from covergenre.io import storage
from covergenre.io.s3_range_get import RangeGetter

IN_FLIGHT = (1, 8, 32)
Get = Callable[[str], object]
"""Reads an s3:// URI."""


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", help="an s3:// prefix to write to")
    parser.add_argument("--covers", type=int, default=400)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    if storage.scheme(args.directory) != "s3":
        raise ConfigError(f"{args.directory}: not an s3:// prefix; give s3://BUCKET/PREFIX")
    folder = storage.join(storage.absolute(args.directory), f"fetching-{uuid.uuid4().hex}")
    try:
        make_sample(folder, args.covers, 0)
        sizes = storage.list_sizes(storage.join(folder, "covers"))
        uris = [storage.join(folder, "covers", name) for name in sizes]
        print(f"{len(uris)} covers of {sum(sizes.values()) // len(sizes):,} bytes\n")
        print(
            "| in flight | client | covers/s | ratio | CPU, ms | ratio |\n|---|---|---|---|---|---|"
        )
        for in_flight in IN_FLIGHT:
            _print_rows(_measure(uris, in_flight, args.runs), in_flight)
    finally:
        storage.delete_directory(folder)


def clients(bucket: str) -> dict[str, Get]:
    """Name -> the client; the ratios are to the second one."""
    import boto3
    from botocore.config import Config

    raw: Any = boto3.session.Session().client("s3", config=Config(max_pool_connections=64))
    arrow = pyarrow.fs.S3FileSystem(endpoint_override=os.environ.get("AWS_ENDPOINT_URL"))

    def key(uri: str) -> str:
        return uri.removeprefix(f"s3://{bucket}/")

    found: dict[str, Get] = {
        "covergenre": lambda uri: fetch(uri, Source()),
        "covergenre, sent by boto3": lambda uri: fetch(uri, Source()),
        "boto3": lambda uri: raw.get_object(Bucket=bucket, Key=key(uri))["Body"].read(),
        "Arrow": lambda uri: arrow.open_input_stream(uri.removeprefix("s3://")).read(),
    }
    try:
        from obstore.store import S3Store  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return found
    url = os.environ.get("AWS_ENDPOINT_URL")
    store = S3Store(bucket, endpoint=url, client_options={"allow_http": True})
    return found | {"obstore": lambda uri: store.get(key(uri)).bytes()}


def _measure(uris: list[str], in_flight: int, runs: int) -> dict[str, list[tuple[float, float]]]:
    """Client -> (covers per second, ms of CPU per request) of each run; a first run warms up."""
    bucket = uris[0].split("/")[2]
    by_name = clients(bucket)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in by_name}
    for _ in range(runs + 1):
        for name, get in by_name.items():
            never = mock.patch.object(RangeGetter, "_repeat", return_value=None)
            with mock.MagicMock() if "sent by" not in name else never:
                found[name].append(_run(get, uris, in_flight))
    return {name: measured[1:] for name, measured in found.items()}


def _run(get: Get, uris: list[str], in_flight: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(in_flight) as pool:
        list(pool.map(get, uris))
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return len(uris) / seconds, 1000 * cpu / len(uris)


def _print_rows(measured: dict[str, list[tuple[float, float]]], in_flight: int) -> None:
    base = measured["covergenre, sent by boto3"]
    for name, runs in measured.items():
        cells = [str(in_flight), name]
        for column, digits in ((0, 0), (1, 2)):
            ratios = [run[column] / other[column] for run, other in zip(runs, base, strict=True)]
            cells.append(f"{median(run[column] for run in runs):.{digits}f}")
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run_benchmark(main)
