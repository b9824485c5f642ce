"""Names and Arrow schemas of every table that covergenre reads or writes. Nothing else."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

SPLITS = ("train", "dev", "test")

# Why a row is set aside. The text beside it in `detail` says more about the one row.
REASONS = {
    "null_id": "the row has no album_id",
    "no_cover": "the row names no cover",
    "missing_file": "the cover is not there",
    "unreadable_file": "the cover is there but cannot be read",
    "unsupported_scheme": "the cover is at a kind of URL that cannot be read (gs://, ftp:// ...)",
    "access_denied": "whoever keeps the cover does not give it out (401, 403)",
    "fetch_failed": "the cover did not come, however often it was asked for",
    "address_refused": "the address is in a private network (see --allow-private-addresses)",
    "empty_file": "the cover has no bytes",
    "file_too_large": "the cover has more than 25 MB",
    "not_an_image": "the bytes are no image format that can be decoded",
    "truncated_image": "the image ends too early or is damaged",
    "too_many_pixels": "the image has more pixels than is safe to decode",
    "too_much_memory": "the image takes more memory than is safe to decode",
    "decode_timeout": "the image takes longer to decode than a cover may",
    "decoder_crashed": "the image crashes the decoder",
    "worker_died": "each worker that was given this row died, alone with it too",
    "conflicting_cover": "an earlier row has this album_id with another cover",
    "unlabelled": "the album has no genre (prepare only)",
    "no_selected_genre": "none of the album's genres was selected (prepare only)",
    "genre_not_selected": "one of the album's genres was not selected, and --genre-match is all",
}


def counted_reasons(reasons: Mapping[str, int]) -> str:
    """`3 missing_file, 1 not_an_image`: the most common first."""
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ranked)


def reason_warnings(reasons: Mapping[str, int]) -> list[str]:
    """A line for each reason of many rows that one change of the catalog would remove."""
    count = reasons.get("unsupported_scheme", 0)
    if not count:
        return []
    return [
        f"  warning: {count:,} covers have a URL whose scheme cannot be read (unsupported_scheme);"
        " copy them to a folder or to s3://, or give their http(s):// URLs"
    ]


# One row an album: what prepare writes under DATASET/<split>/.
DATASET = pa.schema(
    [
        pa.field("album_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # place in the catalog, from 0
        pa.field("image", pa.large_binary(), nullable=False),  # encoded, never pixels
        pa.field("cover_sha256", pa.string(), nullable=False),  # of the source bytes
        pa.field("genres", pa.list_(pa.string()), nullable=False),
        pa.field("group", pa.string()),  # what --group-by kept together; null: the album alone
        pa.field("split", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("artist", pa.string()),
    ]
)

# A rejected row: the keys of _rejected/part-*.jsonl.
REJECTED = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("album_id", pa.string()),  # of score: a number where the catalog's are
        pa.field("cover", pa.string()),  # path or URL, without secrets
        pa.field("reason", pa.string(), nullable=False),  # a key of REASONS
        pa.field("detail", pa.string()),
    ]
)

# A later row of an album that was already counted, with the same cover.
DUPLICATES = pa.schema(
    [
        pa.field("album_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
    ]
)

# A catalog after reading: every source format becomes this. Where `source` has no bytes, `cover`
# counts.
CATALOG = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("album_id", pa.string()),
        pa.field("cover", pa.string()),  # absolute path or URI
        pa.field("source", pa.int32()),  # index into Catalog.files, where the image bytes are
        pa.field("source_row", pa.int64()),  # row of that file
        pa.field("genres", pa.list_(pa.string())),
        pa.field("title", pa.string()),
        pa.field("artist", pa.string()),
        pa.field("split", pa.string()),
        pa.field("group", pa.string()),
        pa.field("first_row", pa.int64()),  # set where an earlier row has this album_id
    ]
)


ID = "id"
"""A column beside CATALOG's: the id in the catalog's own type where that is a number;
nulls of type text where it is text, which album_id has. Rows are compared by album_id."""
CARRIED = "carry:"
"""Columns that a result is to have as they are in the catalog: this, and their name."""


def labels(album_id: pa.DataType, carried: Sequence[pa.Field] = ()) -> pa.Schema:
    """Schema of score's part-*.parquet, the same for all models.

    album_id: the type of the catalog's ids. carried: the columns of --carry.
    """
    return pa.schema(
        [
            pa.field("album_id", album_id),
            pa.field("title", pa.string()),
            pa.field("artist", pa.string()),
            *carried,
            pa.field("top_genre", pa.string()),
            pa.field("top_score", pa.float32()),
            pa.field("genres", pa.list_(pa.string())),  # whose score reaches their threshold
            pa.field("scores", pa.map_(pa.string(), pa.float32())),  # genre -> score
            pa.field("row", pa.int64()),  # index in the catalog, from 0
            pa.field("cover_sha256", pa.string()),  # of the source bytes
            pa.field("weights_id", pa.string()),
            pa.field("decision_id", pa.string()),
        ]
    )


LABELS = labels(pa.string())


def predictions() -> pa.Schema:
    """Schema of evaluate's part-*.parquet: LABELS, and the genres that the albums have."""
    return LABELS.append(pa.field("true_genres", pa.list_(pa.string())))
