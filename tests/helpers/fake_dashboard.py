"""A fake of the job API of Ray's dashboard, which fails as configured."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_WEBSOCKET = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # from RFC 6455

NO_AGENT = "No available agent to submit job, please try again later."


class FakeDashboard:
    """Serves on 127.0.0.1 in its `with` block.

    fails: (method, start of the path) -> failures of the next requests: a status with its text,
    "drop" (the request is processed, and the connection closed without a response) or "silent" (no
    response until the end of the block).
    """

    def __init__(self) -> None:
        self.fails: dict[tuple[str, str], list[tuple[int, str] | str]] = {}
        self.requests: list[str] = []
        self.packages: set[str] = set()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log = "a line of the job\n"
        self.end: dict[str, Any] = {"status": "SUCCEEDED", "driver_exit_code": 0}
        self.version: Any = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}
        self.stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeDashboard":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def failure(self, method: str, path: str) -> tuple[int, str] | str | None:
        for (failing, start), failures in self.fails.items():
            if method == failing and path.startswith(start) and failures:
                return failures.pop(0)
        return None

    def submit(self, request: dict[str, Any]) -> tuple[int, str]:
        job = request["submission_id"]
        if job in self.jobs:
            return 500, (
                "Traceback (most recent call last):\n  File x\nRuntimeError: Request failed with"
                " status code 400: Traceback (most recent call last):\n  File y\nValueError: Job"
                f" with submission_id {job} already exists. Please use a different"
                " submission_id.\n."
            )
        self.jobs[job] = request
        return 200, json.dumps({"job_id": job, "submission_id": job})

    def info(self, job: str) -> tuple[int, str]:
        if job not in self.jobs:
            return 404, f"Job {job} does not exist"
        details = {"type": "SUBMISSION", "submission_id": job, "entrypoint": "x"} | self.end
        return 200, json.dumps(details)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, do: Callable[[], tuple[int, str]]) -> None:
                fake.requests.append(f"{self.command} {self.path}")
                failure = fake.failure(self.command, self.path)
                if failure == "silent":
                    fake.stopped.wait()
                    self.close_connection = True
                    return
                status, text = failure if isinstance(failure, tuple) else do()
                if failure == "drop":
                    self.close_connection = True
                    return
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def do_GET(self) -> None:
                if self.path == "/api/version":
                    self.answer(lambda: (200, json.dumps(fake.version)))
                elif self.path.startswith("/api/packages/"):
                    self.answer(lambda: (200 if self.path in fake.packages else 404, "no"))
                elif self.path.endswith("/logs/tail"):
                    failure = fake.failure("GET", "tail")
                    if failure is None:
                        self.tail()
                    else:
                        fake.fails["GET", self.path] = [failure]
                        self.answer(lambda: (200, ""))
                else:
                    self.answer(lambda: fake.info(self.path.split("/")[3]))

            def do_PUT(self) -> None:
                self.body()
                self.answer(self.upload)

            def upload(self) -> tuple[int, str]:
                fake.packages.add(self.path)
                return 200, ""

            def do_POST(self) -> None:
                request = json.loads(self.body())
                self.answer(lambda: fake.submit(request))

            def tail(self) -> None:
                fake.requests.append(f"{self.command} {self.path}")
                key = self.headers["Sec-WebSocket-Key"].encode() + _WEBSOCKET
                self.send_response(101)
                self.send_header("Upgrade", "websocket")
                self.send_header("Connection", "Upgrade")
                accept = base64.b64encode(hashlib.sha1(key).digest()).decode()
                self.send_header("Sec-WebSocket-Accept", accept)
                self.end_headers()
                data = fake.log.encode()
                assert len(data) < 126
                text = bytes([0x81, len(data)]) + data
                self.wfile.write(text + b"\x88\x02\x03\xe8")  # and a close frame, code 1000
                self.close_connection = True

        return Handler
