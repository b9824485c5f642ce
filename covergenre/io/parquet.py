"""Reads untrusted Parquet files without running code that they refer to."""

import base64
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_EXTENSION = b"ARROW:extension:name"
_EXTENSION_IGNORED = b"arrow.extension.name"  # same length; Arrow ignores it

_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # length of the footer, then _MAGIC
# The footer's entry for Arrow's schema, in Thrift's compact protocol: key, type and length, base64.
_ARROW_SCHEMA = re.compile(rb"(ARROW:schema\x18[\x80-\xff]*[\x00-\x7f])([A-Za-z0-9+/=]*)")

# https://arrow.apache.org/docs/format/CanonicalExtensions.html
CANONICAL_EXTENSIONS = {
    *("arrow.json", "arrow.uuid", "arrow.bool8", "arrow.opaque", "arrow.timestamp_with_offset"),
    *("arrow.fixed_shape_tensor", "arrow.variable_shape_tensor", "arrow.parquet.variant"),
}


def opened(file: pa.NativeFile, **settings: Any) -> pq.ParquetFile:
    """`file` opened as Parquet; columns of extension types have their storage types.

    Arrow would call the Python code that is registered for an extension type; that of Ray's types
    unpickles data in the file. settings: those of pq.ParquetFile.
    """
    return pq.ParquetFile(
        file, metadata=_without_extensions(file), arrow_extensions_enabled=False, **settings
    )


def extension_name(field: pa.Field) -> str | None:
    """The original extension type of a field of an `opened` file, if any."""
    name: bytes | None = (field.metadata or {}).get(_EXTENSION_IGNORED)
    return name.decode(errors="replace") if name is not None else None


def _without_extensions(file: pa.NativeFile) -> pq.FileMetaData:
    """The footer, with the key that marks extension types replaced in its Arrow schema.

    The bytes of the footer are changed, because Arrow instantiates the types when it parses them.
    """
    size = file.size()
    file.seek(max(size - _TAIL_BYTES, 0))
    length = int.from_bytes(file.read(4), "little")
    if length + _TAIL_BYTES > size or file.read() != _MAGIC:
        file.seek(0)
        return pq.read_metadata(file)  # raises the reason
    file.seek(size - _TAIL_BYTES - length)
    footer, schemas = _ARROW_SCHEMA.subn(_ignore_extensions, file.read())
    if schemas != footer.count(b"ARROW:schema"):
        raise pa.ArrowInvalid("an Arrow schema in the footer cannot be read")
    return pq.read_metadata(pa.BufferReader(_MAGIC + footer))


def _ignore_extensions(found: re.Match[bytes]) -> bytes:
    schema = base64.b64decode(found[2]).replace(_EXTENSION, _EXTENSION_IGNORED)
    return found[1] + base64.b64encode(schema)
