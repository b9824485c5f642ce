"""Covers over http: every answer of a server, from a real one on this machine."""

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from covergenre import fetch, ingest, schema
from covergenre.addresses import redacted
from covergenre.covers import CoverError
from covergenre.ingest import Cover, Source


class _Handler(BaseHTTPRequestHandler):
    """/status/N answers N; others are described in `do_GET`."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            turn = self.server.asked[self.path]
        try:
            self._answer(self.path.partition("?")[0].strip("/").split("/"), turn)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _answer(self, path: list[str], turn: int) -> None:
        kind = path[0]
        if kind == "status":
            self._send(int(path[1]))
        elif kind == "late":  # 503 twice, then the cover
            self._send(200 if turn > 2 else 503)
        elif kind == "reset":  # the connection is lost twice
            if turn <= 2:
                self.close_connection = True
                return
            self._send(200)
        elif kind == "short":  # a body that is cut short, once
            self._send(200, claimed=9 if turn == 1 else None)
            self.close_connection = turn == 1
        elif kind == "large":
            self._send(200, b"x" * 3000)
        elif kind == "endless":  # no length is told
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
        elif kind == "inside":  # a redirect to where clouds keep credentials
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "private":  # wants a user and a password
            known = self.headers.get("Authorization") == "Basic dXNlcjpwQHNz"  # user:p@ss
            self._send(200 if known else 401)
        elif kind == "together":  # answers only when two are here at once
            self.server.barrier.wait(timeout=10)
            self._send(200)
        else:
            self._send(200)

    def _send(self, status: int, body: bytes = b"cover", claimed: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(claimed or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.barrier = threading.Barrier(2)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has read enough goes away


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(fetch, "_FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(fetch, "MAX_BYTES", 2000)
    fetch.web_covers.cache_clear()
    with _Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    fetch.web_covers.cache_clear()


def address(server: _Server, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.server_address[1]}/{path}"


def get(url: str, allow_private: bool = True) -> bytes | str:
    """The bytes, or the reason."""
    try:
        return fetch.web_covers(4, allow_private)(url)
    except CoverError as error:
        assert error.reason in schema.REASONS
        assert error.detail.startswith(f"{redacted(url)}: ") and "\n" not in error.detail
        return error.reason


@pytest.mark.parametrize(
    ("path", "expected", "asked"),
    [
        ("cover.jpg", b"cover", 1),
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
        ("short", b"cover", 2),
        ("large", "file_too_large", 1),
        ("endless", "file_too_large", 1),
        ("to/cover.jpg", b"cover", 1),
        ("to", "fetch_failed", 36),  # to itself: six redirects, six times
    ],
)
def test_every_answer(server: _Server, path: str, expected: bytes | str, asked: int) -> None:
    assert get(address(server, path)) == expected
    assert server.asked[f"/{path}"] == asked


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://a b/x", "http://host:port/x", "https://\ud800/"]
)
def test_what_is_no_address(url: str) -> None:
    assert get(url) in ("unreadable_file", "fetch_failed")


@pytest.mark.parametrize("path", ["status/404", "status/403", "status/500", "large"])
def test_no_secret_of_an_address_is_told(server: _Server, path: str) -> None:
    url = address(server, f"{path}?token=hidden", host="user:hidden@127.0.0.1")
    for allow_private in (True, False):
        with pytest.raises(CoverError) as caught:
            fetch.web_covers(4, allow_private)(url)
        assert "hidden" not in str(caught.value) + repr(caught.value.__reduce__())


@pytest.mark.parametrize("url", ["http://user:hidden@[::1/x", "https://user:hidden@host:port/x"])
def test_no_secret_of_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(CoverError) as caught:
        fetch.web_covers(4, True)(url)
    assert "hidden" not in str(caught.value)


def test_a_user_and_password_in_an_address_are_used(server: _Server) -> None:
    assert get(address(server, "private", host="user:p%40ss@127.0.0.1")) == b"cover"
    assert get(address(server, "private", host="user:wrong@127.0.0.1")) == "access_denied"
    assert get(address(server, "private")) == "access_denied"


def test_nobody_there(server: _Server) -> None:
    url = address(server, "x")
    server.server_close()
    assert get(url) == "fetch_failed"


def test_a_host_that_is_down_is_asked_once_for_each_cover_until_later(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(address(server, "status/500")) == "fetch_failed"
    assert get(address(server, "status/502")) == "fetch_failed"
    assert get(address(server, "cover")) == b"cover"
    assert server.asked == {"/status/500": 6, "/status/502": 1, "/cover": 1}
    monkeypatch.setattr(fetch, "_DOWN_SECONDS", 0.0)
    assert get(address(server, "status/503")) == "fetch_failed"
    assert server.asked["/status/503"] == 6


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_private_address_is_not_asked_unless_allowed(server: _Server, host: str) -> None:
    assert get(address(server, "x", host), allow_private=False) == "address_refused"
    assert not server.asked
    assert get(address(server, "x", host)) == b"cover"


def test_a_redirect_does_not_lead_to_a_clouds_credentials(server: _Server) -> None:
    assert get(address(server, "inside")) == "address_refused"


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
def test_which_addresses_may_be_asked(ip: str, public: bool, private: bool) -> None:
    assert fetch._may_ask(ip, allow_private=False) == public
    assert fetch._may_ask(ip, allow_private=True) == private


def test_covers_of_a_catalog_come_in_parallel_and_in_order(server: _Server) -> None:
    paths = ["together/a", "together/b", "status/404", "status/403", "x"] + ["cover"] * 20
    records = [
        {"row": n, "album_id": str(n), "cover": address(server, path)}
        for n, path in enumerate(paths)
    ]
    plan = ingest.plan(_table(records))
    source = Source(fetches=3, allow_private=True)
    ((_, outcomes),) = ingest.load(plan, source, len(records))
    shown = [o.data if isinstance(o, Cover) else getattr(o, "reason", None) for o in outcomes]
    assert shown == [b"cover"] * 2 + ["missing_file", "access_denied"] + [b"cover"] * 21
    assert server.most_at_once <= 3


def _table(records: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(records, schema=schema.CATALOG)
