"""Inference: batches of pixels -> scores. Training's dev evaluation, evaluate and score use it."""

import json
import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre import errors
from covergenre.cluster.ray_runtime import data_context, unwrap_ray_errors
from covergenre.cluster.workers import Workers, use_cores
from covergenre.data import covers, dataset
from covergenre.data.covers import Cover, Duplicate, Source
from covergenre.data.decoder_process import decode
from covergenre.data.image_decoding import CoverError, Preprocessing
from covergenre.data.plan import Plan
from covergenre.errors import CovergenreError, DeviceMemoryError
from covergenre.formatting import plural
from covergenre.io.urls import redacted
from covergenre.models.bundle import Bundle, load_model, read_bundle
from covergenre.models.predictor import Predictor, to_device

logger = logging.getLogger(__name__)

_CHUNK_ROWS = dataset.ROW_GROUP_ROWS
"""Rows that one loading task reads, as many as lie together in a dataset. Where the covers are in
somebody's Parquet files a task reads a whole unit: their row groups may be larger."""
_MOST_BLOCKS = 2000
_RETRIES = 2
"""Of a task whose worker died. Ray's own default is for ever."""

# What became of each row of a batch; travels with the pixels and stays beside the scores.
OUTCOMES = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("album_id", pa.string()),
        pa.field("cover", pa.string()),
        pa.field("cover_sha256", pa.string()),  # set: the row has the next scores
        pa.field("first_row", pa.int64()),  # set: a duplicate
        pa.field("reason", pa.string()),  # set: set aside
        pa.field("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Scored:
    """Some rows of a unit, in order of row: what became of each, and the scores of some."""

    unit: int
    outcomes: pa.Table
    scores: NDArray[np.float32]
    """[rows of `outcomes` that have a cover_sha256, genres]"""


def score_plan(
    plan: Plan, units: NDArray[np.int64], bundle: Bundle, *, batch_size: int, workers: Workers
) -> Iterator[Scored]:
    """Score rows of a plan on the cluster, in any order, each row once.

    units: [n, 3] of (unit, first row, row after its last). A unit is loaded in chunks and computed
    in batches that depend on nothing but its rows, so a unit done twice has the same scores.

    A worker that dies is made up for. Rows whose workers die again and again are given to others
    in smaller and smaller parts, and a row that alone is the death of several is set aside.
    """
    whole_units = bool(plan.source.files) and not plan.source.prepared
    for rows_a_task in (0 if whole_units else _CHUNK_ROWS, batch_size, 1):
        chunks = _chunks(units, rows_a_task)
        missing = _Missing(chunks)
        for part in _run(plan, chunks, bundle, batch_size, workers):
            missing.remove(part)
            yield part
        units = missing.rows()
        if not len(units):
            return
        if missing.none_came:
            raise CovergenreError(
                "workers die, whatever rows they are given; --verbose shows more of it, and the"
                " same command goes on from here"
            )
        count = int((units[:, 2] - units[:, 1]).sum())
        logger.info(f"workers died over {plural(count, 'row')}: finding out over which")
    for unit, start, stop in units.tolist():
        yield _set_aside(plan, bundle, unit, start, stop)


def _chunks(units: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """(unit, start, stop) in parts of `rows` rows; whole, where that is 0."""
    if not rows:
        return units
    counts = -(-(units[:, 2] - units[:, 1]) // rows)
    of = np.repeat(np.arange(len(units)), counts)
    place = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = units[of, 1] + place * rows
    return np.stack([units[of, 0], start, np.minimum(start + rows, units[of, 2])], axis=1)


class _Missing:
    """Which rows have yet to come. No part crosses a chunk, and chunks are in order of row."""

    def __init__(self, chunks: NDArray[np.int64]) -> None:
        self._chunks = chunks
        self._left = chunks[:, 2] - chunks[:, 1]
        self._came: dict[int, list[tuple[int, int]]] = {}  # of chunks that came in part
        self.none_came = True

    def remove(self, part: Scored) -> None:
        rows = part.outcomes["row"]
        start, stop = rows[0].as_py(), rows[-1].as_py() + 1
        chunk = int(np.searchsorted(self._chunks[:, 1], start, side="right")) - 1
        self._left[chunk] -= stop - start
        self._came.setdefault(chunk, []).append((start, stop))
        if not self._left[chunk]:
            del self._came[chunk]
        self.none_came = False

    def rows(self) -> NDArray[np.int64]:
        """(unit, start, stop) of what is left. No range crosses a chunk, nor so do its batches."""
        left = []
        for chunk in np.flatnonzero(self._left).tolist():
            unit, at, stop = self._chunks[chunk].tolist()
            for begin, end in sorted(self._came.get(chunk, ())):
                if begin > at:
                    left.append((unit, at, begin))
                at = end
            if at < stop:
                left.append((unit, at, stop))
        return np.array(left, np.int64).reshape(-1, 3)


def _set_aside(plan: Plan, bundle: Bundle, unit: int, start: int, stop: int) -> Scored:
    rows = plan.read(start, stop)
    died = CoverError("worker_died", "each worker that was given this row alone died")
    outcomes, _ = _decode_all(rows, [died] * rows.num_rows, bundle.preprocessing)
    return Scored(unit, outcomes, np.empty((0, len(bundle.genres)), np.float32))


def _run(
    plan: Plan, chunks: NDArray[np.int64], bundle: Bundle, batch_size: int, workers: Workers
) -> Iterator[Scored]:
    """Score chunks of rows; those whose workers die do not come."""
    import ray.data
    from ray.data import ActorPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    # A block a chunk, so that chunks load in parallel; fewer, for a catalog of millions.
    blocks = [
        pa.table(list(part.T), names=["unit", "start", "stop"])
        for part in np.array_split(chunks, min(len(chunks), _MOST_BLOCKS))
    ]
    with data_context(skip_failed_blocks=True):
        planned = ray.data.from_arrow(blocks)
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to say how often, and wants this one gone by 2.64.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        scored = planned.map_batches(
            partial(_load_chunks, plan=plan, spec=bundle.preprocessing, batch_size=batch_size),
            batch_size=None,
            batch_format="pyarrow",
            max_retries=_RETRIES,
        ).map_batches(
            _Predict,
            fn_constructor_args=(bundle.uri, workers),
            compute=ActorPoolStrategy(size=workers.count),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=workers.resources["CPU"],
            num_gpus=workers.resources.get("GPU", 0),
            max_task_retries=_RETRIES,
        )
    came: Iterable[Any] = scored.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    with unwrap_ray_errors():
        for batch in (batch for block in came for batch in block.to_pylist()):
            if batch["error"] is not None:
                _raise(batch["error"])
            outcomes = pa.ipc.open_stream(batch["outcomes"]).read_all()
            shape = (-1, batch["genres"])
            yield Scored(
                batch["unit"], outcomes, np.frombuffer(batch["scores"], np.float32).reshape(shape)
            )


# What a loading task hands to a predictor: one row a batch, so that no block boundary can cut one.
_LOADED = pa.schema(
    [
        pa.field("unit", pa.int64()),
        pa.field("outcomes", pa.large_binary()),  # OUTCOMES, as an Arrow stream
        pa.field("pixels", pa.large_binary()),  # uint8 [batch, side, side, 3]
        pa.field("error", pa.string()),  # set: what ended the task, see _told
    ]
)
# And what a predictor hands to the driver.
_PREDICTED = pa.schema(
    [
        pa.field("unit", pa.int64()),
        pa.field("outcomes", pa.large_binary()),
        pa.field("scores", pa.large_binary()),  # float32 [rows with a cover, genres]
        pa.field("genres", pa.int64()),
        pa.field("error", pa.string()),
    ]
)


def _told(error: Exception, fields: pa.Schema) -> pa.Table:
    """An error as a row: to be told from the death of a worker, which brings nothing."""
    told = {
        "kind": type(error).__name__,
        "text": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }
    return pa.Table.from_pylist([{"error": json.dumps(told)}], schema=fields)


def _raise(told: str) -> None:
    error = json.loads(told)
    kind = getattr(errors, error["kind"], None)
    if kind is not None:
        raise kind(error["text"])
    raise RuntimeError(f"in a worker:\n{error['trace']}")


def _load_chunks(
    chunks: pa.Table, plan: Plan, spec: Preprocessing, batch_size: int
) -> Iterator[pa.Table]:
    try:
        for chunk in chunks.to_pylist():
            rows = plan.read(chunk["start"], chunk["stop"])
            for part, found in covers.load(rows, plan.source, batch_size):
                outcomes, pixels = _decode_all(part, found, spec)
                values = [[chunk["unit"]], [_to_stream(outcomes)], [pixels.tobytes()], [None]]
                yield pa.table(values, schema=_LOADED)
    except MemoryError:  # of these rows, it may be: others are tried without them
        raise
    except Exception as error:
        yield _told(error, _LOADED)


def _decode_all(
    rows: pa.Table, outcomes: list[covers.Outcome], spec: Preprocessing
) -> tuple[pa.Table, NDArray[np.uint8]]:
    pixels: list[NDArray[np.uint8]] = []
    records: list[dict[str, Any]] = []
    for row, outcome in zip(
        rows.select(["row", "album_id", "cover"]).to_pylist(), outcomes, strict=True
    ):
        record = dict.fromkeys(OUTCOMES.names) | row
        if isinstance(outcome, Cover):
            try:
                pixels.append(decode(outcome.data, spec))
                record["cover_sha256"] = outcome.sha256
            except CoverError as error:
                outcome = error
        if isinstance(outcome, Duplicate):
            record["first_row"] = outcome.first_row
        elif isinstance(outcome, CoverError):
            cover = record["cover"] and redacted(record["cover"])
            record |= {"cover": cover, "reason": outcome.reason, "detail": outcome.detail}
        records.append(record)
    shape = (0, spec.side, spec.side, 3)
    stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
    return pa.Table.from_pylist(records, schema=OUTCOMES), stacked


def pixels_of(rows: pa.Table, source: Source, spec: Preprocessing) -> list[NDArray[np.uint8]]:
    """The pixels of a few rows of a plan, for pictures; every row must have a good cover."""
    return [
        image
        for part, outcomes in covers.load(rows, source, len(rows))
        for image in _decode_all(part, outcomes, spec)[1]
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
            too_large = DeviceMemoryError(
                "a batch does not fit the GPU's memory; lower --batch-size"
            )
            yield _told(too_large, _PREDICTED)
        except Exception as error:
            yield _told(error, _PREDICTED)

    def _score(self, batch: pa.RecordBatch) -> pa.Table:
        unit, outcomes, pixels, error = (batch[name][0] for name in _LOADED.names)
        if error.is_valid:
            return pa.table([[None], [None], [None], [None], [error.as_py()]], schema=_PREDICTED)
        images = np.frombuffer(pixels.as_buffer(), np.uint8)
        images = images.reshape(-1, self._side, self._side, 3)
        scores = np.empty((0, self._genres), np.float32)
        if len(images):
            scores = self._predictor(images)
        values = [unit.as_py(), outcomes.as_py(), scores.tobytes(), self._genres, None]
        return pa.table([[value] for value in values], schema=_PREDICTED)
