"""The Ray Data pipeline: plan -> load and decode (tasks) -> model (actors) -> driver."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre.cluster.ray_runtime import data_context, unwrap_ray_errors
from covergenre.cluster.workers import Workers, use_cores
from covergenre.data import covers, dataset
from covergenre.data.image_decoding import CoverError, Preprocessing
from covergenre.data.plan import Plan
from covergenre.errors import CovergenreError, DeviceMemoryError
from covergenre.formatting import plural
from covergenre.inference.error_records import raise_record, to_record
from covergenre.inference.missing_rows import MissingRows, Ranges, split_ranges
from covergenre.inference.outcomes import ScoredRows, decode_rows
from covergenre.models.bundle import Bundle, load_model, read_bundle
from covergenre.models.predictor import Predictor, to_device

logger = logging.getLogger(__name__)

_TASK_ROWS = dataset.ROW_GROUP_ROWS
"""Rows that one loading task reads: a row group of a dataset. Where the covers are in Parquet files
of a catalog, whose row groups may be larger, a task reads a whole output part."""
_MAX_BLOCKS = 2000
_MAX_RETRIES = 2
"""Of a task whose worker crashed. Ray's default for actors is unlimited."""


def score_plan(
    plan: Plan, ranges: Ranges, bundle: Bundle, *, batch_size: int, workers: Workers
) -> Iterator[ScoredRows]:
    """Score ranges of rows of `plan` on the cluster. Yields each row once, in any order.

    ranges: int64 [n, 3] of (output part, first row, row after the last one). The batches of a range
    depend on its rows only, so a range that is scored again gets the same scores.

    Crashed workers are restarted. Rows whose workers crash repeatedly are tried again in smaller
    batches, in the end alone; a row whose workers crash then is a poison row, and is rejected.
    """
    covers_in_files = bool(plan.source.files) and not plan.source.prepared
    for task_rows in (None if covers_in_files else _TASK_ROWS, batch_size, 1):
        tasks = split_ranges(ranges, task_rows) if task_rows else ranges
        missing = MissingRows(tasks)
        for scored in _run(plan, tasks, bundle, batch_size, workers):
            missing.remove(scored.start, scored.stop)
            yield scored
        ranges = missing.ranges()
        if not len(ranges):
            return
        if not missing.any_received:
            raise CovergenreError(
                "every worker crashed; run the same command with --verbose to see the reason, and"
                " again to resume",
                code="workers_crash",
            )
        count = int((ranges[:, 2] - ranges[:, 1]).sum())
        logger.warning(
            "workers crashed on %s; trying them in smaller batches", plural(count, "row")
        )
    for part, start, stop in ranges.tolist():
        yield _poison_rows(plan, bundle, part, start, stop)


def _poison_rows(plan: Plan, bundle: Bundle, part: int, start: int, stop: int) -> ScoredRows:
    rows = plan.read(start, stop)
    error = CoverError("worker_died", "every worker that processed only this row crashed")
    outcomes, _ = decode_rows(rows, [error] * rows.num_rows, bundle.preprocessing)
    return ScoredRows(part, outcomes, np.empty((0, len(bundle.genres)), np.float32))


def _run(
    plan: Plan, ranges: Ranges, bundle: Bundle, batch_size: int, workers: Workers
) -> Iterator[ScoredRows]:
    """Score ranges of rows; rows whose workers crashed are missing from the result."""
    import ray.data
    from ray.data import ActorPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    # A block for each range, so that they load in parallel; fewer for a catalog of millions.
    blocks = [
        pa.table(list(block.T), names=["part", "start", "stop"])
        for block in np.array_split(ranges, min(len(ranges), _MAX_BLOCKS))
    ]
    load = partial(_load, plan=plan, spec=bundle.preprocessing, batch_size=batch_size)
    with data_context(skip_failed_blocks=True):
        planned = ray.data.from_arrow(blocks)
    with warnings.catch_warnings():
        # Ray 2.60 deprecates max_retries and max_task_retries, to be removed in 2.64, without
        # another way to limit them.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        scored = planned.map_batches(
            load, batch_size=None, batch_format="pyarrow", max_retries=_MAX_RETRIES
        ).map_batches(
            _Predict,
            fn_constructor_args=(bundle.uri, workers),
            compute=ActorPoolStrategy(size=workers.count),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=workers.resources["CPU"],
            num_gpus=workers.resources.get("GPU", 0),
            max_task_retries=_MAX_RETRIES,
        )
    received: Iterable[Any] = scored.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    with unwrap_ray_errors():
        for batch in (batch for block in received for batch in block.to_pylist()):
            if batch["error"] is not None:
                raise_record(batch["error"])
            outcomes = pa.ipc.open_stream(batch["outcomes"]).read_all()
            scores = np.frombuffer(batch["scores"], np.float32)
            yield ScoredRows(batch["part"], outcomes, scores.reshape(-1, len(bundle.genres)))


# Output of a loading task: a row for each batch, so that no block boundary can split a batch.
_LOADED = pa.schema(
    [
        pa.field("part", pa.int64()),
        pa.field("outcomes", pa.large_binary()),  # ScoredRows.outcomes as an Arrow stream
        pa.field("pixels", pa.large_binary()),  # uint8 [batch, side, side, 3]
        pa.field("error", pa.string()),  # an error record; then all else is null
    ]
)
# Output of a predictor.
_PREDICTED = pa.schema(
    [
        pa.field("part", pa.int64()),
        pa.field("outcomes", pa.large_binary()),
        pa.field("scores", pa.large_binary()),  # float32 [rows with a cover_sha256, genres]
        pa.field("error", pa.string()),
    ]
)


def _error_row(fields: pa.Schema, record: str) -> pa.Table:
    return pa.Table.from_pylist([{"error": record}], schema=fields)


def _load(ranges: pa.Table, plan: Plan, spec: Preprocessing, batch_size: int) -> Iterator[pa.Table]:
    try:
        for part, start, stop in zip(*(c.to_pylist() for c in ranges.columns), strict=True):
            for outcomes, pixels in _decoded_batches(plan, start, stop, spec, batch_size):
                values = [[part], [_to_stream(outcomes)], [pixels.tobytes()], [None]]
                yield pa.table(values, schema=_LOADED)
    except MemoryError:  # handled like a crash: it may be due to these rows only
        raise
    except Exception as error:
        yield _error_row(_LOADED, to_record(error))


def _decoded_batches(
    plan: Plan, start: int, stop: int, spec: Preprocessing, batch_size: int
) -> Iterator[tuple[pa.Table, NDArray[np.uint8]]]:
    """Rows `start` to `stop` in batches: outcomes, and uint8 [rows that decode, side, side, 3]."""
    rows = plan.read(start, stop)
    first = 0
    for _, found in covers.load(rows.select(covers.LOADED_COLUMNS), plan.source, batch_size):
        yield decode_rows(rows.slice(first, len(found)), found, spec)
        first += len(found)


def decoded(plan: Plan, rows: Iterable[int], spec: Preprocessing) -> list[NDArray[np.uint8]]:
    """Pixels of a few rows, uint8 [side, side, 3] each; every row must have a valid cover."""
    return [
        image
        for row in rows
        for _, pixels in _decoded_batches(plan, row, row + 1, spec, 1)
        for image in pixels
    ]


def _to_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


class _Predict:
    """A Ray Data actor: loads the model once, then scores batch after batch."""

    def __init__(self, model_uri: str, workers: Workers) -> None:
        use_cores(workers)
        device = "cuda" if workers.use_gpu else "cpu"
        bundle = read_bundle(model_uri)
        model = to_device(load_model(bundle), device)
        self._predictor = Predictor(model, bundle.preprocessing, device, bundle.precision)
        self._side = bundle.preprocessing.side
        self._genres = len(bundle.genres)

    def __call__(self, batches: pa.Table) -> Iterator[pa.Table]:
        import torch

        try:
            yield from map(self._score, batches.to_batches(1))
        except torch.OutOfMemoryError:
            error = DeviceMemoryError("a batch does not fit GPU memory; use a smaller --batch-size")
            yield _error_row(_PREDICTED, to_record(error))
        except Exception as error:
            yield _error_row(_PREDICTED, to_record(error))

    def _score(self, batch: pa.RecordBatch) -> pa.Table:
        part, outcomes, pixels, error = (batch[name][0] for name in _LOADED.names)
        if error.is_valid:
            return _error_row(_PREDICTED, error.as_py())
        images = np.frombuffer(pixels.as_buffer(), np.uint8)
        images = images.reshape(-1, self._side, self._side, 3)
        scores = np.empty((0, self._genres), np.float32)
        if len(images):
            scores = self._predictor(images)
        values = [part.as_py(), outcomes.as_py(), scores.tobytes(), None]
        return pa.table([[value] for value in values], schema=_PREDICTED)
