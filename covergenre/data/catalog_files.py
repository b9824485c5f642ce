"""The files of a catalog: finding them, their formats, and opening them."""

import contextlib
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from covergenre.errors import CatalogError
from covergenre.io import storage

EXTENSIONS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
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


@dataclass(frozen=True)
class SourceFile:
    """One file, read part by part."""

    uri: str
    columns: set[str]
    """All columns; of JSON Lines, those of the lines read so far."""
    parts: Iterator[pa.Table]
    """Tables of the requested columns, without image bytes. Can be iterated once."""
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
        """All columns, including those of directory names; empty if the file is."""
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
            f"{uri}: files of several formats ({counted}); choose one with --format",
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
def opened(uri: str, kind: str) -> Iterator[Any]:
    """The file, decompressed if it is gzip; errors of reading it become CatalogError."""
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


def check_unique(uri: str, columns: Sequence[str], wanted: Collection[str]) -> None:
    """Raises CatalogError if several columns have one of the names `wanted`."""
    for name in wanted:
        if columns.count(name) > 1:
            raise CatalogError(
                f"{uri}: {columns.count(name)} columns are named {name!r}; rename or remove one",
                code="duplicate_column",
            )
