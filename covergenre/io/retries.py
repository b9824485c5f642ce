"""The retry policy of network requests: exponential backoff with full jitter.

With full jitter (waits between 0 and the backoff), processes that failed at the same time do not
retry at the same time.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)
from tenacity.stop import stop_base

T = TypeVar("T")


def with_retries(
    send: Callable[[], T],
    is_retryable: Callable[[BaseException], bool],
    *,
    first_wait: float,
    max_wait: float,
    timeout: float,
    max_attempts: int | None = None,
    min_wait: Callable[[BaseException], float] | None = None,
    before_retry: Callable[[BaseException], None] | None = None,
) -> T:
    """Return `send()`, or raise the error of its last attempt.

    send: must be safe to repeat; a request may have succeeded, with only its response lost.
    first_wait, max_wait: seconds; the limit of the random wait doubles with each attempt.
    timeout: seconds after the first attempt; no attempt begins later.
    min_wait: the minimum wait after an error, such as that of a Retry-After header.
    before_retry: called with the error before each wait.
    """
    jitter = wait_random_exponential(multiplier=first_wait, max=max_wait)

    def wait(state: RetryCallState) -> float:
        least = min_wait(_error(state)) if min_wait is not None else 0.0
        return max(jitter(state), least)

    stop: stop_base = stop_before_delay(timeout)
    if max_attempts is not None:
        stop = stop | stop_after_attempt(max_attempts)
    retrying = Retrying(
        retry=retry_if_exception(is_retryable),  # False for KeyboardInterrupt
        wait=wait,
        stop=stop,
        before_sleep=(lambda state: before_retry(_error(state))) if before_retry else None,
        sleep=_sleep,
        reraise=True,
    )
    return retrying(send)


def _error(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
