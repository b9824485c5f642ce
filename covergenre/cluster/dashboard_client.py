"""A client of a cluster's dashboard that repeats requests which fail temporarily.

Imports Ray: import this module inside functions.
"""

import logging
import re
import time
from collections.abc import Callable
from http.client import BadStatusLine
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from requests.exceptions import ChunkedEncodingError, ProxyError, SSLError, Timeout
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_chain,
    wait_random,
)
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from covergenre.cluster.ray_runtime import temporary_environment
from covergenre.errors import ConfigError, CovergenreError, essential_line
from covergenre.io.urls import redacted

logger = logging.getLogger(__name__)

RETRY_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)
"""Before each further attempt; each is shortened at random, to half at most."""
_RETRY_TIMEOUT_SECONDS = 120.0
_REQUEST_TIMEOUT_SECONDS = (10.0, 60.0)
"""To connect, and to wait for an answer."""
_RETRYABLE_STATUS = {408, 429, 500, 502, 503, 504}

Sleep = Callable[[float], None]


class TemporaryError(Exception):
    """A request failed, and the same request may succeed later. The text says how it failed."""


def retrying(what: str, sleep: Sleep = time.sleep) -> Retrying:
    """Repeats a call that raises TemporaryError, for up to two minutes; logs the first retry.

    what: the subject of the log line.
    """

    def log(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            logger.info(
                f"{what} {state.outcome.exception()}; retrying for up to"
                f" {_RETRY_TIMEOUT_SECONDS:.0f} s"
            )

    waits = RETRY_WAITS_SECONDS
    return Retrying(
        sleep=sleep,
        retry=retry_if_exception_type(TemporaryError),
        wait=wait_chain(*(wait_random(seconds / 2, seconds) for seconds in waits)),
        stop=stop_after_attempt(len(waits) + 1) | stop_after_delay(_RETRY_TIMEOUT_SECONDS),
        before_sleep=log,
        reraise=True,
    )


def connect(address: str, sleep: Sleep) -> "DashboardClient":
    """A client of the dashboard at the URL `address`.

    Raises ConfigError if there is no dashboard, or if it requires a token; CovergenreError if it
    keeps failing. The same errors may be raised by the client's methods.
    """
    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    shown = redacted(address)
    try:
        # Ray prefers these variables to the argument.
        with temporary_environment({"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}):
            return DashboardClient(address, sleep)
    except ConnectionError as error:
        cause = error.__context__  # of requests
        if cause is not None and not _is_unreachable(cause):
            raise _not_a_dashboard(shown, essential_line(str(cause))) from error
        raise ConfigError(
            f"{shown}: no Ray dashboard responds at this address; start the cluster, or forward its"
            " dashboard with `ray dashboard cluster.yaml`",
            code="no_dashboard",
        ) from error
    # ValueError: not a URL; KeyError, TypeError: an answer of another service
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        raise _not_a_dashboard(shown, str(error).splitlines()[0]) from error


class DashboardClient(JobSubmissionClient):
    """Ray's client, with retries and timeouts. Made by `connect`."""

    def __init__(self, address: str, sleep: Sleep) -> None:
        self._shown_address = redacted(address)
        self._sleep = sleep
        self._has_answered = False
        super().__init__(address)

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        attempts = retrying("submit: the dashboard", self._sleep)
        try:
            response: requests.Response = attempts(self._request_once, method, endpoint, **kwargs)
        except TemporaryError as error:
            raise CovergenreError(
                f"{self._shown_address}: the dashboard {error}, and every retry failed; try"
                " again later",
                code="dashboard_failed",
            ) from error
        return response

    def _request_once(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        try:
            response: requests.Response = super()._do_request(
                method, endpoint, timeout=_REQUEST_TIMEOUT_SECONDS, **kwargs
            )
        except AuthenticationError as error:
            raise ConfigError(
                f"{self._shown_address}: the cluster requires a token; set RAY_AUTH_MODE=token,"
                " and RAY_AUTH_TOKEN_PATH to its file (default: ~/.ray/auth_token)",
                code="token_required",
            ) from error
        except requests.RequestException as error:
            if not self._is_temporary(error):
                raise
            how = f"closed the connection ({essential_line(str(error))})"
            timed_out = isinstance(error, Timeout)
            raise TemporaryError("does not respond" if timed_out else how) from error
        self._has_answered = True
        # The dashboard reports a refusal of its agent as an HTTP 500.
        is_refusal = re.search(r"status code 4\d\d", response.text)
        if response.status_code in _RETRYABLE_STATUS and not is_refusal:
            is_page = "html" in response.headers.get("Content-Type", "")
            text = response.reason if is_page else essential_line(response.text)
            raise TemporaryError(f"returned {response.status_code} ({text})")
        return response

    def _is_temporary(self, error: requests.RequestException) -> bool:
        """Whether a request that got no answer may get one later.

        Before the first answer, a dashboard that cannot be reached may not exist: no retry.
        """
        if isinstance(error, SSLError | ProxyError):
            return False
        if _is_unreachable(error):
            return self._has_answered
        cause = getattr(error.args[0], "args", ())[-1:] if error.args else ()
        if cause and isinstance(cause[0], BadStatusLine) and not isinstance(cause[0], OSError):
            return False  # the service does not speak HTTP
        return isinstance(error, requests.ConnectionError | Timeout | ChunkedEncodingError)


def _is_unreachable(error: BaseException) -> bool:
    """Whether no connection could be made at all."""
    inner = error.args[0] if error.args else None
    return isinstance(getattr(inner, "reason", None), ConnectTimeoutError | NewConnectionError)


def _not_a_dashboard(address: str, reason: str) -> ConfigError:
    return ConfigError(f"{address}: not a Ray dashboard: {reason}", code="not_a_dashboard")
