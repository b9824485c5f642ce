"""The files of a catalog, and the columns in each of them.

Readers return the requested columns as they are in the file; catalog.py interprets them. They
raise CatalogError instead of skipping or guessing a malformed line.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from covergenre.errors import CatalogError
from covergenre.genre_text import GenreTextError, excerpt, split_names
from covergenre.io import parquet, storage

EXTENSIONS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
OWN = "own:"
"""Prefix of the columns of a JSON Lines file in their own types."""
DELIMITERS = {"csv": ",", "tsv": "\t"}

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}

# Formats that are not supported, by extension, and what to do instead.
_OTHER_EXTENSIONS = {
    ".json": "use JSON Lines (.jsonl), one object per line: jq -c '.[]' FILE.json > FILE.jsonl",
    ".xlsx": "export the sheet as CSV (UTF-8)",
    ".xls": "export the sheet as CSV (UTF-8)",
    ".feather": "write it as Parquet",
    ".arrow": "write it as Parquet",
    ".orc": "write it as Parquet",
    ".avro": "write it as Parquet",
}
# First bytes of files that are not text, and their formats.
_NOT_TEXT = {
    b"PK\x03\x04": "a zip archive (as .xlsx is); unpack it, or export the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an Excel file; export the sheet as CSV (UTF-8)",
    b"PAR1": "a Parquet file (--format parquet)",
    b"ARROW1": "an Arrow file; write it as Parquet",
    b"SQLite": "an SQLite database; export the table as CSV",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it (zstd -d), or use gzip",
    b"\xfd7zXZ": "compressed with xz; decompress it (xz -d), or use gzip",
    b"BZh91A": "compressed with bzip2; decompress it (bzip2 -d), or use gzip",
}
_GZIP = b"\x1f\x8b"
_PARTITION = re.compile(r"([^=]+)=(.*)", re.DOTALL)
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"

# Small, because blocks are read ahead. Files with longer rows are read in blocks of _ROW_BYTES.
_CSV_BLOCK_BYTES = 2**19
_ROW_BYTES = 2**25
"""Maximum size of a row of a text file."""
_CHUNK_ROWS = 50_000
_BUFFER_BYTES = 8 * 2**20
_PATH_BYTES = 4096  # longest path on Linux
_ROW_GROUP_BYTES = 4 << 30  # about 100,000 covers


@dataclass(frozen=True)
class SourceFile:
    """One file, read part by part."""

    uri: str
    columns: set[str]
    """All columns; of JSON Lines, those of the lines read so far."""
    parts: Iterator[pa.Table]
    """The requested columns, without image bytes. Can be iterated once."""
    image_column: str | None = None
    """The column that can contain image bytes, if there is one."""
    image_type: pa.DataType | None = None
    """Type of the image column."""
    path_column: str | None = None
    """The column of `parts` with the paths of Hugging Face's {bytes, path}, if there is one."""
    null_images: int = 0
    """Rows without an image, according to the statistics in the file."""
    rows: int | None = None
    """Number of rows, if the file states it."""
    partitions: dict[str, str | None] = field(default_factory=dict)
    """Columns given by directory names, as in `split=train/part-0.parquet`: name -> value."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Optional columns without text -> what they contain; complete at the end of `parts`."""

    def names(self) -> set[str]:
        """All columns with those of directory names; none if the file is empty."""
        return self.columns | set(self.partitions) if self.columns else set()


def find_files(uri: str, format_: str) -> tuple[str, list[str]]:
    """(format, files in order) of a file, directory or pattern; the format is never "auto".

    In a directory, names that begin with `.` or `_` are skipped, as are files of other formats.
    """
    uri = storage.absolute(uri)
    is_pattern = any(character in uri for character in "*?[") and not storage.exists(uri)
    if not is_pattern and not storage.is_directory(uri):
        storage.size(uri)  # report a missing file before an unknown extension
        found = _format_of(uri) if format_ == "auto" else format_
        if found is None:
            raise CatalogError(
                f"{uri}: unknown format; known: {', '.join(EXTENSIONS)} (or --format){_hint(uri)}",
                code="unknown_format",
            )
        return found, [uri]
    folder, pattern = _pattern(uri) if is_pattern else (uri, re.compile(""))
    files = {
        file: kind
        for file in storage.list_files(folder)
        if (kind := _format_of(file)) and format_ in ("auto", kind)
        if _is_shown(path := file[len(folder.rstrip("/")) + 1 :]) and pattern.match(path)
    }
    if not files:
        wanted = ", ".join(e for e, kind in EXTENSIONS.items() if format_ in ("auto", kind))
        raise CatalogError(f"{uri}: no catalog files found; known: {wanted}", code="no_files")
    kinds = Counter(files.values())
    if len(kinds) > 1:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise CatalogError(
            f"{uri}: has files of several formats ({counted}); choose one with --format",
            code="mixed_formats",
        )
    return next(iter(kinds)), list(files)


def _format_of(uri: str) -> str | None:
    name = storage.name(uri).lower()
    text_name = name.removesuffix(".gz")
    for extension, kind in EXTENSIONS.items():
        if name.endswith(extension) or (kind != "parquet" and text_name.endswith(extension)):
            return kind
    return None


def _hint(uri: str) -> str:
    extensions = [end for end in _OTHER_EXTENSIONS if uri.lower().endswith(end)]
    return f"; {_OTHER_EXTENSIONS[extensions[0]]}" if extensions else ""


def partitions(uri: str) -> dict[str, str | None]:
    """Columns in the directory names of a path, `name=value`, as Hive, Spark and DuckDB write."""
    found = map(_PARTITION.fullmatch, uri.split("/")[:-1])
    values = {unquote(match[1]): unquote(match[2]) for match in found if match}
    return {name: None if v == _NULL_PARTITION else v for name, v in values.items()}


def _is_shown(path: str) -> bool:
    return not any(part.startswith((".", "_")) for part in path.split("/"))


def _pattern(uri: str) -> tuple[str, re.Pattern[str]]:
    """The directory above the first wildcard, and a regex for the paths below it."""
    parts = uri.split("/")
    start = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    regex = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|.", "/".join(parts[start:])):
        if token.startswith("[") and len(token) > 1:
            negated, members = token[1] == "!", re.escape(token[1:-1]).replace(r"\-", "-")
            regex += f"[^{members[1:]}]" if negated else f"[{members}]"
        else:
            wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
            regex += wild.get(token, re.escape(token))
    return "/".join(parts[:start]) or "/", re.compile(regex + r"\Z")


@contextlib.contextmanager
def _opened(uri: str, kind: str) -> Iterator[Any]:
    """The file, decompressed if its content is gzip; errors of Arrow become CatalogError."""
    with storage.open_input(uri) as file:
        try:
            start = file.read(6)
            file.seek(0)
            if kind == "parquet":
                yield file
            elif start.startswith(_GZIP):
                # Unlike Arrow's, it ignores zero padding at the end, as gzip and zcat do.
                with gzip.GzipFile(fileobj=file) as stream:
                    yield stream
            else:
                for magic, what in _NOT_TEXT.items():
                    if start.startswith(magic):
                        raise CatalogError(f"{uri}: not {kind} but {what}", code="other_format")
                yield file
        except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CatalogError(
                f"{uri}: cannot read as {kind}: {reason}", code="unreadable"
            ) from error


@contextlib.contextmanager
def _csv_rows(uri: str, stream: Any, kind: str) -> Iterator[Any]:
    """A strict csv.reader over `stream`, with the size limit of a row for each value."""
    limit = csv.field_size_limit(_ROW_BYTES)
    try:
        # surrogateescape keeps invalid bytes, so that their line can be reported.
        text = io.TextIOWrapper(
            io.BufferedReader(stream, 1 << 20), "utf-8-sig", "surrogateescape", newline=""
        )
        yield csv.reader(_lines(uri, text), delimiter=DELIMITERS[kind], strict=True)
    finally:
        csv.field_size_limit(limit)


def _lines(uri: str, file: Any) -> Iterator[Any]:
    """Lines of a text or binary file. Raises CatalogError if one is longer than _ROW_BYTES."""
    for number in itertools.count(1):
        line = file.readline(_ROW_BYTES + 1)
        if len(line) > _ROW_BYTES:
            raise CatalogError(
                f"{uri}, line {number}: longer than {_ROW_BYTES >> 20} MiB", code="row_too_long"
            )
        if not line:
            return
        yield line


def read_header(uri: str, kind: str) -> list[str]:
    """The column names of a CSV or TSV file; none if it is empty."""
    with _opened(uri, kind) as stream, _csv_rows(uri, stream, kind) as rows:
        try:
            header: list[str] = next((row for row in rows if row), [])
            "".join(header).encode()
        except UnicodeEncodeError as error:
            raise _not_utf8(uri, 1) from error
        except csv.Error as error:
            raise CatalogError(
                f"{uri}, line 1: not valid CSV: {error}", code="invalid_csv"
            ) from error
    return header


def _not_utf8(uri: str, line: int) -> CatalogError:
    return CatalogError(
        f"{uri}, line {line}: not UTF-8; save the file as UTF-8 "
        "(from Latin-1: iconv -f latin1 -t utf-8; from UTF-16: iconv -f utf-16 -t utf-8)",
        code="encoding",
    )


def read_delimited(uri: str, kind: str, wanted: Collection[str]) -> SourceFile:
    """Columns of a CSV or TSV file as text; empty cells are null."""
    header = read_header(uri, kind)
    _check_unique(uri, header, wanted)
    names = [name for name in header if name in wanted]
    parts = _delimited_parts(uri, kind, header, names) if header else iter(())
    return SourceFile(uri, set(header), parts)


def _check_unique(uri: str, columns: Sequence[str], wanted: Collection[str]) -> None:
    for name in wanted:
        if columns.count(name) > 1:
            raise CatalogError(
                f"{uri}: {columns.count(name)} columns are named {name!r}; rename or remove one",
                code="duplicate_column",
            )


def _delimited_parts(
    uri: str, kind: str, header: list[str], names: list[str]
) -> Iterator[pa.Table]:
    rows = 0
    counter = None
    for block_bytes in (_CSV_BLOCK_BYTES, _ROW_BYTES):
        # The second time, rows that were read before are skipped.
        before = rows
        read = 0
        with _opened(uri, kind) as stream:
            counter = _LineCounter(stream)
            try:
                for batch in _arrow_batches(counter, kind, header, names, block_bytes):
                    new = batch.slice(max(before - read, 0))
                    read += batch.num_rows
                    if new.num_rows:
                        rows += new.num_rows
                        yield pa.Table.from_batches([new]).select(names)
                break
            except pa.ArrowInvalid as error:
                is_too_long = "straddl" in str(error)  # a row that does not fit two blocks
                if is_too_long and block_bytes < _ROW_BYTES:
                    continue
                _check_delimited(uri, kind, names)  # finds the line, which Arrow does not report
                if is_too_long:
                    raise CatalogError(
                        f"{uri}: a row is longer than {_ROW_BYTES >> 20} MiB", code="row_too_long"
                    ) from error
                raise
    # With an unclosed quote, Arrow silently reads the lines up to the next quote as one value. If
    # there are more lines than rows, the file is checked again with a strict parser.
    if counter is not None and counter.lines > rows + 1:
        records = _check_delimited(uri, kind, names)
        if records != rows:
            raise CatalogError(
                f"{uri}: has {records:,} rows, but {rows:,} were read", code="lost_rows"
            )


def _arrow_batches(
    stream: "_LineCounter", kind: str, header: list[str], names: list[str], block_bytes: int
) -> Iterator[pa.RecordBatch]:
    yield from pa.csv.open_csv(
        stream,
        read_options=pa.csv.ReadOptions(block_size=block_bytes),
        parse_options=pa.csv.ParseOptions(delimiter=DELIMITERS[kind], newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            # Without any column Arrow would return all; the first one gives the number of rows.
            include_columns=names or header[:1],
            column_types=dict.fromkeys(names or header[:1], pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


class _LineCounter:
    """A binary stream for Arrow that counts lines.

    No block ends between CR and LF: Arrow (26) would lose the LF, also within quotes
    (https://github.com/apache/arrow/issues/51368).
    """

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._ends = 0
        self._held = b""
        self._last = b"\n"

    @property
    def lines(self) -> int:
        return self._ends + (self._last != b"\n")

    def read(self, size: int) -> bytes:
        data: bytes = self._held + self._stream.read(size - len(self._held))
        self._held = b""
        if data.endswith(b"\r") and len(data) > 1:
            data, self._held = data[:-1], data[-1:]
        self._ends += data.count(b"\n")
        self._last = data[-1:] or self._last
        return data


def _check_delimited(uri: str, kind: str, names: Sequence[str]) -> int:
    """Number of rows below the header, by a strict parser. Raises CatalogError with the line.

    names: columns whose values have to be UTF-8.
    """
    records = width = 0
    used: list[int] = []
    start = 1
    with _opened(uri, kind) as stream, _csv_rows(uri, stream, kind) as rows:
        try:
            for row in rows:
                if row:
                    if not width:
                        width = len(row)
                        used = [at for at, name in enumerate(row) if name in names]
                    if len(row) != width:
                        raise CatalogError(
                            f"{uri}, line {start}: {len(row)} columns, the header has {width}",
                            code="columns",
                        )
                    "".join([row[at] for at in used]).encode()
                    records += 1
                start = rows.line_num + 1
        except UnicodeEncodeError as error:
            raise _not_utf8(uri, start) from error
        except csv.Error as error:
            why = "a quote is not closed"
            if "limit" in str(error):
                why = f"a value is longer than {_ROW_BYTES:,} characters, or {why}"
            raise CatalogError(f"{uri}, line {start}: {why} ({error})", code="quote") from error
    return records - 1


def read_jsonl(
    uri: str,
    wanted: Collection[str],
    optional: Collection[str],
    lists: str,
    separator: str,
    own: Collection[str] = (),
) -> SourceFile:
    """Columns of a JSON Lines file as text; the column `lists` as lists, by splitting any text.

    optional: columns whose values are null if they are neither text nor a number.
    own: columns to add in their own types, with the prefix OWN. Lists, objects, and values of
    several types become JSON text.

    Not pyarrow.json: it guesses types (2020-01-01 becomes a date), does not report line numbers,
    and crashes on a line `null` (26.0).
    """
    source = SourceFile(uri, set(), iter(()))
    parts = _jsonl_parts(source, wanted, optional, lists, separator, own)
    return replace(source, parts=parts)


def _jsonl_parts(
    source: SourceFile,
    wanted: Collection[str],
    optional: Collection[str],
    lists: str,
    separator: str,
    own: Collection[str],
) -> Iterator[pa.Table]:
    uri = source.uri
    schema = pa.schema(
        [(name, pa.list_(pa.string()) if name == lists else pa.string()) for name in wanted]
    )
    cells: dict[str, list[Any]] = {name: [] for name in wanted}
    own_cells: dict[str, list[Any]] = {name: [] for name in own}

    def part() -> pa.Table:
        table = pa.table(cells, schema)
        for name, values in own_cells.items():
            table = table.append_column(f"{OWN}{name}", _json_array(values))
        for values in (*cells.values(), *own_cells.values()):
            values.clear()
        return table

    with _opened(uri, "jsonl") as stream:
        for number, line in enumerate(_lines(uri, io.BufferedReader(stream, 1 << 20)), 1):
            if line.isspace():
                continue
            used = {*wanted, *own}
            record = _json_object(uri, number, line, used, is_first=not source.columns)
            source.columns.update(record)
            for name, values in own_cells.items():
                values.append(record.get(name))
            for name, values in cells.items():
                value = record.get(name)
                if name == lists:
                    value = _json_names(uri, number, name, value, separator)
                elif value is not None and not isinstance(value, str):
                    if name in optional and not _is_number(value):
                        source.ignored[name] = _JSON_TYPES.get(type(value), "other values")
                        value = None
                    else:
                        value = _number_text(uri, number, name, value)
                values.append(value)
            if number % _CHUNK_ROWS == 0:
                yield part()
        yield part()


def _json_array(values: list[Any]) -> pa.Array:
    """Values of one simple type as that type; others as text or, if they are not text, as JSON."""
    types = {type(value) for value in values if value is not None}
    if not types:
        return pa.nulls(len(values))
    if types in ({str}, {bool}) or (types <= {int, float} and float in types):
        return pa.array(values, pa.float64() if float in types else None)
    if types == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pa.array(values, pa.int64())
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(texts, pa.string())


_JSON_TYPES = {list: "lists", dict: "objects", bool: "true and false"}


def _json_object(
    uri: str, number: int, line: bytes, wanted: Collection[str], *, is_first: bool
) -> dict[str, Any]:
    """The object on a line. Only the values of `wanted` have to be valid Unicode."""
    try:
        # surrogateescape: invalid bytes are allowed in values that are not used.
        text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        if is_first and re.match(r"\s*\[\s*(\{|\Z)", text):
            raise CatalogError(
                f"{uri}: is a JSON array; expected JSON Lines, one object per line:"
                " jq -c '.[]' FILE > FILE.jsonl",
                code="json_array",
            )
        if is_first and text.strip() == "{":
            raise CatalogError(
                f"{uri}, line {number}: an object over several lines; expected JSON Lines, one"
                " object per line: jq -c . FILE > FILE.jsonl",
                code="json_lines",
            )
        record = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CatalogError(
            f"{uri}, line {number}: not valid JSON: {error}", code="invalid_json"
        ) from error
    if not isinstance(record, dict):
        raise CatalogError(
            f"{uri}, line {number}: not a JSON object; expected one per line", code="not_an_object"
        )
    if not text.isascii() or "\\ud" in text.lower():
        for name in wanted:
            try:
                json.dumps(record.get(name), ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                if any("\udc80" <= character <= "\udcff" for character in text):
                    raise _not_utf8(uri, number) from error
                raise CatalogError(
                    f"{uri}, line {number}: not valid JSON: {name!r} contains half of a surrogate"
                    " pair",
                    code="invalid_json",
                ) from error
    return record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} occurs twice in an object")
    return record


def _json_names(
    uri: str, number: int, name: str, value: object, separator: str
) -> list[str | None] | None:
    if isinstance(value, str):
        try:
            return split_names(value, separator)
        except GenreTextError as error:
            raise CatalogError(f"{uri}, line {number}: {name!r}: {error}", code="genres") from error
    if value is None or _is_nan(value):
        return None
    if not isinstance(value, list):
        raise CatalogError(
            f"{uri}, line {number}: {name!r} is neither text nor a list of text", code="value_type"
        )
    names = [None if _is_nan(item) else item for item in value]
    for item in names:
        if not isinstance(item, str | None):
            raise CatalogError(
                f"{uri}, line {number}: {name!r} is neither text nor a list of text: it contains"
                f" {excerpt(str(item))}",
                code="value_type",
            )
    return names


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and value != value  # pandas' missing value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_text(uri: str, number: int, name: str, value: object) -> str | None:
    if not _is_number(value):
        raise CatalogError(
            f"{uri}, line {number}: {name!r} is neither text nor a number", code="value_type"
        )
    if _is_nan(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_parquet(
    uri: str, wanted: Collection[str], *, image: str, cover: str, image_is_set: bool
) -> SourceFile:
    """Columns of a Parquet file in their own types; UUIDs as text. Image bytes are not read.

    image: the column of image bytes. If it does not exist and the user did not name it, it is
    `cover` if that contains bytes that are not a path.
    """
    with _opened(uri, "parquet") as stream, parquet.opened(stream) as file:
        schema, metadata = file.schema_arrow, file.metadata
        uuids = _uuid_columns(file)
    _check_unique(uri, schema.names, [*wanted, image])
    image_name = image if image in schema.names else None
    is_free = image_name is None and not image_is_set and cover in schema.names
    if is_free and _holds_images(uri, schema.field(cover)):
        image_name = cover
    image_type = schema.field(image_name).type if image_name else None
    skipped = image_name if image_type is not None and holds_bytes(image_type) else None
    if skipped:
        _check_row_groups(uri, metadata)
    path_column = f"{image_name}.path" if image_type and _has_path(image_type) else None
    if path_column in schema.names:  # another column with that name
        path_column = None
    names = [name for name in schema.names if name in wanted and name != skipped]
    for name in [*names, image_name]:
        if name is not None:
            _check_extension(uri, schema.field(name))
    return SourceFile(
        uri,
        set(schema.names),
        _parquet_parts(uri, names, uuids & set(names), path_column),
        image_column=image_name,
        image_type=image_type,
        path_column=path_column,
        null_images=_null_images(metadata, image_name) if image_name else 0,
        rows=metadata.num_rows,
    )


def _parquet_parts(
    uri: str, names: list[str], uuids: set[str], path_column: str | None
) -> Iterator[pa.Table]:
    columns = [*names, *([path_column] if path_column else [])]
    with _opened(uri, "parquet") as stream, parquet.opened(stream) as file:
        for batch in file.iter_batches(_CHUNK_ROWS, columns=columns):
            batch.validate(full=True)  # text may contain invalid UTF-8
            table = pa.Table.from_batches([batch])
            for name in uuids:
                texts = [v and str(UUID(bytes=v)) for v in table[name].to_pylist()]
                at = table.column_names.index(name)
                table = table.set_column(at, name, pa.array(texts, pa.string()))
            if path_column:
                image = path_column.removesuffix(".path")
                path = pc.struct_field(table[image], "path")
                table = table.drop_columns([image]).append_column(path_column, path)
            yield table


def _uuid_columns(file: pq.ParquetFile) -> set[str]:
    """Columns of 16 bytes that are UUIDs by Parquet's logical type or Arrow's extension type."""
    columns = map(file.schema.column, range(len(file.schema)))
    found = {column.path for column in columns if column.logical_type.type == "UUID"}
    return found | {
        field.name for field in file.schema_arrow if parquet.extension_name(field) == "arrow.uuid"
    }


def _check_extension(uri: str, column: pa.Field) -> None:
    name = parquet.extension_name(column)
    if name is not None and name not in parquet.CANONICAL_EXTENSIONS:
        raise CatalogError(
            f"{uri}: the column {column.name!r} has the extension type {name}, which could run"
            " code; write it as plain text, numbers or bytes",
            code="extension_type",
        )


def _holds_images(uri: str, column: pa.Field) -> bool:
    """Whether the first value of a column is bytes that cannot be a path."""
    if not holds_bytes(column.type):
        return False
    if pa.types.is_struct(column.type):
        return True
    settings = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    with _opened(uri, "parquet") as stream, parquet.opened(stream, **settings) as file:
        for batch in file.iter_batches(64, columns=[column.name]):
            for value in batch.column(0).drop_null():
                data = value.as_py()
                try:
                    return len(data) > _PATH_BYTES or "\0" in data.decode()
                except UnicodeDecodeError:
                    return True
    return False


def _check_row_groups(uri: str, metadata: pq.FileMetaData) -> None:
    """Raises CatalogError if a row group is too large.

    Each task has to read the rows of a row group before its own.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if group.total_byte_size > _ROW_GROUP_BYTES:
            raise CatalogError(
                f"{uri}: a row group has {group.total_byte_size / 2**30:.1f} GiB, limit"
                f" {_ROW_GROUP_BYTES >> 30} GiB; write the file with smaller row groups"
                " (pyarrow and pandas: row_group_size=1000)",
                code="row_group_too_large",
            )


def holds_bytes(type_: pa.DataType) -> bool:
    """Whether the type is that of images: bytes, or Hugging Face's {bytes, path}."""
    if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        type_ = type_.field("bytes").type
        if pa.types.is_null(type_):  # no row has bytes
            return True
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _has_path(type_: pa.DataType) -> bool:
    return (
        pa.types.is_struct(type_)
        and type_.get_field_index("path") >= 0
        and type_.field("path").type in (pa.string(), pa.large_string())
    )


def _null_images(metadata: pq.FileMetaData, image: str) -> int:
    """Rows without an image, by the statistics in the file; 0 if there are none."""
    nulls = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in (image, f"{image}.bytes"):
                statistics = column.statistics
                nulls += (statistics and statistics.has_null_count and statistics.null_count) or 0
    return nulls
