"""Columns of genre lists, rewritten at the cost of their distinct values.

Millions of albums share far fewer combinations of genres, so each combination is worked on once,
in plain Python, and the rest is Arrow.
"""

from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.compute as pc

# The "unit separator" control character: it stands between names and is never part of one.
JOINT = "\x1f"

GENRES = pa.list_(pa.string())


def is_any_list(type_: pa.DataType) -> bool:
    """Whether a column is of lists, by any of Arrow's types for them."""
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
    """Lists of names as texts, the names separated by JOINT; null stays null."""
    return pa.chunked_array([_join(chunk) for chunk in lists.chunks], pa.string())


def _join(lists: pa.ListArray) -> pa.Array:
    # binary_join makes a list that holds a null into a null, and its other names would be lost.
    names = pc.fill_null(lists.values.cast(pa.string()), "")
    texts = pc.binary_join(pa.ListArray.from_arrays(lists.offsets, names), JOINT)
    return pc.if_else(lists.is_valid(), texts, None)


def make_lists(texts: pa.ChunkedArray, to_names: Callable[[str], Iterable[str]]) -> pa.ChunkedArray:
    """`to_names(text)` of every text; an empty list for a null."""
    encoded = texts.dictionary_encode()
    # All chunks share one dictionary.
    values = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    lists = pa.array([*(list(to_names(value)) for value in values), []], GENRES)
    return pa.chunked_array(
        [lists.take(pc.fill_null(chunk.indices, len(values))) for chunk in encoded.chunks], GENRES
    )
