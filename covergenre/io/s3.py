"""S3 objects: read, write, write if absent, list and delete; by paths like bucket/key.

All requests go through boto3. Arrow's own S3 client does not support a customer's key, keeps
expired credentials, and reports a finished upload as failed if the last response is lost. The
length of responses is checked, failed requests are retried, and every error is an OSError of one
line.
"""

import contextlib
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from covergenre.io import s3_client
from covergenre.io.s3_client import client, request
from covergenre.io.s3_errors import (
    S3UnavailableError,
    TruncatedResponseError,
    error_code,
    no_bucket,
    no_response,
)
from covergenre.io.s3_listing import Page, page_of
from covergenre.io.s3_range_get import ObjectRange

_PROBE_AGAIN_SECONDS = 30.0
"""After this time, an unavailable bucket is probed again; until then, requests fail at once."""
_FIRST_READ_BYTES = 2**20
"""Read when a file is opened, instead of requesting its size first: most covers are no larger."""
CHUNK_BYTES = 8 * 2**20
"""Size of the parts of an upload and of a long read. S3 accepts 10,000 parts: 80 GB."""
_PARTS_IN_FLIGHT = 4
_PAGE_KEYS = 1000
"""Keys per page of a listing; S3's maximum."""
_WRITE_ID = "covergenre-write"
"""Metadata with a random id: shows whether a write whose response was lost was carried out."""

_probe_lock = threading.Lock()


# Availability


def require_available(bucket: str) -> None:
    """Raises S3UnavailableError, within 15 seconds, if this process cannot use `bucket`.

    A bucket is probed once, and again a while after a failure.
    """
    states = s3_client.bucket_states
    with _probe_lock:
        when, error = states.get(bucket, (-math.inf, None))
        is_old = time.monotonic() - when >= _PROBE_AGAIN_SECONDS
        if bucket not in states or (error is not None and is_old):
            error = _probe(bucket)
            states[bucket] = (time.monotonic(), error)
    if error is not None:
        raise error.with_traceback(None)  # else the traceback would grow each time


def _probe(bucket: str) -> S3UnavailableError | None:
    """Why `bucket` cannot be used; None if it can."""
    answers: queue.SimpleQueue[S3UnavailableError | None] = queue.SimpleQueue()

    def probe() -> None:
        try:
            next(list_pages(bucket, "", recursive=True, max_keys=1, probe=True))
            answers.put(None)
        except S3UnavailableError as error:
            answers.put(error)
        except FileNotFoundError:
            answers.put(no_bucket(s3_client.endpoint()))
        except OSError:  # reading and writing may be allowed where listing is not
            answers.put(None)

    # In a thread: resolving a name, and connecting to each of its addresses, has no timeout.
    threading.Thread(target=probe, daemon=True).start()
    timeout = s3_client.PROBE_RETRY_TIMEOUT_SECONDS
    timeout += s3_client.PROBE_CONNECT_SECONDS + s3_client.PROBE_READ_SECONDS
    try:
        return answers.get(timeout=timeout)
    except queue.Empty:
        return no_response(s3_client.endpoint())


# Objects


def split_path(path: str) -> tuple[str, str]:
    """(bucket, key) of the file bucket/key."""
    bucket, _, key = path.partition("/")
    if not key:
        raise IsADirectoryError("it is a bucket, not an object")
    return bucket, key


def _get(path: str, start: int, stop: int, etag: str | None = None) -> ObjectRange:
    """The content from byte `start` to `stop` or the end.

    etag: raises OSError if the object has another one, because it has changed since.
    """
    from botocore.exceptions import ClientError

    bucket, key = split_path(path)

    def send(client: Any) -> ObjectRange:
        try:
            found: ObjectRange = client.get_range(bucket, key, start, stop, etag)
        except ClientError as error:
            if error_code(error) == "InvalidRange" and start == 0:
                return ObjectRange(b"", 0, "")  # an empty object has no first byte
            raise
        return found

    return request(bucket, send)


class ObjectReader:
    """An object opened for reading, with the methods that pa.PythonFile calls."""

    closed = False

    def __init__(self, path: str, first_bytes: int = _FIRST_READ_BYTES) -> None:
        self._path = path
        self._at = 0
        self._first, self.size, self._etag = _get(path, 0, first_bytes)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def read(self, nbytes: int = -1) -> bytes:
        stop = self.size if nbytes < 0 else min(self._at + nbytes, self.size)
        start, self._at = self._at, max(self._at, stop)
        if stop <= len(self._first):
            return self._first[start:stop]
        chunks = [self._first[start:]]
        for at in range(max(start, len(self._first)), stop, CHUNK_BYTES):
            chunks.append(_get(self._path, at, min(at + CHUNK_BYTES, stop), self._etag).data)
        return b"".join(chunks)

    def close(self) -> None:
        self.closed, self._first = True, b""


def read(path: str) -> bytes:
    """The content of the object."""
    return ObjectReader(path, CHUNK_BYTES).read()


class ObjectWriter:
    """An upload, with the methods that pa.PythonFile calls.

    The object appears when `close` is called; `abort` discards what was written.
    """

    closed = False

    def __init__(self, path: str) -> None:
        self._bucket, key = split_path(path)
        self._object = {"Bucket": self._bucket, "Key": key}
        self._buffer = bytearray()
        self._write_id = uuid.uuid4().hex
        self._upload: str | None = None
        self._parts: list[Future[str]] = []
        self._pool: ThreadPoolExecutor | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            self._buffer += view[start : start + CHUNK_BYTES]
            while len(self._buffer) > CHUNK_BYTES:
                self._send(bytes(self._buffer[:CHUNK_BYTES]))
                del self._buffer[:CHUNK_BYTES]
        return len(view)

    def flush(self) -> None:
        pass  # the object appears as a whole, in `close`

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._finish()
        finally:
            self.abort()

    def abort(self) -> None:
        self.closed = True
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if self._upload:
            with contextlib.suppress(Exception):  # the upload has failed already
                client().abort_multipart_upload(**self._object, UploadId=self._upload)

    def _finish(self) -> None:
        data = bytes(self._buffer)
        if self._pool is None:
            request(self._bucket, lambda client: client.put_object(**self._object, Body=data))
            return
        self._send(data)
        tags = [part.result() for part in self._parts]
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, start=1)]
        request(self._bucket, lambda client: self._complete(client, parts))
        self._upload = None

    def _send(self, data: bytes) -> None:
        if self._pool is None:
            response = request(self._bucket, self._create)
            self._upload = response["UploadId"]
            self._pool = ThreadPoolExecutor(_PARTS_IN_FLIGHT)
        number = len(self._parts) + 1
        if number > _PARTS_IN_FLIGHT:  # bounds the parts in memory
            self._parts[-_PARTS_IN_FLIGHT].result()
        self._parts.append(self._pool.submit(self._send_part, number, data))

    def _create(self, client: Any) -> Any:
        return client.create_multipart_upload(**self._object, Metadata={_WRITE_ID: self._write_id})

    def _send_part(self, number: int, data: bytes) -> str:
        part = {"UploadId": self._upload, "PartNumber": number, "Body": data}
        response = request(self._bucket, lambda client: client.upload_part(**self._object, **part))
        return str(response["ETag"])

    def _complete(self, client: Any, parts: list[dict[str, Any]]) -> None:
        from botocore.exceptions import ClientError

        try:
            client.complete_multipart_upload(
                **self._object, UploadId=self._upload, MultipartUpload={"Parts": parts}
            )
        except ClientError as error:
            # S3 forgets finished uploads: this one may be finished, with the response lost.
            if error_code(error) != "NoSuchUpload":
                raise
            if not _was_written_by(client, self._object, self._write_id):
                raise


def head(client: Any, where: dict[str, str]) -> Any:
    """The response to a HEAD request: an object's size, mtime and metadata."""
    from botocore.exceptions import ClientError

    try:
        found = client.head_object(**where)
    except ClientError as error:
        if error_code(error) in ("400", "403"):
            # A response to HEAD has no error code in its body; that to GET does.
            client.get_object(**where, Range="bytes=0-0")["Body"].close()
        raise
    if not {"ContentLength", "LastModified"} <= set(found):
        raise TruncatedResponseError(where["Key"])
    return found


def _was_written_by(client: Any, where: dict[str, str], write_id: str) -> bool:
    """Whether the object was written with the id `write_id`."""
    from botocore.exceptions import ClientError

    try:
        return bool(head(client, where)["Metadata"].get(_WRITE_ID) == write_id)
    except ClientError as error:
        if error_code(error) == "404":  # another writer's object, which was deleted since
            return False
        raise


def write(path: str, chunks: Iterable[Any]) -> None:
    """Write an object that consists of `chunks`; if iterating them raises, nothing is written."""
    writer = ObjectWriter(path)
    try:
        for chunk in chunks:
            writer.write(chunk)
    except BaseException:
        writer.abort()
        raise
    writer.close()


def write_if_absent(path: str, data: bytes) -> bool:
    """Write `data` unless the object exists. Returns True for exactly one of concurrent calls."""
    from botocore.exceptions import ClientError

    bucket, key = split_path(path)
    where, write_id = {"Bucket": bucket, "Key": key}, uuid.uuid4().hex

    def send(client: Any) -> bool:
        try:
            client.put_object(**where, Body=data, IfNoneMatch="*", Metadata={_WRITE_ID: write_id})
        except ClientError as error:
            if error_code(error) != "PreconditionFailed":
                raise
            # An earlier attempt of this call may have written it, with the response lost.
            return _was_written_by(client, where, write_id)
        return True

    return request(bucket, send)


# Listing and deleting


def list_pages(
    bucket: str, prefix: str, recursive: bool, *, max_keys: int = 0, probe: bool = False
) -> Iterator[Page]:
    """The pages of a listing of keys that begin with `prefix`."""
    parameters: dict[str, Any] = {"Prefix": prefix, "MaxKeys": max_keys or _PAGE_KEYS}
    if not recursive:
        parameters["Delimiter"] = "/"

    def send(client: Any) -> Page:
        return page_of(client.list_objects_v2(Bucket=bucket, **parameters))

    while True:
        page = request(bucket, send, probe=probe)
        yield page
        if page.next_token is None:
            return
        parameters["ContinuationToken"] = page.next_token


def list_sizes(directory: str, recursive: bool = True) -> dict[str, int]:
    """Path below `directory` -> bytes, of every object in it, sorted.

    recursive: also of those in subdirectories.
    """
    bucket, _, key = directory.partition("/")
    prefix = f"{key}/" if key else ""
    sizes: dict[str, int] = {}
    for page in list_pages(bucket, prefix, recursive):
        for name, size in zip(page.keys, page.sizes, strict=True):
            if not name.endswith("/"):  # an empty object that marks a directory
                sizes[name[len(prefix) :]] = size
    return {name: sizes[name] for name in sorted(sizes)}


def delete(bucket: str, key: str) -> None:
    """Delete the object, if it exists."""
    request(bucket, lambda client: client.delete_object(Bucket=bucket, Key=key))
