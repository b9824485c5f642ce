"""Starting Ray: import paths of workers, failures, and network access."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from covergenre import cli
from covergenre.cluster import ray_runtime
from covergenre.cluster.embedded import EmbeddedRayDirectory
from covergenre.demo.sample import write_sample
from covergenre.errors import ConfigError, RayStartError

HIDING = ("token", "string", "random", "json", "torch", "tempfile", "defusedxml", "click")
"""Names of modules that the commands and their workers import."""


def write_hiding_modules(folder: Path, markers: Path) -> None:
    """Modules that hide others where `folder` is on the import path; each leaves a marker."""
    markers.mkdir()
    files = [f"{name}.py" for name in HIDING]
    files += [f"{name}/__init__.py" for name in ("PIL", "numpy", "pyarrow", "ray")]
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        marker = markers / name.partition("/")[0]
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """(URL of an HTTP proxy that forwards nothing, what it was asked for)"""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            self.send_error(502)

        do_CONNECT = do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path is short enough for Ray's sockets."""
    folder = Path("/tmp", f"r{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


COMMANDS = """
import json, sys
from covergenre.cli import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
"""


@pytest.mark.commands
def test_stages_run_without_home_and_network_and_import_nothing_from_the_current_directory(
    proxy: tuple[str, list[str]], short: Path, tmp_path: Path
) -> None:
    """prepare and train on Ray, then evaluate and score without, beside a catalog with hostile
    files."""
    catalog = write_sample(tmp_path / "catalog", 150, seed=0)
    write_hiding_modules(catalog.parent, tmp_path / "markers")
    (catalog.parent / "covergenre.py").write_text("raise SystemExit('the wrong covergenre')\n")
    script = tmp_path / "bin" / "covergenre"
    script.parent.mkdir()
    script.write_text(COMMANDS)
    on_ray = [
        f"prepare {catalog.name} --out ../dataset --min-share 0 --shard-rows 50",
        "train ../dataset --out ../model --model tiny --epochs 1 --workers 1",
    ]
    without_ray = [
        "evaluate ../model ../dataset --out ../metrics",
        f"score ../model {catalog.name} --out ../labels",
    ]
    url, requests = proxy
    proxies = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    unset = {"RAY_ADDRESS", "no_proxy", "NO_PROXY", "PYTHONPATH", "MPLCONFIGDIR", "grpc_proxy"}
    environment = {
        **{name: value for name, value in os.environ.items() if name not in unset},
        **dict.fromkeys(proxies, url),
        "HOME": "/dev/null",
        "TMPDIR": str(tmp_path / "missing"),
        "RAY_TMPDIR": str(short),
    }
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "XDG_CONFIG_HOME"):
        environment.pop(name, None)  # a Ray of this process may have set them
    for stages in (on_ray, without_ray):
        done = subprocess.run(
            [sys.executable, str(script), json.dumps([stage.split() for stage in stages])],
            cwd=catalog.parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "Matplotlib" not in done.stderr and "Traceback" not in done.stderr
    assert "150 rows = 150 scored + 0 rejected" in done.stdout
    assert not list((tmp_path / "markers").iterdir())
    assert not requests
    assert not list(short.iterdir()), "the temporary directory is removed at exit"


def test_python_m_covergenre_imports_nothing_from_the_current_directory(
    tmp_path: Path,
) -> None:
    markers = tmp_path / "markers"
    folder = tmp_path / "folder"
    folder.mkdir()
    write_hiding_modules(folder, markers)
    command = [sys.executable, "-m", "covergenre", "score", "--help"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(markers.iterdir())


def test_directory_of_embedded_ray_is_private(local_ray: None) -> None:
    directory = ray_runtime._embedded_directory
    assert directory is not None
    assert directory.logs.is_dir()
    assert directory.path.stat().st_mode & 0o777 == 0o700


def test_workers_do_not_import_from_the_current_directory(
    local_ray: None,
) -> None:
    import ray

    def look() -> tuple[list[str], str]:
        import covergenre

        return sys.path, str(Path(covergenre.__file__).resolve())

    path, package = ray.get(ray.remote(num_cpus=0)(look).remote())
    here = Path(ray_runtime.__file__).resolve().parents[1]
    assert package == str(here / "__init__.py")
    assert os.getcwd() not in path
    assert os.path.dirname(os.path.realpath(sys.argv[0])) not in path


# --- What stops a start ------------------------------------------------------------------------


@pytest.fixture
def embed(short: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Start an embedded Ray where ray.init raises these errors, one at each attempt."""

    def start(*errors: Exception | None) -> list[str]:
        left = list(errors)

        def init(verbose: bool, **settings: Any) -> None:
            if error := left.pop(0):
                raise error

        said: list[str] = []
        for name in ("RAY_AUTH_TOKEN_PATH", "grpc_proxy", "PYTHONPATH"):
            monkeypatch.setenv(name, os.environ.get(name, ""))  # to be undone
        monkeypatch.setenv("RAY_TMPDIR", str(short))
        monkeypatch.setattr(ray_runtime, "_init", init)
        monkeypatch.setattr(ray_runtime.logger, "info", said.append)
        monkeypatch.setattr(ray_runtime, "_embedded_directory", None)
        try:
            ray_runtime._embed(verbose=False)
        finally:
            directory = ray_runtime._embedded_directory
            assert isinstance(directory, EmbeddedRayDirectory)
            directory.delete()
        assert not left
        return said

    return start


TIME_OUT = Exception("The current node timed out during startup.\nThis could happen")


def test_start_that_times_out_is_retried(embed: Callable[..., list[str]]) -> None:
    (line,) = embed(TIME_OUT, None)
    assert line == "Ray did not start in time; retrying"


def test_repeated_start_timeouts_are_an_error_of_one_line(embed: Callable[..., list[str]]) -> None:
    with pytest.raises(RayStartError) as caught:
        embed(*[TIME_OUT] * ray_runtime._START_ATTEMPTS)
    assert str(caught.value).startswith(
        "Ray did not start on this machine: The current node timed out during startup. This could"
        " happen; try again when the machine is less busy; its logs are in /tmp/"
    )


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            PermissionError(13, "Permission denied", "/.ray"),
            "[Errno 13] Permission denied: '/.ray'",
        ),
        (
            BlockingIOError(11, "Resource temporarily unavailable"),
            "[Errno 11] Resource temporarily",
        ),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_other_start_failures_are_not_retried(
    embed: Callable[..., list[str]], error: Exception, cause: str
) -> None:
    with pytest.raises(RayStartError) as caught:
        embed(error)
    assert str(caught.value).startswith(f"Ray did not start on this machine: {cause}")
    assert "\n" not in str(caught.value)


def test_command_prints_the_start_failure_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RayStartError("Ray did not start on this machine: it is full")

    monkeypatch.setattr(cli.cli, "main", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "covergenre: Ray did not start on this machine: it is full\n"


def test_connection_refused_by_the_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Version mismatch:\n  the cluster has Ray 2.9")

    monkeypatch.setattr(ray_runtime, "_init", refuse)
    with pytest.raises(ConfigError) as caught:
        ray_runtime._connect("head:6379", verbose=False)
    assert str(caught.value) == "RAY_ADDRESS head:6379: Version mismatch: the cluster has Ray 2.9"


def test_address_that_accepts_and_never_answers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_runtime, "_CONNECT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS {address}: no Ray cluster answers"):
            ray_runtime._check_address(address)


def test_address_of_a_running_cluster_is_accepted(local_ray: None) -> None:
    import ray

    ray_runtime._check_address(ray.get_runtime_context().gcs_address)


# --- Use as a library --------------------------------------------------------------------------

_STATE = """
import atexit, json, logging, os, signal, sys, threading

def state():
    return {
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)],
        "streams": [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)],
        "objects": [sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
        "threads": [t.name for t in threading.enumerate() if "covergenre" in str(t._target)],
        "loggers": [logging.getLogger(name).level for name in ("", "matplotlib", "covergenre")],
    }
"""

_EMBEDS = (
    _STATE
    + """
import ray
before = state()
from covergenre.cluster.ray_runtime import start_ray
start_ray()
assert ray.get(ray.remote(lambda: os.environ["RAY_task_oom_retries"]).remote()) == "3"
assert state() == before, (before, state())
ray.shutdown()
"""
)

_HOSTS_OWN = (
    _STATE
    + """
import ray
ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1])
levels = [logging.getLogger(name).level for name in ("ray", "ray.data")]
before, job = state(), ray.get_runtime_context().get_job_id()
from covergenre.cluster import ray_runtime
ray_runtime.start_ray()
assert (state(), ray.get_runtime_context().get_job_id()) == (before, job)
assert [logging.getLogger(name).level for name in ("ray", "ray.data")] == levels
assert ray_runtime._embedded_directory is None
assert ray.cluster_resources()["CPU"] == 1
ray.shutdown()
"""
)


@pytest.mark.commands
@pytest.mark.parametrize("code", [_EMBEDS, _HOSTS_OWN], ids=["embeds", "own_ray"])
def test_starting_ray_as_a_library_changes_nothing_else_in_the_process(
    code: str, short: Path
) -> None:
    # Without what the tests' own Ray has set in this process.
    environment = {k: value for k, value in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-c", code, str(short / "ray")]
    done = subprocess.run(
        command,
        env=environment | {"RAY_TMPDIR": str(short), "HOME": str(short)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
