"""submit: a stage as a job on a cluster, from a machine that is not of it.

The same as `ray job submit --address URL --working-dir . -- python jobs/STAGE.py ARGS`, with the
arguments and the size of the upload checked before it begins, and requests that fail for the moment
repeated.
"""

import asyncio
import logging
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from http.client import BadStatusLine
from pathlib import Path
from typing import Any

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_chain,
    wait_random,
)

from covergenre.errors import ConfigError, CovergenreError, essential_line
from covergenre.io.urls import redacted

logger = logging.getLogger(__name__)

_DASHBOARD = "http://127.0.0.1:8265"
_LARGEST_UPLOAD_BYTES = 100 * 2**20
"""Ray's limit for a working directory."""
_SHOWN = 3
_POLL_SECONDS = 1.0
_RETRY_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)
"""Before each further attempt; each is shortened at random."""
_RETRY_TIMEOUT_SECONDS = 120.0
_REQUEST_TIMEOUT_SECONDS = (10.0, 60.0)
"""To connect, and to wait for an answer."""
_RETRYABLE_STATUS = {408, 429, 500, 502, 503, 504}
_COMMAND_NOT_FOUND = 127

Sleep = Callable[[float], None]
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


def run_job(
    entrypoint: Sequence[str],
    *,
    address: str | None,
    wait: bool,
    working_dir: str,
    sleep: Sleep = time.sleep,
) -> int:
    """The same for any command; its paths are relative to `working_dir`.

    sleep: waits between attempts at a dashboard that fails for the moment.
    """
    address = address or os.environ.get("RAY_ADDRESS") or _DASHBOARD
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address {redacted(address)}: give the dashboard's, as http://HEAD:8265 (`ray"
            f" dashboard cluster.yaml` brings it to {_DASHBOARD})"
        )
    folder = Path(working_dir).resolve()
    sent = check_size(folder)
    client = _client(address, sleep)
    logger.info(f"submit: {sent / 2**20:.1f} MiB of {folder} to {redacted(address)}")
    job = f"covergenre-{uuid.uuid4().hex[:16]}"
    there = f"--address {redacted(address)} {job}"
    _start(client, job, entrypoint, folder, there)
    logger.info(
        f"job {job}\n  status: ray job status {there}\n  logs: ray job logs --follow {there}"
    )
    logger.info(f"  stop: ray job stop {there}")
    if not wait:
        return 0
    info = _follow(client, job, sleep)
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:  # it never came to run
        logger.info(f"job {job}: {info.status}: {essential_line(info.message or '')}")
    elif info.driver_exit_code == _COMMAND_NOT_FOUND:
        logger.info(
            f"job {job}: the cluster's head has no `{entrypoint[0]}` on the PATH of its jobs"
        )
    return info.driver_exit_code or 1


def _start(client: Any, job: str, entrypoint: Sequence[str], folder: Path, there: str) -> None:
    """Start the job once, however often the request has to be made: its id is unique on a cluster.

    Raises CovergenreError where it cannot be started.
    """
    try:
        client.submit_job(
            entrypoint=shlex.join(entrypoint),
            submission_id=job,
            runtime_env={"working_dir": str(folder), "excludes": [f"{n}/" for n in _NEVER_SENT]},
        )
    except ConfigError:
        raise
    except CovergenreError as error:
        raise CovergenreError(
            f"{error}; whether the job was started, tells: ray job status {there}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        # An earlier attempt did start it, and its answer was lost.
        if f"{job} already exists" not in str(error):
            raise CovergenreError(
                f"submit: no job was started: {essential_line(str(error))}"
            ) from error


def _follow(client: Any, job: str, sleep: Sleep) -> Any:
    """Print the job's log until it ends; returns Ray's record of the job.

    A broken connection, as of ssh, is made again: the job is not affected. Raises CovergenreError
    where the job's state cannot be read.
    """
    from aiohttp import ClientError

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
            raise _TemporaryError(f"cannot be read ({reason})") from error

    while True:
        wait = _POLL_SECONDS
        try:
            _retrying(sleep, f"job {job}: its log")(poll)
        except _TemporaryError:  # the exit code matters more than the log
            wait = _RETRY_WAITS_SECONDS[-1]
        if info.status.is_terminal():
            return info
        sleep(wait)


def _job_info(client: Any, job: str) -> Any:
    try:
        return client.get_job_info(job)
    except CovergenreError as error:
        raise CovergenreError(
            f"job {job}: lost the connection to the job ({error}), which may still be running; see"
            " the commands above"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise CovergenreError(f"job {job}: {essential_line(str(error))}") from error


async def _tail(client: Any, job: str, shown: list[int]) -> None:
    """Print the log from the character after the first shown[0] on, and count there."""
    passed = 0
    async for text in client.tail_job_logs(job):  # always from the beginning
        new = text[max(0, shown[0] - passed) :]
        passed += len(text)
        shown[0] = max(shown[0], passed)
        sys.stdout.write(new)
        sys.stdout.flush()


class _TemporaryError(Exception):
    """A request failed, and the same request may succeed later; its text says how it failed."""


def _retrying(sleep: Sleep, what: str) -> Retrying:
    """Repeats a block that raises _TemporaryError, for up to two minutes; logs the first retry."""

    def log(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            logger.info(
                f"{what} {state.outcome.exception()}; retrying for up to"
                f" {_RETRY_TIMEOUT_SECONDS:.0f} s"
            )

    waits = _RETRY_WAITS_SECONDS
    return Retrying(
        sleep=sleep,
        retry=retry_if_exception_type(_TemporaryError),
        wait=wait_chain(*(wait_random(seconds / 2, seconds) for seconds in waits)),
        stop=stop_after_attempt(len(waits) + 1) | stop_after_delay(_RETRY_TIMEOUT_SECONDS),
        before_sleep=log,
        reraise=True,
    )


def _client(address: str, sleep: Sleep) -> Any:
    """A client of the dashboard, which repeats requests that fail for the moment.

    Raises ConfigError where there is no dashboard, CovergenreError where it goes on failing.
    """
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    shown = redacted(address)
    answered = False

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
            try:
                response: requests.Response = _retrying(sleep, "submit: the dashboard")(
                    self._try_request, method, endpoint, **kwargs
                )
            except _TemporaryError as error:
                raise CovergenreError(
                    f"{shown}: the dashboard {error}; gave up, try again later"
                ) from error
            return response

        def _try_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
            nonlocal answered
            try:
                response: requests.Response = super()._do_request(
                    method, endpoint, timeout=_REQUEST_TIMEOUT_SECONDS, **kwargs
                )
            except AuthenticationError as error:
                raise ConfigError(
                    f"{shown}: the cluster requires its token; set RAY_AUTH_MODE=token, and"
                    " RAY_AUTH_TOKEN_PATH to its file (default: ~/.ray/auth_token)",
                    code="token_required",
                ) from error
            except requests.RequestException as error:
                if not _is_temporary(error, answered):
                    raise
                raise _TemporaryError(_reason(error)) from error
            answered = True
            if _is_temporary_answer(response):
                is_page = "html" in response.headers.get("Content-Type", "")
                text = response.reason if is_page else essential_line(response.text)
                raise _TemporaryError(f"answers {response.status_code}: {text}")
            return response

    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray lets these win over the argument.
    held = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        return Client(address)
    except ConnectionError as error:
        found = error.__context__  # of requests
        if found is not None and not _is_unreachable(found):
            raise ConfigError(
                f"{shown}: is no Ray dashboard: {essential_line(str(found))}"
            ) from error
        raise ConfigError(
            f"{shown}: no Ray dashboard answers there; is the cluster up, and `ray"
            " dashboard cluster.yaml` running?"
        ) from error
    # ValueError: it is no address; KeyError, TypeError: another service answers
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{shown}: is no Ray dashboard: {reason}") from error
    finally:
        os.environ.update({name: value for name, value in held.items() if value is not None})


def _is_temporary(error: Exception, answered: bool) -> bool:
    """Whether a request that got no answer may get one later.

    answered: there was an answer before. Otherwise nobody may be there at all, which is said at
    once.
    """
    import requests

    if isinstance(error, requests.exceptions.SSLError | requests.exceptions.ProxyError):
        return False
    if _is_unreachable(error):
        return answered
    cause = getattr(error.args[0], "args", ())[-1:] if error.args else ()
    if cause and isinstance(cause[0], BadStatusLine) and not isinstance(cause[0], OSError):
        return False  # what answers does not speak HTTP
    return isinstance(
        error,
        requests.exceptions.ConnectionError
        | requests.exceptions.Timeout
        | requests.exceptions.ChunkedEncodingError,
    )


def _is_unreachable(error: BaseException) -> bool:
    """Whether no connection could be made at all."""
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    inner = error.args[0] if error.args else None
    return isinstance(getattr(inner, "reason", None), ConnectTimeoutError | NewConnectionError)


def _is_temporary_answer(response: Any) -> bool:
    """Whether the same request may succeed later."""
    # The dashboard reports its agent's refusal as an HTTP 500.
    return response.status_code in _RETRYABLE_STATUS and not re.search(
        r"status code 4\d\d", response.text
    )


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.exceptions.Timeout):
        return "does not answer in time"
    return f"breaks the connection ({essential_line(str(error))})"


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
