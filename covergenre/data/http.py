"""Covers at http(s) URLs, with limited concurrency for each host and retries, and in data: URIs.

Sizes, times and addresses are limited, because catalogs are untrusted input.
"""

import math
import re
import socket
import threading
import time
import zlib
from base64 import b64decode
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes, urljoin

import idna
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationValueError, ProxyError, SSLError
from urllib3.util import Url, parse_url

from covergenre import __version__
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
_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED = (401, 403, 451)
_NO_ENCODING = frozenset({"", "identity", "none", "binary", "utf-8", "aws-chunked"})
"""Content-Encodings that mean no encoding: none, and values that servers send by mistake (S3 keeps
aws-chunked, the encoding of the upload)."""
_URL = re.compile(
    r"(https?)://(?:([^/?#\\]*)@)?(\[[^]]*\]|[^/?#\\:@]*)([^/?#\\]*)(.*)", re.I | re.S
)
_NAT64 = IPv6Network("64:ff9b::/96")
_TUNNEL_FAILED = re.compile(r"Tunnel connection failed: (\d+)")
_ASCII = "".join(map(chr, range(33, 127)))


class _RefusedError(HTTPError):
    """Requests to this address are not allowed."""


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
        raise CoverError("unreadable_file", f"{redacted(uri)}: not a valid data: URI (no comma)")
    data = unquote_to_bytes(text)
    if head.rpartition(";")[2].strip().lower() == "base64":
        # Padding is optional, and the alphabet may be that of base64url.
        data = re.sub(rb"[\s=]+", b"", data).translate(bytes.maketrans(b"-_", b"+/"))
        try:
            data = b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except ValueError as error:
            raise CoverError("unreadable_file", f"{redacted(uri)}: not valid base64") from error
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
        try:
            target = _parse(url)
            proxy = proxy_for(str(target.scheme), str(target.host), target.port)
        except (LocationValueError, UnicodeError) as error:  # its text is the URL
            raise CoverError("unreadable_file", f"{redacted(url)}: not a valid URL") from error
        except ConfigError as error:
            raise CoverError("fetch_failed", f"{redacted(url)}: {error}") from error
        host = str(target.netloc)
        deadline = time.monotonic() + _SECONDS_PER_COVER
        # A host that is down gets one attempt for each of its covers.
        down = is_down(host) or (proxy is not None and is_down(proxy.url))
        try:
            return with_retries(
                lambda: _attempt(pools, url, target, agent, deadline),
                lambda error: isinstance(error, _RetryableError),
                first_wait=_FIRST_WAIT_SECONDS,
                max_wait=_MAX_WAIT_SECONDS,
                timeout=_SECONDS_PER_COVER,
                max_attempts=1 if down else _ATTEMPTS,
                min_wait=lambda error: getattr(error, "retry_after", 0.0),
            )
        except _RetryableError as error:
            failed[error.proxy.url if error.proxy else host] = time.monotonic()
            raise CoverError("fetch_failed", f"{redacted(url)}: {error}") from error

    return fetch


class _Pools:
    """Connection pools: direct ones, and one for each proxy."""

    def __init__(self, in_flight: int, allow_private: bool) -> None:
        self._in_flight = in_flight
        self._allow_private = allow_private
        self._direct = _direct_pool(in_flight, allow_private)
        self._lock = threading.Lock()
        self._proxied: dict[Proxy, urllib3.ProxyManager] = {}

    def of(self, target: Url) -> tuple[urllib3.PoolManager, Proxy | None]:
        """(connections to `target`, the proxy they use). Raises _RefusedError and ConfigError."""
        host = str(target.host)
        proxy = proxy_for(str(target.scheme), host, target.port)
        if proxy is None:
            return self._direct, None  # it checks the address when it connects
        # The proxy resolves names; hosts that are IP addresses are checked here.
        if (address := _literal_address(host)) is not None:
            _check_address(address, self._allow_private)
        elif host == "localhost" or host.endswith(
            ".localhost"
        ):  # a machine itself, to any resolver
            _check_address("127.0.0.1", self._allow_private)
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


def _attempt(pools: _Pools, url: str, target: Url, agent: str, deadline: float) -> bytes:
    """The content of `url`, which was parsed as `target`; redirects are followed."""
    auth = target.auth
    for _ in range(_REDIRECTS + 1):
        headers = {"User-Agent": agent}
        if auth:
            headers["Authorization"] = basic_authorization(auth)
        response, proxy = _ask(pools, url, target, headers)
        try:
            if location := response.get_redirect_location():
                response.read1(_CHUNK_BYTES, decode_content=False)
                before, target = target, _redirected(url, target, location)
                if target.auth or _origin(target) != _origin(before):
                    auth = target.auth  # a password goes to its own host only
                continue
            _check_status(url, response, proxy)
            return _decoded(url, response, _body(url, response, deadline))
        except HTTPError as error:  # a body that is truncated, or stalls
            raise _RetryableError(f"{error}{_via(proxy)}") from error
        finally:
            # A connection whose response was read to its end is in the pool already; any other
            # cannot be used again.
            response.close()
            response.release_conn()
    raise _RetryableError(f"more than {_REDIRECTS} redirects")


def _ask(
    pools: _Pools, url: str, target: Url, headers: dict[str, str]
) -> tuple[urllib3.BaseHTTPResponse, Proxy | None]:
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
    except ConfigError as error:
        raise CoverError("fetch_failed", f"{redacted(url)}: {error}") from error
    except _RefusedError as error:
        raise CoverError("address_refused", f"{redacted(url)}: {error}") from error
    except (LocationValueError, UnicodeError) as error:  # its text is the URL
        raise CoverError("unreadable_file", f"{redacted(url)}: not a valid URL") from error
    except SSLError as error:
        raise CoverError("unreadable_file", f"{redacted(url)}: {error}") from error
    except ProxyError as error:
        assert proxy is not None
        if match := _TUNNEL_FAILED.search(str(error)):
            _check_proxy_status(url, int(match[1]), proxy)
        cause = error.original_error.__cause__ or error.original_error
        why = getattr(cause, "strerror", None) or str(cause)
        raise _RetryableError(
            f"the proxy {proxy.host} does not respond: {why}", proxy=proxy
        ) from error
    except HTTPError as error:
        raise _RetryableError(f"{error}{_via(proxy)}") from error
    if proxy and response.status == 407:
        response.close()
        _check_proxy_status(url, response.status, proxy)
    return response, proxy


def _via(proxy: Proxy | None) -> str:
    return f" through the proxy {proxy.host}" if proxy else ""


def _check_proxy_status(url: str, status: int, proxy: Proxy) -> None:
    """Raises for the response of a proxy that did not forward the request."""
    answer = f"the proxy {proxy.host} responds HTTP {status}"
    if status == 407:
        hint = "set its user and password in the variable: http://USER:PASSWORD@HOST:PORT"
        raise CoverError("fetch_failed", f"{redacted(url)}: {answer}; {hint}")
    if status in _DENIED:
        raise CoverError("access_denied", f"{redacted(url)}: {answer}")
    raise _RetryableError(answer)


def _parse(url: str) -> Url:
    """The http(s) `url` in ASCII: the host by IDNA, the rest percent-encoded.

    IP addresses in any notation (127.1, 0x7f000001) are normalised, so that the address that is
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
    if (address := _literal_address(host)) is not None:
        host = f"[{address}]" if address.version == 6 else str(address)
    user = "" if userinfo is None else f"{userinfo}@"
    parsed = parse_url(f"{scheme}://{user}{host}{port}{rest}")
    if not parsed.host:
        raise LocationValueError("no host")
    return parsed._replace(fragment=None)


def _redirected(url: str, target: Url, location: str) -> Url:
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
        raise CoverError(
            "unsupported_scheme",
            f"{redacted(url)}: redirects to {scheme[1].lower()}:, not http(s)",
        )
    try:
        return _parse(urljoin(target.url, text))
    except ValueError as error:  # of urljoin; UnicodeError and LocationValueError are ValueErrors
        raise CoverError(
            "unreadable_file", f"{redacted(url)}: redirects to an invalid URL"
        ) from error


def _origin(target: Url) -> tuple[str | None, str | None, int | None]:
    return target.scheme, target.host, target.port


def _check_status(url: str, response: urllib3.BaseHTTPResponse, proxy: Proxy | None) -> None:
    status = response.status
    if status in (200, 203):  # 203: changed by a proxy, for example to a smaller image
        return
    answer = f"HTTP {status}{_via(proxy)}"
    detail = f"{redacted(url)}: {answer}"
    if status in _RETRYABLE_STATUSES:
        after = response.headers.get("Retry-After", "")
        raise _RetryableError(answer, float(after) if after.isdecimal() else 0.0)
    if status in (404, 410):
        raise CoverError("missing_file", detail)
    if status in _DENIED:
        raise CoverError("access_denied", detail)
    if status in (204, 205):
        raise CoverError("empty_file", detail)
    if status == 206:
        raise CoverError("unreadable_file", f"{detail}: a partial response to a request for all")
    raise CoverError("unreadable_file", detail)


def _body(url: str, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """The body, not yet decoded."""
    data = bytearray()
    while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
        data += chunk
        if len(data) > MAX_BYTES:
            raise _too_large(url)
        if time.monotonic() > deadline:
            raise CoverError("fetch_failed", f"{redacted(url)}: took over {_SECONDS_PER_COVER:g} s")
    return bytes(data)


def _too_large(url: str) -> CoverError:
    return CoverError("file_too_large", f"{redacted(url)}: over {MAX_BYTES:,} bytes")


def _decoded(url: str, response: urllib3.BaseHTTPResponse, data: bytes) -> bytes:
    """`data` without the content encodings of `response`: some servers apply them unrequested.

    Decoding stops at the size limit of covers, so that a small body cannot expand without bound.
    """
    codings = response.headers.get("Content-Encoding", "").lower().split(",")
    for coding in reversed([coding.strip() for coding in codings]):
        if coding in _NO_ENCODING or not data:
            continue
        if coding not in _DECODERS:
            raise CoverError(
                "unreadable_file", f"{redacted(url)}: unknown Content-Encoding {coding[:40]!r}"
            )
        try:
            data = _DECODERS[coding](data, MAX_BYTES)
        except _TooLongError as error:
            raise _too_large(url) from error
        except (EOFError, zlib.error) as error:
            raise CoverError(
                "unreadable_file", f"{redacted(url)}: not in its Content-Encoding, {coding}"
            ) from error
    return data


class _TooLongError(Exception):
    """The decoded data is over the limit."""


# Decoders raise EOFError or zlib.error if the data is not in their encoding.


def _gunzip(data: bytes, limit: int) -> bytes:
    found = bytearray()
    while True:  # a file may have several members, and trailing garbage
        member = zlib.decompressobj(wbits=31)
        found += member.decompress(data, limit + 1 - len(found))
        _check_ended(len(found), limit, member.eof)
        data = member.unused_data
        if not data.startswith(b"\x1f\x8b"):
            return bytes(found)


def _inflate(data: bytes, limit: int) -> bytes:
    def inflate(wbits: int) -> bytes:
        stream = zlib.decompressobj(wbits)
        found = stream.decompress(data, limit + 1)
        _check_ended(len(found), limit, stream.eof)
        return found

    try:
        return inflate(zlib.MAX_WBITS)
    except zlib.error:  # some servers leave out the zlib header
        return inflate(-zlib.MAX_WBITS)


def _unbrotli(data: bytes, limit: int) -> bytes:
    import brotli

    stream = brotli.Decompressor()
    try:
        found = bytearray(stream.process(data, output_buffer_limit=limit + 1))
        while len(found) <= limit and not stream.can_accept_more_data():
            found += stream.process(b"", output_buffer_limit=limit + 1)
    except brotli.error as error:
        raise EOFError from error
    _check_ended(len(found), limit, stream.is_finished())
    return bytes(found)


def _unzstd(data: bytes, limit: int) -> bytes:
    from backports import zstd

    found = bytearray()
    while data:  # a file may have several frames
        frame = zstd.ZstdDecompressor()
        try:
            found += frame.decompress(data, limit + 1 - len(found))
        except zstd.ZstdError as error:
            raise EOFError from error
        _check_ended(len(found), limit, frame.eof)
        data = frame.unused_data
    return bytes(found)


def _check_ended(length: int, limit: int, ended: bool) -> None:
    if length > limit:
        raise _TooLongError
    if not ended:
        raise EOFError


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "deflate": _inflate,
    "br": _unbrotli,
    "zstd": _unzstd,
}


def _direct_pool(in_flight: int, allow_private: bool) -> urllib3.PoolManager:
    """Connections that check the address before they are made, also after redirects."""

    def connect(connection: HTTPConnection) -> socket.socket:
        host, port = connection.host.strip("[]"), connection.port or connection.default_port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(connection, str(error)) from error
        for *_, address in found:
            _check_address(address[0], allow_private)
        try:
            # By address: resolving the name again might give another one.
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


def _literal_address(host: str) -> IPv4Address | IPv6Address | None:
    """The IP address that a URL's `host` is, in any notation; None for a name."""
    host = host.strip("[]").rstrip(".").partition("%")[0]
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def _check_address(address: object, allow_private: bool) -> None:
    if not _is_allowed(str(address), allow_private):
        hint = "" if allow_private else "; to allow it, use --allow-private-addresses"
        raise _RefusedError(f"{address} is not a public address{hint}")


def _is_allowed(address: str, allow_private: bool) -> bool:
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or ip
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    return ip.is_global or allow_private
