"""The files of a catalog: which they are, and the columns that each one holds.

A reader returns the wanted columns that a file has, unjudged: what they mean is catalog.py's
business. It raises CatalogError where a line would otherwise be lost or guessed at.
"""

import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from covergenre import parquet, storage
from covergenre.errors import CatalogError

EXTENSIONS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
DELIMITERS = {"csv": ",", "tsv": "\t"}

# A row of a CSV file may be as long as a block.
_CSV_BLOCK_BYTES = 2**19
_CHUNK_ROWS = 50_000
_ROW_GROUP_BYTES = 4 << 30  # 100,000 covers


@dataclass(frozen=True)
class SourceFile:
    """One file, and how to read it a part at a time."""

    uri: str
    columns: set[str]
    """Every column of the file; of JSON Lines those that were met, so all of them at the end."""
    parts: Iterator[pa.Table]
    """The wanted columns, without image bytes. Can be gone through once."""
    image_type: pa.DataType | None = None
    """Of the image column, if there is one."""
    null_images: int = 0
    """As far as the file's own statistics tell."""
    rows: int | None = None
    """Where the file itself says it."""


def find_files(uri: str, format_: str) -> tuple[str, list[str]]:
    """The format ("auto" made definite) and the files, in order, of a file, folder or pattern.

    Below a folder, names that begin with `.` or `_` are skipped, and files that are no catalog.
    """
    uri = storage.absolute(uri)
    is_pattern = any(character in uri for character in "*?[") and not storage.exists(uri)
    if not is_pattern and not storage.is_folder(uri):
        storage.size(uri)  # a missing file is told before its name is judged
        found = _format_of(uri) if format_ == "auto" else format_
        if found is None:
            raise CatalogError(
                f"{uri}: no known format; known: {', '.join(EXTENSIONS)} (or --format)"
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
        raise CatalogError(f"{uri}: no catalog file there; known: {wanted}")
    kinds = Counter(files.values())
    if len(kinds) > 1:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise CatalogError(f"{uri} mixes formats ({counted}); name the one to read with --format")
    return next(iter(kinds)), list(files)


def _format_of(uri: str) -> str | None:
    name = storage.name(uri).lower()
    text_name = name.removesuffix(".gz")
    for extension, kind in EXTENSIONS.items():
        if name.endswith(extension) or (kind != "parquet" and text_name.endswith(extension)):
            return kind
    return None


def _is_shown(path: str) -> bool:
    return not any(part.startswith((".", "_")) for part in path.split("/"))


def _pattern(uri: str) -> tuple[str, re.Pattern[str]]:
    """The folder that a pattern starts from, and a regex for the paths below that folder."""
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
def _opened(uri: str, kind: str) -> Iterator[pa.NativeFile]:
    """The file, unpacked if it is .gz; what Arrow raises inside becomes one line."""
    with storage.open_input(uri) as file:
        try:
            if uri.lower().endswith(".gz"):
                with pa.CompressedInputStream(file, "gzip") as stream:
                    yield stream
            else:
                yield file
        except (pa.ArrowException, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CatalogError(f"{uri}: not readable as {kind}: {reason}") from error


def read_header(uri: str, kind: str) -> list[str]:
    """The column names of a CSV or TSV file; none where it is empty."""
    with _opened(uri, kind) as stream:
        rows = csv.reader(_text(stream), delimiter=DELIMITERS[kind], strict=True)
        try:
            header = next((row for row in rows if row), [])
            "".join(header).encode()
        except UnicodeEncodeError as error:
            raise _not_utf8(uri, 1) from error
        except csv.Error as error:
            raise CatalogError(f"{uri}, line 1: not valid CSV: {error}") from error
    return header


def _text(stream: pa.NativeFile) -> io.TextIOWrapper:
    # surrogateescape lets a bad byte through, so that its line can be told.
    return io.TextIOWrapper(
        io.BufferedReader(stream, 1 << 20), "utf-8-sig", "surrogateescape", newline=""
    )


def _not_utf8(uri: str, line: int) -> CatalogError:
    return CatalogError(
        f"{uri}, line {line}: not UTF-8; save the file as UTF-8 "
        "(from Latin-1: iconv -f latin1 -t utf-8; from UTF-16: iconv -f utf-16 -t utf-8)"
    )


def read_delimited(uri: str, kind: str, wanted: Collection[str]) -> SourceFile:
    """Columns of a CSV or TSV file, all as text, an empty cell as null."""
    header = read_header(uri, kind)
    names = [name for name in dict.fromkeys(header) if name in wanted]
    for name in names:
        if header.count(name) > 1:
            raise CatalogError(f"{uri}: {header.count(name)} columns are named {name!r}")
    parts = _delimited_parts(uri, kind, header, names) if header else iter(())
    return SourceFile(uri, set(header), parts)


def _delimited_parts(
    uri: str, kind: str, header: list[str], names: list[str]
) -> Iterator[pa.Table]:
    options = {
        "read_options": pa.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        "parse_options": pa.csv.ParseOptions(delimiter=DELIMITERS[kind], newlines_in_values=True),
        "convert_options": pa.csv.ConvertOptions(
            # With no column wanted Arrow would give all: the first one stands in for the count.
            include_columns=names or header[:1],
            column_types=dict.fromkeys(names or header[:1], pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    }
    rows = 0
    with _opened(uri, kind) as stream:
        counter = _LineCounter(stream)
        try:
            for batch in pa.csv.open_csv(counter, **options):
                rows += batch.num_rows
                yield pa.Table.from_batches([batch]).select(names)
        except pa.ArrowInvalid:
            _check_delimited(uri, kind)  # says the line, which Arrow does not know
            raise
    # A quote that is opened and not closed makes Arrow swallow the lines up to the next one, in
    # silence. Only a value of several lines can hide that, and such a file is looked at closely.
    if counter.lines > rows + 1:
        records = _check_delimited(uri, kind)
        if records != rows:
            raise CatalogError(f"{uri}: {records:,} rows are there, {rows:,} were read")


class _LineCounter:
    """A stream of bytes for Arrow that counts the lines that pass."""

    closed = False

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self._ends = 0
        self._last = b"\n"

    @property
    def lines(self) -> int:
        return self._ends + (self._last != b"\n")

    def read(self, size: int | None = None) -> bytes:
        data: bytes = self._stream.read(size)
        self._ends += data.count(b"\n")
        self._last = data[-1:] or self._last
        return data


def _check_delimited(uri: str, kind: str) -> int:
    """Rows below the header, read slowly and strictly. Raises CatalogError naming a bad line."""
    records = width = 0
    start = 1
    with _opened(uri, kind) as stream:
        rows = csv.reader(_text(stream), delimiter=DELIMITERS[kind], strict=True)
        try:
            for row in rows:
                if row:
                    width = width or len(row)
                    if len(row) != width:
                        raise CatalogError(
                            f"{uri}, line {start}: {len(row)} columns, the header has {width}"
                        )
                    "".join(row).encode()
                    records += 1
                start = rows.line_num + 1
        except UnicodeEncodeError as error:
            raise _not_utf8(uri, start) from error
        except csv.Error as error:
            raise CatalogError(
                f"{uri}, line {start}: a quote is opened and not closed well, or a value is too"
                f" long ({error})"
            ) from error
    return records - 1


def read_jsonl(uri: str, wanted: Collection[str], lists: str, separator: str) -> SourceFile:
    """Columns of a JSON Lines file, as text; `lists` as lists of text, split where it is text.

    Line by line: pyarrow.json guesses types (text like 2020-01-01 becomes a date), does not know
    line numbers, and crashes the process on a line `null` (26.0).
    """
    columns: set[str] = set()
    return SourceFile(uri, columns, _jsonl_parts(uri, wanted, lists, separator, columns))


def _jsonl_parts(
    uri: str, wanted: Collection[str], lists: str, separator: str, columns: set[str]
) -> Iterator[pa.Table]:
    schema = pa.schema(
        [(name, pa.list_(pa.string()) if name == lists else pa.string()) for name in wanted]
    )
    cells: dict[str, list[Any]] = {name: [] for name in wanted}

    def part() -> pa.Table:
        table = pa.table(cells, schema)
        for values in cells.values():
            values.clear()
        return table

    with _opened(uri, "jsonl") as stream:
        for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):
            if line.isspace():
                continue
            record = _json_object(uri, number, line)
            columns.update(record)
            for name, values in cells.items():
                value = record.get(name)
                if name == lists:
                    value = value.split(separator) if isinstance(value, str) else value
                    if value is not None and not _is_text_list(value):
                        raise CatalogError(
                            f"{uri}, line {number}: {name!r} is neither text nor a list of texts"
                        )
                elif value is not None and not isinstance(value, str):
                    value = _number_text(uri, number, name, value)
                values.append(value)
            if number % _CHUNK_ROWS == 0:
                yield part()
        yield part()


def _json_object(uri: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        if b"\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeDecodeError as error:
        raise _not_utf8(uri, number) from error
    except (ValueError, RecursionError) as error:
        raise CatalogError(f"{uri}, line {number}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise CatalogError(f"{uri}, line {number}: no JSON object; one on each line is expected")
    return record


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str | None) for item in value)


def _number_text(uri: str, number: int, name: str, value: object) -> str | None:
    if isinstance(value, float):
        if value != value:
            return None  # pandas writes a missing number as NaN
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise CatalogError(f"{uri}, line {number}: {name!r} is neither text nor a number")


def read_parquet(uri: str, wanted: Collection[str], image: str) -> SourceFile:
    """Columns of a Parquet file as they are. The bytes of its `image` column are not read."""
    with _opened(uri, "parquet") as stream, parquet.opened(uri, stream) as file:
        schema, metadata = file.schema_arrow, file.metadata
    image_type = schema.field(image).type if image in schema.names else None
    skipped = image if image_type is not None and holds_bytes(image_type) else None
    if skipped:
        _check_row_groups(uri, metadata)
    names = [name for name in schema.names if name in wanted and name != skipped]
    return SourceFile(
        uri,
        set(schema.names),
        _parquet_parts(uri, names),
        image_type,
        _null_images(metadata, image),
        metadata.num_rows,
    )


def _parquet_parts(uri: str, names: list[str]) -> Iterator[pa.Table]:
    with _opened(uri, "parquet") as stream, parquet.opened(uri, stream) as file:
        for batch in file.iter_batches(_CHUNK_ROWS, columns=names):
            yield pa.Table.from_batches([batch])


def _check_row_groups(uri: str, metadata: pq.FileMetaData) -> None:
    """Parquet can only be entered at a row group: each task passes over those rows before its own.

    Raises CatalogError where that is too much to pass over.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if group.total_byte_size > _ROW_GROUP_BYTES:
            raise CatalogError(
                f"{uri}: a row group has {group.total_byte_size / 2**30:.1f} GiB, limit"
                f" {_ROW_GROUP_BYTES >> 30} GiB; write the file again with smaller ones"
                " (pyarrow and pandas: row_group_size=1000)"
            )


def holds_bytes(type_: pa.DataType) -> bool:
    """Whether a column of this type can hold images: bytes, or HuggingFace's {bytes, path}."""
    if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        type_ = type_.field("bytes").type
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _null_images(metadata: pq.FileMetaData, image: str) -> int:
    """Rows whose image is null, by the statistics of the file; 0 where it has none."""
    nulls = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in (image, f"{image}.bytes"):
                statistics = column.statistics
                nulls += (statistics and statistics.has_null_count and statistics.null_count) or 0
    return nulls
