"""Covers at http(s) URLs, with limited concurrency for each host and retries, and in data: URIs.

Sizes, times and addresses are limited, because catalogs are untrusted input.
"""

import math
import re
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes, urljoin

import idna
import urllib3
from urllib3.exceptions import HTTPError, LocationValueError, ProxyError, SSLError
from urllib3.util import Url, parse_url

from covergenre import __version__
from covergenre.data.http_addresses import (
    AddressRefusedError,
    check_address,
    direct_pool,
    literal_address,
)
from covergenre.data.http_encodings import decoded
from covergenre.data.http_proxies import Proxy, basic_authorization, proxy_for
from covergenre.data.image_decoding import MAX_BYTES, CoverError
from covergenre.errors import ConfigError
from covergenre.io.retries import with_retries
from covergenre.io.urls import redacted

_ATTEMPTS = 6
_FIRST_WAIT_SECONDS = 0.5
_MAX_WAIT_SECONDS = 15.0
_TIMEOUT = urllib3.Timeout(connect=5.0, read=15.0)
_SECONDS_PER_COVER = 60.0
"""For all attempts together; the read timeout alone does not end a slow trickle of bytes."""
_DOWN_SECONDS = 10.0
"""For how long a host or proxy counts as down after a request failed at every attempt."""
_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED_STATUSES = (401, 403, 451)
_URL = re.compile(
    r"(https?)://(?:([^/?#\\]*)@)?(\[[^]]*\]|[^/?#\\:@]*)([^/?#\\]*)(.*)", re.I | re.S
)
_TUNNEL_FAILED = re.compile(r"Tunnel connection failed: (\d+)")
_ASCII = "".join(map(chr, range(33, 127)))


class _RetryableError(Exception):
    """The attempt failed; the next one may succeed."""

    def __init__(self, why: str, retry_after: float = 0.0, *, proxy: Proxy | None = None) -> None:
        """proxy: set if it is the proxy, not the cover's host, that does not respond."""
        super().__init__(why)
        self.retry_after = retry_after
        self.proxy = proxy


def is_web(cover: str) -> bool:
    """Whether a cover is an http(s) URL."""
    return cover[:8].lower().startswith(("http://", "https://"))


def is_data(cover: str) -> bool:
    """Whether a cover is a data: URI."""
    return cover[:5].lower() == "data:"


def data_cover(uri: str) -> bytes:
    """The content of a data: URI. Raises CoverError."""
    head, comma, text = uri.partition(",")
    if not comma:
        raise CoverError("unreadable_file", f"{redacted(uri)}: invalid data: URI (no comma)")
    data = unquote_to_bytes(text)
    if head.rpartition(";")[2].strip().lower() == "base64":
        # Padding is optional, and the alphabet may be that of base64url.
        data = re.sub(rb"[\s=]+", b"", data).translate(bytes.maketrans(b"-_", b"+/"))
        try:
            data = b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except ValueError as error:
            raise CoverError("unreadable_file", f"{redacted(uri)}: invalid base64") from error
    if len(data) > MAX_BYTES:
        raise CoverError("file_too_large", f"{redacted(uri)}: over {MAX_BYTES:,} bytes")
    return data


@lru_cache
def web_covers(
    in_flight: int, allow_private: bool, contact: str | None = None
) -> Callable[[str], bytes]:
    """A function from an http(s) URL to a cover's bytes; it raises CoverError.

    in_flight: concurrent requests to one host. allow_private: also send requests to addresses of
    private networks and of this machine; never to link-local ones, where clouds serve credentials.
    contact: sent in User-Agent. Proxies are taken from the environment; see http_proxies.py.
    """
    pools = _Pools(in_flight, allow_private)
    agent = f"covergenre/{__version__}" + (f" (+{contact})" if contact else "")
    failed: dict[str, float] = {}  # host or proxy -> when it last failed at every attempt

    def is_down(host: str) -> bool:
        return time.monotonic() - failed.get(host, -math.inf) < _DOWN_SECONDS

    def fetch(url: str) -> bytes:
        target = _parse(url)
        proxy = proxy_for(str(target.scheme), str(target.host), target.port)
        host = str(target.netloc)
        deadline = time.monotonic() + _SECONDS_PER_COVER
        # A host that is down gets one attempt for each of its covers.
        down = is_down(host) or (proxy is not None and is_down(proxy.url))
        try:
            return with_retries(
                lambda: _attempt(pools, target, agent, deadline),
                lambda error: isinstance(error, _RetryableError),
                first_wait=_FIRST_WAIT_SECONDS,
                max_wait=_MAX_WAIT_SECONDS,
                timeout=_SECONDS_PER_COVER,
                max_attempts=1 if down else _ATTEMPTS,
                min_wait=lambda error: getattr(error, "retry_after", 0.0),
            )
        except _RetryableError as error:
            failed[error.proxy.url if error.proxy else host] = time.monotonic()
            raise

    def fetch_or_reject(url: str) -> bytes:
        try:
            return fetch(url)
        except (CoverError, ConfigError, HTTPError, UnicodeError, _RetryableError) as error:
            reason, detail = _rejection(error)
            raise CoverError(reason, f"{redacted(url)}: {detail}") from error

    return fetch_or_reject


def _rejection(error: Exception) -> tuple[str, str]:
    """(reason, detail) of the rejection of a cover whose download raised `error`."""
    match error:
        case CoverError():
            return error.reason, error.detail
        case AddressRefusedError():
            return "address_refused", str(error)
        case LocationValueError() | UnicodeError():  # their text is the URL, secrets included
            return "unreadable_file", "invalid URL"
        case SSLError():
            return "unreadable_file", str(error)
    return "fetch_failed", str(error)


class _Pools:
    """Connection pools: direct ones, and one for each proxy."""

    def __init__(self, in_flight: int, allow_private: bool) -> None:
        self._in_flight = in_flight
        self._allow_private = allow_private
        self._direct = direct_pool(in_flight, allow_private)
        self._lock = threading.Lock()
        self._proxied: dict[Proxy, urllib3.ProxyManager] = {}

    def of(self, target: Url) -> tuple[urllib3.PoolManager, Proxy | None]:
        """(connections to `target`, the proxy they use).

        Raises AddressRefusedError and ConfigError.
        """
        host = str(target.host)
        proxy = proxy_for(str(target.scheme), host, target.port)
        if proxy is None:
            return self._direct, None  # it checks the address when it connects
        # The proxy resolves names, so only hosts that are IP addresses can be checked here, and
        # localhost, which is the resolving machine itself.
        is_localhost = host == "localhost" or host.endswith(".localhost")
        address = "127.0.0.1" if is_localhost else literal_address(host)
        if address is not None:
            check_address(address, self._allow_private)
        with self._lock:
            if proxy not in self._proxied:
                auth = proxy.authorization
                self._proxied[proxy] = urllib3.ProxyManager(
                    proxy.url,
                    proxy_headers={"Proxy-Authorization": auth} if auth else None,
                    maxsize=self._in_flight,
                    block=True,
                )
            return self._proxied[proxy], proxy


def _attempt(pools: _Pools, target: Url, agent: str, deadline: float) -> bytes:
    """The content of the URL `target`; redirects are followed."""
    auth = target.auth
    for _ in range(_REDIRECTS + 1):
        headers = {"User-Agent": agent}
        if auth:
            headers["Authorization"] = basic_authorization(auth)
        response, proxy = _request(pools, target, headers)
        try:
            if location := response.get_redirect_location():
                response.read1(_CHUNK_BYTES, decode_content=False)
                before, target = target, _redirected(target, location)
                if target.auth or _origin(target) != _origin(before):
                    auth = target.auth  # a password is sent to its own host only
                continue
            _check_status(response, proxy)
            encoding = response.headers.get("Content-Encoding", "")
            return decoded(_body(response, deadline), encoding, MAX_BYTES)
        except HTTPError as error:  # a body that is truncated, or stalls
            raise _RetryableError(f"{error}{_via(proxy)}") from error
        finally:
            # A connection whose response was read to its end is in the pool already; any other
            # cannot be used again.
            response.close()
            response.release_conn()
    raise _RetryableError(f"more than {_REDIRECTS} redirects")


def _request(
    pools: _Pools, target: Url, headers: dict[str, str]
) -> tuple[urllib3.BaseHTTPResponse, Proxy | None]:
    """(response to a GET request, the proxy that was used)."""
    proxy = None
    try:
        pool, proxy = pools.of(target)
        response = pool.request(
            *("GET", target._replace(auth=None).url),
            headers=headers,
            preload_content=False,
            redirect=False,
            retries=False,
            timeout=_TIMEOUT,
        )
    except (AddressRefusedError, LocationValueError, SSLError):
        raise  # another attempt would fail, too
    except ProxyError as error:
        assert proxy is not None
        if match := _TUNNEL_FAILED.search(str(error)):
            _check_proxy_status(int(match[1]), proxy)
        cause = error.original_error.__cause__ or error.original_error
        why = getattr(cause, "strerror", None) or str(cause)
        raise _RetryableError(
            f"the proxy {proxy.host} does not respond: {why}", proxy=proxy
        ) from error
    except HTTPError as error:
        raise _RetryableError(f"{error}{_via(proxy)}") from error
    if proxy and response.status == 407:
        response.close()
        _check_proxy_status(response.status, proxy)
    return response, proxy


def _via(proxy: Proxy | None) -> str:
    return f" through the proxy {proxy.host}" if proxy else ""


def _check_proxy_status(status: int, proxy: Proxy) -> None:
    """Raises for the response of a proxy that did not forward the request."""
    answer = f"the proxy {proxy.host} responds HTTP {status}"
    if status == 407:
        hint = "set its user and password in the variable: http://USER:PASSWORD@HOST:PORT"
        raise CoverError("fetch_failed", f"{answer}; {hint}")
    if status in _DENIED_STATUSES:
        raise CoverError("access_denied", answer)
    raise _RetryableError(answer)


def _parse(url: str) -> Url:
    """The http(s) `url` in ASCII: the host by IDNA, the rest percent-encoded.

    IP addresses in any notation (127.1, 0x7f000001) are normalized, so that the address that is
    checked is the one that is used. Raises LocationValueError or UnicodeError.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise LocationValueError("not an http(s) URL")
    scheme, userinfo, host, port, rest = match.groups()
    if not host.startswith("["):
        host = unquote(host)
        if not host.isascii():
            host = idna.encode(host, uts46=True).decode()
    if (address := literal_address(host)) is not None:
        host = f"[{address}]" if address.version == 6 else str(address)
    user = "" if userinfo is None else f"{userinfo}@"
    parsed = parse_url(f"{scheme}://{user}{host}{port}{rest}")
    if not parsed.host:
        raise LocationValueError("no host")
    return parsed._replace(fragment=None)


def _redirected(target: Url, location: str) -> Url:
    """The URL of `location`, the header of a response from `target`."""
    # http.client decodes headers as Latin-1; some servers send UTF-8.
    raw = location.encode("latin-1")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = quote_from_bytes(raw, safe=_ASCII)
    text = text.strip(" \t")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if scheme and scheme[1].lower() not in ("http", "https"):
        raise CoverError("unsupported_scheme", f"redirects to {scheme[1].lower()}:, not to http(s)")
    try:
        return _parse(urljoin(target.url, text))
    except ValueError as error:  # of urljoin; UnicodeError and LocationValueError are ValueErrors
        raise CoverError("unreadable_file", "redirects to an invalid URL") from error


def _origin(target: Url) -> tuple[str | None, str | None, int | None]:
    return target.scheme, target.host, target.port


def _check_status(response: urllib3.BaseHTTPResponse, proxy: Proxy | None) -> None:
    status = response.status
    if status in (200, 203):  # 203: changed by a proxy, for example to a smaller image
        return
    answer = f"HTTP {status}{_via(proxy)}"
    if status in _RETRYABLE_STATUSES:
        after = response.headers.get("Retry-After", "")
        raise _RetryableError(answer, float(after) if after.isdecimal() else 0.0)
    if status in (404, 410):
        raise CoverError("missing_file", answer)
    if status in _DENIED_STATUSES:
        raise CoverError("access_denied", answer)
    if status in (204, 205):
        raise CoverError("empty_file", answer)
    more = ", a partial response; no range was requested" if status == 206 else ""
    raise CoverError("unreadable_file", f"{answer}{more}")


def _body(response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """The body, not yet decoded."""
    data = bytearray()
    while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
        data += chunk
        if len(data) > MAX_BYTES:
            raise CoverError("file_too_large", f"over {MAX_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise CoverError("fetch_failed", f"took over {_SECONDS_PER_COVER:g} s")
    return bytes(data)
