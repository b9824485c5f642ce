"""Progress reporting: log lines and callbacks."""

import logging

import pytest

from covergenre import progress
from covergenre.progress import Progress, ProgressEvent, log_to_stderr, reporting


@pytest.fixture(autouse=True)
def log_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY_SECONDS", 0.0)


def count(total: int | None = 10) -> None:
    with Progress("score", total, "covers") as shown:
        shown.advance(4)
        shown.advance(3, "a note")


def test_nothing_is_logged_by_default(caplog: pytest.LogCaptureFixture) -> None:
    count()
    with reporting(True), reporting(False):
        count()
    with reporting(None):
        count()
    assert caplog.text == ""


def test_log_lines_have_the_task_the_count_and_the_note(caplog: pytest.LogCaptureFixture) -> None:
    with reporting(True), reporting(None):
        count()
    assert caplog.messages[-1].startswith("score: 7 of 10 covers, ")
    assert caplog.messages[-1].endswith(", a note")


def test_callbacks_receive_progress_and_the_metrics_of_an_epoch() -> None:
    outer: list[ProgressEvent] = []
    inner: list[ProgressEvent] = []
    with reporting(None, [outer.append]), reporting(None, [inner.append]):
        with Progress("train", 20, "covers") as shown:
            shown.update_to(5)
            shown.update_to(2)  # from an older checkpoint
            shown.epoch_ended({"epoch": 1})
        count()
    assert outer == inner
    assert [event.done for event in inner] == [5, 2, 2, 4, 7]
    assert [dict(event.metrics) for event in inner[:3]] == [{}, {}, {"epoch": 1}]
    assert {event.task for event in inner} == {"train", "score"}
    with reporting(None):
        count()
    assert len(inner) == 5


def test_log_to_stderr_restores_the_logger(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("covergenre")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with log_to_stderr():
        logging.getLogger("covergenre.x").info("a line")
        logging.getLogger("covergenre.x").debug("not this one")
    assert capsys.readouterr().err == "a line\n"
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
