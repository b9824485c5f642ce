"""Hashes of the values of tables, independent of chunks, offsets and the memory of nulls."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def hash_rows(digest: Any, rows: pa.Table) -> None:
    """Update `digest`, a hash of hashlib, with the values of `rows`."""
    for column in rows.columns:
        for content in _content(column.combine_chunks()):
            digest.update(content)


def _content(column: pa.Array) -> Iterator[bytes | pa.Buffer]:
    """The bytes of the values, for nulls those of an empty value."""
    if pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type):
        yield pc.fill_null(pc.list_value_length(column), -1).to_numpy().tobytes()
        column = pc.list_flatten(column)
    if pa.types.is_string(column.type):
        yield pc.fill_null(pc.binary_length(column), -1).to_numpy().tobytes()
        texts = pc.fill_null(column, "")
        yield pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), "")[0].as_buffer()
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        yield pc.fill_null(column, 0).to_numpy().tobytes()
        yield column.is_valid().to_numpy(zero_copy_only=False).tobytes()
    else:
        yield repr(column.to_pylist()).encode()
