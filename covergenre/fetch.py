"""Covers at http(s) addresses: few at a time from each host, waiting longer after each failure.

Sizes, times and addresses have limits, because catalogs come from outside.
"""

import math
import random
import socket
import time
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError, SSLError

from covergenre.addresses import redacted
from covergenre.covers import MAX_BYTES, CoverError

_ATTEMPTS = 6
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 15.0
_TIMEOUT = urllib3.Timeout(connect=5.0, read=15.0)
_SECONDS_A_COVER = 60.0
"""A server that sends a byte now and then never runs into the timeout of a read."""
_DOWN_SECONDS = 10.0
_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_WORTH_TRYING_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class _RefusedError(HTTPError):
    """The address must not be asked."""


class _AgainError(Exception):
    """The attempt failed, the next may not."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


def is_web(cover: str) -> bool:
    """Whether a cover is an http(s) address."""
    return cover[:8].lower().startswith(("http://", "https://"))


@lru_cache
def web_covers(in_flight: int, allow_private: bool) -> Callable[[str], bytes]:
    """A function from an http(s) address to a cover's bytes; it raises CoverError.

    in_flight: requests at a time to one host. allow_private: also ask addresses of private
    networks and of this machine (link-local ones, where clouds keep credentials, never).
    """
    pool = _pool(in_flight, allow_private)
    failed: dict[str, float] = {}  # host -> when it last failed at every attempt

    def fetch(url: str) -> bytes:
        host = url.split("/")[2]
        began = time.monotonic()
        deadline = began + _SECONDS_A_COVER
        # A host that is gone is not asked over and over for each of its covers.
        is_down = began - failed.get(host, -math.inf) < _DOWN_SECONDS
        for attempt in range(1 if is_down else _ATTEMPTS):
            try:
                return _attempt(pool, url, deadline)
            except _AgainError as error:
                why = str(error)
                # Full jitter: workers that were refused together do not come back together.
                longest = min(_FIRST_WAIT_SECONDS * 2**attempt, _LONGEST_WAIT_SECONDS)
                wait = max(random.uniform(0, longest), error.wait)
                if time.monotonic() + wait > deadline:
                    break
                time.sleep(wait)
        failed[host] = time.monotonic()
        raise CoverError("fetch_failed", f"{redacted(url)}: {why}")

    return fetch


def _attempt(pool: urllib3.PoolManager, url: str, deadline: float) -> bytes:
    retries = urllib3.Retry(total=_REDIRECTS, connect=0, read=0, status=0, other=0)
    try:
        response = pool.request(
            *("GET", url),
            headers=_headers(url),
            preload_content=False,
            retries=retries,
            timeout=_TIMEOUT,
        )
    except _RefusedError as error:
        raise CoverError("address_refused", f"{redacted(url)}: {error}") from error
    except MaxRetryError as error:
        if isinstance(error.reason, SSLError):
            raise CoverError("unreadable_file", f"{redacted(url)}: {error.reason}") from error
        raise _AgainError(str(error.reason)) from error
    except (LocationValueError, UnicodeError) as error:  # whose text is the address itself
        raise CoverError("unreadable_file", f"{redacted(url)}: no valid address") from error
    except HTTPError as error:
        raise _AgainError(str(error)) from error
    try:
        _check_status(url, response)
        return _body(url, response, deadline)
    except HTTPError as error:  # a body that is cut short, or stalls
        raise _AgainError(str(error)) from error
    finally:
        # One that was read to its end went back to the pool before; any other has to be made anew.
        response.close()
        response.release_conn()


def _headers(url: str) -> dict[str, str]:
    """urllib3 does not make use of a user and password in an address itself.

    It does leave them out again where a redirect leads to another host.
    """
    auth = urllib3.util.parse_url(url).auth
    basic = urllib3.make_headers(basic_auth=unquote(auth)) if auth else {}
    return {"User-Agent": "covergenre", **basic}


def _check_status(url: str, response: urllib3.BaseHTTPResponse) -> None:
    status = response.status
    if status == 200:
        return
    detail = f"{redacted(url)}: HTTP {status}"
    if status in _WORTH_TRYING_AGAIN:
        after = response.headers.get("Retry-After", "")
        raise _AgainError(f"HTTP {status}", float(after) if after.isdecimal() else 0.0)
    if status in (404, 410):
        raise CoverError("missing_file", detail)
    if status in (401, 403, 451):
        raise CoverError("access_denied", detail)
    raise CoverError("unreadable_file", detail)


def _body(url: str, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    data = bytearray()
    for chunk in response.stream(_CHUNK_BYTES, decode_content=True):
        data += chunk
        if len(data) > MAX_BYTES:
            raise CoverError("file_too_large", f"{redacted(url)}: over {MAX_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise CoverError("fetch_failed", f"{redacted(url)}: took over {_SECONDS_A_COVER:g} s")
    return bytes(data)


def _pool(in_flight: int, allow_private: bool) -> urllib3.PoolManager:
    """Connections whose address is looked at before they are made, after redirects too."""

    def connect(connection: HTTPConnection) -> socket.socket:
        host, port = connection.host.strip("[]"), connection.port or connection.default_port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(connection, str(error)) from error
        for *_, address in found:
            if not _may_ask(str(address[0]), allow_private):
                hint = "" if allow_private else "; --allow-private-addresses would ask it"
                raise _RefusedError(f"{address[0]} is not on the public internet{hint}")
        try:
            # By number: a second look-up of the name might give another address.
            timeout = connection.timeout
            return socket.create_connection(
                (str(found[0][4][0]), port), timeout if isinstance(timeout, float | int) else 5.0
            )
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(connection, str(error)) from error

    class Http(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self)

    class Https(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self)

    class HttpPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Http

    class HttpsPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Https

    pool = urllib3.PoolManager(maxsize=in_flight, block=True)
    pool.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
    return pool


def _may_ask(address: str, allow_private: bool) -> bool:
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    return ip.is_global or allow_private
