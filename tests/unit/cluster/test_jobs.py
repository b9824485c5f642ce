"""Jobs submitted to a fake dashboard that fails; tests/cluster/test_lab.py uses a real one."""

import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_dashboard import NO_AGENT, FakeDashboard

from covergenre.cluster import dashboard_client, jobs
from covergenre.errors import ConfigError, CovergenreError


def tree(root: Path, **sizes: int) -> None:
    for name, size in sizes.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))


@pytest.mark.parametrize("git", [False, True])
def test_too_large_upload_names_the_largest_entries(
    tmp_path: Path, git: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_MAX_UPLOAD_BYTES", 3 * 2**20)
    tree(tmp_path, covergenre__a=1000, jobs__b=500)
    (tmp_path / ".venv").mkdir()
    tree(tmp_path / ".venv", c=5 * 2**20)
    if git:
        (tmp_path / ".gitignore").write_text(".venv/\nignored/\n")
        tree(tmp_path, ignored__x=9 * 2**20)
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert jobs.check_size(tmp_path) == 1500 + (len(".venv/\nignored/\n") if git else 0)
    tree(tmp_path, covers__0=2 * 2**20, covers__1=2 * 2**20, model__weights=2**20)
    with pytest.raises(ConfigError) as error:
        jobs.check_size(tmp_path)
    assert error.value.code == "upload_too_large"
    assert " 5 MiB " in str(error.value)
    assert "covers 4 MiB, model 1 MiB, covergenre 0 MiB" in str(error.value)


def test_unreachable_dashboard_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = Path(__file__).parents[3]
    with pytest.raises(ConfigError) as caught:
        jobs.submit(
            "train", [], None, address="http://127.0.0.1:9", wait=True, working_dir=str(root)
        )
    assert caught.value.code == "no_dashboard"


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:99999", "http://", "127.0.0.1:8265", "ray://127.0.0.1:10001"]
)
def test_address_that_is_not_a_url_of_a_dashboard_is_an_error(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs.run_job(["x"], address=address, wait=True, working_dir=str(tmp_path))
    assert caught.value.code in ("not_a_dashboard", "no_dashboard")
    assert address in str(caught.value) and "\n" not in str(caught.value)


# A dashboard that fails temporarily


@pytest.fixture
def dashboard() -> Iterator[FakeDashboard]:
    with FakeDashboard() as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tree(tmp_path / "sent", jobs__train=10)
    return tmp_path / "sent"


class Sleep:
    """Counts waits instead of waiting."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)


def run(dashboard: FakeDashboard, folder: Path, *, wait: bool = True) -> tuple[int, list[float]]:
    sleep = Sleep()
    code = jobs.run_job(
        ["python", "x"], address=dashboard.url, wait=wait, working_dir=str(folder), sleep=sleep
    )
    return code, sleep.waits


def failed(dashboard: FakeDashboard, folder: Path) -> tuple[CovergenreError, list[float]]:
    """The error, whose message is one line, and the waits before it."""
    sleep = Sleep()
    with pytest.raises(CovergenreError) as error:
        jobs.run_job(
            ["python", "x"], address=dashboard.url, wait=True, working_dir=str(folder), sleep=sleep
        )
    assert "\n" not in str(error.value)
    return error.value, sleep.waits


def test_job_is_submitted_and_followed(
    dashboard: FakeDashboard,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run(dashboard, folder) == (0, [])
    out, err = capsys.readouterr().out, caplog.text
    assert out == dashboard.log
    ((job, request),) = dashboard.jobs.items()
    assert request["entrypoint"] == "python x"
    assert f"--address {dashboard.url} {job}" in err
    assert "retrying" not in err


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/version"),
        ("GET", "/api/packages/"),
        ("PUT", "/api/packages/"),
        ("POST", "/api/jobs/"),
        ("GET", "/api/jobs/"),
        ("GET", "tail"),
    ],
)
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ((500, NO_AGENT), NO_AGENT),
        ((502, "bad gateway"), "502"),
        ((503, "busy"), "503"),
        ((504, "late"), "504"),
        ("drop", "connect"),
    ],
)
def test_request_that_fails_temporarily_is_repeated(
    method: str,
    path: str,
    failure: tuple[int, str] | str,
    reason: str,
    dashboard: FakeDashboard,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    dashboard.fails[method, path] = [failure] * 3
    code, waits = run(dashboard, folder)
    out, err = capsys.readouterr().out, caplog.text
    assert (code, out) == (0, dashboard.log)
    assert len(dashboard.jobs) == 1
    (logged,) = [line for line in err.splitlines() if "retrying" in line]
    if path != "tail":
        assert reason in logged
    # aiohttp repeats some of the requests for the log itself.
    assert len(waits) == 3 or (path, failure) == ("tail", "drop")
    for wait, longest in zip(waits, dashboard_client.RETRY_WAITS_SECONDS, strict=False):
        assert longest / 2 <= wait <= longest


def test_job_is_started_once_if_the_answer_is_lost(dashboard: FakeDashboard, folder: Path) -> None:
    dashboard.fails["POST", "/api/jobs/"] = ["drop"]
    assert run(dashboard, folder)[0] == 0
    posts = [request for request in dashboard.requests if request.startswith("POST")]
    assert (len(posts), len(dashboard.jobs)) == (2, 1)


def test_two_submissions_start_two_jobs(dashboard: FakeDashboard, folder: Path) -> None:
    for _ in range(2):
        assert run(dashboard, folder, wait=False) == (0, [])
    assert len(dashboard.jobs) == 2


@pytest.mark.parametrize("path", ["/api/version", "/api/jobs/"])
def test_persistent_failure_of_the_dashboard_is_an_error(
    path: str, dashboard: FakeDashboard, folder: Path
) -> None:
    method = "GET" if path == "/api/version" else "POST"
    dashboard.fails[method, path] = [(500, NO_AGENT)] * 100
    error, waits = failed(dashboard, folder)
    assert error.code == "dashboard_failed" and f"500 ({NO_AGENT})" in str(error)
    assert ("ray job status" in str(error)) == (method == "POST")
    assert len(waits) == len(dashboard_client.RETRY_WAITS_SECONDS)


def test_lost_connection_to_a_job_is_an_error(dashboard: FakeDashboard, folder: Path) -> None:
    dashboard.fails["GET", "/api/jobs/"] = [(503, "<html>\n</html>")] * 100
    error, _ = failed(dashboard, folder)
    assert error.code == "connection_lost" and "503" in str(error)


def test_exit_code_is_returned_if_the_log_cannot_be_read(
    dashboard: FakeDashboard, folder: Path
) -> None:
    dashboard.fails["GET", "tail"] = [(500, "no agent")] * 100
    dashboard.end = {"status": "FAILED", "driver_exit_code": 3}
    assert run(dashboard, folder)[0] == 3


def test_request_that_times_out_is_repeated(
    dashboard: FakeDashboard,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dashboard_client, "_REQUEST_TIMEOUT_SECONDS", (5.0, 0.1))
    dashboard.fails["POST", "/api/jobs/"] = ["silent"]
    code, waits = run(dashboard, folder, wait=False)
    assert (code, len(waits)) == (0, 1)
    assert "retrying" in caplog.text


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        (
            400,
            "Traceback (most recent call last):\n  File x\nValueError: bad y\n",
            "ValueError: bad y",
        ),
        (413, "too large", "413: too large"),
        (
            500,
            "Traceback (most recent call last):\nRuntimeError: Request failed with status code"
            " 400: Traceback (most recent call last):\n  x\nTypeError: no\n.\n",
            "TypeError: no",
        ),
    ],
)
def test_refused_job_is_not_retried(
    status: int, text: str, reason: str, dashboard: FakeDashboard, folder: Path
) -> None:
    dashboard.fails["POST", "/api/jobs/"] = [(status, text)]
    error, waits = failed(dashboard, folder)
    assert error.code == "job_refused" and reason in str(error)
    assert waits == [] and not dashboard.jobs


@pytest.mark.parametrize("version", [{}, [], "text", {"ray_version": "1.0"}, {"ray_version": "x"}])
def test_another_service_is_not_a_dashboard(
    version: Any, dashboard: FakeDashboard, folder: Path
) -> None:
    dashboard.version = version
    error, waits = failed(dashboard, folder)
    assert error.code == "not_a_dashboard" and str(error).startswith(f"{dashboard.url}: ")
    assert waits == []


def test_missing_token_is_an_error(dashboard: FakeDashboard, folder: Path) -> None:
    dashboard.fails["GET", "/api/version"] = [(401, "no token")]
    error, waits = failed(dashboard, folder)
    assert error.code == "token_required" and "RAY_AUTH_MODE=token" in str(error)
    assert waits == []


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "Job supervisor actor failed to start within 900.0 seconds. This timeout can be"
            " configured by setting the environment variable RAY_JOB_START_TIMEOUT_SECONDS.",
            "Job supervisor actor failed to start within 900.0 seconds.",
        ),
        (
            "runtime_env setup failed: Failed to set up runtime environment.\nCould not create"
            " the actor because its associated runtime env failed to be created.\nTraceback"
            " (most recent call last):\n  File x\n    raise\nOSError: No space left on device\n\n",
            "runtime_env setup failed: Failed to set up runtime environment: OSError: No space"
            " left on device",
        ),
        (
            "Failed to start supervisor actor x: 'no'. Full traceback:\nTraceback (most recent"
            " call last):\n  File x\nValueError: no\n",
            "Failed to start supervisor actor x: 'no': ValueError: no",
        ),
        (None, "no reason was given"),
    ],
)
def test_reason_of_a_job_that_never_ran_is_logged_in_one_line(
    message: str | None,
    reason: str,
    dashboard: FakeDashboard,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dashboard.end = {"status": "FAILED", "message": message}
    assert run(dashboard, folder)[0] == 1
    last = caplog.messages[-1]
    assert re.match(rf"job covergenre-\w+: FAILED: {re.escape(reason)}", last), last


def test_missing_command_on_the_cluster_is_logged(
    dashboard: FakeDashboard, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dashboard.end = {"status": "FAILED", "driver_exit_code": 127}
    assert run(dashboard, folder)[0] == 127
    assert "`python`" in caplog.messages[-1] and "PATH" in caplog.messages[-1]


def test_unknown_job_is_an_error(dashboard: FakeDashboard, folder: Path) -> None:
    dashboard.fails["GET", "/api/jobs/"] = [(404, "Job x does not exist")]
    assert "404: Job x does not exist" in str(failed(dashboard, folder)[0])


def test_service_that_does_not_speak_http_is_not_a_dashboard(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        sleep = Sleep()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match="BadStatusLine") as caught:
            jobs.run_job(["x"], address=address, wait=True, working_dir=str(folder), sleep=sleep)
        thread.join()
    assert caught.value.code == "not_a_dashboard"
    assert sleep.waits == []
