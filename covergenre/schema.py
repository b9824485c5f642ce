"""Columns of all tables, and the reasons for rejecting a row."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

SPLITS = ("train", "dev", "test")

# Reason of a rejected row -> meaning. The row's `detail` has more.
REASONS = {
    "null_id": "the row has no album_id",
    "no_cover": "the row has no cover",
    "missing_file": "the cover does not exist",
    "unreadable_file": "the cover exists but cannot be read",
    "unsupported_scheme": "the cover's URL has a scheme that is not supported (gs://, ftp:// ...)",
    "access_denied": "access to the cover is denied (HTTP 401, 403 or 451, or by S3)",
    "fetch_failed": "the cover could not be downloaded",
    "address_refused": "the URL's host has a private address (see --allow-private-addresses)",
    "empty_file": "the cover has no bytes",
    "file_too_large": "the cover is larger than 25 MB",
    "not_an_image": "the bytes are not in an image format that can be decoded",
    "truncated_image": "the image is truncated or damaged",
    "too_many_pixels": "the image has too many pixels to decode safely",
    "too_much_memory": "decoding the image needs too much memory",
    "decode_timeout": "decoding the image takes too long",
    "decoder_crashed": "decoding the image crashes the decoder",
    "worker_died": "every worker that was given the row crashed, even with the row alone",
    "conflicting_cover": "an earlier row has the same album_id and another cover",
    "unlabelled": "the album has no genre (prepare only)",
    "no_selected_genre": "none of the album's genres is selected (prepare only)",
    "genre_not_selected": "not all of the album's genres are selected, with --genre-match all",
}


def counted_reasons(reasons: Mapping[str, int]) -> str:
    """`3 missing_file, 1 not_an_image`: the most common first."""
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ranked)


def reason_warnings(reasons: Mapping[str, int]) -> list[str]:
    """Warnings about rejected rows that a change of the catalog can fix all at once."""
    count = reasons.get("unsupported_scheme", 0)
    if not count:
        return []
    return [
        f"  warning: {count:,} covers have a URL whose scheme is not supported"
        " (unsupported_scheme); copy them to a directory or to s3://, or use http(s):// URLs"
    ]


# A dataset's SPLIT/part-*.parquet: one row per album.
DATASET = pa.schema(
    [
        pa.field("album_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # index in the catalog, from 0
        pa.field("image", pa.large_binary(), nullable=False),  # encoded, never pixels
        pa.field("cover_sha256", pa.string(), nullable=False),  # of the source bytes
        pa.field("genres", pa.list_(pa.string()), nullable=False),
        pa.field("group", pa.string()),  # value of --group-by; null: the album is its own group
        pa.field("split", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("artist", pa.string()),
    ]
)

# A rejected row: the keys of _rejected/part-*.jsonl.
REJECTED = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("album_id", pa.string()),  # in score: a number if the catalog's ids are numbers
        pa.field("cover", pa.string()),  # path or URL, without secrets
        pa.field("reason", pa.string(), nullable=False),  # a key of REASONS
        pa.field("detail", pa.string()),
    ]
)

# A duplicate: a row with the album_id and the cover of an earlier row.
DUPLICATES = pa.schema(
    [
        pa.field("album_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
    ]
)

# A catalog of any format, after reading. `cover` is used if the row has no image bytes.
CATALOG = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("album_id", pa.string()),
        pa.field("cover", pa.string()),  # absolute path or URI
        pa.field("source", pa.int32()),  # index of the file with the image bytes
        pa.field("source_row", pa.int64()),  # row in that file
        pa.field("genres", pa.list_(pa.string())),
        pa.field("title", pa.string()),
        pa.field("artist", pa.string()),
        pa.field("split", pa.string()),
        pa.field("group", pa.string()),
    ]
)


ID = "id"
"""Additional column of a catalog: the id as a number, if the catalog's ids are numbers; otherwise
nulls of type string. Rows are compared by album_id."""
CARRIED = "carry:"
"""Prefix of the additional columns for --carry."""


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
            pa.field("genres", pa.list_(pa.string())),  # genres whose score reaches the threshold
            pa.field("scores", pa.map_(pa.string(), pa.float32())),  # genre -> score
            pa.field("row", pa.int64()),  # index in the catalog, from 0
            pa.field("cover_sha256", pa.string()),  # of the source bytes
            pa.field("weights_id", pa.string()),
            pa.field("decision_id", pa.string()),
        ]
    )


LABELS = labels(pa.string())


def predictions() -> pa.Schema:
    """Schema of evaluate's part-*.parquet: LABELS and the true genres."""
    return LABELS.append(pa.field("true_genres", pa.list_(pa.string())))
