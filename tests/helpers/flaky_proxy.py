"""A proxy for an S3 store that makes one request in five fail, in different ways.

    python flaky_proxy.py http://127.0.0.1:9000 [--one-in 5] [--seed 0]

prints its URL and, after Ctrl-C, the number of faults per kind of request. Every 40 requests of a
kind have the same faults, in an order that depends on the seed:

    slow_down     503 SlowDown
    reset         the connection is reset before the request reaches the store
    lost          the store processes the request; then the connection is reset
    stall         the request does not reach the store; no response until the client gives up
    lost_stall    the store processes the request; no response until the client gives up
    short         the body of the response is cut in half (`lost` if it has none)
"""

import argparse
import http.client
import random
import select
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

FAULTS = ("slow_down", "slow_down", "reset", "lost", "stall", "lost_stall", "short", "short")
_ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0}</Message></Error>"
_HOP_BY_HOP_HEADERS = {"connection", "expect", "keep-alive", "transfer-encoding"}


class FlakyProxy:
    """Serves on 127.0.0.1 in its `with` block."""

    def __init__(
        self, upstream: str, *, one_in: int = 5, seed: int = 0, stall_seconds: float = 3600
    ) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.one_in = one_in
        """0: no random faults."""
        self.refused: dict[str, str] = {}
        """Access key -> error code of all responses to its requests."""
        self.next: dict[str, list[str]] = defaultdict(list)
        """Kind of request -> faults of the next requests ("": none), before random faults."""
        self.keyed: Counter[tuple[str, bool]] = Counter()
        """(kind of request, whether it had a customer-provided key) -> number of requests."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """(kind of request, fault or "") -> number of requests."""
        self.stall_seconds = stall_seconds
        """Maximum duration of a stall."""
        self.over = threading.Event()
        self._random = random.Random(seed)
        self._decks: dict[str, list[str]] = defaultdict(list)
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self._server.server_address)

    def __enter__(self) -> "FlakyProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def faults(self) -> Counter[str]:
        """Fault -> number of requests of all kinds."""
        found: Counter[str] = Counter()
        for (_, fault), number in self.counts.items():
            if fault:
                found[fault] += number
        return found

    def draw(self, kind: str) -> str:
        """The fault of the next request of this kind; "": none."""
        with self._lock:
            if self.next[kind]:
                return self.next[kind].pop(0)
            deck = self._decks[kind]
            if not deck and self.one_in:
                deck += [*FAULTS, *[""] * (len(FAULTS) * (self.one_in - 1))]
                self._random.shuffle(deck)
            return deck.pop() if self.one_in else ""

    def count(self, kind: str, fault: str, is_keyed: bool) -> None:
        with self._lock:
            self.counts[kind, fault] += 1
            self.keyed[kind, is_keyed] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FlakyProxy) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client closed the connection


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _handle(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = _kind(self.command, self.path)
        key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        code = proxy.refused.get(key)
        fault = "refused" if code else proxy.draw(kind)
        answer, data = None, b""
        if fault in ("", "lost", "lost_stall", "short"):
            answer, data = self._forward(body)
            if fault == "short" and not data:
                fault = "lost"
        keyed = "x-amz-server-side-encryption-customer-key" in self.headers
        proxy.count(kind, fault, keyed)
        if fault in ("stall", "lost_stall"):
            self._stall()
        elif fault in ("reset", "lost"):
            self._reset()
        elif answer is None:
            self._refuse(400 if code else 503, code or "SlowDown")
        else:
            self._respond(answer, data, data[: len(data) // 2] if fault == "short" else data)

    def _respond(self, answer: http.client.HTTPResponse, data: bytes, sent: bytes) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP_HEADERS | {"content-length"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
        if length is not None and answer.status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = len(sent) < len(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # including Host, which is signed
                if name.lower() not in _HOP_BY_HOP_HEADERS:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer, answer.read()
        finally:
            upstream.close()

    def _refuse(self, status: int, code: str) -> None:
        data = _ERROR.format(code).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())

    def _stall(self) -> None:
        self.close_connection = True
        end = time.monotonic() + self.server.proxy.stall_seconds
        while not self.server.proxy.over.is_set() and time.monotonic() < end:
            if select.select([self.connection], [], [], 0.05)[
                0
            ]:  # the client closed the connection
                return

    def log_message(self, *_: Any) -> None:
        pass


def _kind(method: str, target: str) -> str:
    """The kind of S3 request."""
    query = parse_qs(urlsplit(target).query, keep_blank_values=True)
    if "list-type" in query:
        return "LIST"
    if "uploads" in query:
        return "CREATE"
    if "uploadId" in query:
        return {"PUT": "PART", "POST": "COMPLETE", "DELETE": "ABORT"}.get(method, method)
    return method


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("upstream")
    parser.add_argument("--one-in", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with FlakyProxy(args.upstream, one_in=args.one_in, seed=args.seed) as proxy:
        print(proxy.url, flush=True)
        try:
            proxy.over.wait()
        except KeyboardInterrupt:
            for (kind, fault), number in sorted(proxy.counts.items()):
                print(f"{kind:10} {fault or 'no fault':12} {number}")


if __name__ == "__main__":
    main()
