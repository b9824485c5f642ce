"""Local paths and s3:// alike: the one place that makes a filesystem.

Few verbs, because S3 has few: open, list, put atomically, put if absent, delete. There is no
rename. A reader never sees half an object: local puts go through a temporary name in the same
folder, S3 shows an object only when its upload is complete.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlparse

import pyarrow as pa
from pyarrow import fs

from covergenre.errors import StorageError

# Older S3-compatible stores answer 411 to the checksummed streaming uploads of newer clients.
# It has to be set before the first client is made, in every process that imports this module.
for _name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
    os.environ.setdefault(_name, "when_required")

_ATTEMPTS = 8
"""Of one request to S3, waiting longer after each."""
_ATTEMPTS_TO_CONNECT = 3
_CONNECT_SECONDS = 3.0
_READ_SECONDS = 10.0
_TROUBLE_SECONDS = 30.0
_BAD_CREDENTIALS = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
)
_PIECE_BYTES = 8 * 2**20
_TEMPORARY = ".covergenre-writing-"
"""How the name of a half-written local file begins; the dot keeps it out of listings by pattern."""


def is_uri(text: str) -> bool:
    """Whether `text` has a scheme, as s3://bucket/key has."""
    return "://" in text


def absolute(uri: str) -> str:
    """`uri` as a path or URI that means the same in every process of this host."""
    if uri.startswith("file://"):
        uri = unquote(urlparse(uri).path)
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
        if trouble := _trouble(bucket):
            raise StorageError(f"s3://{bucket}: {trouble}")
        return _s3(_bucket_region(bucket)), path
    scheme = uri.partition("://")[0]
    raise StorageError(f"{uri}: no storage for {scheme}://; use a local path or s3://")


@lru_cache(maxsize=1)
def _local() -> fs.LocalFileSystem:
    return fs.LocalFileSystem()


class _S3FileSystem(fs.S3FileSystem):  # type: ignore[misc]
    """Made anew by the factory below wherever it is unpickled: in a process that has imported this
    module, with the credentials of that machine, and without secrets in the pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _s3, (self.region,)


@lru_cache
def _s3(region: str | None) -> fs.S3FileSystem:
    settings: dict[str, Any] = {}
    endpoint = urlparse(_client().meta.endpoint_url)
    if not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        # pyarrow does not reliably take the endpoint from the environment itself.
        settings |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    if region:
        settings["region"] = region
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
    return _S3FileSystem(retry_strategy=retries, connect_timeout=_CONNECT_SECONDS, **settings)


@lru_cache(maxsize=1)
def _client() -> Any:
    """boto3's client: for what Arrow's filesystem does not do, and to say what is wrong."""
    import boto3
    from botocore.config import Config

    settings = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS_TO_CONNECT},
    )
    return boto3.session.Session().client("s3", region_name=_region(), config=settings)


_found: dict[str, tuple[float, str | None, str | None]] = {}
"""Bucket -> (when it was asked, what is wrong, its region)."""


def _trouble(bucket: str) -> str | None:
    """What keeps this process from the bucket, naming the setting to look at; None if nothing.

    Asked once a bucket, and again where something was wrong some time ago.
    """
    asked, trouble, _ = _found.get(bucket, (-math.inf, "", None))
    if trouble is None or (trouble and time.monotonic() - asked < _TROUBLE_SECONDS):
        return trouble
    trouble, region = _ask(bucket)
    _found[bucket] = (time.monotonic(), trouble, region)
    return trouble


def forget() -> None:
    """Make clients anew and ask buckets again: the settings of AWS have changed."""
    _found.clear()
    _client.cache_clear()
    _s3.cache_clear()


def _bucket_region(bucket: str) -> str | None:
    return _found[bucket][2]


def _ask(bucket: str) -> tuple[str | None, str | None]:
    """(what is wrong, the bucket's region where the store tells it)"""
    from botocore import exceptions

    try:
        answer = _client().list_objects_v2(Bucket=bucket, MaxKeys=1)
    except exceptions.ProfileNotFound as error:
        return f"{error}; look at AWS_PROFILE", None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        return (
            "no AWS credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
            " or give the machine an instance profile"
        ), None
    except exceptions.ParamValidationError:
        return "no valid name of a bucket", None
    except (exceptions.HTTPClientError, exceptions.EndpointConnectionError):
        return (
            f"{_client().meta.endpoint_url} does not answer; look at AWS_ENDPOINT_URL, at the"
            " region (AWS_REGION), and at the network"
        ), None
    except exceptions.ClientError as error:
        answer, code = error.response, error.response["Error"]["Code"]
        if code == "NoSuchBucket":
            where = _client().meta.endpoint_url
            return f"no such bucket at {where}; look at its name, and at AWS_ENDPOINT_URL", None
        if code in _BAD_CREDENTIALS:
            return (
                f"the store refuses the credentials ({code}); look at AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ), None
        # Whatever else: reading and writing may be allowed where listing is not.
    except (exceptions.BotoCoreError, ValueError) as error:  # ValueError: an endpoint without http
        return f"{error}; look at the AWS settings", None
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return None, headers.get("x-amz-bucket-region") or _region()


def _region() -> str | None:
    # boto3 knows the second alone, Arrow both.
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


@contextlib.contextmanager
def named(uri: str, verb: str) -> Iterator[None]:
    """Turn what a filesystem raises into one line that names the place."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{uri}: no such file or folder") from error
    except (OSError, pa.ArrowException, UnicodeError) as error:
        reason, *_ = str(getattr(error, "strerror", None) or error or repr(error)).splitlines()
        if "ACCESS_DENIED" in reason:  # as Arrow says it of S3
            reason = "access denied; look at what the credentials in use are allowed to do"
        raise StorageError(f"{uri}: cannot {verb}: {reason}") from error


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
    with open_input(uri) as file, named(uri, "read"):
        return bytes(file.read())


def read_json(uri: str) -> Any:
    """The JSON value in the file `uri`. Raises StorageError where it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: not valid JSON: {error}") from error


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
            with system.open_output_stream(path) as stream:
                stream.write(data)


def put_file(uri: str, file: Path) -> None:
    """Copy the local `file` to `uri`, atomically and a piece at a time."""
    system, path = filesystem(uri)
    with named(uri, "write"), file.open("rb") as source:
        if isinstance(system, fs.LocalFileSystem):
            _put_local(Path(path), source, overwrite=True)
        else:
            with system.open_output_stream(path) as stream:
                shutil.copyfileobj(source, stream, _PIECE_BYTES)


def get_file(uri: str, file: Path) -> None:
    """Copy `uri` to the local `file`, a piece at a time."""
    with open_input(uri) as source, named(uri, "read"), file.open("wb") as sink:
        shutil.copyfileobj(source, sink, _PIECE_BYTES)


def put_json(uri: str, value: Any) -> None:
    """Write `value` to `uri` as indented JSON, atomically."""
    put(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write `data` to `uri` unless it exists. Whether this call wrote it: one caller wins."""
    system, path = filesystem(uri)
    with named(uri, "write"):
        if isinstance(system, fs.LocalFileSystem):
            return _put_local(Path(path), data, overwrite=False)
        return _put_s3_if_absent(path, data)


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


def _put_s3_if_absent(path: str, data: bytes) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = path.partition("/")
    try:
        _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        if error.response["Error"]["Code"] in ("PreconditionFailed", "ConditionalRequestConflict"):
            return False
        raise OSError(str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error
    return True


def delete_file(uri: str) -> None:
    """Delete the file `uri`; nothing happens where there is none."""
    system, path = filesystem(uri)
    with named(uri, "delete"), contextlib.suppress(FileNotFoundError):
        system.delete_file(path)


def delete_folder(uri: str) -> None:
    """Delete the folder `uri` and all below it; nothing happens where there is none."""
    system, path = filesystem(uri)
    if isinstance(system, fs.S3FileSystem) and "/" not in path:
        # Arrow would empty the bucket before it says that it deletes no bucket.
        raise StorageError(f"{uri}: cannot delete: it is a whole bucket")
    with named(uri, "delete"), contextlib.suppress(FileNotFoundError):
        system.delete_dir(path)
