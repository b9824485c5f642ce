"""Rejected rows in _rejected/part-*.jsonl, and duplicates in _state/duplicates/part-*.arrow.

Without rows there is no file, because readers of JSON refuse an empty one; a file that an earlier
attempt may have left is deleted.
"""

import json
import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from covergenre.data.image_decoding import CoverError
from covergenre.io import arrow_file, storage
from covergenre.io.urls import redacted
from covergenre.schema import REJECTED


def rejected_row(row: dict[str, Any], error: CoverError) -> dict[str, Any]:
    """The record of a rejected row; `row` has its cover, and its row and album_id where known."""
    return {
        "row": row.get("row"),
        "album_id": row.get("album_id"),
        "cover": row["cover"] and redacted(row["cover"]),
        "reason": error.reason,
        "detail": error.detail or None,
    }


def to_json_lines(records: Iterable[dict[str, Any]]) -> bytes:
    """`records` as JSON Lines, keys as in schema.REJECTED; album_id is a number or text."""
    lines = (
        json.dumps(
            {name: record[name] for name in REJECTED.names} | {"album_id": _id(record["album_id"])},
            ensure_ascii=False,
        )
        for record in records
    )
    return "".join(f"{line}\n" for line in lines).encode()


def write_rejected(uri: str, records: Sequence[dict[str, Any]]) -> None:
    """Write `records`, keys as in schema.REJECTED, as JSON Lines."""
    _put_or_delete(uri, to_json_lines(records) if records else None)


def write_duplicates(uri: str, rows: pa.Table) -> None:
    """Write rows of schema.DUPLICATES as Arrow IPC."""
    data = arrow_file.to_arrow_file(rows, rows.num_rows) if rows.num_rows else None
    _put_or_delete(uri, data)


def _put_or_delete(uri: str, data: bytes | pa.Buffer | None) -> None:
    if data is None:
        storage.delete_file(uri)
    else:
        storage.put(uri, data)


def _id(value: Any) -> Any:
    """An id as JSON has it."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
