"""The boto3 client for S3: its settings, the customer's key, and requests with retries."""

import base64
import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from covergenre.io import s3_listing
from covergenre.io.retries import with_retries
from covergenre.io.s3_errors import (
    CUSTOMER_KEY_FILE,
    S3UnavailableError,
    TruncatedResponseError,
    is_expired,
    is_retryable,
    translate,
)
from covergenre.io.s3_range_get import RangeGetter

RETRY_TIMEOUT_SECONDS = 90.0
"""No attempt of a request begins later than this after the first."""
CONNECT_SECONDS = 3.0
READ_SECONDS = 10.0
"""Maximum wait for the next bytes of a response."""
FIRST_WAIT_SECONDS = 0.1
MAX_WAIT_SECONDS = 10.0

# The first request to a bucket, the probe, shows mistakes in the settings: it fails after at most
# 9 + 2 + 3 seconds.
PROBE_RETRY_TIMEOUT_SECONDS = 9.0
PROBE_CONNECT_SECONDS = 2.0
PROBE_READ_SECONDS = 3.0

T = TypeVar("T")

_lock = threading.Lock()
_clients: dict[bool, Any] = {}
"""For probes: True, and for all other requests: False."""
bucket_states: dict[str, tuple[float, S3UnavailableError | None]] = {}
"""Bucket -> (time.monotonic() of its probe or last failure, the error if it is unavailable)."""


def reset_clients() -> None:
    """Make new clients for the next requests: the AWS settings or the process have changed."""
    with _lock:
        _clients.clear()
        bucket_states.clear()


def client(*, probe: bool = False) -> Any:
    """The boto3 client of this process; `probe`: the one with short timeouts."""
    with _lock:
        if probe not in _clients:
            _clients[probe] = _new_client(probe)
        return _clients[probe]


def _new_client(probe: bool) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        # Older S3-compatible stores answer 411 to uploads with the checksums that botocore sends.
        request_checksum_calculation=_checksums("AWS_REQUEST_CHECKSUM_CALCULATION"),
        response_checksum_validation=_checksums("AWS_RESPONSE_CHECKSUM_VALIDATION"),
        connect_timeout=PROBE_CONNECT_SECONDS if probe else CONNECT_SECONDS,
        read_timeout=PROBE_READ_SECONDS if probe else READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": 1},  # `request` retries more errors
        max_pool_connections=64,
    )
    # boto3 itself reads AWS_DEFAULT_REGION only.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    session = boto3.session.Session()
    session.events.register("creating-client-class.s3", _add_range_getter)
    made = session.client("s3", region_name=region, config=config)
    made.meta.events.register("before-parse.s3", _check_length)
    s3_listing.register(made)
    if (key := _customer_key()) is not None:
        encryption = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}
        for operation in (
            *("GetObject", "HeadObject", "PutObject", "CreateMultipartUpload", "UploadPart"),
        ):
            _add_parameters(made, operation, encryption)
    return made


def _add_range_getter(base_classes: list[type], **_: Any) -> None:
    base_classes.insert(0, RangeGetter)


def _checksums(variable: str) -> str:
    """The user's setting, or "when_required", where botocore's own default is "when_supported"."""
    return os.environ.get(variable) or "when_required"


def _add_parameters(made: Any, operation: str, parameters: dict[str, Any]) -> None:
    def add(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return params | parameters

    made.meta.events.register(f"provide-client-params.s3.{operation}", add)


def _check_length(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Raises TruncatedResponseError; botocore would read an empty response as an empty listing."""
    body, length = response_dict["body"], response_dict["headers"].get("Content-Length")
    has_body = operation_model.http["method"] != "HEAD" and isinstance(body, bytes)
    if has_body and length is not None and len(body) != int(length):
        raise TruncatedResponseError(operation_model.name)


def _customer_key() -> bytes | None:
    file = os.environ.get(CUSTOMER_KEY_FILE)
    if not file:
        return None
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise S3UnavailableError(
            f"{CUSTOMER_KEY_FILE}: {file}: {error.strerror}", "customer_key"
        ) from error
    if len(content) == 32:
        return content
    with contextlib.suppress(ValueError):
        if len(key := base64.b64decode(content.strip(), validate=True)) == 32:
            return key
    raise S3UnavailableError(
        f"{CUSTOMER_KEY_FILE}: {file}: not a key of 32 bytes, plain or in base64; make one with"
        " `openssl rand -out FILE 32`",
        "customer_key",
    )


def endpoint() -> str:
    """The URL of the S3 server, for messages."""
    for made in list(_clients.values()):
        parts = urlsplit(made.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return "the S3 server"


def request(bucket: str, send: Callable[[Any], T], *, probe: bool = False) -> T:
    """What `send(client)` returns, with retries. Raises OSError.

    The response to a request that was carried out may be lost: `send` must be safe to repeat.
    """
    used: Any = None

    def attempt() -> T:
        nonlocal used
        used = None  # a new client may raise, too
        used = client(probe=probe)
        return send(used)

    def renew_credentials(error: BaseException) -> None:
        # boto3 renews credentials with a known expiry in time; others need a new client.
        if is_expired(error):
            with _lock:
                if used in _clients.values():  # else another thread has replaced it
                    _clients.clear()

    try:
        return with_retries(
            attempt,
            is_retryable,
            first_wait=FIRST_WAIT_SECONDS,
            max_wait=MAX_WAIT_SECONDS,
            timeout=PROBE_RETRY_TIMEOUT_SECONDS if probe else RETRY_TIMEOUT_SECONDS,
            before_retry=renew_credentials,
        )
    except Exception as error:
        translated = translate(error, endpoint())
        if isinstance(translated, S3UnavailableError) and not probe:
            bucket_states[bucket] = (time.monotonic(), translated)
        if translated is error:
            raise
        raise translated from error
