"""Rejected rows: as records, and as the JSON Lines of _rejected/part-*.jsonl."""

import json
import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from covergenre.data.image_decoding import CoverError
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


def _id(value: Any) -> Any:
    """An id as JSON has it."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
