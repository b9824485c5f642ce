"""Columns of text and of genre lists, mapped once for each distinct value.

Millions of albums share far fewer combinations of genres, so each distinct combination is handled
once in Python and the rest is done by Arrow.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

JOINT = "\x1f"
"""Separates the names in a text of join_lists: the "unit separator" control character, which
clean_names removes from names."""

GENRES = pa.list_(pa.string())


def is_any_list(type_: pa.DataType) -> bool:
    """Whether `type_` is any of Arrow's list types."""
    return bool(
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
        or pa.types.is_list_view(type_)
        or pa.types.is_large_list_view(type_)
    )


def as_lists(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of lists of text, of any Arrow type, as GENRES."""
    if pa.types.is_list_view(lists.type) or pa.types.is_large_list_view(lists.type):
        # Arrow (26) casts some of them to invalid arrays.
        return pa.chunked_array([pa.array(c.to_pylist(), GENRES) for c in lists.chunks], GENRES)
    return lists.cast(GENRES)


def join_lists(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of names as texts, the names separated by JOINT; null for a null."""
    return pa.chunked_array([_join(chunk) for chunk in lists.chunks], pa.string())


def _join(lists: pa.ListArray) -> pa.Array:
    # binary_join of a list that contains a null is null: its other names would be lost.
    names = pc.fill_null(lists.values.cast(pa.string()), "")
    texts = pc.binary_join(pa.ListArray.from_arrays(lists.offsets, names), JOINT)
    return pc.if_else(lists.is_valid(), texts, None)


def map_distinct(
    texts: pa.ChunkedArray, function: Callable[[str], Any], type_: pa.DataType, null: Any = None
) -> pa.ChunkedArray:
    """`function` of every text in a column, called once for each distinct text; `null` for a null.

    type_: Arrow type of the results.
    """
    encoded = texts.dictionary_encode()
    # All chunks share one dictionary.
    values = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    results = pa.array([*map(function, values), null], type_)
    return pa.chunked_array(
        [results.take(pc.fill_null(chunk.indices, len(values))) for chunk in encoded.chunks], type_
    )


def make_lists(texts: pa.ChunkedArray, to_names: Callable[[str], Iterable[str]]) -> pa.ChunkedArray:
    """`to_names(text)` of every text; an empty list for a null."""
    return map_distinct(texts, lambda text: list(to_names(text)), GENRES, null=[])


def map_names(
    lists: pa.ChunkedArray, to_names: Callable[[list[str]], Iterable[str]]
) -> pa.ChunkedArray:
    """`to_names(names)` of every list, called once for each distinct list."""
    return make_lists(join_lists(lists), lambda text: to_names(split_joined(text)))


def split_joined(text: str) -> list[str]:
    """The names in a text of join_lists."""
    return [name for name in text.split(JOINT) if name]
