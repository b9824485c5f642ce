"""Parquet files, opened with care: some come from outside."""

import base64
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covergenre.errors import StorageError

_EXTENSION = b"ARROW:extension:name"


def opened(uri: str, file: pa.NativeFile, **settings: Any) -> pq.ParquetFile:
    """`file`, which is that of `uri`, as Parquet; settings: pq.ParquetFile's.

    Raises StorageError where a column has an extension type: to read one is to run the code that
    is registered for it, and Ray's own unpickle what they find in the file.
    """
    # The file's metadata alone: the Arrow schema in it is not yet made.
    metadata = pq.read_metadata(file)
    schema = (metadata.metadata or {}).get(b"ARROW:schema", b"")
    if _EXTENSION in base64.b64decode(schema):
        raise StorageError(
            f"{uri}: a column has an extension type, which could run code; write the file again"
            " with plain columns (text, numbers, bytes)"
        )
    return pq.ParquetFile(file, metadata=metadata, **settings)
