"""CPU time of a driver per row, and how the rate of score grows with the number of workers.

    uv run python -m benchmarks.driver                        # score, 1,000,000 rows
    uv run python -m benchmarks.driver --stage prepare        # prepare, 1,000,000 rows
    uv run python -m benchmarks.driver --workers 8 32 128     # rates

Everything is real, on an embedded Ray, except what the workers do with a row. For the CPU time they
load no cover, and write random scores, or no shards. For the rates they sleep for as long as a GPU
would take for the covers of an output part, and write nothing; the rate is that of the middle half
of the run.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from benchmarks import run_benchmark
from covergenre.cluster.ray_runtime import start_ray
from covergenre.cluster.workers import Workers
from covergenre.config import PrepareConfig, ScoreConfig
from covergenre.data import shards
from covergenre.data.covers import Duplicate
from covergenre.data.dataset_plan import plan_dataset, read_inputs
from covergenre.data.plan import Plan
from covergenre.demo.sample import write_untrained_model
from covergenre.inference import ray_scoring
from covergenre.inference.batches import Ranges
from covergenre.inference.outcomes import decode_rows
from covergenre.inference.scorer import Report, Write
from covergenre.models.bundle import Bundle, read_bundle
from covergenre.stages import prepare as prepare_stage
from covergenre.stages import score as score_stage

_PART_ROWS = 1024
_COVERS_PER_SECOND = 900.0
"""Of a worker that sleeps: about that of an L4 GPU in Ray's benchmark of image classification."""


class WritingActor:
    """A ScoringActor that loads no covers and writes random scores."""

    def __init__(self, plan: Plan, bundle: Bundle, batch_size: int, workers: Workers) -> None:
        self._plan, self._bundle = plan, bundle

    def start(self) -> None:
        """Nothing to load."""

    def score(self, ranges: Ranges, write: Write) -> Iterator[Report]:
        """A report for every part, so more than a real actor's."""
        spec, genres = self._bundle.preprocessing, len(self._bundle.genres)
        for part, start, stop in ranges.tolist():
            rows = self._plan.read(start, stop)
            outcomes, _ = decode_rows(rows, [Duplicate(0)] * rows.num_rows, spec)
            for name, values in (("cover_sha256", ["0" * 64]), ("first_row", [None])):
                column = pa.array(values * rows.num_rows, outcomes.schema.field(name).type)
                outcomes = outcomes.set_column(outcomes.column_names.index(name), name, column)
            scores = np.random.default_rng(part).random((rows.num_rows, genres), np.float32)
            report = Report(rows.num_rows)
            report.parts.append((part, write(part, outcomes, scores)))
            yield report


class SleepingActor:
    """A ScoringActor that takes the time of a GPU, and does nothing."""

    def __init__(self, plan: Plan, bundle: Bundle, batch_size: int, workers: Workers) -> None:
        pass

    def start(self) -> None:
        """Nothing to load."""

    def score(self, ranges: Ranges, write: Write) -> Iterator[Report]:
        """As often as a real actor's."""
        for part, start, stop in ranges.tolist():
            time.sleep((stop - start) / _COVERS_PER_SECOND)
            report = Report(stop - start)
            report.parts.append((part, {"scored": stop - start}))
            yield report


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--stage", choices=("score", "prepare"), default="score")
    parser.add_argument("--workers", type=int, nargs="+", help="instead: rates with these numbers")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each rate")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_untrained_model(str(folder / "model"))
        if args.workers:
            result = _rates(read_bundle(model), args.workers, args.seconds)
        elif args.stage == "prepare":
            result = _prepare_cpu_time(folder, args.rows)
        else:
            result = _cpu_time(folder, model, args.rows)
    print(json.dumps(result))


def _write_catalog(folder: Path, rows: int) -> str:
    with (folder / "catalog.csv").open("w") as file:
        file.write("album_id,cover,genres\n")
        file.writelines(
            f"album-{row:09d},https://covers.invalid/{row}.jpg,{'Rock' if row % 2 else 'Jazz'}\n"
            for row in range(rows)
        )
    return str(folder / "catalog.csv")


def _record_only(
    shard: shards.ShardRows, out: str, plan: Plan, max_side: int | None
) -> dict[str, Any]:
    """The task of prepare, which reads its rows, loads no cover and writes no shard."""
    rows = shards.read_shard(plan, shard)
    genres = Counter(genre for names in rows["genres"].to_pylist() for genre in names)
    return {"rows": shard.rows, "split": shard.split, "part": shard.part, "genres": genres}


def _prepare_cpu_time(folder: Path, rows: int) -> dict[str, Any]:
    config = PrepareConfig(catalog=_write_catalog(folder, rows), out=str(folder / "dataset"))
    start_ray()
    began = time.perf_counter()
    inputs = read_inputs(config)
    planned = plan_dataset(str(folder / "plan"), config, inputs, reuse=False)
    planning, cpu = time.perf_counter() - began, time.process_time()
    with mock.patch.object(prepare_stage, "_make_shard", _record_only):
        records = list(prepare_stage._make_shards(str(folder / "dataset"), config, planned))
    cpu = time.process_time() - cpu
    assert sum(record["rows"] for record in records) == rows
    return {
        "rows": rows,
        "driver_cpu_us_per_row": round(cpu / rows * 1e6, 2),
        "planned_rows_per_second": round(rows / planning),
        "shards": len(records),
    }


def _cpu_time(folder: Path, model: str, rows: int) -> dict[str, Any]:
    catalog = _write_catalog(folder, rows)
    measured: dict[str, float] = {}
    score_parts = ray_scoring.score_parts

    def timed(*arguments: Any, **settings: Any) -> Iterator[Report]:
        began, cpu = time.perf_counter(), time.process_time()
        yield from score_parts(*arguments, **settings)
        measured["seconds"] = time.perf_counter() - began
        measured["cpu_seconds"] = time.process_time() - cpu

    start_ray()
    began = time.perf_counter()
    config = ScoreConfig(
        model=model, catalog=catalog, out=str(folder / "labels"), workers=2, part_rows=_PART_ROWS
    )
    with (
        mock.patch.object(ray_scoring, "ScoringActor", WritingActor),
        mock.patch.object(ray_scoring, "score_parts", timed),
    ):
        done = score_stage.score(config)
    assert done.ledger["scored"] == rows
    return {
        "rows": rows,
        "driver_cpu_us_per_row": round(measured["cpu_seconds"] / rows * 1e6, 2),
        "scoring_seconds": round(measured["seconds"], 1),
        "other_seconds": round(time.perf_counter() - began - measured["seconds"], 1),
    }


def _rates(bundle: Bundle, counts: list[int], seconds: float) -> dict[str, Any]:
    start_ray()
    with mock.patch.object(ray_scoring, "ScoringActor", SleepingActor):
        return {str(count): round(_rate(bundle, count, seconds)) for count in counts}


def _rate(bundle: Bundle, count: int, seconds: float) -> float:
    """Covers per second of `count` workers."""
    parts = int(count * seconds * _COVERS_PER_SECOND / _PART_ROWS)
    number = np.arange(parts)
    ranges = np.stack([number, number * _PART_ROWS, (number + 1) * _PART_ROWS], axis=1)
    workers = Workers(count, use_gpu=False, cpus=0.01, per_node=count)
    reports = ray_scoring.score_parts(
        None,  # type: ignore[arg-type]  # no row is read
        ranges,
        bundle,
        lambda *_: {},
        batch_size=64,
        workers=workers,
    )
    times = [(time.perf_counter(), report.rows) for report in reports]
    rows = np.cumsum([rows for _, rows in times])
    first, last = np.searchsorted(rows, [rows[-1] // 4, rows[-1] * 3 // 4])
    return float((rows[last] - rows[first]) / (times[last][0] - times[first][0]))


if __name__ == "__main__":
    run_benchmark(main)
