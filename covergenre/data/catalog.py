"""Catalogs: CSV, TSV, JSON Lines, Parquet and MuMu's label files, all made into schema.CATALOG.

A row that cannot be used (no id, no cover) stays in the table, for the stage to set aside and
count; an error is raised only where the catalog cannot be read as one.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covergenre.config import CatalogSettings, flag
from covergenre.data import mumu
from covergenre.data.genre_lists import JOINT, as_lists, is_any_list, join_lists, make_lists
from covergenre.data.readers import (
    OWN,
    SEPARATORS,
    SourceFile,
    find_files,
    holds_bytes,
    partitions,
    read_delimited,
    read_header,
    read_jsonl,
    read_parquet,
)
from covergenre.errors import CatalogError, ConfigError, did_you_mean
from covergenre.genre_text import GenreTextError, clean_names, split_names
from covergenre.io import storage
from covergenre.io.hashing import hash_rows
from covergenre.schema import CARRIED, CATALOG, ID

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


@dataclass
class Scan:
    """A catalog, read a part at a time; what is said of it is known when all parts were read."""

    image_column: str
    parts: Iterator[pa.Table]
    """schema.CATALOG without first_row, in catalog order. Can be gone through once."""
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source_rows: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    """Optional columns that hold no text -> what they hold."""


def read_catalog(uri: str, options: CatalogSettings) -> Catalog:
    """Read the file, the folder or the pattern (`*`, `?`, `[]`, `**`) `uri`, all of it.

    Raises CatalogError naming file and line or column where it is no catalog, and StorageError
    where there is nothing to read.
    """
    scan = scan_catalog(uri, options)
    table = pa.concat_tables(scan.parts)
    table = table.append_column(CATALOG.field("first_row"), _first_rows(table.column("album_id")))
    return Catalog(
        table,
        tuple(scan.files),
        scan.source_rows,
        tuple(scan.notes),
        scan.image_column,
        _fingerprint(table, scan.files),
    )


def scan_catalog(
    uri: str,
    options: CatalogSettings,
    columns: Collection[str] = tuple(CATALOG.names),
    carry: Sequence[str] = (),
) -> Scan:
    """The same a part at a time, and without first_row, for catalogs that fit no memory.

    columns: those of schema.CATALOG that are needed, and ID where that is.
    carry: columns of the source to add in their own types, named CARRIED and their name.
    """
    if options.covers is not None:
        _check_covers(storage.absolute(options.covers))
    kind, files = find_files(uri, "csv" if options.format == "mumu" else options.format)
    scan = Scan(options.image_column, iter(()))
    if options.format == "mumu" or (kind == "csv" and _is_mumu(files[0], options)):
        parts = _mumu_parts(scan, files, options, carry)
    else:
        parts = _file_parts(scan, uri, kind, files, options, columns, carry)
    scan.parts = _numbered(uri, parts, columns)
    return scan


def _check_covers(folder: str) -> None:
    """Raises CatalogError where no cover could be there, rather than set every row aside."""
    if folder.startswith(("http://", "https://", "s3://")):
        return
    if not storage.is_directory(folder):
        raise CatalogError(f"--covers {folder}: no such folder")


def catalog_stamps(uri: str, options: CatalogSettings) -> list[list[Any]]:
    """[path, bytes, time of change in ns] of each file of a catalog: the same, the same content."""
    _, files = find_files(uri, "csv" if options.format == "mumu" else options.format)
    return [[file, *storage.stat(file)] for file in files]


def _file_parts(
    scan: Scan,
    uri: str,
    kind: str,
    files: list[str],
    options: CatalogSettings,
    columns: Collection[str],
    carry: Sequence[str],
) -> Iterator[pa.Table]:
    seen: set[str] = set()
    null_images = 0
    for file in files:
        source = _open_file(file, kind, options, columns, carry)
        image_file = None
        if _has_images(source, options):
            _check_image_column(scan, source)
            image_file = len(scan.files)
            scan.files.append(file)
            null_images += source.null_images
        _check_carried(source, carry)
        start = 0
        for table in (_with_partitions(source, table) for table in source.parts):
            part = _part(source, table, options, image_file, start)
            if ID in columns:
                id_ = _own(table, options.id_column)
                part = part.append_column(ID, _typed_id(id_, part["album_id"]))
            for name in carry:
                part = part.append_column(f"{CARRIED}{name}", _own(table, name))
            yield part
            start += table.num_rows
        scan.source_rows += start
        _check_columns(source, options)  # of JSON Lines they are known now
        seen |= source.names()
        scan.ignored |= source.ignored
    place = files[0] if len(files) == 1 else uri
    for name in carry:
        if seen and name not in seen:
            raise CatalogError(
                f"--carry {name}: no such column in {place}{did_you_mean(name, seen)}",
                code="no_column",
            )
    notes = _check_optional(place, seen, options)
    scan.notes += notes if "genres" in columns else []
    for name, held in scan.ignored.items():
        scan.notes.append(f"column {name!r} is ignored: it holds {held}, not text")
    if null_images:
        scan.notes.append(f"{null_images:,} rows have no bytes in the column {scan.image_column!r}")


def _check_carried(source: SourceFile, carry: Collection[str]) -> None:
    if source.image_column in carry and source.image_type and holds_bytes(source.image_type):
        raise CatalogError(
            f"--carry {source.image_column}: is the column of the images in {source.uri}; carry"
            " other columns",
            code="image_column",
        )


def _own(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of the source in its own type; nulls where the file has no such column."""
    name = f"{OWN}{name}" if f"{OWN}{name}" in table.column_names else name
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows)])
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    return column


def _typed_id(own: pa.ChunkedArray, text: pa.ChunkedArray) -> pa.ChunkedArray:
    type_ = own.type
    if pa.types.is_null(type_):
        return own
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return pc.if_else(pc.is_valid(text), own, None)
    return pa.chunked_array([pa.nulls(len(own), pa.string())])


def _check_image_column(scan: Scan, source: SourceFile) -> None:
    """All files have their images in one column, which workers read."""
    assert source.image_column is not None
    if not scan.files:
        scan.image_column = source.image_column
    elif scan.image_column != source.image_column:
        raise CatalogError(
            f"{source.uri}: images are in the column {source.image_column!r}, and in"
            f" {scan.image_column!r} of {scan.files[0]}; give all files the same"
        )


def _numbered(uri: str, parts: Iterator[pa.Table], columns: Collection[str]) -> Iterator[pa.Table]:
    """Parts with `columns` of CATALOG but first_row, and with those that CATALOG does not have."""
    fields = [field for field in CATALOG if field.name in columns and field.name != "first_row"]
    rows = 0
    for part in parts:
        count = part.num_rows
        others = {name: part[name] for name in part.column_names if name not in CATALOG.names}
        found = {
            **{field.name: pa.nulls(count, field.type) for field in fields},
            **{field.name: part[field.name] for field in fields if field.name in part.column_names},
            "row": pa.array(np.arange(rows, rows + count)),
        }
        rows += count
        yield pa.table(
            {**found, **others},
            pa.schema([*fields, *[(name, column.type) for name, column in others.items()]]),
        )
    if not rows:
        raise CatalogError(f"catalog {uri} has no rows")


def _is_mumu(file: str, options: CatalogSettings) -> bool:
    return (
        options.format == "auto"
        and not _is_set(options, "id_column")
        and read_header(file, "csv") == mumu.HEADER
    )


def _mumu_parts(
    scan: Scan, files: list[str], options: CatalogSettings, carry: Sequence[str]
) -> Iterator[pa.Table]:
    if carry:
        raise ConfigError(
            "--carry: MuMu's label files have rows of songs, not of albums; leave it out",
            code="mumu_columns",
        )
    for name in CatalogSettings.model_fields:
        if name.endswith("_column") and _is_set(options, name):
            raise ConfigError(
                f"MuMu's label files have columns of their own; leave out {flag(name)}"
            )
    to_names = _name_reader(options, mumu.SEPARATOR)
    albums, scan.source_rows = mumu.read_songs(files, to_names, options.covers)
    scan.notes.append(f"{scan.source_rows:,} songs make {albums.num_rows:,} albums")
    yield albums


def _is_set(options: CatalogSettings, name: str) -> bool:
    """Whether the user set the option: a column that was asked for has to be there."""
    return bool(getattr(options, name) != CatalogSettings.model_fields[name].default)


def _is_optional(options: CatalogSettings, name: str) -> bool:
    """Whether rows can do without the column of `name` ("artist") where it holds no text."""
    return (
        name in ("title", "artist", "split", "group")
        and not _is_set(options, f"{name}_column")
        and name not in options.needed_columns()
    )


def _no_column(place: str, columns: Collection[str], options: CatalogSettings, option: str) -> str:
    name = getattr(options, option)
    if len(columns) == 1 and (header := next(iter(columns))) != name:
        for separator, what in SEPARATORS.items():
            if name in (part.strip(' "') for part in header.split(separator)):
                fix = "--format tsv" if separator == "\t" else "save it with commas (.csv) or tabs"
                fix = "--format csv" if separator == "," else fix
                return f"{place}: its columns are separated by {what}; {fix}"
    return f"no column {name!r} in {place}{did_you_mean(name, columns)} ({flag(option)})"


def _open_file(
    file: str,
    kind: str,
    options: CatalogSettings,
    columns: Collection[str],
    carry: Sequence[str],
) -> SourceFile:
    """One file, with the columns that every file must have as far as is known."""
    names = ["id", "cover", *(name for name in _OPTIONAL if name in columns)]
    wanted = {name: getattr(options, f"{name}_column") for name in names}
    if kind == "parquet":
        source = read_parquet(
            file,
            list(dict.fromkeys([*wanted.values(), *carry])),
            image=options.image_column,
            cover=options.cover_column,
            image_is_set=_is_set(options, "image_column"),
        )
    elif _is_set(options, "image_column"):
        raise CatalogError(f"{file}: only Parquet files can hold images (--image-column)")
    elif kind == "jsonl":
        source = read_jsonl(
            file,
            list(dict.fromkeys(wanted.values())),
            [column for name, column in wanted.items() if _is_optional(options, name)],
            options.genres_column,
            options.genres_separator or _SEPARATOR,
            [*([options.id_column] if ID in columns else []), *carry],
        )
    else:
        source = read_delimited(file, kind, list(dict.fromkeys([*wanted.values(), *carry])))
    found = partitions(file)
    source.partitions.update(
        {name: found[name] for name in [*wanted.values(), *carry] if name in found}
    )
    _check_columns(source, options)
    return source


def _check_columns(source: SourceFile, options: CatalogSettings) -> None:
    needed = ["id_column"]
    has_cover = source.image_type is not None or source.path_column is not None
    if not has_cover or _is_set(options, "cover_column"):
        needed.append("cover_column")
    if _is_set(options, "image_column"):
        needed.append("image_column")
    columns = source.names()
    for option in needed:
        # A file without any column is an empty one, and that is no mistake of the options.
        if columns and getattr(options, option) not in columns:
            raise CatalogError(_no_column(source.uri, columns, options, option))


def _has_images(source: SourceFile, options: CatalogSettings) -> bool:
    """Whether the covers are bytes in the file itself; else its cover column says where."""
    type_ = source.image_type
    if type_ is None:
        return False
    in_bytes = holds_bytes(type_)
    has_cover = options.cover_column in source.names()
    if in_bytes and options.cover_column == source.image_column:
        has_cover = False
    has_path = has_cover or source.path_column is not None
    if in_bytes:
        # A column of nulls alone holds no image: take the other way to the covers if there is one.
        return not (has_path and source.null_images == source.rows)
    if has_path and not (_is_set(options, "image_column") and source.path_column is None):
        return False
    raise CatalogError(
        f"column {options.image_column!r} in {source.uri} has the type {type_}, not bytes "
        f"(--image-column); if it is a path: --cover-column {options.image_column}"
    )


def _with_partitions(source: SourceFile, table: pa.Table) -> pa.Table:
    for name, value in source.partitions.items():
        table = table.select([n for n in table.column_names if n not in (name, f"{OWN}{name}")])
        column = pa.repeat(pa.scalar(value, pa.string()), table.num_rows)
        table = table.append_column(name, column)
    return table


def _part(
    source: SourceFile,
    table: pa.Table,
    options: CatalogSettings,
    image_file: int | None,
    start: int,
) -> pa.Table:
    """CATALOG's columns for some rows of a file, `start` and those that follow."""
    count = table.num_rows
    folder = storage.absolute(options.covers or storage.parent(source.uri))
    missing = _missing_values(options)
    in_file = image_file is not None

    def text(name: str) -> pa.ChunkedArray:
        column = getattr(options, f"{name}_column")
        try:
            return _text(source.uri, table, column, missing)
        except CatalogError:
            if not (_is_optional(options, name) or (name == "cover" and in_file)):
                raise
            source.ignored[column] = f"the type {table[column].type}"
            return pa.chunked_array([pa.nulls(count, pa.string())])

    # Beside image bytes, a path is where the cover of a row without bytes is.
    cover = text("cover")
    if source.path_column is not None:
        cover = pc.coalesce(cover, _text(source.uri, table, source.path_column, missing))
    numbers = pa.array(np.arange(start, start + count))
    return pa.table(
        {
            "album_id": text("id"),
            "cover": _resolve(cover, folder),
            "source": pa.repeat(pa.scalar(image_file, pa.int32()), count),
            "source_row": numbers if in_file else pa.nulls(count, pa.int64()),
            "genres": _genres(source.uri, table, options, start),
            "title": text("title"),
            "artist": text("artist"),
            "split": text("split"),
            "group": text("group"),
        }
    )


@lru_cache(maxsize=4)
def _missing_texts(words: tuple[str, ...]) -> pa.Array:
    """The empty text, and `words` in the cases that are in use."""
    cases = {f(word) for word in words for f in (str, str.lower, str.upper, str.capitalize)}
    return pa.array(sorted({"", *cases}))


def _missing_values(options: CatalogSettings) -> pa.Array:
    return _missing_texts(options.missing_values)


def _text(uri: str, table: pa.Table, name: str, missing: pa.Array) -> pa.ChunkedArray:
    """The column as text, `missing` values as null; all null where the file has no such column."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
    column = table.column(name)
    type_ = column.type
    try:
        if pa.types.is_dictionary(type_):
            column = column.cast(type_.value_type)
        if pa.types.is_floating(column.type):
            column = _float_text(column)
        if pa.types.is_decimal(column.type):
            column = _decimal_text(column)
        column = column.cast(pa.string())
    except pa.ArrowException as error:
        what = "and is no text"
        if pa.types.is_binary(type_) or pa.types.is_fixed_size_binary(type_):
            what = "with bytes that are no UTF-8 text"
        hint = f"; for images: {flag('image_column')} {name}" if holds_bytes(type_) else ""
        raise CatalogError(
            f"column {name!r} in {uri} has the type {type_}, {what}{hint}"
        ) from error
    is_missing = pc.is_in(column, missing)
    return pc.if_else(is_missing, None, column) if pc.any(is_missing).as_py() else column


def _float_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole numbers without a point: pandas makes floats of them as soon as one is missing."""
    column = pc.if_else(pc.is_nan(column), None, column)
    is_whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**63))
    whole = pc.if_else(is_whole, column, 0.0).cast(pa.int64()).cast(pa.string())
    return pc.if_else(is_whole, whole, column.cast(pa.string()))


def _decimal_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without zeros behind the point."""
    if column.type.scale == 0:
        return column.cast(pa.string())
    return pc.replace_substring_regex(column.cast(pa.string()), r"\.?0+$", "")


def _name_reader(
    options: CatalogSettings, separator: str, *, is_list: bool = False
) -> Callable[[str], list[str]]:
    """A function from the text of a cell to the names in it; it raises GenreTextError.

    is_list: the cell is a list already, as join_lists makes it.
    """
    separator = options.genres_separator or separator
    missing = frozenset(word.lower() for word in options.missing_values)

    def to_names(cell: str) -> list[str]:
        try:
            names = cell.split(JOINT) if is_list else split_names(cell, separator)
            return clean_names(names, missing)
        except GenreTextError:
            raise
        except ValueError as error:
            raise GenreTextError(cell, str(error)) from error

    return to_names


def _genres(uri: str, table: pa.Table, options: CatalogSettings, start: int) -> pa.ChunkedArray:
    """The column as lists of distinct names, from lists or from text."""
    name = options.genres_column
    separator = options.genres_separator or _SEPARATOR
    texts, is_list = None, False
    if name in table.column_names:
        column = table.column(name)
        type_ = column.type
        if is_list := is_any_list(type_):
            if not _is_text(type_.value_type):
                raise CatalogError(
                    f"column {name!r} in {uri} has the type {type_}; a list of names is "
                    "needed (--genres-column)"
                )
            texts = join_lists(as_lists(column))
    if texts is None:
        texts = _text(uri, table, name, _missing_values(options))
    try:
        return make_lists(texts, _name_reader(options, separator, is_list=is_list))
    except GenreTextError as error:
        row = start + pc.index(texts, error.cell).as_py()
        raise CatalogError(f"{uri}, row {row}: {name!r}: {error}") from error


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return type_ in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _resolve(covers: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """Covers as absolute paths or URIs, as storage.join makes them."""
    base = storage.join(folder, "")

    def resolved(cover: pa.Array) -> pa.Array:
        # Browsers and urllib strip white space around an address, too.
        cover = pc.utf8_trim_whitespace(cover)
        cover = pc.if_else(pc.equal(cover, ""), None, cover)
        is_absolute = pc.match_substring_regex(cover, storage.ABSOLUTE)
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
    hash_files(digest, files)
    rows = table.drop_columns(["row", "first_row"])  # those follow from the rest
    for start in range(0, table.num_rows, _HASHED_ROWS):
        hash_rows(digest, rows.slice(start, _HASHED_ROWS))
    return digest.hexdigest()


def hash_files(digest: Any, files: list[str]) -> None:
    """Add what the files of covers are known by to a hash of hashlib."""
    for file in files:
        digest.update(json.dumps([file, storage.size(file)]).encode())
