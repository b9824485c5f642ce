"""Covers at http(s) URLs, from a server on this machine, and in data: URIs."""

import gzip
import os
import threading
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import brotli
import pytest
from backports import zstd
from rows import plan_table

from covergenre import __version__, schema
from covergenre.config import ScoreConfig
from covergenre.data import covers, http, http_addresses, http_encodings
from covergenre.data.covers import Cover, Source
from covergenre.data.image_decoding import CoverError
from covergenre.errors import ConfigError
from covergenre.io.urls import redacted


class _Handler(BaseHTTPRequestHandler):
    """/status/N responds with status N; other paths are described in `_respond`."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests[self.path] += 1
            self.server.concurrent += 1
            self.server.max_concurrent = max(self.server.max_concurrent, self.server.concurrent)
            attempt = self.server.requests[self.path]
        try:
            self._respond(self.path.partition("?")[0].strip("/").split("/"), attempt)
        finally:
            with self.server.lock:
                self.server.concurrent -= 1

    def _respond(self, path: list[str], attempt: int) -> None:
        kind = path[0]
        if kind == "status":
            self._send(int(path[1]))
        elif kind == "late":  # 503 twice, then the cover
            self._send(200 if attempt > 2 else 503)
        elif kind == "reset":  # the connection is lost twice
            if attempt <= 2:
                self.close_connection = True
                return
            self._send(200)
        elif kind == "truncated":  # a truncated body, once
            self._send(200, length=9 if attempt == 1 else None)
            self.close_connection = attempt == 1
        elif kind == "large":
            self._send(200, b"x" * 3000)
        elif kind == "endless":  # without a Content-Length
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b"x" * 1000)
            self.close_connection = True
        elif kind == "to":  # a redirect
            self.send_response(302)
            self.send_header("Location", "/" + "/".join(path[1:]) if len(path) > 1 else "/to")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "location" and self.path[10:] in self.server.locations:
            # a redirect to the location that the test has set, as Latin-1
            self.send_response(302)
            self.send_header("Location", self.server.locations[self.path[10:]])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "coded":  # with a Content-Encoding that was not requested
            coding, body = self.server.coded[path[1]]
            self.send_response(200)
            self.send_header("Content-Encoding", coding)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        elif kind == "agent":
            self._send(200, self.headers["User-Agent"].encode())
        elif kind == "metadata":  # a redirect to the address where clouds serve credentials
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "private":  # needs a user and a password
            known = self.headers.get("Authorization") == "Basic dXNlcjpwQHNz"  # user:p@ss
            self._send(200 if known else 401)
        elif kind == "together":  # responds only when there are two concurrent requests
            self.server.barrier.wait(timeout=10)
            self._send(200)
        else:
            self._send(200)

    def _send(self, status: int, body: bytes = b"cover", length: int | None = None) -> None:
        body = b"" if status == 204 else body
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.concurrent = self.max_concurrent = 0
        self.barrier = threading.Barrier(2)
        self.locations: dict[str, str] = {}
        self.coded: dict[str, tuple[str, bytes]] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client closes the connection when it has read enough


@pytest.fixture(autouse=True)
def no_proxy_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    http.web_covers.cache_clear()
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        server.shutdown()
        thread.join()
    http.web_covers.cache_clear()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(http, "_FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(http, "MAX_BYTES", 2000)
    running = _Server()
    with serving(running):
        yield running


def url_of(server: _Server, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.server_address[1]}/{path}"


def get(url: str, allow_private: bool = True) -> bytes | str:
    """The cover's bytes, or the reason for its rejection."""
    try:
        return http.web_covers(4, allow_private)(url)
    except CoverError as error:
        assert error.reason in schema.REASONS
        assert error.detail.startswith(f"{redacted(url)}: ") and "\n" not in error.detail
        return error.reason


def error_of(url: str, allow_private: bool = True) -> CoverError:
    with pytest.raises(CoverError) as caught:
        http.web_covers(4, allow_private)(url)
    return caught.value


@pytest.mark.parametrize(
    ("path", "expected", "requests"),
    [
        ("cover.jpg", b"cover", 1),
        ("status/203", b"cover", 1),
        ("status/204", "empty_file", 1),
        ("status/206", "unreadable_file", 1),
        ("status/302", "unreadable_file", 1),  # without a Location
        ("status/404", "missing_file", 1),
        ("status/410", "missing_file", 1),
        ("status/401", "access_denied", 1),
        ("status/403", "access_denied", 1),
        ("status/400", "unreadable_file", 1),
        ("status/500", "fetch_failed", 6),
        ("status/503", "fetch_failed", 6),
        ("status/429", "fetch_failed", 6),
        ("late", b"cover", 3),
        ("reset", b"cover", 3),
        ("truncated", b"cover", 2),
        ("large", "file_too_large", 1),
        ("endless", "file_too_large", 1),
        ("to/cover.jpg", b"cover", 1),
        ("to", "fetch_failed", 36),  # to itself: six redirects, six times
    ],
)
def test_outcome_of_every_response(
    server: _Server, path: str, expected: bytes | str, requests: int
) -> None:
    assert get(url_of(server, path)) == expected
    assert server.requests[f"/{path}"] == requests


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://a b/x", "http://host:port/x", "https://\ud800/"]
)
def test_invalid_url_is_rejected(url: str) -> None:
    assert get(url) in ("unreadable_file", "fetch_failed")


@pytest.mark.parametrize("path", ["status/404", "status/403", "status/500", "large"])
def test_error_does_not_contain_secrets_of_the_url(server: _Server, path: str) -> None:
    url = url_of(server, f"{path}?token=hidden", host="user:hidden@127.0.0.1")
    for allow_private in (True, False):
        error = error_of(url, allow_private)
        assert "hidden" not in str(error) + repr(error.__reduce__())


@pytest.mark.parametrize("url", ["http://user:hidden@[::1/x", "https://user:hidden@host:port/x"])
def test_error_does_not_contain_secrets_of_an_invalid_url(url: str) -> None:
    assert "hidden" not in str(error_of(url))


def test_user_and_password_in_a_url_are_sent(server: _Server) -> None:
    assert get(url_of(server, "private", host="user:p%40ss@127.0.0.1")) == b"cover"
    assert get(url_of(server, "private", host="user:wrong@127.0.0.1")) == "access_denied"
    assert get(url_of(server, "private")) == "access_denied"


def test_server_that_does_not_listen(server: _Server) -> None:
    url = url_of(server, "x")
    server.server_close()
    assert get(url) == "fetch_failed"


def test_host_that_is_down_gets_one_request_per_cover_for_a_while(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(url_of(server, "status/500")) == "fetch_failed"
    assert get(url_of(server, "status/502")) == "fetch_failed"
    assert get(url_of(server, "cover")) == b"cover"
    assert server.requests == {"/status/500": 6, "/status/502": 1, "/cover": 1}
    monkeypatch.setattr(http, "_DOWN_SECONDS", 0.0)
    assert get(url_of(server, "status/503")) == "fetch_failed"
    assert server.requests["/status/503"] == 6


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_private_address_gets_no_request_unless_allowed(server: _Server, host: str) -> None:
    assert get(url_of(server, "x", host), allow_private=False) == "address_refused"
    assert not server.requests
    assert get(url_of(server, "x", host)) == b"cover"


def test_redirect_to_the_credentials_of_a_cloud_is_refused(server: _Server) -> None:
    assert get(url_of(server, "metadata")) == "address_refused"


def test_flag_that_allows_private_addresses_is_in_errors_that_it_avoids() -> None:
    assert "--allow-private-addresses" in error_of("http://127.0.0.1/", False).detail
    assert "--allow-private-addresses" not in error_of("http://169.254.1.1/", False).detail


@pytest.mark.parametrize(
    ("ip", "public", "private"),
    [
        ("8.8.8.8", True, True),
        ("2001:4860:4860::8888", True, True),
        ("10.1.2.3", False, True),
        ("192.168.0.1", False, True),
        ("127.0.0.1", False, True),
        ("::1", False, True),
        ("fd00::1", False, True),
        ("::ffff:10.1.2.3", False, True),
        ("100.64.0.1", False, True),
        ("169.254.169.254", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("fe80::1%eth0", False, False),
        ("0.0.0.0", False, False),
        ("224.0.0.1", False, False),
    ],
)
def test_allowed_addresses(ip: str, public: bool, private: bool) -> None:
    assert http_addresses.is_allowed(ip, allow_private=False) == public
    assert http_addresses.is_allowed(ip, allow_private=True) == private


# Redirects


@pytest.mark.parametrize(
    ("location", "requested"),
    [
        ("/cover.jpg", "/cover.jpg"),
        ("cover.jpg", "/location/cover.jpg"),
        ("?a=1", "/location/x?a=1"),
        ("//127.0.0.1:{port}/cover.jpg", "/cover.jpg"),
        ("HTTP://127.0.0.1:{port}/cover.jpg", "/cover.jpg"),
        ("/a cover.jpg", "/a%20cover.jpg"),
        ("/\u00e0.jpg", "/%C3%A0.jpg"),
        ("/%C3%A0 \u00e0.jpg", "/%C3%A0%20%C3%A0.jpg"),
    ],
)
def test_location_is_resolved_and_percent_encoded(
    server: _Server, location: str, requested: str
) -> None:
    location = location.format(port=server.server_address[1])
    server.locations["x"] = location.encode().decode("latin-1")  # raw UTF-8 on the wire
    assert get(url_of(server, "location/x")) == b"cover"
    assert server.requests[requested] == 1


def test_location_in_latin_1_is_percent_encoded_byte_by_byte(server: _Server) -> None:
    server.locations["x"] = "/\u00fc.jpg"
    assert get(url_of(server, "location/x")) == b"cover"
    assert server.requests["/%FC.jpg"] == 1


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("ftp://127.0.0.1/x", "unsupported_scheme"),
        ("file:///etc/passwd", "unsupported_scheme"),
        ("data:image/png;base64,AAAA", "unsupported_scheme"),
        ("http://[::1", "unreadable_file"),
        ("http://169.254.1.1/x", "address_refused"),
        ("http://0xa9fe0101/x", "address_refused"),
    ],
)
def test_redirect_to_a_refused_url_is_rejected_without_a_retry(
    server: _Server, location: str, reason: str
) -> None:
    server.locations["x"] = location
    assert get(url_of(server, "location/x")) == reason
    assert server.requests == {"/location/x": 1}


def test_password_is_sent_to_the_same_host_only_after_a_redirect(server: _Server) -> None:
    port = server.server_address[1]
    server.locations["same"] = f"http://127.0.0.1:{port}/private"
    server.locations["other"] = f"http://localhost:{port}/private"
    server.locations["own"] = f"http://user:p%40ss@localhost:{port}/private"
    with_password = "user:p%40ss@127.0.0.1"
    assert get(url_of(server, "location/same", host=with_password)) == b"cover"
    assert get(url_of(server, "location/other", host=with_password)) == "access_denied"
    assert get(url_of(server, "location/own")) == b"cover"


# URLs


@pytest.mark.parametrize(
    ("path", "requested"),
    [
        ("a cover.jpg", "/a%20cover.jpg"),
        ("\u00e0.jpg?q=\u00e0 b", "/%C3%A0.jpg?q=%C3%A0%20b"),
        ("%C3%A0.jpg", "/%C3%A0.jpg"),
        ("x#fragment", "/x"),
    ],
)
def test_url_is_percent_encoded(server: _Server, path: str, requested: str) -> None:
    assert get(url_of(server, path)) == b"cover"
    assert server.requests == {requested: 1}


@pytest.mark.parametrize(
    ("host", "normal"),
    [
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        ("B%C3%BCcher.Example", "xn--bcher-kva.example"),
        ("127.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f.0.0.1", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("\uff11\uff12\uff17.0.0.1", "127.0.0.1"),
        ("%31%32%37.0.0.1", "127.0.0.1"),
        ("[0:0:0:0:0:0:0:1]", "[::1]"),
    ],
)
def test_host_is_normalised(host: str, normal: str) -> None:
    assert http._parse(f"http://{host}:8080/x").url == f"http://{normal}:8080/x"


# User-Agent


def test_user_agent_has_version_and_contact(server: _Server) -> None:
    url = url_of(server, "agent")
    assert http.web_covers(4, True)(url) == f"covergenre/{__version__}".encode()
    contact = "https://example.org/me; me@example.org"
    expected = f"covergenre/{__version__} (+{contact})".encode()
    assert http.web_covers(4, True, contact)(url) == expected
    rows = plan_table([{"album_id": "a", "cover": url}])
    ((_, (outcome,)),) = covers.load(rows, Source(allow_private=True, contact=contact), 1)
    assert isinstance(outcome, Cover) and outcome.data == expected


@pytest.mark.parametrize("contact", ["", " ", "a\nb", "a\r\nX: y", "m\u00fcller@example.org"])
def test_contact_that_is_not_valid_in_a_header_is_an_error(contact: str) -> None:
    with pytest.raises(ConfigError):
        ScoreConfig(model="m", catalog="c", out="o", contact=contact)


# Content encodings


def _raw_deflate(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


@pytest.mark.parametrize(
    ("coding", "encode"),
    [
        ("gzip", gzip.compress),
        ("X-GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", _raw_deflate),
        ("br", brotli.compress),
        ("zstd", zstd.compress),
        ("identity", bytes),
        ("aws-chunked", bytes),
        ("aws-chunked, gzip", gzip.compress),
        ("gzip, br", lambda data: brotli.compress(gzip.compress(data))),
        ("gzip", lambda data: gzip.compress(data[:2]) + gzip.compress(data[2:]) + b"\0\0"),
        ("zstd", lambda data: zstd.compress(data[:2]) + zstd.compress(data[2:])),
    ],
)
def test_response_is_decoded(server: _Server, coding: str, encode: Any) -> None:
    server.coded["x"] = (coding, encode(b"cover"))
    assert get(url_of(server, "coded/x")) == b"cover"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_response_that_is_not_in_its_encoding_is_rejected_without_a_retry(
    server: _Server, coding: str
) -> None:
    encode = {"gzip": gzip, "deflate": zlib, "br": brotli, "zstd": zstd}[coding].compress
    truncated = encode(os.urandom(500))[:-5]
    for name, body in (("plain", b"\xff\xd8\xff\xe0 a JPEG"), ("truncated", truncated)):
        server.coded[name] = (coding, body)
        assert get(url_of(server, f"coded/{name}")) == "unreadable_file"
        assert server.requests[f"/coded/{name}"] == 1


def test_error_has_an_unknown_content_encoding(server: _Server) -> None:
    server.coded["x"] = ("rot13", b"cover")
    error = error_of(url_of(server, "coded/x"))
    assert error.reason == "unreadable_file" and "'rot13'" in error.detail


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_size_limit_applies_to_decoded_bytes(server: _Server, coding: str) -> None:
    encode = {"gzip": gzip, "deflate": zlib, "br": brotli, "zstd": zstd}[coding].compress
    for size, expected in ((2000, bytes(2000)), (2001, "file_too_large"), (10**7, None)):
        server.coded[str(size)] = (coding, encode(bytes(size)))
        assert http_encodings.decoded(encode(bytes(1999)), coding, 2000) == bytes(1999)
        if expected is None:  # a bomb; it may be over the limit in its encoded form
            expected = "file_too_large"
        assert get(url_of(server, f"coded/{size}")) == expected


# Proxies


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_ProxyServer"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Proxy-Authorization")))
        if "redirect" in self.path:
            self.send_response(302)
            self.send_header("Location", self.server.location)
            body = b""
        else:
            self.send_response(self.server.status)
            body = b"by proxy"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Proxy-Authorization")))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.requests: list[tuple[str, str | None]] = []
        self.status = 200
        self.location = ""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[_ProxyServer]:
    monkeypatch.setattr(http, "_FIRST_WAIT_SECONDS", 0.001)
    running = _ProxyServer()
    with serving(running):
        yield running


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_proxy_resolves_names(
    proxy: _ProxyServer, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    url = "http://covers.invalid/\u00e0.jpg"
    assert get(url, allow_private=False) == b"by proxy"
    assert proxy.requests == [("http://covers.invalid/%C3%A0.jpg", None)]


def test_user_and_password_of_the_proxy_are_sent_to_it(
    proxy: _ProxyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url.replace("://", "://user:p%40ss%E2%82%AC@"))
    assert get("http://covers.invalid/x") == b"by proxy"
    expected = "Basic " + b64encode("user:p@ss\u20ac".encode()).decode()
    assert proxy.requests == [("http://covers.invalid/x", expected)]


def test_hosts_in_no_proxy_are_requested_directly(
    proxy: _ProxyServer, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "example.org, 127.0.0.1")
    assert get(url_of(server, "x")) == b"cover"
    assert get("http://covers.invalid/x") == b"by proxy"
    assert [url for url, _ in proxy.requests] == ["http://covers.invalid/x"]


@pytest.mark.parametrize(
    "host",
    [
        *("10.1.2.3", "127.1", "0x7f000001", "2130706433", "017700000001", "[::1]"),
        *("[::ffff:10.1.2.3]", "[64:ff9b::10.1.2.3]", "\uff11\uff12\uff17.0.0.1"),
        *("localhost", "a.localhost", "127.0.0.1."),
    ],
)
def test_private_addresses_are_not_requested_from_the_proxy(
    proxy: _ProxyServer, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    proxy.location = f"http://{host.encode('idna').decode() if '[' not in host else host}/x"
    assert get(f"http://{host}/x", allow_private=False) == "address_refused"
    assert get("http://covers.invalid/redirect", allow_private=False) == "address_refused"
    assert [url for url, _ in proxy.requests] == ["http://covers.invalid/redirect"]
    assert get(f"http://{host}/x", allow_private=True) == b"by proxy"


def test_link_local_addresses_are_never_requested_from_the_proxy(
    proxy: _ProxyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    for host in ("169.254.169.254", "0xa9fea9fe", "[fe80::1%25eth0]", "[::ffff:169.254.169.254]"):
        assert get(f"http://{host}/x", allow_private=True) == "address_refused"
    assert not proxy.requests


@pytest.mark.parametrize(
    ("status", "reason", "requests"),
    [(407, "fetch_failed", 1), (403, "access_denied", 1), (502, "fetch_failed", 6)],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_error_responses_of_the_proxy(
    proxy: _ProxyServer,
    scheme: str,
    status: int,
    reason: str,
    requests: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", proxy.url.replace("://", "://user:hidden@"))
    monkeypatch.setenv("http_proxy", proxy.url.replace("://", "://user:hidden@"))
    proxy.status = status
    error = error_of(f"{scheme}://covers.invalid/x", allow_private=False)
    assert error.reason == reason
    assert f"127.0.0.1:{proxy.server_address[1]}" in error.detail
    assert "hidden" not in error.detail and "dXNlcjpoaWRkZW4" not in error.detail
    target = "covers.invalid:443" if scheme == "https" else "http://covers.invalid/x"
    assert proxy.requests == [(target, "Basic dXNlcjpoaWRkZW4=")] * requests


def test_error_has_a_proxy_that_does_not_respond(
    proxy: _ProxyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url.replace("://", "://user:hidden@"))
    proxy.server_close()
    for _ in range(2):
        error = error_of("http://covers.invalid/x", allow_private=False)
        assert error.reason == "fetch_failed"
        assert proxy.url.removeprefix("http://") in error.detail
        assert "Connection refused" in error.detail
        assert "hidden" not in error.detail


def test_error_has_an_invalid_proxy_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:hidden@:port")
    error = error_of("http://covers.invalid/x", allow_private=False)
    assert error.reason == "fetch_failed" and "http_proxy" in error.detail
    assert "hidden" not in str(error)


# data: URIs


@pytest.mark.parametrize(
    ("uri", "data"),
    [
        ("data:image/jpeg;base64,/9j/4AA=", b"\xff\xd8\xff\xe0\x00"),
        ("data:image/jpeg;base64,/9j/4AA", b"\xff\xd8\xff\xe0\x00"),  # no padding
        ("DATA:image/jpeg;BASE64,/9j/4AA=", b"\xff\xd8\xff\xe0\x00"),
        ("data:image/jpeg; base64,_9j_4AA", b"\xff\xd8\xff\xe0\x00"),  # the alphabet of URLs
        ("data:image/jpeg;base64,/9j/\r\n 4AA=\n", b"\xff\xd8\xff\xe0\x00"),
        ("data:image/jpeg;base64,%2F9j%2F4AA%3D", b"\xff\xd8\xff\xe0\x00"),
        ("data:;base64,/9j/4AA=", b"\xff\xd8\xff\xe0\x00"),
        ("data:image/gif,GIF89a%01%ff,x", b"GIF89a\x01\xff,x"),
        ("data:,", b""),
    ],
)
def test_data_uri_is_decoded(uri: str, data: bytes) -> None:
    assert http.data_cover(uri) == data


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png;base64,a", "unreadable_file"),
        ("data:image/png;base64,ab*d", "unreadable_file"),
        ("data:image/png;base64,\u00fcabc", "unreadable_file"),
        ("data:image/png;base64", "unreadable_file"),
        ("data:" + "A" * 20_000, "unreadable_file"),
        ("data:image/png;base64," + "A" * 20_001, "unreadable_file"),
        ("data:image/png;base64," + "A" * 20_480, "file_too_large"),
    ],
)
def test_error_of_an_invalid_data_uri_is_short(
    uri: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_BYTES", 10_000)
    with pytest.raises(CoverError) as caught:
        http.data_cover(uri)
    assert caught.value.reason == reason
    assert len(caught.value.detail) < 200


def test_redacted_data_uri_has_its_beginning_and_length() -> None:
    uri = "data:image/jpeg;base64," + "A" * 20_457
    assert redacted(uri) == "data:image/jpeg;base64,... (20,480 characters)"
    assert redacted("data:" + "x" * 100) == "data:" + "x" * 60 + "... (105 characters)"
    assert redacted("/9j/" + "A" * 20_000) == "/9j/" + "A" * 196 + "... (20,004 characters)"


def test_covers_are_downloaded_concurrently_and_returned_in_order(server: _Server) -> None:
    paths = ["together/a", "together/b", "status/404", "status/403", "x"] + ["cover"] * 20
    records = [
        {"row": n, "album_id": str(n), "cover": url_of(server, path)}
        for n, path in enumerate(paths)
    ]
    plan = plan_table(records)
    source = Source(download_concurrency=3, allow_private=True)
    ((_, outcomes),) = covers.load(plan, source, len(records))
    shown = [o.data if isinstance(o, Cover) else getattr(o, "reason", None) for o in outcomes]
    assert shown == [b"cover"] * 2 + ["missing_file", "access_denied"] + [b"cover"] * 21
    assert server.max_concurrent <= 3
