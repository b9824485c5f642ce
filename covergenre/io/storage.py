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
import stat
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from covergenre.errors import StorageError
from covergenre.io import s3
from covergenre.io.urls import redacted

_PIECE_BYTES = 8 * 2**20
_TEMPORARY = ".covergenre-writing-"
"""How the name of a half-written local file begins; the dot keeps it out of listings by pattern."""


ABSOLUTE = r"(?i)^(/|data:|file:/|[a-z][a-z0-9+.-]+://)"
"""What begins like this is not relative to a folder. Not one letter: `C:/` is a Windows drive."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_FILE_URI = re.compile(r"file:(?://([^/]*))?(/.*)?\Z", re.IGNORECASE | re.DOTALL)
_S3_SCHEMES = ("s3", "s3a", "s3n")
"""The last two are Hadoop's names for S3."""


def is_uri(text: str) -> bool:
    """Whether `text` has a scheme, as s3://bucket/key has."""
    return _SCHEME.match(text) is not None


def scheme(uri: str) -> str:
    """The scheme of `uri` in lower case: "" for a path, "s3" for s3a:// and s3n:// too."""
    if uri[:6].lower() == "file:/":
        return "file"
    match = _SCHEME.match(uri)
    found = match[1].lower() if match else ""
    return "s3" if found in _S3_SCHEMES else found


def absolute(uri: str) -> str:
    """`uri` as a path or URI that means the same in every process of this host.

    The scheme of a URI is written in one way: s3:// for S3A://; a file: URI becomes a path. Raises
    StorageError for a URI that names no bucket: as a path it would be a folder `s3:`.
    """
    if re.match(r"(?i)s3[an]?:(/[^/]|/*$)", uri):
        raise StorageError(f"{uri}: names no bucket; write s3://bucket/prefix")
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
            f"{redacted(uri)}: not a file on this machine; write file:///folder/file"
        )
    return unquote(match[2])


def check_scheme(uri: str) -> None:
    """Raises StorageError where nothing can be stored at URIs like `uri`."""
    found = scheme(uri)
    if found in ("", "file", "s3"):
        return
    advice = "use a local path or s3://"
    if found in ("http", "https"):
        advice = "download it first, and use a local path or s3://"
    raise StorageError(f"{redacted(uri)}: no storage for {found}://; {advice}")


def join(base: str, *parts: str) -> str:
    """`base/part/...`; a part that is itself absolute or a URI replaces what is before it."""
    for part in parts:
        base = part if re.match(ABSOLUTE, part) else f"{base.rstrip('/')}/{part}"
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
    check_scheme(uri)
    if scheme(uri) != "s3":
        return _local(), absolute(uri)
    path = uri.partition("://")[2].rstrip("/")
    bucket = path.partition("/")[0]
    try:
        s3.check(bucket)
    except OSError as error:
        raise StorageError(f"{redacted(f's3://{bucket}')}: {error}") from error
    return s3.filesystem(), path


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
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: a NUL, half a character
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
        if info.type == fs.FileType.Unknown:
            _check_regular(path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(uri)
    return int(info.size), int(info.mtime_ns)


def open_input(uri: str) -> pa.NativeFile:
    """`uri` opened for reading at any place. Raises StorageError where it cannot be.

    Of local files only regular ones are opened: a pipe would wait for its writer, and to open a
    device can do something to it.
    """
    system, path = filesystem(uri)
    with named(uri, "read"):
        if isinstance(system, fs.LocalFileSystem):
            _check_regular(path)
        return system.open_input_file(path)


def _check_regular(path: str) -> None:
    """Raises OSError where the local `path`, symbolic links followed, is not a regular file."""
    mode = os.stat(path.encode()).st_mode  # UTF-8, as Arrow has paths
    if stat.S_ISREG(mode) or path == os.devnull:  # the usual name of an empty file
        return
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(mode), "a special file")
    advice = "; write what it gives to a file, and name that" if kind == "a pipe" else ""
    raise OSError(f"it is {kind}, not a regular file{advice}")


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
    prefix = "" if isinstance(system, fs.LocalFileSystem) else "s3://"
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
