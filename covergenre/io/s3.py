"""S3: one client, one patience, one key; and an Arrow filesystem made of them.

All of S3 goes through boto3. Arrow's own client cannot encrypt with a customer's key, keeps its
credentials when they expire, and takes a finished upload for a failed one where the last answer is
lost; and two clients would be two behaviours to know. An answer is looked at for its length, a
request that failed for now is made again, and every error is an OSError of one line.
"""

import base64
import contextlib
import itertools
import math
import os
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

CUSTOMER_KEY_FILE = "COVERGENRE_S3_CUSTOMER_KEY_FILE"
"""The variable that names a file with the key (SSE-C) of all that is read and written."""

_PATIENCE_SECONDS = 90.0
"""How long a request that failed for now is made again. Its last attempt may begin then."""
_CONNECT_SECONDS = 3.0
_READ_SECONDS = 10.0
"""Longest silence within a request."""
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 10.0

# The first look at a bucket is bounded by 9 + 2 + 3 seconds: attempts begin in the first 9.
_LOOK_PATIENCE_SECONDS = 9.0
_LOOK_CONNECT_SECONDS = 2.0
_LOOK_READ_SECONDS = 3.0
_TROUBLE_SECONDS = 30.0
"""How long a bucket that is out of reach is not asked again."""

_FIRST_BYTES = 2**20
"""Read when a file is opened, instead of a question after its size: most covers are no larger."""
_PIECE_BYTES = 8 * 2**20
"""Of an upload in parts, and of a long read. S3 takes 10,000 parts: 80 GB."""
_PARTS_IN_FLIGHT = 4
_PAGE_KEYS = 1000
"""Of a listing; S3 gives no more at a time."""
_MARK = "covergenre-write"
"""Metadata that tells one write from another: whether one was carried out whose answer was lost."""

_BAD_CREDENTIALS = (
    *("AuthFailure", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken"),
    *("RequestExpired", "SignatureDoesNotMatch", "TokenRefreshRequired"),
)
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_WRONG_REGION = (
    *("301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
    "PermanentRedirect",
)
_FOR_NOW = (
    *("BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError"),
    *("OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling"),
    *("ThrottlingException", "TooManyRequests", "RequestLimitExceeded"),
)

T = TypeVar("T")


class StoreError(OSError):
    """The store itself is out of reach, or refuses us: no matter which object was asked for."""


class _CutShortError(Exception):
    """An answer is not as long as it says."""


# Clients


_lock = threading.Lock()
_clients: dict[bool, Any] = {}
_looking = threading.Lock()
_looked: dict[str, tuple[float, str | None]] = {}
"""Bucket -> (when it was looked at, what is wrong)."""


def forget() -> None:
    """Make clients anew and look at buckets again: the settings of AWS have changed."""
    with _lock, _looking:
        _clients.clear()
        _looked.clear()


def _client(looking: bool = False) -> Any:
    with _lock:
        if looking not in _clients:
            _clients[looking] = _new_client(looking)
        return _clients[looking]


def _new_client(looking: bool) -> Any:
    import boto3
    from botocore.config import Config

    settings = Config(
        # Older S3-compatible stores answer 411 to uploads with the checksums that botocore sends.
        request_checksum_calculation=_checksums("AWS_REQUEST_CHECKSUM_CALCULATION"),
        response_checksum_validation=_checksums("AWS_RESPONSE_CHECKSUM_VALIDATION"),
        connect_timeout=_LOOK_CONNECT_SECONDS if looking else _CONNECT_SECONDS,
        read_timeout=_LOOK_READ_SECONDS if looking else _READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": 1},  # `_asked` tries again, more broadly
        max_pool_connections=64,
    )
    # boto3 looks at the second alone.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    client = boto3.session.Session().client("s3", region_name=region, config=settings)
    client.meta.events.register("before-parse.s3", _check_length)
    if (key := _customer_key()) is not None:
        encryption = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}
        for name in ("Get", "Head", "Put"):
            _add_to(client, f"{name}Object", encryption)
        for name in ("CreateMultipartUpload", "UploadPart"):
            _add_to(client, name, encryption)
    return client


def _checksums(variable: str) -> str:
    """The user's setting, or "when_required", where botocore's own default is "when_supported"."""
    return os.environ.get(variable) or "when_required"


def _add_to(client: Any, operation: str, more: dict[str, Any]) -> None:
    def add(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return params | more

    client.meta.events.register(f"provide-client-params.s3.{operation}", add)


def _check_length(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """botocore takes a short answer as it is; an empty one, for instance, as a list of nothing."""
    body, length = response_dict["body"], response_dict["headers"].get("Content-Length")
    has_body = operation_model.http["method"] != "HEAD" and isinstance(body, bytes)
    if has_body and length is not None and len(body) != int(length):
        raise _CutShortError(operation_model.name)


def _customer_key() -> bytes | None:
    file = os.environ.get(CUSTOMER_KEY_FILE)
    if not file:
        return None
    try:
        held = Path(file).read_bytes()
    except OSError as error:
        raise StoreError(f"{CUSTOMER_KEY_FILE}: {file}: {error.strerror}") from error
    if len(held) == 32:
        return held
    with contextlib.suppress(ValueError):
        if len(key := base64.b64decode(held.strip(), validate=True)) == 32:
            return key
    raise StoreError(
        f"{CUSTOMER_KEY_FILE}: {file}: a key is 32 bytes, or those in base64; make one with"
        " `openssl rand -out FILE 32`"
    )


def _endpoint() -> str:
    for client in list(_clients.values()):
        parts = urlsplit(client.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return "the store"


# Asking, and asking again


def check(bucket: str) -> None:
    """Raises StoreError where something keeps this process from `bucket`, within 15 seconds.

    Asked once a bucket, and again where something was wrong a while ago.
    """
    with _looking:
        when, wrong = _looked.get(bucket, (-math.inf, ""))
        if wrong is not None and time.monotonic() - when >= _TROUBLE_SECONDS:
            wrong = _look(bucket)
            _looked[bucket] = (time.monotonic(), wrong)
    if wrong is not None:
        raise StoreError(wrong)


def _look(bucket: str) -> str | None:
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def look() -> None:
        try:
            next(_pages(bucket, "", recursive=True, keys=1, looking=True))
            answers.put(None)
        except StoreError as error:
            answers.put(str(error))
        except FileNotFoundError:
            answers.put(_no_bucket())
        except OSError:  # reading and writing may be allowed where listing is not
            answers.put(None)

    # Looking up a name, and connecting to each of its addresses, has no timeout of its own.
    threading.Thread(target=look, daemon=True).start()
    longest = _LOOK_PATIENCE_SECONDS + _LOOK_CONNECT_SECONDS + _LOOK_READ_SECONDS
    try:
        return answers.get(timeout=longest)
    except queue.Empty:
        return _no_answer()


def _no_bucket() -> str:
    return f"no such bucket at {_endpoint()}; look at its name, and at AWS_ENDPOINT_URL"


def _no_answer() -> str:
    return (
        f"{_endpoint()} does not answer; look at AWS_ENDPOINT_URL, at the region (AWS_REGION), and"
        " at the network"
    )


def _asked(bucket: str, ask: Callable[[Any], T], *, looking: bool = False) -> T:
    """What `ask(client)` gives, asked again where it failed for now.

    An answer may have been lost of a request that was carried out: `ask` must bear repetition.
    """
    patience = _LOOK_PATIENCE_SECONDS if looking else _PATIENCE_SECONDS
    deadline = time.monotonic() + patience
    for attempt in itertools.count():
        client = None
        try:
            client = _client(looking)
            return ask(client)
        except Exception as error:
            # Full jitter: processes that were refused together do not come back together.
            wait = random.uniform(0, min(_FIRST_WAIT_SECONDS * 2**attempt, _LONGEST_WAIT_SECONDS))
            if not _may_pass(error) or time.monotonic() + wait > deadline:
                told = _one_line(error)
                if isinstance(told, StoreError) and not looking:
                    _looked[bucket] = (time.monotonic(), str(told))  # for those who come after
                if told is error:
                    raise
                raise told from error
            if _code(error) in _EXPIRED:
                _renew(client)
        time.sleep(wait)
    raise AssertionError


def _renew(client: Any) -> None:
    """Take up credentials anew where the store refuses those of `client` as expired.

    Those that say when they expire are renewed by boto3 itself, before they do.
    """
    with _lock:
        if client in _clients.values():  # else another thread was here before
            _clients.clear()


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) else ""


def _may_pass(error: Exception) -> bool:
    from botocore import exceptions, parsers

    if isinstance(error, exceptions.SSLError):
        return "CERTIFICATE" not in str(error)
    if isinstance(error, exceptions.ClientError):
        code, status = _code(error), error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        # Expired: whoever renews them may be a bit late.
        return code in _FOR_NOW + _EXPIRED or status == 429 or (status >= 500 and status != 501)
    return isinstance(
        error,
        exceptions.CredentialRetrievalError
        | exceptions.MetadataRetrievalError
        | exceptions.ConnectionError
        | exceptions.HTTPClientError
        | exceptions.IncompleteReadError
        | parsers.ResponseParserError
        | _CutShortError,
    )


def _one_line(error: Exception) -> OSError:
    """`error` in words that name the setting to look at, and hold no secret."""
    from botocore import exceptions, parsers

    match error:
        case exceptions.ClientError():
            return _refusal(error)
        case exceptions.ProfileNotFound():
            return StoreError(f"{error}; look at AWS_PROFILE")
        case exceptions.NoCredentialsError() | exceptions.PartialCredentialsError():
            return StoreError(
                "no AWS credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, or give the machine an instance profile"
            )
        case exceptions.CredentialRetrievalError():
            # Its text has what a credential_process printed.
            provider = error.kwargs.get("provider", "their source")
            return StoreError(f"no AWS credentials from {provider}; look at AWS_PROFILE")
        case exceptions.ParamValidationError():
            return OSError("no valid name of a bucket or object")
        case exceptions.SSLError():
            return StoreError(
                f"{_endpoint()}: no secure connection; look at AWS_CA_BUNDLE and AWS_ENDPOINT_URL"
            )
        case exceptions.ConnectionError() | exceptions.HTTPClientError():
            return StoreError(_no_answer())
        case exceptions.IncompleteReadError() | parsers.ResponseParserError() | _CutShortError():
            return StoreError(
                f"{_endpoint()}: answers are cut short, or not S3's; look at AWS_ENDPOINT_URL"
            )
        case exceptions.BotoCoreError():
            return StoreError(f"{error}; look at the AWS settings".replace("\n", " "))
        case ValueError() if "endpoint" in str(error):
            return StoreError("AWS_ENDPOINT_URL is no http(s) address; look at the AWS settings")
        case OSError():  # ours; some of botocore's are one as well
            return error
    raise error


def _refusal(error: Any) -> OSError:
    """An error that the store answered."""
    code, status = _code(error), error.response["ResponseMetadata"].get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return StoreError(_no_bucket())
    if code in _BAD_CREDENTIALS:
        return StoreError(
            f"the store refuses the credentials ({code}); look at AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if code in _WRONG_REGION:
        return StoreError(f"the bucket is in another region ({code}); look at AWS_REGION")
    if code in ("404", "NoSuchKey"):
        return FileNotFoundError("no such file or directory")
    if code in ("403", "AccessDenied", "AllAccessDisabled", "Forbidden"):
        more = f", and at {CUSTOMER_KEY_FILE}" if os.environ.get(CUSTOMER_KEY_FILE) else ""
        return PermissionError(
            f"access denied; look at what the credentials in use are allowed to do{more}"
        )
    if status == 412:
        return OSError("it changed while it was read")
    if status == 400 and code in ("400", "InvalidRequest", "InvalidArgument"):
        return OSError(
            f"the store refuses the request ({code}); if the object is encrypted with a customer's"
            f" key, or is not, look at {CUSTOMER_KEY_FILE}"
        )
    # The code alone: what else a store says may be what we said to it, secrets included.
    kind = StoreError if _may_pass(error) else OSError
    return kind(f"the store answers {code or status}")


# Objects


def _split(path: str) -> tuple[str, str]:
    """(bucket, key) of the file bucket/key."""
    bucket, _, key = path.partition("/")
    if not key:
        raise IsADirectoryError("it is a whole bucket")
    return bucket, key


def _get(path: str, start: int, stop: int, etag: str | None = None) -> tuple[bytes, int, str]:
    """(bytes `start` to `stop` of the object or to its end, the object's bytes, its ETag)

    etag: of the object that is wanted; another is an error.
    """
    from botocore.exceptions import ClientError

    bucket, key = _split(path)
    condition = {"IfMatch": etag} if etag else {}

    def ask(client: Any) -> tuple[bytes, int, str]:
        where = f"bytes={start}-{stop - 1}"
        try:
            answer = client.get_object(Bucket=bucket, Key=key, Range=where, **condition)
        except ClientError as error:
            if _code(error) == "InvalidRange" and start == 0:
                return b"", 0, ""  # an empty object has no first byte
            raise
        with contextlib.closing(answer["Body"]) as body:
            data = body.read()
        size = int(answer.get("ContentRange", "").rpartition("/")[2] or -1)
        if len(data) != min(stop, size) - start:
            raise _CutShortError(path)
        return data, size, answer["ETag"]

    return _asked(bucket, ask)


class _Reader:
    """An object opened for reading: what pa.PythonFile needs."""

    closed = False

    def __init__(self, path: str, first_bytes: int = _FIRST_BYTES) -> None:
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
        pieces = [self._first[start:]]
        for at in range(max(start, len(self._first)), stop, _PIECE_BYTES):
            pieces.append(_get(self._path, at, min(at + _PIECE_BYTES, stop), self._etag)[0])
        return b"".join(pieces)

    def close(self) -> None:
        self.closed, self._first = True, b""


def read(path: str) -> bytes:
    """All bytes of the object."""
    return _Reader(path, _PIECE_BYTES).read()


class _Writer:
    """An upload: what pa.PythonFile needs. Nobody sees it before `close`; `abort` forgets it."""

    closed = False

    def __init__(self, path: str) -> None:
        self._bucket, key = _split(path)
        self._where = {"Bucket": self._bucket, "Key": key}
        self._held = bytearray()
        self._mark = uuid.uuid4().hex
        self._upload: str | None = None
        self._parts: list[Future[str]] = []
        self._pool: ThreadPoolExecutor | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            self._held += view[start : start + _PIECE_BYTES]
            while len(self._held) > _PIECE_BYTES:
                self._send(bytes(self._held[:_PIECE_BYTES]))
                del self._held[:_PIECE_BYTES]
        return len(view)

    def flush(self) -> None:
        pass  # what is not whole is nowhere

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
            with contextlib.suppress(Exception):  # it failed already; this is but tidying up
                _client().abort_multipart_upload(**self._where, UploadId=self._upload)

    def _finish(self) -> None:
        data = bytes(self._held)
        if self._pool is None:
            _asked(self._bucket, lambda client: client.put_object(**self._where, Body=data))
            return
        self._send(data)
        tags = [part.result() for part in self._parts]
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, start=1)]
        _asked(self._bucket, lambda client: self._complete(client, parts))
        self._upload = None

    def _send(self, data: bytes) -> None:
        if self._pool is None:
            answer = _asked(self._bucket, self._create)
            self._upload = answer["UploadId"]
            self._pool = ThreadPoolExecutor(_PARTS_IN_FLIGHT)
        number = len(self._parts) + 1
        if number > _PARTS_IN_FLIGHT:  # no more of them are held in memory
            self._parts[-_PARTS_IN_FLIGHT].result()
        self._parts.append(self._pool.submit(self._send_part, number, data))

    def _create(self, client: Any) -> Any:
        return client.create_multipart_upload(**self._where, Metadata={_MARK: self._mark})

    def _send_part(self, number: int, data: bytes) -> str:
        part = {"UploadId": self._upload, "PartNumber": number, "Body": data}
        answer = _asked(self._bucket, lambda client: client.upload_part(**self._where, **part))
        return str(answer["ETag"])

    def _complete(self, client: Any, parts: list[dict[str, Any]]) -> None:
        from botocore.exceptions import ClientError

        try:
            client.complete_multipart_upload(
                **self._where, UploadId=self._upload, MultipartUpload={"Parts": parts}
            )
        except ClientError as error:
            # A finished upload is known no more: it may be ours, its answer lost.
            if _code(error) != "NoSuchUpload" or not _is_marked(client, self._where, self._mark):
                raise


def _head(client: Any, where: dict[str, str]) -> Any:
    """What the store says of an object without its bytes."""
    from botocore.exceptions import ClientError

    try:
        found = client.head_object(**where)
    except ClientError as error:
        if _code(error) in ("400", "403"):
            # An answer to HEAD cannot say what is wrong; the one to GET does.
            client.get_object(**where, Range="bytes=0-0")["Body"].close()
        raise
    if not {"ContentLength", "LastModified"} <= set(found):
        raise _CutShortError(where["Key"])
    return found


def _is_marked(client: Any, where: dict[str, str], mark: str) -> bool:
    """Whether the object is the one that was written with `mark`."""
    from botocore.exceptions import ClientError

    try:
        return bool(_head(client, where)["Metadata"].get(_MARK) == mark)
    except ClientError as error:
        if _code(error) == "404":  # another's, and deleted since
            return False
        raise


def write(path: str, pieces: Iterable[Any]) -> None:
    """Write an object that consists of `pieces`; where they end in an error, nothing."""
    writer = _Writer(path)
    try:
        for piece in pieces:
            writer.write(piece)
    except BaseException:
        writer.abort()
        raise
    writer.close()


def write_if_absent(path: str, data: bytes) -> bool:
    """Write `data` unless there is such an object. Whether this call wrote it: one caller wins."""
    from botocore.exceptions import ClientError

    bucket, key = _split(path)
    where, mark = {"Bucket": bucket, "Key": key}, uuid.uuid4().hex

    def ask(client: Any) -> bool:
        try:
            client.put_object(**where, Body=data, IfNoneMatch="*", Metadata={_MARK: mark})
        except ClientError as error:
            if _code(error) != "PreconditionFailed":
                raise
            # It may be this call that wrote it, its answer lost.
            return _is_marked(client, where, mark)
        return True

    return _asked(bucket, ask)


# An Arrow filesystem


@lru_cache(maxsize=1)
def filesystem() -> fs.PyFileSystem:
    """S3, by paths like bucket/key. It pickles as a call: no secret and no client goes along."""
    return fs.PyFileSystem(Handler())


class Handler(fs.FileSystemHandler):  # type: ignore[misc]
    """S3 as Arrow wants a filesystem: a folder is what keys have before a slash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handler)

    def __hash__(self) -> int:
        return hash(Handler)

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [_info(path) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        folder = selector.base_dir.rstrip("/")
        bucket, _, key = folder.partition("/")
        files: list[fs.FileInfo] = []
        folders: set[str] = set()
        is_there = not key
        for page in _pages(bucket, f"{key}/" if key else "", selector.recursive):
            for found in page.get("Contents", ()):
                is_there, path = True, f"{bucket}/{found['Key']}"
                above = path.rpartition("/")[0]
                while len(above) > len(folder) and above not in folders:
                    folders.add(above)
                    above = above.rpartition("/")[0]
                if not path.endswith("/"):  # an empty object that stands for a folder
                    files.append(_file_info(path, found["Size"], found["LastModified"]))
            for found in page.get("CommonPrefixes", ()):
                is_there = True
                folders.add(f"{bucket}/{found['Prefix'].rstrip('/')}")
        if not is_there and not selector.allow_not_found:
            raise FileNotFoundError("no such file or directory")
        return files + [fs.FileInfo(path, fs.FileType.Directory) for path in sorted(folders)]

    def create_dir(self, path: str, recursive: bool) -> None:
        pass  # a folder is there as soon as something is in it

    def delete_dir(self, path: str) -> None:
        self.delete_dir_contents(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        bucket, key = _split(path.rstrip("/"))  # never a whole bucket
        pages = _pages(bucket, f"{key}/", recursive=True)
        keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
        # One by one: older stores refuse the checksum that a request for many of them has.
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: _delete(bucket, key), keys))

    def delete_root_dir_contents(self) -> None:
        raise OSError("all buckets are not deleted at once")

    def delete_file(self, path: str) -> None:
        _delete(*_split(path))

    def move(self, src: str, dest: str) -> None:
        raise OSError("S3 cannot rename")

    def copy_file(self, src: str, dest: str) -> None:
        write(dest, _pieces(_Reader(src)))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Writer(path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError("S3 cannot append")


def _pieces(reader: _Reader) -> Iterator[bytes]:
    while piece := reader.read(_PIECE_BYTES):
        yield piece


def _file_info(path: str, size: int, changed: Any) -> fs.FileInfo:
    return fs.FileInfo(path, fs.FileType.File, size=size, mtime=changed)


def _info(path: str) -> fs.FileInfo:
    bucket, _, key = path.partition("/")
    if key:
        with contextlib.suppress(FileNotFoundError):  # then it may be a folder
            where = {"Bucket": bucket, "Key": key}
            found = _asked(bucket, lambda client: _head(client, where))
            return _file_info(path, found["ContentLength"], found["LastModified"])
    page = next(_pages(bucket, f"{key}/" if key else "", recursive=True, keys=1))
    is_folder = page.get("Contents") or not key
    return fs.FileInfo(path, fs.FileType.Directory if is_folder else fs.FileType.NotFound)


def _pages(
    bucket: str, prefix: str, recursive: bool, *, keys: int = 0, looking: bool = False
) -> Iterator[dict[str, Any]]:
    """A listing, a part at a time."""
    more: dict[str, Any] = {"Prefix": prefix, "MaxKeys": keys or _PAGE_KEYS}
    if not recursive:
        more["Delimiter"] = "/"

    def ask(client: Any) -> dict[str, Any]:
        page: dict[str, Any] = client.list_objects_v2(Bucket=bucket, **more)
        if "IsTruncated" not in page:
            raise _CutShortError(bucket)
        return page

    while True:
        page = _asked(bucket, ask, looking=looking)
        yield page
        if not page["IsTruncated"]:
            return
        more["ContinuationToken"] = page["NextContinuationToken"]


def _delete(bucket: str, key: str) -> None:
    _asked(bucket, lambda client: client.delete_object(Bucket=bucket, Key=key))
