"""submit: a stage as a job on a cluster, from a machine outside of the cluster.

Does the same as `ray job submit --address URL --working-dir . -- python jobs/STAGE.py ARGS`, but
checks the arguments and the size of the upload first, and repeats requests that fail temporarily.
"""

import asyncio
import logging
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covergenre.errors import ConfigError, CovergenreError, essential_line
from covergenre.io.urls import redacted

if TYPE_CHECKING:
    from covergenre.cluster.dashboard_client import DashboardClient

logger = logging.getLogger(__name__)

_DASHBOARD = "http://127.0.0.1:8265"
_MAX_UPLOAD_BYTES = 100 * 2**20
"""Ray's limit for a working directory."""
_SHOWN = 3
_POLL_SECONDS = 1.0
_LOG_RETRY_SECONDS = 30.0
_COMMAND_NOT_FOUND = 127
_NEVER_UPLOADED = (".git", ".venv", "__pycache__")


def submit(
    stage: str,
    arguments: Sequence[str],
    config_file: str | None,
    *,
    address: str | None,
    wait: bool,
    working_dir: str,
) -> int:
    """Run `stage` with these command-line arguments as a job. Returns the job's exit code, or 0
    without `wait`.

    config_file: value of --config among the arguments; the job must find the file, too.
    address: URL of the dashboard, as forwarded by `ray dashboard cluster.yaml`; None: RAY_ADDRESS,
    or port 8265 of this machine.

    Raises ConfigError if no dashboard answers, the token is missing or the directory is too large.
    """
    if config_file is not None and "://" not in config_file:
        uploaded = Path(working_dir, config_file)
        if Path(config_file).is_absolute() or not uploaded.exists():
            raise ConfigError(
                f"--config {config_file}: the job sees only the files of --working-dir"
                f" {working_dir}; give the path of a file in it, relative to it, or an s3:// URI",
                code="config_not_uploaded",
            )
    if not Path(working_dir, "jobs", f"{stage}.py").is_file():
        raise ConfigError(
            f"--working-dir {working_dir}: has no jobs/{stage}.py; run this in covergenre's"
            " directory, or give that directory with --working-dir",
            code="no_source",
        )
    entrypoint = ["python", f"jobs/{stage}.py", *arguments]
    return run_job(entrypoint, address=address, wait=wait, working_dir=working_dir)


def run_job(
    entrypoint: Sequence[str],
    *,
    address: str | None,
    wait: bool,
    working_dir: str,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Like `submit`, for any command; it runs in a copy of `working_dir`.

    sleep: called between attempts.
    """
    from covergenre.cluster import dashboard_client

    address = address or os.environ.get("RAY_ADDRESS") or _DASHBOARD
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address {redacted(address)}: not an http(s) URL; give that of the dashboard, such"
            f" as http://HEAD:8265 (`ray dashboard cluster.yaml` forwards it to {_DASHBOARD})",
            code="not_a_dashboard",
        )
    folder = Path(working_dir).resolve()
    size = check_size(folder)
    client = dashboard_client.connect(address, sleep)
    logger.info(f"submit: uploading {size / 2**20:.1f} MiB of {folder} to {redacted(address)}")
    job = f"covergenre-{uuid.uuid4().hex[:16]}"
    job_arguments = f"--address {redacted(address)} {job}"
    _start(client, job, entrypoint, folder, job_arguments)
    logger.info(
        f"job {job}\n  status: ray job status {job_arguments}\n  logs: ray job logs --follow"
        f" {job_arguments}\n  stop: ray job stop {job_arguments}"
    )
    if not wait:
        return 0
    info = _follow(client, job, sleep)
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:  # the command was never started
        logger.info(f"job {job}: {info.status}: {essential_line(info.message or '')}")
    elif info.driver_exit_code == _COMMAND_NOT_FOUND:
        logger.info(f"job {job}: no `{entrypoint[0]}` on the PATH of jobs on the cluster's head")
    return info.driver_exit_code or 1


def _start(
    client: "DashboardClient", job: str, entrypoint: Sequence[str], folder: Path, job_arguments: str
) -> None:
    """Start the job, once even if the request is repeated: its id is unique on a cluster.

    Raises CovergenreError if it cannot be started.
    """
    try:
        client.submit_job(
            entrypoint=shlex.join(entrypoint),
            submission_id=job,
            runtime_env={
                "working_dir": str(folder),
                "excludes": [f"{name}/" for name in _NEVER_UPLOADED],
            },
        )
    except ConfigError:
        raise
    except CovergenreError as error:
        raise CovergenreError(
            f"{error}; the job may have started: see ray job status {job_arguments}",
            code=error.code,
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        # A previous attempt started the job, and its answer was lost.
        if f"{job} already exists" not in str(error):
            raise CovergenreError(
                f"submit: no job was started: {essential_line(str(error))}", code="job_refused"
            ) from error


def _follow(client: "DashboardClient", job: str, sleep: Callable[[float], None]) -> Any:
    """Print the job's log until the job ends; returns Ray's record of it.

    A lost connection is made again; the job is not affected. Raises CovergenreError if the job's
    state cannot be read.
    """
    from aiohttp import ClientError

    from covergenre.cluster.dashboard_client import TemporaryError, retrying

    shown = [0]
    info: Any = None

    def poll() -> None:
        nonlocal info
        error: Exception | None = None
        try:
            asyncio.run(_tail(client, job, shown))
        except (OSError, RuntimeError, ClientError) as caught:
            error = caught
        info = _job_info(client, job)
        if error is not None:
            reason = essential_line(str(error) or type(error).__name__)
            raise TemporaryError(f"cannot be read ({reason})") from error

    while True:
        wait = _POLL_SECONDS
        try:
            retrying(f"job {job}: its log", sleep)(poll)
        except TemporaryError:  # continue for the exit code, with or without the log
            wait = _LOG_RETRY_SECONDS
        if info.status.is_terminal():
            return info
        sleep(wait)


def _job_info(client: "DashboardClient", job: str) -> Any:
    try:
        return client.get_job_info(job)
    except CovergenreError as error:
        raise CovergenreError(
            f"job {job}: lost the connection to the job ({error}), which may still be running; see"
            " the commands above",
            code="connection_lost",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise CovergenreError(f"job {job}: {essential_line(str(error))}") from error


async def _tail(client: "DashboardClient", job: str, shown: list[int]) -> None:
    """Print the log after its first shown[0] characters, and add those printed to shown[0]."""
    passed = 0
    async for text in client.tail_job_logs(job):  # always from the beginning
        new = text[max(0, shown[0] - passed) :]
        passed += len(text)
        shown[0] = max(shown[0], passed)
        sys.stdout.write(new)
        sys.stdout.flush()


def check_size(folder: Path) -> int:
    """Bytes of an upload of `folder`. Raises ConfigError if they exceed Ray's limit."""
    sizes: Counter[str] = Counter()
    for path in _uploaded_files(folder):
        if path.is_file():
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
    if sizes.total() > _MAX_UPLOAD_BYTES:
        largest = ", ".join(
            f"{name} {size / 2**20:,.0f} MiB" for name, size in sizes.most_common(_SHOWN)
        )
        raise ConfigError(
            f"--working-dir {folder}: {sizes.total() / 2**20:,.0f} MiB to upload, over Ray's limit"
            f" of {_MAX_UPLOAD_BYTES >> 20} MiB; largest: {largest}; move data to s3://, or list"
            " it in .gitignore",
            code="upload_too_large",
        )
    return sizes.total()


def _uploaded_files(folder: Path) -> list[Path]:
    """Files that Ray uploads: those that .gitignore does not exclude."""
    git = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(git, capture_output=True, check=True).stdout.decode().split("\0")
        return [folder / name for name in found if name]
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):  # no git or repository
        paths: list[Path] = []
        for root, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name not in _NEVER_UPLOADED]
            paths += [Path(root, name) for name in names]
        return paths
