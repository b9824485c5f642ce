"""CPU time and memory of listing 300,000 keys of S3, and of boto3 for the same pages.

    uv run python -m benchmarks.listing

A server in another process answers with pages of 1,000 keys, as S3 does. Each listing is measured
in a separate process; memory is by how much its peak grows.
"""

import argparse
import http.server
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any
from urllib.parse import parse_qs, urlsplit

from benchmarks import run_benchmark
from covergenre.io import s3, storage

BUCKET = "bucket"
CLIENTS = ("covergenre", "boto3")
_OBJECT = (
    "<Contents><Key>covers/{0:09}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;{0:032x}&quot;</ETag><Size>{1}</Size><StorageClass>STANDARD</StorageClass>"
    "</Contents>"
)
_PAGE = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult'
    ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><EncodingType>url</EncodingType>'
    "<IsTruncated>{0}</IsTruncated><NextContinuationToken>{1}</NextContinuationToken>{2}"
    "</ListBucketResult>"
)
_NO_TOKEN = "<NextContinuationToken></NextContinuationToken>"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    keys = 0

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("continuation-token", ["0"])[0])
        stop = min(start + int(query.get("max-keys", ["1000"])[0]), self.keys)
        objects = "".join(_OBJECT.format(n, 12_000 + n) for n in range(start, stop))
        is_last = stop == self.keys
        page = _PAGE.format("false" if is_last else "true", "" if is_last else stop, objects)
        body = page.replace(_NO_TOKEN, "").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    """Measure in child processes, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keys", type=int, default=300_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--role", choices=("server", *CLIENTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "server":
        _serve(args.keys)
    elif args.role:
        print(json.dumps(_measure(args.role)))
    else:
        _print_table(args.keys, args.runs)


def _serve(keys: int) -> None:
    _Handler.keys = keys
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


def _measure(client: str) -> dict[str, float]:
    storage.filesystem(f"s3://{BUCKET}")  # connects
    from botocore.session import get_session

    boto3 = get_session().create_client("s3")  # its models are loaded before the measurement, too
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    if client == "covergenre":
        found = s3.list_sizes(f"{BUCKET}/covers")
    else:
        pages = boto3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="covers/")
        found = {entry["Key"]: entry["Size"] for page in pages for entry in page["Contents"]}
    seconds = time.process_time() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return {"keys": len(found), "seconds": seconds, "mebibytes": grown / 2**10}


def _print_table(keys: int, runs: int) -> None:
    command = [sys.executable, "-m", "benchmarks.listing", "--keys", str(keys), "--role"]
    with subprocess.Popen([*command, "server"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            environment = os.environ | {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "x",
                "AWS_SECRET_ACCESS_KEY": "x",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            found: dict[str, list[dict[str, float]]] = {client: [] for client in CLIENTS}
            for _ in range(runs):
                for client in CLIENTS:
                    output = subprocess.check_output([*command, client], env=environment)
                    found[client].append(json.loads(output))
        finally:
            server.kill()
    ratios = [
        theirs["seconds"] / ours["seconds"]
        for ours, theirs in zip(found["covergenre"], found["boto3"], strict=True)
    ]
    print(f"| {keys:,} keys | CPU, s | memory, MiB |", "|---|---|---|", sep="\n")
    for client, measured in found.items():
        seconds, memory = (
            median(run[name] for run in measured) for name in measured[0] if name != "keys"
        )
        print(f"| {client} | {seconds:.1f} | {memory:.0f} |")
    print(f"\nboto3 takes {median(ratios):.1f}x the CPU ({min(ratios):.1f} to {max(ratios):.1f}).")


if __name__ == "__main__":
    run_benchmark(main)
