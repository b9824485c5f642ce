"""The outcome of each row (scored, rejected or duplicate), and the tables of outcomes."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from covergenre import schema
from covergenre.data import covers
from covergenre.data.covers import Cover, Duplicate
from covergenre.data.decoder_process import decode
from covergenre.data.genres import over_threshold
from covergenre.data.image_decoding import CoverError, Preprocessing
from covergenre.data.rejected import rejected_row
from covergenre.models.bundle import Bundle

# One of these is set: cover_sha256 of a scored row, first_row of a duplicate, reason of a
# rejected row.
_OUTCOME = pa.schema(
    [
        pa.field("cover_sha256", pa.string()),
        pa.field("first_row", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("cover", pa.string()),  # of a rejected row, without secrets
    ]
)


def decode_rows(
    rows: pa.Table, found: list[covers.Outcome], spec: Preprocessing
) -> tuple[pa.Table, NDArray[np.uint8]]:
    """Rows of a plan and their covers -> outcomes, and pixels of the rows that decode.

    The pixels are uint8 [rows with a cover_sha256, side, side, 3].
    """
    own_id = rows[schema.ID] if schema.ID in rows.column_names else rows["album_id"]
    kept = [
        n for n in rows.column_names if n in ("title", "artist") or n.startswith(schema.CARRIED)
    ]
    table = rows.select(["row", *kept]).append_column("album_id", own_id)
    pixels: list[NDArray[np.uint8]] = []
    records: list[dict[str, Any]] = []
    for row, outcome in zip(rows.select(["cover"]).to_pylist(), found, strict=True):
        record: dict[str, Any] = {}
        if isinstance(outcome, Cover):
            try:
                pixels.append(decode(outcome.data, spec))
                record = {"cover_sha256": outcome.sha256}
            except CoverError as error:
                outcome = error
        if isinstance(outcome, CoverError):
            record = rejected_row(row, outcome)
        elif isinstance(outcome, Duplicate):
            record = {"first_row": outcome.first_row}
        records.append(record)
    outcome_columns = pa.Table.from_pylist(records, schema=_OUTCOME)
    for name in _OUTCOME.names:
        table = table.append_column(name, outcome_columns[name])
    shape = (0, spec.side, spec.side, 3)
    return table, np.stack(pixels) if pixels else np.empty(shape, np.uint8)


def rejected(outcomes: pa.Table) -> list[dict[str, Any]]:
    """Records of the rejected rows."""
    rows = outcomes.filter(pc.is_valid(outcomes["reason"]))
    return list(rows.select(schema.REJECTED.names).to_pylist())


def duplicates(outcomes: pa.Table) -> pa.Table:
    """Columns row, album_id and first_row of the duplicates."""
    rows = outcomes.filter(pc.is_valid(outcomes["first_row"]))
    return rows.select(["row", "album_id", "first_row"])


def labels(outcomes: pa.Table, scores: NDArray[np.float32], bundle: Bundle) -> pa.Table:
    """A row for each scored row, columns as in schema.labels."""
    rows = outcomes.filter(pc.is_valid(outcomes["cover_sha256"]))
    count, names = rows.num_rows, bundle.genres.names
    best = scores.argmax(axis=1) if count else np.empty(0, np.int64)
    offsets = np.arange(0, scores.size + 1, len(names), dtype=np.int32)
    columns = {
        "top_genre": pa.array(names, pa.string()).take(pa.array(best)),
        "top_score": pa.array(scores[np.arange(count), best]),
        "genres": pa.array(
            over_threshold(scores, bundle.genres, bundle.thresholds), pa.list_(pa.string())
        ),
        "scores": pa.MapArray.from_arrays(
            offsets, pa.array([*names] * count, pa.string()), pa.array(scores.ravel())
        ),
        "weights_id": pa.repeat(bundle.weights_id, count),
        "decision_id": pa.repeat(bundle.decision_id, count),
    }
    for name in ("title", "artist"):
        if name not in rows.column_names:
            columns[name] = pa.nulls(count, pa.string())
    own = {name: rows[name] for name in rows.column_names}
    carried = {
        name.removeprefix(schema.CARRIED): own.pop(name)
        for name in rows.column_names
        if name.startswith(schema.CARRIED)
    }
    columns |= own | carried
    fields = schema.labels(
        rows.schema.field("album_id").type,
        [pa.field(name, column.type) for name, column in carried.items()],
    )
    return pa.table([columns[name] for name in fields.names], schema=fields)
