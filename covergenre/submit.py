"""submit: a stage as a job on a cluster, from a machine that is not of it.

The same as `ray job submit --address URL --working-dir . -- python jobs/STAGE.py ARGS`, with the
arguments and the size of the upload checked before it begins.
"""

import asyncio
import logging
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from covergenre.addresses import redacted
from covergenre.errors import ConfigError, CovergenreError
from covergenre.progress import say

_DASHBOARD = "http://127.0.0.1:8265"
_LARGEST_UPLOAD_BYTES = 100 * 2**20
"""Ray's limit for a working directory."""
_SHOWN = 3
_AGAIN_SECONDS = 1.0
_PATIENCE_SECONDS = 120.0
_NEVER_SENT = (".git", ".venv", "__pycache__")


def submit(
    stage: str,
    arguments: Sequence[str],
    config_file: str | None,
    *,
    address: str | None,
    wait: bool,
    working_dir: str,
) -> int:
    """Run `stage` with its command line's `arguments` on the cluster of `address`.

    config_file: what --config among them names: it has to be where the job finds it, too.
    address: of the dashboard, as `ray dashboard cluster.yaml` forwards it; None: RAY_ADDRESS, or
    this machine's port 8265. Gives the job's exit code, 0 where it is not waited for. Raises
    ConfigError where nobody answers, the token is missing or the directory is too large.
    """
    if config_file is not None and "://" not in config_file:
        sent = Path(working_dir, config_file)  # the path itself, where it is absolute
        if Path(config_file).is_absolute() or not sent.exists():
            raise ConfigError(
                f"--config {config_file}: the job sees --working-dir {working_dir} alone; give the"
                " path of a file in it, relative to it, or s3://"
            )
    if not Path(working_dir, "jobs", f"{stage}.py").is_file():
        raise ConfigError(
            f"--working-dir {working_dir}: has no jobs/{stage}.py; be in covergenre's folder, or"
            f" name it: covergenre submit {stage} --working-dir FOLDER"
        )
    entrypoint = ["python", f"jobs/{stage}.py", *arguments]
    return run_job(entrypoint, address=address, wait=wait, working_dir=working_dir)


def run_job(entrypoint: Sequence[str], *, address: str | None, wait: bool, working_dir: str) -> int:
    """The same for any command; its paths are relative to `working_dir`."""
    address = address or os.environ.get("RAY_ADDRESS") or _DASHBOARD
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address {redacted(address)}: give the dashboard's, as http://HEAD:8265 (`ray"
            f" dashboard cluster.yaml` brings it to {_DASHBOARD})"
        )
    folder = Path(working_dir).resolve()
    sent = check_size(folder)
    client = _client(address)
    say(f"submit: {sent / 2**20:.1f} MiB of {folder} to {redacted(address)}")
    job = client.submit_job(
        entrypoint=shlex.join(entrypoint),
        runtime_env={"working_dir": str(folder), "excludes": [f"{n}/" for n in _NEVER_SENT]},
    )
    there = f"--address {redacted(address)} {job}"
    say(f"job {job}\n  status: ray job status {there}\n  logs: ray job logs --follow {there}")
    say(f"  stop: ray job stop {there}")
    if not wait:
        return 0
    info = _follow(client, job)
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:  # it never came to run
        say(f"job {job}: {info.status}: {info.message}")
    return info.driver_exit_code or 1


def _follow(client: Any, job: str) -> Any:
    """Print the job's log until it ends; gives what Ray then knows of it.

    A connection that breaks, as ssh's do, is made anew: the job goes on without. Raises
    CovergenreError where none can be made for _PATIENCE_SECONDS.
    """
    from aiohttp import ClientError

    shown = [0]
    seen_at = time.monotonic()
    while True:
        try:
            asyncio.run(_tail(client, job, shown))
            info = client.get_job_info(job)
            if info.status.is_terminal():
                return info
            seen_at = time.monotonic()
        except (OSError, RuntimeError, ClientError) as error:
            if time.monotonic() - seen_at > _PATIENCE_SECONDS:
                raise CovergenreError(
                    f"job {job}: is out of sight ({str(error).splitlines()[0]}), and may well go"
                    " on; see the commands above"
                ) from error
        time.sleep(_AGAIN_SECONDS)


async def _tail(client: Any, job: str, shown: list[int]) -> None:
    """Print the log from the character after the first shown[0] on, and count there."""
    passed = 0
    async for text in client.tail_job_logs(job):  # always from the beginning
        new = text[max(0, shown[0] - passed) :]
        passed += len(text)
        shown[0] = max(shown[0], passed)
        sys.stdout.write(new)
        sys.stdout.flush()


def _client(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray lets these win over the argument.
    held = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise ConfigError(
            f"{redacted(address)}: no Ray dashboard answers there; is the cluster up, and `ray"
            " dashboard cluster.yaml` running?"
        ) from error
    except AuthenticationError as error:
        raise ConfigError(
            f"{redacted(address)}: the cluster wants its token; set RAY_AUTH_MODE=token, and"
            " RAY_AUTH_TOKEN_PATH to its file (~/.ray/auth_token unless set)"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:  # the last two: it is no address
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{redacted(address)}: is no Ray dashboard: {reason}") from error
    finally:
        os.environ.update({name: value for name, value in held.items() if value is not None})


def check_size(folder: Path) -> int:
    """Bytes that an upload of `folder` sends. Raises ConfigError where Ray would refuse them."""
    sizes: Counter[str] = Counter()
    for path in _sent(folder):
        if path.is_file():
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
    if sizes.total() > _LARGEST_UPLOAD_BYTES:
        largest = ", ".join(
            f"{name} {size / 2**20:,.0f} MiB" for name, size in sizes.most_common(_SHOWN)
        )
        raise ConfigError(
            f"--working-dir {folder}: has {sizes.total() / 2**20:,.0f} MiB, and Ray takes"
            f" {_LARGEST_UPLOAD_BYTES >> 20} MiB at most; largest: {largest}; move data to s3://,"
            " or name it in .rayignore or .gitignore"
        )
    return sizes.total()


def _sent(folder: Path) -> list[Path]:
    """Files that Ray sends: it goes by .gitignore too."""
    git = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(git, capture_output=True, check=True).stdout.decode().split("\0")
        return [folder / name for name in found if name]
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):  # no git, no repository
        paths: list[Path] = []
        for root, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name not in _NEVER_SENT]
            paths += [Path(root, name) for name in names]
        return paths
