"""What long work shows: a bar on a terminal, a line every so often in a log. Always on stderr."""

import sys
import time
from types import TracebackType

_LOG_EVERY_SECONDS = 15.0


def say(line: str) -> None:
    """One line about what is going on."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Counts towards `total`, with rate and time left."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._first = 0
        self._began = self._logged = 0.0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True, smoothing=0.1
            )

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done."""
        if not self._began:
            # What came before the first is start-up, and says nothing about the rate.
            self._began = self._logged = time.monotonic()
            self._first = count
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY_SECONDS:
            self._logged = now
            rate = self.rate
            left = ""
            if self._total is not None and rate > 0:
                left = f", {(self._total - self._done) / rate:,.0f} s left"
            of = f" of {self._total:,}" if self._total is not None else ""
            note = f", {note}" if note else ""
            say(f"{self._what}: {self._done:,}{of} {self._unit}, {rate:,.1f}/s{left}{note}")

    def at(self, done: int, note: str = "") -> None:
        """`done` are done in all: as after `advance`, or, where work was lost, fewer."""
        if done < self._done or not self._began:
            # What was done before, or is done again, says nothing about the rate.
            self._first += done - self._done
            if not self._began:
                self._began = self._logged = time.monotonic()
        if self._bar is not None and done < self._done:
            self._bar.reset(self._total)
            self._bar.update(done)
            self._done = done
        self.advance(done - self._done, note)

    @property
    def rate(self) -> float:
        """How many a second since the first came; 0 before that."""
        seconds = time.monotonic() - self._began
        return (self._done - self._first) / seconds if self._began else 0.0

    def say(self, line: str) -> None:
        """One line about what is going on, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        say(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
