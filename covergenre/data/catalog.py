"""Catalogs: CSV, TSV, JSON Lines, Parquet and MuMu's label files, read as schema.CATALOG.

A row that cannot be used (no id, no cover) stays in the table; the stage rejects and counts it. An
error is raised only if the catalog itself cannot be read.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covergenre.config import CatalogSettings, flag
from covergenre.data import mumu
from covergenre.data.catalog_files import SourceFile, find_files, partitions
from covergenre.data.covers import Source
from covergenre.data.genre_lists import JOINT, as_lists, is_any_list, join_lists, make_lists
from covergenre.data.parquet_reader import holds_bytes, read_parquet
from covergenre.data.readers import OWN, SEPARATORS, read_delimited, read_header, read_jsonl
from covergenre.errors import CatalogError, ConfigError, did_you_mean
from covergenre.genre_text import GenreTextError, clean_names, split_names
from covergenre.io import storage
from covergenre.schema import CARRIED, CATALOG, ID

_SEPARATOR = "|"
# Columns that files may lack.
_OPTIONAL = ("genres", "title", "artist", "split", "group")


class CatalogReader:
    """A catalog, read part by part; see plan.RowReader.

    Args:
        uri: a file, a directory or a pattern (`*`, `?`, `[]`, `**`), local or s3://.
        settings: format, column names and separators.
        columns: the columns of schema.CATALOG to read, and ID; others are left out.
        carry: columns of the source to add in their own types, with the prefix CARRIED.

    Raises:
        CatalogError: with file and line or column, if it is not a catalog.
        StorageError: if there is nothing to read.
    """

    identity: str | None = None  # known only when all rows have been read

    def __init__(
        self,
        uri: str,
        settings: CatalogSettings,
        columns: Collection[str] = tuple(CATALOG.names),
        carry: Sequence[str] = (),
    ) -> None:
        self.uri = storage.absolute(uri)
        self.files: list[str] = []
        """Files with image bytes, which the column `source` counts from 0."""
        self.notes: list[str] = []
        """Notes for the user, one line each; complete when all parts have been read."""
        self.source_rows = 0
        """Rows of the source files; of MuMu's label files, songs."""
        self.image_column = settings.image_column
        """The column of `files` that has the bytes."""
        self._settings = settings
        self._columns = tuple(columns)
        self._mapping = _ColumnMapping(settings, columns, carry)
        self._covers = None if settings.covers is None else storage.absolute(settings.covers)
        if self._covers is not None:
            _check_covers(self._covers)
        is_mumu = settings.format == "mumu"
        self._format, self._paths = find_files(self.uri, "csv" if is_mumu else settings.format)
        self._is_mumu = is_mumu or (self._format == "csv" and self._has_mumu_header())
        if self._is_mumu:
            self._mapping.check_mumu()
        names = CatalogSettings.model_fields.keys() & settings.result_settings()
        self.key: dict[str, Any] = {
            "settings": settings.model_dump(mode="json", include=set(names)),
            "covers": self._covers,
            "columns": [*columns, *carry],
            "files": [[file, *storage.stat(file)] for file in self._paths],
        }
        """Settings, and path, size and mtime of each file; equal keys mean equal rows."""

    def parts(self) -> Iterator[pa.Table]:
        """All rows as tables with columns of schema.CATALOG, in catalog order."""
        self.files, self.notes, self.source_rows = [], [], 0
        fields = [field for field in CATALOG if field.name in self._columns]
        rows = 0
        for part in self._mumu_parts() if self._is_mumu else self._file_parts():
            count = part.num_rows
            others = {name: part[name] for name in part.column_names if name not in CATALOG.names}
            found = {
                field.name: part[field.name]
                if field.name in part.column_names
                else pa.nulls(count, field.type)
                for field in fields
            }
            found["row"] = pa.array(np.arange(rows, rows + count))
            rows += count
            types = [(name, column.type) for name, column in others.items()]
            yield pa.table({**found, **others}, pa.schema([*fields, *types]))
        if not rows:
            raise CatalogError(f"{self.uri}: the catalog has no rows", code="no_rows")

    def source(self) -> Source:
        """Where image bytes are; complete when all parts have been read."""
        return Source(tuple(self.files), self.image_column)

    def summary(self) -> dict[str, Any]:
        """`source_rows` and `notes`; complete when all parts have been read."""
        return {"source_rows": self.source_rows, "notes": self.notes}

    def _has_mumu_header(self) -> bool:
        return (
            self._settings.format == "auto"
            and not self._mapping.is_set("id")
            and read_header(self._paths[0], "csv") == mumu.HEADER
        )

    def _mumu_parts(self) -> Iterator[pa.Table]:
        parse = _GenreParser(self._settings, mumu.SEPARATOR)
        albums, self.source_rows = mumu.read_songs(self._paths, parse, self._covers)
        self.notes.append(f"{self.source_rows:,} songs make {albums.num_rows:,} albums")
        yield albums

    def _file_parts(self) -> Iterator[pa.Table]:
        mapping = self._mapping
        seen: set[str] = set()
        ignored: dict[str, str] = {}
        null_images = 0
        parse = _GenreParser(self._settings, _SEPARATOR)
        for path in self._paths:
            file = mapping.open(path, self._format, parse.separator)
            image_file = None
            if mapping.has_images(file):
                image_file = len(self.files)
                self._add_image_file(file)
                null_images += file.null_images
            mapping.check_carried(file)
            convert = _Converter(file, mapping, parse, self._covers, image_file)
            yield from convert.parts()
            self.source_rows += convert.rows
            mapping.check_required(file)  # the columns of JSON Lines are known only now
            seen |= file.names()
            ignored |= file.ignored
        self.notes += mapping.check_optional(
            self._paths[0] if len(self._paths) == 1 else self.uri, seen
        )
        for name, found in ignored.items():
            self.notes.append(f"column {name!r} is ignored: it has {found}, not text")
        if null_images:
            self.notes.append(
                f"{null_images:,} rows have no bytes in the column {self.image_column!r}"
            )

    def _add_image_file(self, file: SourceFile) -> None:
        """Workers read the images of all files from one column."""
        assert file.image_column is not None
        if not self.files:
            self.image_column = file.image_column
        elif self.image_column != file.image_column:
            raise CatalogError(
                f"{file.uri}: images are in the column {file.image_column!r}, but in"
                f" {self.image_column!r} of {self.files[0]}; use one name in all files",
                code="image_columns",
            )
        self.files.append(file.uri)


def _check_covers(folder: str) -> None:
    """Raises CatalogError if the directory is missing: every row would be rejected."""
    if folder.startswith(("http://", "https://", "s3://")):
        return
    if not storage.is_directory(folder):
        raise CatalogError(f"--covers {folder}: no such directory", code="no_covers_directory")


class _ColumnMapping:
    """Maps columns of the source files to columns of schema.CATALOG."""

    def __init__(
        self, settings: CatalogSettings, columns: Collection[str], carry: Sequence[str]
    ) -> None:
        self.carry = carry
        self.with_id = ID in columns
        self.names = {
            name: getattr(settings, f"{name}_column")
            for name in ("id", "cover", "image", *_OPTIONAL)
        }
        self._wanted = ["id", "cover", *(name for name in _OPTIONAL if name in columns)]
        defaults = CatalogSettings.model_fields
        self._set = {n for n, c in self.names.items() if c != defaults[f"{n}_column"].default}
        self._needed = settings.needed_columns()

    def is_set(self, name: str) -> bool:
        """Whether the user set the column of `name` ("artist"); then it must exist."""
        return name in self._set

    def may_ignore(self, name: str) -> bool:
        """Whether the column of `name` is ignored, with a note, if it has no text."""
        is_optional = name in ("title", "artist", "split", "group")
        return is_optional and name not in self._set and name not in self._needed

    def open(self, path: str, format_: str, separator: str) -> SourceFile:
        """The file with its wanted columns, checked for those that every file needs."""
        wanted = {name: self.names[name] for name in self._wanted}
        used = list(dict.fromkeys([*wanted.values(), *self.carry]))
        if format_ == "parquet":
            file = read_parquet(
                path,
                used,
                image=self.names["image"],
                cover=self.names["cover"],
                image_is_set=self.is_set("image"),
            )
        elif self.is_set("image"):
            raise CatalogError(
                f"{path}: --image-column needs Parquet files", code="image_column_format"
            )
        elif format_ == "jsonl":
            file = read_jsonl(
                path,
                list(dict.fromkeys(wanted.values())),
                [column for name, column in wanted.items() if self.may_ignore(name)],
                self.names["genres"],
                separator,
                [*([self.names["id"]] if self.with_id else []), *self.carry],
            )
        else:
            file = read_delimited(path, format_, used)
        found = partitions(path)
        file.partitions.update({name: found[name] for name in used if name in found})
        self.check_required(file)
        return file

    def check_required(self, file: SourceFile) -> None:
        """Raises CatalogError if the file lacks a column that every file must have."""
        needed = ["id"]
        has_cover = file.image_type is not None or file.path_column is not None
        if not has_cover or self.is_set("cover"):
            needed.append("cover")
        if self.is_set("image"):
            needed.append("image")
        columns = file.names()
        for name in needed:
            # A file without columns is empty, which is not an error in the settings.
            if columns and self.names[name] not in columns:
                raise self._missing(file.uri, columns, name)

    def check_optional(self, source: str, seen: set[str]) -> list[str]:
        """Notes for the columns that no file has. Raises CatalogError for those the user named.

        source: the catalog, for messages. seen: the columns of all files.
        """
        notes: list[str] = []
        if not seen:
            return notes
        for name in self.carry:
            if name not in seen:
                raise CatalogError(
                    f"--carry {name}: no such column in {source}{did_you_mean(name, seen)}",
                    code="no_column",
                )
        for name in _OPTIONAL:
            if self.names[name] in seen:
                continue
            missing = self._missing(source, seen, name)
            if self.is_set(name):
                raise missing
            if name == "genres" and name in self._wanted:
                notes.append(f"no row has genres: {missing}")
        return notes

    def check_carried(self, file: SourceFile) -> None:
        """Raises CatalogError if --carry names the column of the images."""
        if file.image_column in self.carry and file.image_type and holds_bytes(file.image_type):
            raise CatalogError(
                f"--carry {file.image_column}: the column of the images in {file.uri}; carry"
                " other columns",
                code="image_column",
            )

    def check_mumu(self) -> None:
        """Raises ConfigError for settings that do not apply to MuMu's label files."""
        if self.carry:
            raise ConfigError(
                "--carry: MuMu's label files have rows of songs, not of albums; leave it out",
                code="mumu_columns",
            )
        for name in self.names:
            if self.is_set(name):
                raise ConfigError(
                    f"{flag(f'{name}_column')}: the columns of MuMu's label files are fixed; leave"
                    " it out",
                    code="mumu_columns",
                )

    def has_images(self, file: SourceFile) -> bool:
        """Whether the covers are image bytes in the file; else the cover column has paths."""
        type_ = file.image_type
        if type_ is None:
            return False
        in_bytes = holds_bytes(type_)
        has_cover = self.names["cover"] in file.names()
        if in_bytes and self.names["cover"] == file.image_column:
            has_cover = False
        has_path = has_cover or file.path_column is not None
        if in_bytes:
            # A column of nulls has no image: use paths if there are any.
            return not (has_path and file.null_images == file.rows)
        if has_path and not (self.is_set("image") and file.path_column is None):
            return False
        column = self.names["image"]
        raise CatalogError(
            f"column {column!r} in {file.uri} has the type {type_}, not bytes (--image-column); if"
            f" it is a path: --cover-column {column}",
            code="image_type",
        )

    def _missing(self, source: str, columns: Collection[str], name: str) -> CatalogError:
        """The error for a column that `source` does not have."""
        column = self.names[name]
        if len(columns) == 1 and (header := next(iter(columns))) != column:
            for separator, what in SEPARATORS.items():
                if column in (part.strip(' "') for part in header.split(separator)):
                    fix = "save it with commas (.csv) or tabs (.tsv)"
                    fix = {"\t": "use --format tsv", ",": "use --format csv"}.get(separator, fix)
                    return CatalogError(
                        f"{source}: its columns are separated by {what}; {fix}", code="separator"
                    )
        option = flag(f"{name}_column")
        return CatalogError(
            f"no column {column!r} in {source}{did_you_mean(column, columns)} ({option})",
            code="no_column",
        )


class _GenreParser:
    """Parses the genres in the text of a cell. Raises GenreTextError."""

    def __init__(self, settings: CatalogSettings, default_separator: str) -> None:
        self.separator = settings.genres_separator or default_separator
        self._missing = frozenset(word.lower() for word in settings.missing_values)
        cases = (str, str.lower, str.upper, str.capitalize)
        words = {case(word) for word in settings.missing_values for case in cases}
        self.missing_texts = pa.array(sorted({"", *words}))
        """Texts that mean a missing value, in every column."""

    def __call__(self, cell: str) -> list[str]:
        """The genres in a cell of text."""
        return self._clean(cell, split_names(cell, self.separator))

    def joined(self, cell: str) -> list[str]:
        """The genres in a list, given as a text of join_lists."""
        return self._clean(cell, cell.split(JOINT))

    def _clean(self, cell: str, names: Sequence[str | None]) -> list[str]:
        try:
            return clean_names(names, self._missing)
        except ValueError as error:
            raise GenreTextError(cell, str(error)) from error


class _Converter:
    """Converts the tables of one file to columns of schema.CATALOG."""

    def __init__(
        self,
        file: SourceFile,
        mapping: _ColumnMapping,
        parse: _GenreParser,
        covers: str | None,
        image_file: int | None,
    ) -> None:
        """covers: directory of relative paths; None: that of the file. image_file: its number among
        the files with images, if it has any."""
        self._file = file
        self._mapping = mapping
        self._parse = parse
        self._folder = covers or storage.absolute(storage.parent(file.uri))
        self._image_file = image_file
        self.rows = 0
        """Rows converted so far."""

    def parts(self) -> Iterator[pa.Table]:
        """All tables of the file."""
        for table in self._file.parts:
            yield self._part(self._with_partitions(table))
            self.rows += table.num_rows

    def _with_partitions(self, table: pa.Table) -> pa.Table:
        for name, value in self._file.partitions.items():
            table = table.select([n for n in table.column_names if n not in (name, f"{OWN}{name}")])
            column = pa.repeat(pa.scalar(value, pa.string()), table.num_rows)
            table = table.append_column(name, column)
        return table

    def _part(self, table: pa.Table) -> pa.Table:
        count = table.num_rows
        in_file = self._image_file is not None
        # A row without image bytes has its cover at the path, if any.
        cover = self._catalog_text(table, "cover")
        if self._file.path_column is not None:
            cover = pc.coalesce(cover, self._text(table, self._file.path_column))
        numbers = pa.array(np.arange(self.rows, self.rows + count))
        columns = {
            "album_id": self._catalog_text(table, "id"),
            "cover": _resolve(cover, self._folder),
            "source": pa.repeat(pa.scalar(self._image_file, pa.int32()), count),
            "source_row": numbers if in_file else pa.nulls(count, pa.int64()),
            "genres": self._genres(table),
            **{
                name: self._catalog_text(table, name)
                for name in ("title", "artist", "split", "group")
            },
        }
        if self._mapping.with_id:
            own = _own(table, self._mapping.names["id"])
            columns[ID] = _typed_id(own, columns["album_id"])
        for name in self._mapping.carry:
            columns[f"{CARRIED}{name}"] = _own(table, name)
        return pa.table(columns)

    def _catalog_text(self, table: pa.Table, name: str) -> pa.ChunkedArray:
        """The column of `name` as text; null if it has no text and may be ignored."""
        column = self._mapping.names[name]
        try:
            return self._text(table, column)
        except CatalogError:
            is_beside_images = name == "cover" and self._image_file is not None
            if not (self._mapping.may_ignore(name) or is_beside_images):
                raise
            self._file.ignored[column] = f"the type {table[column].type}"
            return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])

    def _text(self, table: pa.Table, name: str) -> pa.ChunkedArray:
        """The column as text, missing values as null; all null if the file has no such column."""
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
            what = "which is not text"
            if pa.types.is_binary(type_) or pa.types.is_fixed_size_binary(type_):
                what = "with bytes that are not UTF-8"
            hint = f"; for images: {flag('image_column')} {name}" if holds_bytes(type_) else ""
            raise CatalogError(
                f"column {name!r} in {self._file.uri} has the type {type_}, {what}{hint}",
                code="column_type",
            ) from error
        is_missing = pc.is_in(column, self._parse.missing_texts)
        return pc.if_else(is_missing, None, column) if pc.any(is_missing).as_py() else column

    def _genres(self, table: pa.Table) -> pa.ChunkedArray:
        """The genres as lists of distinct names, from lists or from text."""
        name, uri = self._mapping.names["genres"], self._file.uri
        is_list = name in table.column_names and is_any_list(table[name].type)
        if is_list:
            type_ = table[name].type
            if not _is_text(type_.value_type):
                raise CatalogError(
                    f"column {name!r} in {uri} has the type {type_}; expected text or lists of text"
                    " (--genres-column)",
                    code="column_type",
                )
            texts = join_lists(as_lists(table[name]))
        else:
            texts = self._text(table, name)
        try:
            return make_lists(texts, self._parse.joined if is_list else self._parse)
        except GenreTextError as error:
            row = self.rows + pc.index(texts, error.cell).as_py()
            raise CatalogError(f"{uri}, row {row}: {name!r}: {error}", code="genres") from error


def _own(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of the source in its own type; nulls if the file has no such column."""
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


def _float_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole numbers without a decimal point: pandas makes integers floats if one is missing."""
    column = pc.if_else(pc.is_nan(column), None, column)
    is_whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**63))
    whole = pc.if_else(is_whole, column, 0.0).cast(pa.int64()).cast(pa.string())
    return pc.if_else(is_whole, whole, column.cast(pa.string()))


def _decimal_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without trailing zeros after the decimal point."""
    if column.type.scale == 0:
        return column.cast(pa.string())
    return pc.replace_substring_regex(column.cast(pa.string()), r"\.?0+$", "")


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return type_ in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _resolve(covers: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """Covers as absolute paths or URIs, equal to those of storage.join."""
    base = storage.join(folder, "")

    def resolved(cover: pa.Array) -> pa.Array:
        # As browsers and urllib do.
        cover = pc.utf8_trim_whitespace(cover)
        cover = pc.if_else(pc.equal(cover, ""), None, cover)
        is_absolute = pc.match_substring_regex(cover, storage.ABSOLUTE)
        relative = pc.replace_substring_regex(cover, r"^(\./+)+", "")  # S3 does not resolve `./`
        return pc.if_else(is_absolute, cover, pc.binary_join_element_wise(base, relative, ""))

    # Chunk by chunk, to keep the intermediate results small.
    return pa.chunked_array(map(resolved, covers.chunks), pa.string())
