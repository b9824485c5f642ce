"""Arrow IPC files of internal state, in batches of a fixed number of rows.

Not Parquet, which tools that read a whole output directory would take for results.
"""

from functools import lru_cache

import pyarrow as pa

from covergenre.errors import StorageError
from covergenre.io import storage

_MAGIC = b"ARROW1"
_TAIL_BYTES = 4 + len(_MAGIC)  # the footer's length, and _MAGIC


def options() -> pa.ipc.IpcWriteOptions:
    """Settings for writing these files."""
    return pa.ipc.IpcWriteOptions(compression="zstd")


def to_arrow_file(table: pa.Table, batch_rows: int) -> pa.Buffer:
    """`table` as an IPC file; each batch but the last has `batch_rows` rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=options()) as writer:
        writer.write_table(table.combine_chunks(), batch_rows)
    return sink.getvalue()


def read_batches(uri: str, first: int, last: int) -> pa.Table:
    """Batches `first` to `last`, inclusive, as one table."""
    with storage.translate_errors(uri, "read as Arrow IPC"):
        file = _open(uri, storage.stat(uri))
        batches = [file.get_batch(number) for number in range(first, last + 1)]
        for batch in batches:
            batch.validate(full=True)
        return pa.Table.from_batches(batches, file.schema)


def read_rows(uri: str, start: int, stop: int, batch_rows: int) -> pa.Table:
    """Rows `start` to `stop` of a file that was written with `batch_rows`."""
    first = start // batch_rows
    table = read_batches(uri, first, (stop - 1) // batch_rows)
    return table.slice(start - first * batch_rows, stop - start)


@lru_cache(maxsize=16)
def _open(uri: str, stat: storage.FileStat) -> pa.ipc.RecordBatchFileReader:
    # A worker reads many ranges of one file; its footer is read again only if the file changes.
    file = storage.open_input(uri)
    _check_no_extension(uri, file)
    return pa.ipc.open_file(file)


def _check_no_extension(uri: str, file: pa.NativeFile) -> None:
    """Raises StorageError for extension types: Arrow would run Python code registered for them."""
    size = file.size()
    file.seek(max(size - _TAIL_BYTES, 0))
    length = int.from_bytes(file.read(4), "little")
    if file.read() != _MAGIC or not 0 < length <= size - _TAIL_BYTES:
        raise pa.ArrowInvalid("not an Arrow IPC file, or truncated")
    file.seek(size - _TAIL_BYTES - length)
    if b"ARROW:extension:name" in file.read(length):
        raise StorageError(
            f"{uri}: has a column of an extension type; the file was not written by covergenre;"
            " delete it and run the command again",
            code="extension_type",
        )
