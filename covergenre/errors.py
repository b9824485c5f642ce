"""Every error that covergenre raises on purpose.

CovergenreError
├── UserError            exit code 2: one line says what, where, and the way out
│   ├── ConfigError      a setting, flag or config file
│   ├── CatalogError     the catalog as a whole (a bad row is set aside, never raised)
│   ├── DatasetError     a prepared dataset
│   ├── ModelError       a MODEL folder, a model name, or weights
│   ├── ImageError       a cover given to Model.predict
│   ├── StorageError     a place that cannot be read or written
│   ├── TrainingDivergedError   the loss is not finite, or far above a baseline's
│   └── DeviceMemoryError       a step does not fit the memory of the GPU
├── RejectedError        exit code 3: the job finished, but rejected more rows than is allowed
├── RayStartError        exit code 1: Ray does not start on this machine
└── LedgerError          exit code 1: the counts of a finished job do not add up
"""

import re
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST_LINE = 400


class CovergenreError(Exception):
    """Base of all errors below; its text is one line, fit for a user."""

    exit_code = 1
    code = ""
    """Tells problems of one class apart, in snake_case; empty where the class says it all."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        if code:
            self.code = code


class UserError(CovergenreError):
    """Something the user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


class CatalogError(UserError):
    """A catalog cannot be read as one, or nothing in it can be used."""


class DatasetError(UserError):
    """A folder is not a prepared dataset, or lacks what was asked of it."""


class ModelError(UserError):
    """A MODEL folder, model name or weights file cannot be used."""


class ImageError(UserError):
    """A cover cannot be read or decoded. `code`: the reason, as in schema.REASONS."""

    index: int | None
    """Position of the cover in what was given; None where it was given alone."""

    def __init__(self, message: str, *, code: str = "", index: int | None = None) -> None:
        super().__init__(message, code=code)
        self.index = index


class StorageError(UserError):
    """A place cannot be read or written, or holds something else."""


class TrainingDivergedError(UserError):
    """The loss is not finite (NaN or Inf), or far above that of predicting the base rates."""


class DeviceMemoryError(UserError):
    """A step, or the part of it that a worker computes at a time, does not fit the GPU's memory."""


class RejectedError(CovergenreError):
    """A finished job rejected more rows than --max-rejected allows."""

    exit_code = 3


class RayStartError(CovergenreError):
    """Ray does not start: a limit of this machine, or one that is too busy."""


class LedgerError(CovergenreError):
    """Rows went in that did not come out: a defect, never the user's mistake."""


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest valid name, else the list of valid names."""
    names = sorted(valid)
    near = get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; valid: {', '.join(names)}" if names else ""


def essential_line(text: str) -> str:
    """One line of a long message, as Ray's are: what failed (its first line) and why (its last).

    A traceback, which stands between them, is left out.
    """
    lines = [_TERMINAL_CODES.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if any(map(str.isalnum, line))]
    if not lines:
        return "no reason was given"
    first, last = lines[0], lines[-1]
    if len(lines) > 1:
        before = _TRACEBACK.split(first)[0].rstrip(" .:")
        last = f"{before}: {last}" if before else last
    return textwrap.shorten(last, _LONGEST_LINE, placeholder=" ...")


_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = re.compile(r"Traceback \(most recent|Full traceback:|^ray::")
