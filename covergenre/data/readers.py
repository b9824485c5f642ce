"""Reads the columns of CSV, TSV and JSON Lines files of a catalog.

Values are returned unchanged; catalog.py interprets them. A malformed line is never skipped or
guessed, but raises CatalogError.
"""

import contextlib
import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.csv

from covergenre.data.catalog_files import SourceFile, check_unique, opened
from covergenre.errors import CatalogError
from covergenre.genre_text import GenreTextError, excerpt, split_names

OWN = "own:"
"""Prefix of the columns of a JSON Lines file in their own types."""
DELIMITERS = {"csv": ",", "tsv": "\t"}

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}

# Small, because blocks are read ahead. Files with longer rows are read in blocks of _ROW_BYTES.
_CSV_BLOCK_BYTES = 2**19
_ROW_BYTES = 2**25
"""Maximum size of a row of a text file."""
_CHUNK_ROWS = 50_000


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
    with opened(uri, kind) as stream, _csv_rows(uri, stream, kind) as rows:
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
    check_unique(uri, header, wanted)
    names = [name for name in header if name in wanted]
    parts = _delimited_parts(uri, kind, header, names) if header else iter(())
    return SourceFile(uri, set(header), parts)


def _delimited_parts(
    uri: str, kind: str, header: list[str], names: list[str]
) -> Iterator[pa.Table]:
    rows = 0
    counter = None
    for block_bytes in (_CSV_BLOCK_BYTES, _ROW_BYTES):
        # The second time, rows that were read before are skipped.
        before = rows
        read = 0
        with opened(uri, kind) as stream:
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
                f"{uri}: a strict parser finds {records:,} rows, but only {rows:,} were read; check"
                " the quoting (a quote is probably not closed)",
                code="lost_rows",
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
    with opened(uri, kind) as stream, _csv_rows(uri, stream, kind) as rows:
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

    with opened(uri, "jsonl") as stream:
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
                f"{uri}: a JSON array; expected JSON Lines, one object per line:"
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
                    f"{uri}, line {number}: not valid JSON: {name!r} has an unpaired surrogate",
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
            f"{uri}, line {number}: {name!r}: expected text or a list of text", code="value_type"
        )
    names = [None if _is_nan(item) else item for item in value]
    for item in names:
        if not isinstance(item, str | None):
            raise CatalogError(
                f"{uri}, line {number}: {name!r}: expected text or a list of text, found"
                f" {excerpt(str(item))} in the list",
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
            f"{uri}, line {number}: {name!r}: expected text or a number", code="value_type"
        )
    if _is_nan(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
