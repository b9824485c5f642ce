"""Catalogs: CSV, TSV, JSON Lines, Parquet and MuMu's genre files, read as schema.CATALOG.

A row that cannot be used (no id, no cover) stays in the table; the stage rejects and counts it. An
error is raised only if the catalog itself cannot be read.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from covergenre.config import CatalogSettings
from covergenre.data import mumu
from covergenre.data.catalog_columns import ColumnMapping, Converter, GenreParser
from covergenre.data.catalog_files import SourceFile, find_files
from covergenre.data.covers import Source
from covergenre.data.readers import read_header
from covergenre.errors import CatalogError
from covergenre.io import storage
from covergenre.schema import CATALOG

_SEPARATOR = "|"


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
        """Rows of the source files; of MuMu's files, songs."""
        self.image_column = settings.image_column
        """The column of `files` that has the bytes."""
        self._settings = settings
        self._columns = tuple(columns)
        self._mapping = ColumnMapping(settings, columns, carry)
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
        parse = GenreParser(self._settings, mumu.SEPARATOR)
        albums, self.source_rows = mumu.read_songs(self._paths, parse, self._covers)
        self.notes.append(f"{self.source_rows:,} songs make {albums.num_rows:,} albums")
        yield albums

    def _file_parts(self) -> Iterator[pa.Table]:
        mapping = self._mapping
        seen: set[str] = set()
        ignored: dict[str, str] = {}
        null_images = 0
        parse = GenreParser(self._settings, _SEPARATOR)
        for path in self._paths:
            file = mapping.open(path, self._format, parse.separator)
            image_file = None
            if mapping.has_images(file):
                image_file = len(self.files)
                self._add_image_file(file)
                null_images += file.null_images
            mapping.check_carried(file)
            convert = Converter(file, mapping, parse, self._covers, image_file)
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
