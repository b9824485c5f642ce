"""Files on local disks and on S3, through one set of functions.

Every function takes a local path or a URI (s3://bucket/key) as text, or a local pathlib.Path, and
raises StorageError with one line that begins with it. Writes are atomic: a reader sees the old file
or the complete new one. A local file is written under a temporary name in the same directory and
then moved; an S3 object appears when its upload is complete. There is no rename: S3 has none.
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
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFMT, S_IFSOCK, S_ISREG
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from covergenre.errors import StorageError
from covergenre.io import s3, s3_filesystem
from covergenre.io.s3_errors import S3Error, S3UnavailableError
from covergenre.io.urls import PathOrUri, redacted

_CHUNK_BYTES = 8 * 2**20
_TEMPORARY_PREFIX = ".covergenre-writing-"
"""Prefix of unfinished local files; globs skip names that begin with a dot."""

ABSOLUTE = r"(?i)^(/|data:|file:/|[a-z][a-z0-9+.-]+://)"
"""Matches absolute paths and URIs. A scheme has two letters or more: `C:/` is a Windows drive."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_FILE_URI = re.compile(r"file:(?://([^/]*))?(/.*)?\Z", re.IGNORECASE | re.DOTALL)
_S3_SCHEMES = ("s3", "s3a", "s3n")
"""s3a and s3n are Hadoop's names for S3."""


# Paths and URIs


def is_uri(path: PathOrUri) -> bool:
    """Whether `path` has a scheme, as s3://bucket/key has."""
    return _SCHEME.match(os.fspath(path)) is not None


def scheme(uri: PathOrUri) -> str:
    """The scheme of `uri` in lower case: "" for a path, "s3" also for s3a:// and s3n://."""
    uri = os.fspath(uri)
    if uri[:6].lower() == "file:/":
        return "file"
    match = _SCHEME.match(uri)
    found = match[1].lower() if match else ""
    return "s3" if found in _S3_SCHEMES else found


def absolute(uri: PathOrUri) -> str:
    """`uri` as text that does not depend on the working directory.

    A relative path and a file: URI become absolute paths; schemes are written in lower case, and
    s3a:// and s3n:// as s3://. Raises StorageError for an S3 URI without a bucket: as a path it
    would be a directory named `s3:`.
    """
    uri = os.fspath(uri)
    if re.match(r"(?i)s3[an]?:(/[^/]|/*$)", uri):
        raise StorageError(
            f"{uri}: no bucket; write s3://BUCKET/PREFIX as a str (pathlib.Path drops a slash)",
            code="invalid_uri",
        )
    found = scheme(uri)
    if found == "file":
        uri = _path_of_file_uri(uri)
    elif found:
        return f"{found}://{uri.partition('://')[2]}".rstrip("/")
    return os.path.abspath(os.path.expanduser(uri))


def _path_of_file_uri(uri: str) -> str:
    match = _FILE_URI.match(uri)
    if match is None or not match[2] or (match[1] or "localhost").lower() != "localhost":
        raise StorageError(
            f"{redacted(uri)}: not a file on this machine; write file:///directory/file",
            code="invalid_uri",
        )
    return unquote(match[2])


def check_scheme(uri: PathOrUri) -> None:
    """Raises StorageError if URIs with the scheme of `uri` are not supported."""
    found = scheme(uri)
    if found in ("", "file", "s3"):
        return
    advice = "use a local path or s3://"
    if found in ("http", "https"):
        advice = "download it first, and use a local path or s3://"
    raise StorageError(
        f"{redacted(uri)}: {found}:// is not supported; {advice}", code="unsupported_scheme"
    )


def join(base: PathOrUri, *parts: PathOrUri) -> str:
    """`base/part/...`; a part that is an absolute path or a URI replaces everything before it."""
    joined = os.fspath(base)
    for part in parts:
        text = os.fspath(part)
        joined = text if re.match(ABSOLUTE, text) else f"{joined.rstrip('/')}/{text}"
    return joined


def parent(uri: PathOrUri) -> str:
    """The directory that contains `uri`."""
    directory, slash, _ = os.fspath(uri).rstrip("/").rpartition("/")
    return directory or slash


def name(uri: PathOrUri) -> str:
    """The last component of `uri`."""
    return os.fspath(uri).rstrip("/").rpartition("/")[2]


def filesystem(uri: PathOrUri) -> tuple[fs.FileSystem, str]:
    """The Arrow filesystem for `uri` and the path in it.

    Raises StorageError for unsupported schemes and for a bucket that cannot be reached.
    """
    check_scheme(uri)
    if scheme(uri) != "s3":
        return _local_filesystem(), absolute(uri)
    path = os.fspath(uri).partition("://")[2].rstrip("/")
    bucket = path.partition("/")[0]
    try:
        s3.require_available(bucket)
    except S3UnavailableError as error:
        uri = redacted(f"s3://{bucket}")
        raise StorageError(f"{uri}: {error}", code=error.code) from error
    return s3_filesystem.filesystem(), path


@lru_cache(maxsize=1)
def _local_filesystem() -> fs.LocalFileSystem:
    return fs.LocalFileSystem()


@contextlib.contextmanager
def translate_errors(uri: PathOrUri, verb: str) -> Iterator[None]:
    """Raise what a filesystem raises as a StorageError: `URI: cannot VERB: reason`."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"{redacted(uri)}: no such file or directory", code="not_found"
        ) from error
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: NUL or a lone surrogate
        reason, *_ = str(getattr(error, "strerror", None) or error or repr(error)).splitlines()
        code = error.code if isinstance(error, S3Error) else ""
        raise StorageError(f"{redacted(uri)}: cannot {verb}: {reason}", code=code) from error


# Reading and listing


def exists(uri: PathOrUri) -> bool:
    """Whether `uri` is a file or a directory (on S3: a key or a prefix of keys)."""
    return bool(_type(uri) != fs.FileType.NotFound)


def is_directory(uri: PathOrUri) -> bool:
    """Whether `uri` is a directory (on S3: a prefix of keys)."""
    return bool(_type(uri) == fs.FileType.Directory)


def _type(uri: PathOrUri) -> fs.FileType:
    system, path = filesystem(uri)
    with translate_errors(uri, "read"):
        return system.get_file_info(path).type


class FileStat(NamedTuple):
    """Size and mtime of a file; while they do not change, neither does its content."""

    size: int
    """In bytes."""
    mtime_ns: int


def stat(uri: PathOrUri) -> FileStat:
    """Size and mtime of the file `uri`. Raises StorageError if it is not a file."""
    system, path = filesystem(uri)
    with translate_errors(uri, "read"):
        info = system.get_file_info(path)
        if info.type == fs.FileType.Unknown:
            _check_regular(path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(uri)
    return FileStat(int(info.size), int(info.mtime_ns))


def size(uri: PathOrUri) -> int:
    """Bytes of the file `uri`. Raises StorageError if it is not a file."""
    return stat(uri).size


def open_input(uri: PathOrUri) -> pa.NativeFile:
    """The file `uri`, opened for random access.

    Raises StorageError, also for local files that are not regular ones: opening a pipe would wait
    for its writer, and opening a device can have side effects.
    """
    system, path = filesystem(uri)
    with translate_errors(uri, "read"):
        if isinstance(system, fs.LocalFileSystem):
            _check_regular(path)
        return system.open_input_file(path)


def _check_regular(path: str) -> None:
    """Raises OSError if the local `path`, symbolic links followed, is not a regular file."""
    mode = os.stat(path.encode()).st_mode  # UTF-8, as Arrow encodes paths
    if S_ISREG(mode) or path == os.devnull:  # the usual name of an empty file
        return
    kinds = {
        S_IFDIR: "a directory",
        S_IFIFO: "a pipe",
        S_IFSOCK: "a socket",
        S_IFCHR: "a device",
        S_IFBLK: "a device",
    }
    kind = kinds.get(S_IFMT(mode), "a special file")
    advice = "; write its output to a file and give that" if kind == "a pipe" else ""
    raise OSError(f"it is {kind}, not a regular file{advice}")


def read_bytes(uri: PathOrUri) -> bytes:
    """The content of the file `uri`."""
    system, path = filesystem(uri)
    if not isinstance(system, fs.LocalFileSystem):
        with translate_errors(uri, "read"):
            return s3.read(path)
    with open_input(uri) as file, translate_errors(uri, "read"):
        return bytes(file.read())


def read_json(uri: PathOrUri) -> Any:
    """The JSON value in the file `uri`. Raises StorageError if it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(
            f"{redacted(uri)}: not valid JSON: {error}", code="invalid_json"
        ) from error


def get_file(uri: PathOrUri, file: Path) -> None:
    """Copy `uri` to the local `file`, a chunk at a time."""
    with open_input(uri) as source, translate_errors(file, "write"), file.open("wb") as sink:
        while chunk := _read_chunk(uri, source):
            sink.write(chunk)


def _read_chunk(uri: PathOrUri, source: pa.NativeFile) -> bytes:
    with translate_errors(uri, "read"):
        return bytes(source.read(_CHUNK_BYTES))


def list_files(uri: PathOrUri) -> list[str]:
    """Every file below the directory `uri`, sorted. Raises StorageError if there is none."""
    system, path = filesystem(uri)
    base = path if isinstance(system, fs.LocalFileSystem) else f"s3://{path}"
    sizes = list_sizes(uri)
    if not sizes and not is_directory(uri):
        with translate_errors(uri, "list"):
            raise FileNotFoundError(uri)
    return [f"{base}/{name}" for name in sizes]


def list_sizes(uri: PathOrUri, *, recursive: bool = True) -> dict[str, int]:
    """Path below the directory `uri` -> bytes, of every file; empty if there is no such directory.

    recursive: also those in subdirectories. Neither this nor `list_files` lists what a killed `put`
    left behind.
    """
    system, path = filesystem(uri)
    with translate_errors(uri, "list"):
        if not isinstance(system, fs.LocalFileSystem):
            return s3.list_sizes(path, recursive)
        found = system.get_file_info(
            fs.FileSelector(path, recursive=recursive, allow_not_found=True)
        )
    return {
        info.path[len(path) + 1 :]: int(info.size)
        for info in sorted(found, key=lambda info: str(info.path))
        if info.type == fs.FileType.File and not info.base_name.startswith(_TEMPORARY_PREFIX)
    }


# Writing and deleting


def put(uri: PathOrUri, data: bytes | pa.Buffer) -> None:
    """Write `data` to `uri`, atomically."""
    system, path = filesystem(uri)
    with translate_errors(uri, "write"):
        if isinstance(system, fs.LocalFileSystem):
            _put_local(Path(path), data, overwrite=True)
        else:
            s3.write(path, [data])


def put_file(uri: PathOrUri, file: Path) -> None:
    """Copy the local `file` to `uri`, atomically and a chunk at a time."""
    system, path = filesystem(uri)
    with translate_errors(uri, "write"), file.open("rb") as source:
        if isinstance(system, fs.LocalFileSystem):
            _put_local(Path(path), source, overwrite=True)
        else:
            s3.write(path, iter(lambda: source.read(_CHUNK_BYTES), b""))


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON in UTF-8, ending with a newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def put_json(uri: PathOrUri, value: Any) -> None:
    """Write `value` to `uri` as `json_bytes`, atomically."""
    put(uri, json_bytes(value))


def put_if_absent(uri: PathOrUri, data: bytes) -> bool:
    """Write `data` to `uri` unless it exists. Returns whether this call wrote it.

    Of concurrent calls, in any processes, exactly one returns True.
    """
    system, path = filesystem(uri)
    with translate_errors(uri, "write"):
        if isinstance(system, fs.LocalFileSystem):
            return _put_local(Path(path), data, overwrite=False)
        return s3.write_if_absent(path, data)


def _put_local(path: Path, data: bytes | pa.Buffer | BinaryIO, *, overwrite: bool) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY_PREFIX, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(data, bytes | pa.Buffer):
                file.write(data)
            else:
                shutil.copyfileobj(data, file, _CHUNK_BYTES)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if overwrite:
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)  # unlike replace, it fails if `path` exists
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


def delete_file(uri: PathOrUri) -> None:
    """Delete the file `uri`, if it exists."""
    system, path = filesystem(uri)
    with translate_errors(uri, "delete"), contextlib.suppress(FileNotFoundError):
        system.delete_file(path)


def delete_directory(uri: PathOrUri) -> None:
    """Delete the directory `uri` and everything below it, if it exists."""
    system, path = filesystem(uri)
    with translate_errors(uri, "delete"), contextlib.suppress(FileNotFoundError):
        system.delete_dir(path)
