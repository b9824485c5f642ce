"""Inference: batches of pixels -> scores. Training's dev evaluation, evaluate and score use it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre import ingest, shards
from covergenre.bundle import load_model, read_bundle
from covergenre.covers import CoverError, Preprocessing
from covergenre.decoding import decode
from covergenre.ingest import Cover, Duplicate, Source
from covergenre.runtime import Workers, data_context, own_errors, use_cores

if TYPE_CHECKING:
    import torch

    from covergenre.models import CoverModel

_CHUNK_ROWS = shards.ROW_GROUP_ROWS
"""Rows that one loading task reads, as many as lie together in a dataset. Where the covers are in
somebody's Parquet files a task reads a whole unit: their row groups may be larger."""

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


class Predictor:
    """A model on a device: uint8 pixels in, scores out."""

    def __init__(
        self, model: "CoverModel", preprocessing: Preprocessing, device: str, precision: str
    ) -> None:
        self._model = model
        self._preprocessing = preprocessing
        self._device = device
        self._precision = precision

    def __call__(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores in 0 to 1, float32 [batch, genres], of uint8 [batch, side, side, 3]."""
        scores = self.scores_of(to_unit(pixels_BHWC, self._device))
        return np.asarray(scores.cpu().numpy(), np.float32)

    def scores_of(self, images_BCHW: "torch.Tensor") -> "torch.Tensor":
        """The same of images in 0 to 1 that are on the device already; stays there."""
        import torch

        training = self._model.training
        self._model.eval()
        with torch.inference_mode(), autocast(self._device, self._precision):
            logits = self._model(normalise(images_BCHW, self._preprocessing))
            scores: torch.Tensor = logits.float().sigmoid()
        self._model.train(training)
        return scores


def autocast(device: str, precision: str) -> "torch.autocast":
    """torch.autocast for a precision of the settings: fp32 (off) or bf16."""
    import torch

    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16")


def to_unit(pixels_BHWC: NDArray[np.uint8], device: str) -> "torch.Tensor":
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in 0 to 1, on `device`.

    The pixels cross to the device as bytes, a quarter of floats; the result is laid out
    channels-last, as they come and as convolutions like it.
    """
    import torch

    pixels = torch.frombuffer(bytearray(pixels_BHWC.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(pixels_BHWC.shape).to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).float().div_(255.0)


def normalise(images_BCHW: "torch.Tensor", spec: Preprocessing) -> "torch.Tensor":
    """Images in 0 to 1 -> zero mean and unit variance by channel, as the trunk expects."""
    import torch

    mean = torch.tensor(spec.mean, device=images_BCHW.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=images_BCHW.device).view(1, 3, 1, 1)
    return (images_BCHW - mean) / std


def to_device(model: "CoverModel", device: str) -> "CoverModel":
    """The model on `device`, its convolutions laid out channels-last."""
    import torch

    return model.to(device).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Scored:
    """Some rows of a unit, in order of row: what became of each, and the scores of some."""

    unit: int
    outcomes: pa.Table
    scores: NDArray[np.float32]
    """[rows of `outcomes` that have a cover_sha256, genres]"""


def score_plan(
    plan_uri: str,
    units: list[tuple[int, int, int]],
    source: Source,
    model_uri: str,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: Workers,
) -> Iterator[Scored]:
    """Score rows of a plan (Parquet of ingest.PLAN) on the cluster, in any order, each row once.

    units: (unit, first row, row after its last). A unit is loaded in chunks and computed in
    batches that depend on nothing but its rows, so a unit done twice has the same scores.
    """
    import ray.data
    from ray.data import ActorPoolStrategy

    data_context()
    whole_units = bool(source.files) and not source.prepared
    chunks = [
        {"unit": unit, "start": at, "stop": min(at + size, stop)}
        for unit, start, stop in units
        for size in [stop - start if whole_units else _CHUNK_ROWS]
        for at in range(start, stop, size)
    ]
    scored = (
        # A block a chunk, so that chunks load in parallel; capped, for a catalog of millions.
        ray.data.from_items(chunks, override_num_blocks=min(len(chunks), 10_000))
        .map_batches(
            partial(
                _load_chunks,
                plan_uri=plan_uri,
                source=source,
                spec=preprocessing,
                batch_size=batch_size,
            ),
            batch_size=None,
            batch_format="pyarrow",
        )
        .map_batches(
            _Predict,
            fn_constructor_args=(model_uri, workers),
            compute=ActorPoolStrategy(size=workers.count),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=workers.resources["CPU"],
            num_gpus=workers.resources.get("GPU", 0),
        )
    )
    blocks: Iterable[Any] = scored.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    with own_errors():
        for batch in (batch for block in blocks for batch in block.to_pylist()):
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
    ]
)


def _load_chunks(
    chunks: pa.Table, plan_uri: str, source: Source, spec: Preprocessing, batch_size: int
) -> Iterator[pa.Table]:
    for chunk in chunks.to_pylist():
        rows = shards.read_rows(plan_uri, chunk["start"], chunk["stop"])
        for part, found in ingest.load(rows, source, batch_size):
            outcomes, pixels = _decode_all(part, found, spec)
            values = [[chunk["unit"]], [_to_stream(outcomes)], [pixels.tobytes()]]
            yield pa.table(values, schema=_LOADED)


def _decode_all(
    rows: pa.Table, outcomes: list[ingest.Outcome], spec: Preprocessing
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
            record |= {"reason": outcome.reason, "detail": outcome.detail}
        records.append(record)
    shape = (0, spec.side, spec.side, 3)
    stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
    return pa.Table.from_pylist(records, schema=OUTCOMES), stacked


def pixels_of(rows: pa.Table, source: Source, spec: Preprocessing) -> list[NDArray[np.uint8]]:
    """The pixels of a few rows of a plan, for pictures; every row must have a good cover."""
    return [
        image
        for part, outcomes in ingest.load(rows, source, len(rows))
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
        for unit, outcomes, pixels in zip(*batches.select(_LOADED.names), strict=True):
            images = np.frombuffer(pixels.as_buffer(), np.uint8)
            images = images.reshape(-1, self._side, self._side, 3)
            scores = np.empty((0, self._genres), np.float32)
            if len(images):
                scores = self._predictor(images)
            yield pa.table(
                {
                    "unit": [unit.as_py()],
                    "outcomes": pa.array([outcomes.as_py()], pa.large_binary()),
                    "scores": pa.array([scores.tobytes()], pa.large_binary()),
                    "genres": [self._genres],
                }
            )
