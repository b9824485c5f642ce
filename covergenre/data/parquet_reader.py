"""Reads the columns of a Parquet file of a catalog, without its image bytes."""

from collections.abc import Collection, Iterator
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from covergenre.data.catalog_files import SourceFile, check_unique, opened
from covergenre.errors import CatalogError
from covergenre.io import parquet

_CHUNK_ROWS = 50_000
_BUFFER_BYTES = 8 * 2**20
_PATH_BYTES = 4096  # longest path on Linux
_ROW_GROUP_BYTES = 4 << 30  # about 100,000 covers


def read_parquet(
    uri: str, wanted: Collection[str], *, image: str, cover: str, image_is_set: bool
) -> SourceFile:
    """Columns of a Parquet file in their own types; UUIDs as text. Image bytes are not read.

    image: the column of image bytes. If it does not exist and the user did not name it, it is
    `cover` if that contains bytes that are not a path.
    """
    with opened(uri, "parquet") as stream, parquet.opened(stream) as file:
        schema, metadata = file.schema_arrow, file.metadata
        uuids = _uuid_columns(file)
    check_unique(uri, schema.names, [*wanted, image])
    image_name = image if image in schema.names else None
    is_free = image_name is None and not image_is_set and cover in schema.names
    if is_free and _holds_images(uri, schema.field(cover)):
        image_name = cover
    image_type = schema.field(image_name).type if image_name else None
    skipped = image_name if image_type is not None and holds_bytes(image_type) else None
    if skipped:
        _check_row_groups(uri, metadata)
    path_column = f"{image_name}.path" if image_type and _has_path(image_type) else None
    if path_column in schema.names:  # a column of this name
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
    with opened(uri, "parquet") as stream, parquet.opened(stream) as file:
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
    """Whether the first value of a column consists of bytes that cannot be a path."""
    if not holds_bytes(column.type):
        return False
    if pa.types.is_struct(column.type):
        return True
    settings = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    with opened(uri, "parquet") as stream, parquet.opened(stream, **settings) as file:
        for batch in file.iter_batches(64, columns=[column.name]):
            for value in batch.column(0).drop_null():
                data = value.as_py()
                try:
                    return len(data) > _PATH_BYTES or "\0" in data.decode()
                except UnicodeDecodeError:
                    return True
    return False


def _check_row_groups(uri: str, metadata: pq.FileMetaData) -> None:
    """Raises CatalogError for a large row group: a task reads it from its beginning."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if group.total_byte_size > _ROW_GROUP_BYTES:
            raise CatalogError(
                f"{uri}: a row group of {group.total_byte_size / 2**30:.1f} GiB, limit"
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
