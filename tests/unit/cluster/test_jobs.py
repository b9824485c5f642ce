"""Jobs sent to a dashboard that fails; test_lab.py has a real one, on two hosts."""

import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_dashboard import NO_AGENT, FakeDashboard

from covergenre.cluster import jobs
from covergenre.errors import ConfigError, CovergenreError


def tree(root: Path, **sizes: int) -> None:
    for name, size in sizes.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))


@pytest.mark.parametrize("git", [False, True])
def test_an_upload_that_is_too_large_names_what_is_large(
    tmp_path: Path, git: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_LARGEST_UPLOAD_BYTES", 3 * 2**20)
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
    assert "has 5 MiB" in str(error.value)
    assert "largest: covers 4 MiB, model 1 MiB, covergenre 0 MiB; move" in str(error.value)


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = Path(__file__).parents[3]
    with pytest.raises(ConfigError, match="no Ray dashboard answers there"):
        jobs.submit(
            "train", [], None, address="http://127.0.0.1:9", wait=True, working_dir=str(root)
        )


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:99999", "http://127.0.0.1:99999: is no Ray dashboard"),
        ("http://", "no Ray dashboard"),
        ("127.0.0.1:8265", "--address 127.0.0.1:8265: give the dashboard's"),
        ("ray://127.0.0.1:10001", "give the dashboard's"),
    ],
)
def test_an_address_that_is_none_is_one_line(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        jobs.run_job(["x"], address=address, wait=True, working_dir=str(tmp_path))
    assert said in str(error.value) and "\n" not in str(error.value)


# A dashboard that fails for the moment


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


def failed(dashboard: FakeDashboard, folder: Path) -> tuple[str, list[float]]:
    """The one line of the error, and the waits before it."""
    sleep = Sleep()
    with pytest.raises(CovergenreError) as error:
        jobs.run_job(
            ["python", "x"], address=dashboard.url, wait=True, working_dir=str(folder), sleep=sleep
        )
    assert "\n" not in str(error.value)
    return str(error.value), sleep.waits


def test_a_job_is_sent_and_followed(
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
    assert f"ray job stop --address {dashboard.url} {job}" in err
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
    ("failure", "said"),
    [
        ((500, NO_AGENT), NO_AGENT),
        ((502, "bad gateway"), "502"),
        ((503, "busy"), "503"),
        ((504, "late"), "504"),
        ("drop", "connect"),
    ],
)
def test_a_request_that_fails_for_the_moment_is_repeated(
    method: str,
    path: str,
    failure: tuple[int, str] | str,
    said: str,
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
    (told,) = [line for line in err.splitlines() if "retrying" in line]
    if path != "tail":
        assert said in told
    # aiohttp repeats some of the requests for the log itself.
    assert len(waits) == 3 or (path, failure) == ("tail", "drop")
    for wait, longest in zip(waits, jobs._RETRY_WAITS_SECONDS, strict=False):
        assert longest / 2 <= wait <= longest


def test_a_job_whose_start_was_not_answered_is_not_started_twice(
    dashboard: FakeDashboard, folder: Path
) -> None:
    dashboard.fails["POST", "/api/jobs/"] = ["drop"]
    assert run(dashboard, folder)[0] == 0
    posts = [request for request in dashboard.requests if request.startswith("POST")]
    assert (len(posts), len(dashboard.jobs)) == (2, 1)


def test_two_submissions_are_two_jobs(dashboard: FakeDashboard, folder: Path) -> None:
    for _ in range(2):
        assert run(dashboard, folder, wait=False) == (0, [])
    assert len(dashboard.jobs) == 2


@pytest.mark.parametrize("path", ["/api/version", "/api/jobs/"])
def test_a_dashboard_that_goes_on_failing_is_given_up_in_one_line(
    path: str, dashboard: FakeDashboard, folder: Path
) -> None:
    method = "GET" if path == "/api/version" else "POST"
    dashboard.fails[method, path] = [(500, NO_AGENT)] * 100
    line, waits = failed(dashboard, folder)
    assert f"the dashboard answers 500: {NO_AGENT}; gave up" in line
    assert ("ray job status" in line) == (method == "POST")
    assert len(waits) == len(jobs._RETRY_WAITS_SECONDS)


def test_a_job_whose_state_cannot_be_had_is_given_up_in_one_line(
    dashboard: FakeDashboard, folder: Path
) -> None:
    dashboard.fails["GET", "/api/jobs/"] = [(503, "<html>\n</html>")] * 100
    line, _ = failed(dashboard, folder)
    assert "lost the connection" in line and "may still be running" in line and "503" in line


def test_a_log_that_cannot_be_read_does_not_hide_how_the_job_ended(
    dashboard: FakeDashboard, folder: Path
) -> None:
    dashboard.fails["GET", "tail"] = [(500, "no agent")] * 100
    dashboard.end = {"status": "FAILED", "driver_exit_code": 3}
    assert run(dashboard, folder)[0] == 3


def test_no_answer_in_time_is_repeated(
    dashboard: FakeDashboard,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "_REQUEST_TIMEOUT_SECONDS", (5.0, 0.1))
    dashboard.fails["POST", "/api/jobs/"] = ["silent"]
    code, waits = run(dashboard, folder, wait=False)
    assert (code, len(waits)) == (0, 1)
    assert "the dashboard does not answer in time; retrying" in caplog.text


@pytest.mark.parametrize(
    ("status", "text", "said"),
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
def test_a_refusal_is_one_line_at_once(
    status: int, text: str, said: str, dashboard: FakeDashboard, folder: Path
) -> None:
    dashboard.fails["POST", "/api/jobs/"] = [(status, text)]
    line, waits = failed(dashboard, folder)
    assert said in line and line.startswith("submit: no job was started: ")
    assert waits == [] and not dashboard.jobs


@pytest.mark.parametrize("version", [{}, [], "text", {"ray_version": "1.0"}, {"ray_version": "x"}])
def test_another_service_is_no_dashboard(
    version: Any, dashboard: FakeDashboard, folder: Path
) -> None:
    dashboard.version = version
    line, waits = failed(dashboard, folder)
    assert f"{dashboard.url}: is no Ray dashboard" in line
    assert waits == []


def test_a_cluster_that_wants_a_token_is_one_line(dashboard: FakeDashboard, folder: Path) -> None:
    dashboard.fails["GET", "/api/version"] = [(401, "no token")]
    line, waits = failed(dashboard, folder)
    assert "requires its token; set RAY_AUTH_MODE=token" in line
    assert waits == []


@pytest.mark.parametrize(
    ("message", "said"),
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
def test_a_job_that_never_ran_is_one_line(
    message: str | None,
    said: str,
    dashboard: FakeDashboard,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dashboard.end = {"status": "FAILED", "message": message}
    assert run(dashboard, folder)[0] == 1
    last = caplog.messages[-1]
    assert re.match(rf"job covergenre-\w+: FAILED: {re.escape(said)}", last), last


def test_a_cluster_without_the_command_says_so(
    dashboard: FakeDashboard, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dashboard.end = {"status": "FAILED", "driver_exit_code": 127}
    assert run(dashboard, folder)[0] == 127
    assert "no `python` on the PATH" in caplog.text


def test_a_job_that_the_cluster_forgot_is_one_line(dashboard: FakeDashboard, folder: Path) -> None:
    dashboard.fails["GET", "/api/jobs/"] = [(404, "Job x does not exist")]
    assert "404: Job x does not exist" in failed(dashboard, folder)[0]


def test_a_service_that_does_not_speak_http_is_no_dashboard(folder: Path) -> None:
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
        with pytest.raises(ConfigError, match=r"is no Ray dashboard: .*BadStatusLine"):
            jobs.run_job(["x"], address=address, wait=True, working_dir=str(folder), sleep=sleep)
        thread.join()
    assert sleep.waits == []
