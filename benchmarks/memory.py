"""Peak memory of score for N and 10 N albums, or the time to start and to resume a long catalog.

    uv run python -m benchmarks.memory                     # 3,000 albums, then 30,000
    uv run python -m benchmarks.memory --plan 300000       # only planning, as by prepare
    uv run python -m benchmarks.memory --rows 5000000      # stopped after the first output part

Runs the command `covergenre score` on an embedded Ray, with an untrained model. Sampled ten times
per second from /proc (Linux only): memory of the driver, of all Ray workers and their children, and
used memory of Ray's object store. The rows repeat 50 synthetic covers.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks import run_benchmark
from covergenre.config import PrepareConfig
from covergenre.data.dataset_plan import plan_dataset, read_inputs
from covergenre.demo.sample import write_sample, write_untrained_model

_COVERS = 50
_SAMPLE_SECONDS = 0.1
_PROCESS_EXITED = (psutil.Error, OSError, KeyError)
_FACTOR = 10


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--albums", type=int, default=3000, help="N; the second run has ten times as many"
    )
    parser.add_argument(
        "--rows", type=int, help="instead: time to start and to resume a catalog of this many rows"
    )
    parser.add_argument("--plan", type=int, help="instead: memory of planning N rows for prepare")
    parser.add_argument("--plan-catalog", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan_catalog:
        print(json.dumps(_plan(Path(args.plan_catalog))))
        return
    if args.plan:
        print(json.dumps(_compare_plans(args.plan)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_untrained_model(str(folder / "model"))
        covers = sorted((write_sample(folder / "sample", _COVERS, 0).parent / "covers").iterdir())
        result = (
            _time_to_start(folder, model, covers, args.rows)
            if args.rows
            else _compare(folder, model, covers, args.albums)
        )
    print(json.dumps(result))


def _catalog(file: Path, covers: list[Path], rows: int) -> Path:
    with file.open("w") as out:
        out.write("album_id,cover\n")
        for row in range(rows):
            out.write(f"album-{row:09d},{covers[row % len(covers)]}\n")
    return file


def _compare_plans(rows: int) -> dict[str, Any]:
    """Peak memory of planning N and 10 N rows, each in a separate process, without Ray."""
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in (rows, rows * _FACTOR):
            catalog = _labeled_catalog(Path(temporary, f"{count}.csv"), count)
            command = [sys.executable, "-m", "benchmarks.memory", "--plan-catalog", str(catalog)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(result.stdout))
    few, many = results
    return {
        **{name: [few[name], many[name]] for name in few},
        "peak_ratio": round(many["peak_mib"] / few["peak_mib"], 2),
    }


def _labeled_catalog(file: Path, rows: int) -> Path:
    """Rows with URLs, up to three of 40 genres, and artists; 1 in 100 repeats an earlier id."""
    chance = random.Random(0)
    names = [f"Genre {n}" for n in range(40)]
    weights = [1 / (n + 1) for n in range(40)]
    with file.open("w") as out:
        out.write("album_id,cover,genres,title,artist\n")
        for row in range(rows):
            album = row if row % 100 else max(row - 77, 0)
            genres = "|".join(dict.fromkeys(chance.choices(names, weights, k=row % 4)))
            out.write(
                f"album-{album:09d},https://covers.example.org/{album % 1000:03d}/{album:09d}.jpg,"
                f"{genres},Title {row},Artist {row % (rows // 8 + 1)}\n"
            )
    return file


def _plan(catalog: Path) -> dict[str, Any]:
    """Plan the dataset of a catalog in this process; returns its peak memory."""
    out = str(catalog.with_suffix(".out"))
    config = PrepareConfig(catalog=str(catalog), out=out, group_by="artist")
    began = time.monotonic()
    planned = plan_dataset(f"{out}/_state/plan", config, read_inputs(config), reuse=False)
    seconds = time.monotonic() - began
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    return {
        "rows": planned.plan.rows,
        "shards": len(planned.assignment.shards),
        "seconds": round(seconds, 1),
        "rows_per_second": round(planned.plan.rows / seconds),
        "peak_mib": int(peak) >> 10,
    }


def _compare(folder: Path, model: str, covers: list[Path], albums: int) -> dict[str, Any]:
    peaks = []
    for count in (albums, albums * _FACTOR):
        run = _Run(model, _catalog(folder / f"{count}.csv", covers, count), folder / f"out-{count}")
        if run.process.wait():
            raise SystemExit(f"score exited with code {run.process.returncode}")
        peaks.append(run.peaks())
    few, many = peaks
    return {
        "albums": [albums, albums * _FACTOR],
        **{f"{name}_mib": [few[name], many[name]] for name in few},
        **{f"{name}_ratio": round(many[name] / few[name], 2) for name in few},
    }


def _time_to_start(folder: Path, model: str, covers: list[Path], rows: int) -> dict[str, Any]:
    catalog, out = _catalog(folder / "catalog.csv", covers, rows), folder / "out"
    found: dict[str, Any] = {"rows": rows, "catalog_mib": catalog.stat().st_size >> 20}
    for name in ("started", "resumed"):
        before = len(_parts(out))
        # Small output parts, so that the first one is written early.
        run = _Run(model, catalog, out, "--part-rows", "64")
        while len(_parts(out)) == before:
            if run.process.poll() is not None:
                raise SystemExit(f"score exited with code {run.process.returncode}")
            time.sleep(_SAMPLE_SECONDS)
        found[f"{name}_after_seconds"] = round(time.monotonic() - run.began, 1)
        run.process.terminate()
        run.process.wait()
        found[f"{name}_driver_mib"] = run.peaks()["driver"]
    plan = out / "_state" / "plan"
    found["plan_mib"] = sum(file.stat().st_size for file in plan.iterdir()) >> 20
    return found


def _parts(out: Path) -> list[Path]:
    return list(out.glob("part-*.parquet"))


class _Run:
    """A process of `covergenre score` whose memory is sampled."""

    def __init__(self, model: str, catalog: Path, out: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "covergenre", "score", model, str(catalog)]
        command += ["--workers", "1"]  # with Ray also for few albums
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*command, "--out", str(out), *flags], env=os.environ | {"RAY_ADDRESS": ""}
        )
        self._peaks = {"driver": 0, "workers": 0, "object_store": 0}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def peaks(self) -> dict[str, int]:
        """Peaks in MiB; waits for the process to exit."""
        self._thread.join()
        return {name: kib >> 10 for name, kib in self._peaks.items()}

    def _watch(self) -> None:
        driver = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            sample = dict.fromkeys(self._peaks, 0)
            with suppress(*_PROCESS_EXITED):
                sample["driver"] = _kib(driver.pid)
                for process in driver.children(recursive=True):
                    with suppress(*_PROCESS_EXITED):
                        if "raylet" in process.name():
                            sample["object_store"] = _store_kib(process.pid)
                        elif _is_worker(process):
                            sample["workers"] += _kib(process.pid)
            self._peaks = {name: max(kib, sample[name]) for name, kib in self._peaks.items()}
            time.sleep(_SAMPLE_SECONDS)


def _is_worker(process: psutil.Process) -> bool:
    """Whether the process is a Ray worker or a child of one, such as the decoder."""
    lines = (" ".join(one.cmdline()) for one in (process, *process.parents()))
    return any(line.startswith("ray::") and "Agent" not in line for line in lines)


def _kib(pid: int) -> int:
    """Private memory of a process: without shared libraries and the object store."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return int(found["RssAnon"])


def _store_kib(pid: int) -> int:
    """Allocated memory of the object store, a file in /dev/shm that the raylet has open."""
    files = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(link).startswith("/dev/shm/"):
            found = link.stat()
            files[found.st_ino] = found.st_blocks // 2
    return sum(files.values())


if __name__ == "__main__":
    run_benchmark(main)
