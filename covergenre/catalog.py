"""Catalogs: CSV, TSV, JSON Lines, Parquet and MuMu's label files, all made into schema.CATALOG.

A row that cannot be used (no id, no cover) stays in the table, for the stage to set aside and
count; an error is raised only where the catalog cannot be read as one.
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covergenre import mumu, storage
from covergenre.catalog_files import (
    SourceFile,
    find_files,
    holds_bytes,
    read_delimited,
    read_header,
    read_jsonl,
    read_parquet,
)
from covergenre.config import CatalogSettings, flag
from covergenre.errors import CatalogError, ConfigError, did_you_mean
from covergenre.genre_lists import GENRES, JOINT, join_lists, make_lists
from covergenre.schema import CATALOG

# Columns that a catalog may lack; the option `<name>_column` says what the source calls them.
_OPTIONAL = ("genres", "title", "artist", "split", "group")

_SEPARATOR = "|"
_HASHED_ROWS = 65_536


@dataclass(frozen=True)
class Catalog:
    """A catalog as read."""

    table: pa.Table
    """schema.CATALOG, in catalog order."""
    files: tuple[str, ...]
    """Files with image bytes, which the column `source` counts from 0."""
    source_rows: int
    """Rows of the source files; songs, in MuMu's."""
    notes: tuple[str, ...]
    """Remarks for the user, one line each."""
    image_column: str
    """Column of `files` that has the bytes."""
    fingerprint: str
    """sha256 of the table's content and of the names and sizes of `files`."""


def read_catalog(uri: str, options: CatalogSettings) -> Catalog:
    """Read the file, the folder or the pattern (`*`, `?`, `[]`, `**`) `uri`.

    Raises CatalogError naming file and line or column where it is no catalog, and StorageError
    where there is nothing to read.
    """
    kind, files = find_files(uri, "csv" if options.format == "mumu" else options.format)
    if options.format == "mumu" or (kind == "csv" and _is_mumu(files[0], options)):
        return _read_mumu(uri, files, options)
    parts: list[pa.Table] = []
    images: list[str] = []
    seen: set[str] = set()
    null_images = 0
    for file in files:
        source = _read_file(file, kind, options)
        seen |= source.columns
        if _has_images(source, options):
            parts.append(_part(source, options, image_file=len(images)))
            images.append(file)
            null_images += source.null_images
        else:
            parts.append(_part(source, options))
    notes = _check_optional(files[0] if len(files) == 1 else uri, seen, options)
    if null_images:
        notes.append(f"{null_images:,} rows have no bytes in the column {options.image_column!r}")
    table = pa.concat_tables(parts)
    return _catalog(uri, table, images, table.num_rows, notes, options)


def _is_mumu(file: str, options: CatalogSettings) -> bool:
    return (
        options.format == "auto"
        and not _is_set(options, "id_column")
        and read_header(file, "csv") == mumu.HEADER
    )


def _read_mumu(uri: str, files: list[str], options: CatalogSettings) -> Catalog:
    for name in CatalogSettings.model_fields:
        if name.endswith("_column") and _is_set(options, name):
            raise ConfigError(
                f"MuMu's label files have columns of their own; leave out {flag(name)}"
            )
    separator = options.genres_separator or mumu.SEPARATOR
    albums, songs = mumu.read_songs(files, separator, options.covers)
    notes = [f"{songs:,} songs make {albums.num_rows:,} albums"]
    return _catalog(uri, albums, [], songs, notes, options)


def _catalog(
    uri: str,
    part: pa.Table,
    images: list[str],
    source_rows: int,
    notes: list[str],
    options: CatalogSettings,
) -> Catalog:
    if not part.num_rows:
        raise CatalogError(f"catalog {uri} has no rows")
    columns = {
        **{field.name: pa.nulls(part.num_rows, field.type) for field in CATALOG},
        **dict(zip(part.column_names, part.columns, strict=True)),
        "row": pa.array(np.arange(part.num_rows)),
        "first_row": _first_rows(part.column("album_id")),
    }
    table = pa.table(columns, CATALOG)
    fingerprint = _fingerprint(table, images)
    return Catalog(
        table, tuple(images), source_rows, tuple(notes), options.image_column, fingerprint
    )


def _is_set(options: CatalogSettings, name: str) -> bool:
    """Whether the user set the option: a column that was asked for has to be there."""
    return bool(getattr(options, name) != CatalogSettings.model_fields[name].default)


def _no_column(place: str, columns: Collection[str], options: CatalogSettings, option: str) -> str:
    name = getattr(options, option)
    return f"no column {name!r} in {place}{did_you_mean(name, columns)} ({flag(option)})"


def _read_file(file: str, kind: str, options: CatalogSettings) -> SourceFile:
    """The columns of one file; those that every file must have are there."""
    wanted = [getattr(options, f"{name}_column") for name in ("id", "cover", *_OPTIONAL)]
    if kind == "parquet":
        source = read_parquet(file, wanted, options.image_column)
    elif _is_set(options, "image_column"):
        raise CatalogError(f"{file}: only Parquet files can hold images (--image-column)")
    elif kind == "jsonl":
        source = read_jsonl(
            file, wanted, options.genres_column, options.genres_separator or _SEPARATOR
        )
    else:
        source = read_delimited(file, kind, wanted)
    needed = ["id_column"]
    if source.image_type is None or _is_set(options, "cover_column"):
        needed.append("cover_column")
    if _is_set(options, "image_column"):
        needed.append("image_column")
    for option in needed:
        # A file without any column is an empty one, and that is no mistake of the options.
        if source.columns and getattr(options, option) not in source.columns:
            raise CatalogError(_no_column(file, source.columns, options, option))
    return source


def _has_images(source: SourceFile, options: CatalogSettings) -> bool:
    """Whether the covers are bytes in the file itself; else its cover column says where."""
    type_ = source.image_type
    if type_ is None:
        return False
    has_cover = options.cover_column in source.table.column_names
    if holds_bytes(type_):
        # A column of nulls alone holds no image: take the other way to the covers if there is one.
        return not (has_cover and source.null_images == source.table.num_rows)
    if has_cover and not _is_set(options, "image_column"):
        return False
    raise CatalogError(
        f"column {options.image_column!r} in {source.uri} has the type {type_}, not bytes "
        f"(--image-column); if it is a path: --cover-column {options.image_column}"
    )


def _part(source: SourceFile, options: CatalogSettings, image_file: int | None = None) -> pa.Table:
    """CATALOG's columns for one file, without `row` and `first_row`."""
    count = source.table.num_rows
    folder = storage.absolute(options.covers or storage.parent(source.uri))
    # Beside image bytes, a path is where the cover of a row without bytes is.
    cover = _resolve(_text(source, options.cover_column), folder)
    in_file = image_file is not None
    source_row = pa.array(np.arange(count)) if in_file else pa.nulls(count, pa.int64())
    return pa.table(
        {
            "album_id": _text(source, options.id_column),
            "cover": cover,
            "source": pa.repeat(pa.scalar(image_file, pa.int32()), count),
            "source_row": source_row,
            "genres": _genres(source, options),
            "title": _text(source, options.title_column),
            "artist": _text(source, options.artist_column),
            "split": _text(source, options.split_column),
            "group": _text(source, options.group_column),
        }
    )


def _text(source: SourceFile, name: str) -> pa.ChunkedArray:
    """The column as text, empty text as null; all null where the file has no such column."""
    if name not in source.table.column_names:
        return pa.chunked_array([pa.nulls(source.table.num_rows, pa.string())])
    column = source.table.column(name)
    type_ = column.type
    try:
        if pa.types.is_dictionary(type_):
            column = column.cast(type_.value_type)
        if pa.types.is_floating(type_):
            # pandas makes floats of whole numbers as soon as one is missing.
            column = pc.if_else(pc.is_nan(column), None, column)
            if pc.all(pc.equal(column, pc.floor(column))).as_py() is not False:
                column = column.cast(pa.int64())
        column = column.cast(pa.string())
    except pa.ArrowException as error:
        raise CatalogError(
            f"column {name!r} in {source.uri} has the type {type_}, which is no text"
        ) from error
    is_empty = pc.equal(column, "")
    return pc.if_else(is_empty, None, column) if pc.any(is_empty).as_py() else column


def _genres(source: SourceFile, options: CatalogSettings) -> pa.ChunkedArray:
    """The column as lists of distinct names, from lists or from text."""
    name = options.genres_column
    separator = options.genres_separator or _SEPARATOR
    if name in source.table.column_names:
        column = source.table.column(name)
        type_ = column.type
        if pa.types.is_list(type_) or pa.types.is_large_list(type_):
            if not _is_text(type_.value_type):
                raise CatalogError(
                    f"column {name!r} in {source.uri} has the type {type_}; a list of names is "
                    "needed (--genres-column)"
                )
            return make_lists(join_lists(column.cast(GENRES)), lambda text: text.split(JOINT))
    return make_lists(_text(source, name), lambda text: text.split(separator))


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return type_ in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _resolve(covers: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """Covers as absolute paths or URIs, as storage.join makes them."""
    base = storage.join(folder, "")

    def resolved(cover: pa.Array) -> pa.Array:
        is_absolute = pc.or_(pc.starts_with(cover, "/"), pc.match_substring(cover, "://"))
        relative = pc.replace_substring_regex(cover, r"^(\./+)+", "")  # S3 knows no `./`
        return pc.if_else(is_absolute, cover, pc.binary_join_element_wise(base, relative, ""))

    # Chunk by chunk, so that the steps between do not hold the longest column several times.
    return pa.chunked_array(map(resolved, covers.chunks), pa.string())


def _check_optional(place: str, seen: set[str], options: CatalogSettings) -> list[str]:
    """Raise for a column that the user asked for and no file has; a note where it is genres."""
    notes = []
    for option in (f"{name}_column" for name in _OPTIONAL):
        if not seen or getattr(options, option) in seen:
            continue
        missing = _no_column(place, seen, options, option)
        if _is_set(options, option):
            raise CatalogError(missing)
        if option == "genres_column":
            notes.append(f"no row has genres: {missing}")
    return notes


def _first_rows(album_id: pa.ChunkedArray) -> pa.Array:
    """For each row, the first row with the same id, if that is an earlier one."""
    encoded = album_id.dictionary_encode()
    code = np.concatenate([pc.fill_null(chunk.indices, -1).to_numpy() for chunk in encoded.chunks])
    row = np.arange(len(code))
    # Of several assignments to one place the last one stays; backwards, that is the first row.
    first = np.zeros(code.max() + 2, np.int64)
    first[code[::-1]] = row[::-1]
    first_row = first[code]
    return pa.array(first_row, mask=(code < 0) | (first_row == row))


def _fingerprint(table: pa.Table, files: list[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file, storage.size(file)]).encode())
    for name in table.drop_columns(["row", "first_row"]).column_names:  # those follow from the rest
        for start in range(0, table.num_rows, _HASHED_ROWS):
            block = table.column(name).slice(start, _HASHED_ROWS).combine_chunks()
            for content in _content(block):
                digest.update(content)
    return digest.hexdigest()


def _content(column: pa.Array) -> Iterator[bytes | pa.Buffer]:
    """The values alone: neither chunks and offsets nor what lies under a null."""
    if pa.types.is_list(column.type):
        yield pc.fill_null(pc.list_value_length(column), -1).to_numpy().tobytes()
        column = pc.list_flatten(column)
    if pa.types.is_string(column.type):
        yield pc.fill_null(pc.binary_length(column), -1).to_numpy().tobytes()
        texts = pc.fill_null(column, "")
        yield pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), "")[0].as_buffer()
    else:
        yield pc.fill_null(column, -1).to_numpy().tobytes()
