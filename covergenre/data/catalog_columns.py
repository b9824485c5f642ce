"""Columns of catalog files: which are read, and their conversion to schema.CATALOG."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covergenre.config import CatalogSettings, flag
from covergenre.data.catalog_files import SourceFile, partitions
from covergenre.data.genre_lists import JOINT, as_lists, is_any_list, join_lists, make_lists
from covergenre.data.parquet_reader import holds_bytes, read_parquet
from covergenre.data.readers import OWN, SEPARATORS, read_delimited, read_jsonl
from covergenre.errors import CatalogError, ConfigError, did_you_mean
from covergenre.genre_text import GenreTextError, clean_names, split_names
from covergenre.io import storage
from covergenre.schema import CARRIED, ID

# Columns that files may lack.
_OPTIONAL = ("genres", "title", "artist", "split", "group")


class ColumnMapping:
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
                f"{path}: not a Parquet file, but --image-column is supported only for Parquet; use"
                " --cover-column, or convert the catalog",
                code="image_column_format",
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
                f"--carry {file.image_column}: this is the image column of {file.uri} and cannot"
                " be copied to the labels; remove it from --carry",
                code="image_column",
            )

    def check_mumu(self) -> None:
        """Raises ConfigError for settings that do not apply to MuMu's files."""
        if self.carry:
            raise ConfigError(
                "--carry: MuMu's files have rows of songs, not of albums; leave it out",
                code="mumu_columns",
            )
        for name in self.names:
            if self.is_set(name):
                raise ConfigError(
                    f"{flag(f'{name}_column')}: the columns of MuMu's files are fixed; leave it"
                    " out",
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


class GenreParser:
    """Parses the genres in the text of a cell. Raises GenreTextError."""

    def __init__(self, settings: CatalogSettings, default_separator: str) -> None:
        self.separator = settings.genres_separator or default_separator
        self._missing = frozenset(word.lower() for word in settings.missing_values)
        cases = (str, str.lower, str.upper, str.capitalize)
        words = {case(word) for word in settings.missing_values for case in cases}
        self.missing_texts = pa.array(sorted({"", *words}))
        """Texts that mean a missing value, in every column."""

    def __call__(self, cell: str) -> list[str]:
        """The genres in the text of a cell."""
        return self._clean(cell, split_names(cell, self.separator))

    def joined(self, cell: str) -> list[str]:
        """The genres in a list, given as a text of join_lists."""
        return self._clean(cell, cell.split(JOINT))

    def _clean(self, cell: str, names: Sequence[str | None]) -> list[str]:
        try:
            return clean_names(names, self._missing)
        except ValueError as error:
            raise GenreTextError(cell, str(error)) from error


class Converter:
    """Converts the tables of one file to columns of schema.CATALOG."""

    def __init__(
        self,
        file: SourceFile,
        mapping: ColumnMapping,
        parse: GenreParser,
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
