"""Local paths and s3:// alike: the one place that makes a filesystem.

Few verbs, because S3 has few: open, list, put atomically, put if absent, delete. There is no
rename. A reader never sees half an object: local puts go through a temporary name in the same
folder, S3 shows an object only when its upload is complete.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlparse

import pyarrow as pa
from pyarrow import fs

from covergenre import s3
from covergenre.addresses import redacted
from covergenre.errors import StorageError

_PIECE_BYTES = 8 * 2**20
_TEMPORARY = ".covergenre-writing-"
"""How the name of a half-written local file begins; the dot keeps it out of listings by pattern."""


def is_uri(text: str) -> bool:
    """Whether `text` has a scheme, as s3://bucket/key has."""
    return "://" in text


def absolute(uri: str) -> str:
    """`uri` as a path or URI that means the same in every process of this host.

    Raises StorageError for a URI that names no bucket: as a path it would be a folder `s3:`.
    """
    if uri.startswith("file://"):
        uri = unquote(urlparse(uri).path)
    if re.match(r"s3:(/[^/]|/*$)", uri):
        raise StorageError(f"{uri}: names no bucket; write s3://bucket/prefix")
    return uri.rstrip("/") if is_uri(uri) else os.path.abspath(os.path.expanduser(uri))


def join(base: str, *parts: str) -> str:
    """`base/part/...`; a part that is itself absolute or a URI replaces what is before it."""
    for part in parts:
        base = part if is_uri(part) or part.startswith("/") else f"{base.rstrip('/')}/{part}"
    return base


def parent(uri: str) -> str:
    """The folder that holds `uri`."""
    folder, slash, _ = uri.rstrip("/").rpartition("/")
    return folder or slash


def name(uri: str) -> str:
    """The last part of `uri`."""
    return uri.rstrip("/").rpartition("/")[2]


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The Arrow filesystem of `uri` and the path in it. Raises StorageError for other schemes."""
    if not is_uri(uri) or uri.startswith("file://"):
        return _local(), absolute(uri)
    if uri.startswith("s3://"):
        path = uri.removeprefix("s3://").rstrip("/")
        bucket = path.partition("/")[0]
        try:
            s3.check(bucket)
        except OSError as error:
            raise StorageError(f"{redacted(f's3://{bucket}')}: {error}") from error
        return s3.filesystem(), path
    scheme = uri.partition("://")[0]
    raise StorageError(f"{redacted(uri)}: no storage for {scheme}://; use a local path or s3://")


@lru_cache(maxsize=1)
def _local() -> fs.LocalFileSystem:
    return fs.LocalFileSystem()


@contextlib.contextmanager
def named(uri: str, verb: str) -> Iterator[None]:
    """Turn what a filesystem raises into one line that names the place."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{redacted(uri)}: no such file or folder") from error
    except (OSError, pa.ArrowException, UnicodeError) as error:
        reason, *_ = str(getattr(error, "strerror", None) or error or repr(error)).splitlines()
        raise StorageError(f"{redacted(uri)}: cannot {verb}: {reason}") from error


def exists(uri: str) -> bool:
    """Whether `uri` is a file or a folder (on S3: a key or a prefix of keys)."""
    return bool(_type(uri) != fs.FileType.NotFound)


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder (on S3: a prefix of keys)."""
    return bool(_type(uri) == fs.FileType.Directory)


def _type(uri: str) -> fs.FileType:
    system, path = filesystem(uri)
    with named(uri, "read"):
        return system.get_file_info(path).type


def size(uri: str) -> int:
    """Bytes of the file `uri`. Raises StorageError where it is not a file."""
    return stamp(uri)[0]


def stamp(uri: str) -> tuple[int, int]:
    """(bytes, time of change in ns) of the file `uri`: another stamp is another content.

    Raises StorageError where it is not a file.
    """
    system, path = filesystem(uri)
    with named(uri, "read"):
        info = system.get_file_info(path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(uri)
    return int(info.size), int(info.mtime_ns)


def open_input(uri: str) -> pa.NativeFile:
    """`uri` opened for reading at any place. Raises StorageError where it cannot be."""
    system, path = filesystem(uri)
    with named(uri, "read"):
        return system.open_input_file(path)


def read_bytes(uri: str) -> bytes:
    """All bytes of the file `uri`."""
    system, path = filesystem(uri)
    if not isinstance(system, fs.LocalFileSystem):
        with named(uri, "read"):
            return s3.read(path)
    with open_input(uri) as file, named(uri, "read"):
        return bytes(file.read())


def read_json(uri: str) -> Any:
    """The JSON value in the file `uri`. Raises StorageError where it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{redacted(uri)}: not valid JSON: {error}") from error


def list_files(uri: str) -> list[str]:
    """Every file below the folder `uri`, sorted. Raises StorageError where there is no such."""
    system, path = filesystem(uri)
    with named(uri, "list"):
        found = system.get_file_info(fs.FileSelector(path, recursive=True))
    prefix = "s3://" if uri.startswith("s3://") else ""
    return sorted(prefix + info.path for info in found if _is_whole_file(info))


def list_sizes(uri: str) -> dict[str, int]:
    """Path below the folder `uri` -> bytes, of every file; empty where there is no such folder.

    Neither here nor in `list_files` is what a killed `put` left behind.
    """
    system, path = filesystem(uri)
    with named(uri, "list"):
        found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return {
        info.path[len(path) + 1 :]: int(info.size)
        for info in sorted(found, key=lambda info: str(info.path))
        if _is_whole_file(info)
    }


def _is_whole_file(info: fs.FileInfo) -> bool:
    return bool(info.type == fs.FileType.File and not info.base_name.startswith(_TEMPORARY))


def put(uri: str, data: bytes | pa.Buffer) -> None:
    """Write `data` to `uri` so that a reader sees the old object or all of the new one."""
    system, path = filesystem(uri)
    with named(uri, "write"):
        if isinstance(system, fs.LocalFileSystem):
            _put_local(Path(path), data, overwrite=True)
        else:
            s3.write(path, [data])


def put_file(uri: str, file: Path) -> None:
    """Copy the local `file` to `uri`, atomically and a piece at a time."""
    system, path = filesystem(uri)
    with named(uri, "write"), file.open("rb") as source:
        if isinstance(system, fs.LocalFileSystem):
            _put_local(Path(path), source, overwrite=True)
        else:
            s3.write(path, iter(lambda: source.read(_PIECE_BYTES), b""))


def get_file(uri: str, file: Path) -> None:
    """Copy `uri` to the local `file`, a piece at a time."""
    with open_input(uri) as source, named(str(file), "write"), file.open("wb") as sink:
        while piece := _read_piece(uri, source):
            sink.write(piece)


def _read_piece(uri: str, source: pa.NativeFile) -> bytes:
    with named(uri, "read"):
        return bytes(source.read(_PIECE_BYTES))


def put_json(uri: str, value: Any) -> None:
    """Write `value` to `uri` as indented JSON, atomically."""
    put(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write `data` to `uri` unless it exists. Whether this call wrote it: one caller wins."""
    system, path = filesystem(uri)
    with named(uri, "write"):
        if isinstance(system, fs.LocalFileSystem):
            return _put_local(Path(path), data, overwrite=False)
        return s3.write_if_absent(path, data)


def _put_local(path: Path, data: bytes | pa.Buffer | BinaryIO, *, overwrite: bool) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(data, bytes | pa.Buffer):
                file.write(data)
            else:
                shutil.copyfileobj(data, file, _PIECE_BYTES)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if overwrite:
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)  # unlike replace, a link fails where the name is taken
        except FileExistsError:
            return False
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@lru_cache(maxsize=1)
def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def delete_file(uri: str) -> None:
    """Delete the file `uri`; nothing happens where there is none."""
    system, path = filesystem(uri)
    with named(uri, "delete"), contextlib.suppress(FileNotFoundError):
        system.delete_file(path)


def delete_folder(uri: str) -> None:
    """Delete the folder `uri` and all below it; nothing happens where there is none."""
    system, path = filesystem(uri)
    with named(uri, "delete"), contextlib.suppress(FileNotFoundError):
        system.delete_dir(path)
