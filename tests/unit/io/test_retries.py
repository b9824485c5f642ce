"""Retries: which errors, how often, and how long the waits are."""

from collections.abc import Callable
from typing import Any

import pytest

from covergenre.io import retries
from covergenre.io.retries import with_retries


class Busy(Exception):  # noqa: N818
    """A retryable error."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, in seconds; nothing sleeps."""
    found: list[float] = []
    monkeypatch.setattr(retries, "_sleep", found.append)
    return found


def failing(times: int, error: type[BaseException] = Busy) -> tuple[Callable[[], str], list[int]]:
    """A function that fails `times` times, and a list that grows with each call."""
    calls: list[int] = []

    def send() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error(f"call {len(calls)}")
        return "response"

    return send, calls


def retry(send: Callable[[], str], **others: Any) -> str:
    settings: dict[str, Any] = {"first_wait": 0.5, "max_wait": 4.0, "timeout": 3600.0} | others
    return with_retries(send, lambda error: isinstance(error, Busy), **settings)


def test_request_is_repeated_until_it_succeeds(waits: list[float]) -> None:
    send, calls = failing(7)
    assert retry(send) == "response"
    assert len(calls) == 8 and len(waits) == 7


def test_waits_are_random_below_a_limit_that_doubles(waits: list[float]) -> None:
    for _ in range(50):
        retry(failing(6)[0])
    for attempt, limit in enumerate((0.5, 1.0, 2.0, 4.0, 4.0, 4.0)):
        found = waits[attempt::6]
        assert max(found) <= limit and min(found) < limit / 2 < max(found)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_other_errors_are_raised_at_once(waits: list[float], error: type[BaseException]) -> None:
    send, calls = failing(1, error)
    with pytest.raises(error, match="call 1"):
        retry(send)
    assert len(calls) == 1 and not waits


def test_interrupt_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(retries, "_sleep", interrupted)
    send, calls = failing(1)
    with pytest.raises(KeyboardInterrupt):
        retry(send)
    assert len(calls) == 1


def test_last_error_is_raised_after_all_attempts(waits: list[float]) -> None:
    send, calls = failing(9)
    with pytest.raises(Busy, match="call 3"):
        retry(send, max_attempts=3)
    assert len(calls) == 3 and len(waits) == 2


def test_no_attempt_begins_after_the_timeout(waits: list[float]) -> None:
    send, calls = failing(9)
    with pytest.raises(Busy, match="call 1"):
        retry(send, timeout=0.0)
    assert len(calls) == 1 and not waits
    # nor does a wait begin that would end after it
    with pytest.raises(Busy, match="call 2"):
        retry(send, timeout=60.0, min_wait=lambda _: 61.0)
    assert not waits


def test_wait_is_at_least_the_minimum_of_the_error(waits: list[float]) -> None:
    retry(failing(2)[0], min_wait=lambda _: 7.0)
    assert waits == [7.0, 7.0]


def test_callback_gets_the_error_before_each_retry(waits: list[float]) -> None:
    errors: list[str] = []
    retry(failing(2)[0], before_retry=lambda error: errors.append(str(error)))
    assert errors == ["call 1", "call 2"]
