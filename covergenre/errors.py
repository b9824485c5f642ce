"""All exceptions that covergenre raises deliberately.

CovergenreError
├── UserError            exit code 2: one line with the object, the problem and the fix
│   ├── ConfigError      a setting, flag or config file
│   ├── CatalogError     the catalog as a whole (a bad row is rejected, not raised)
│   ├── DatasetError     a dataset directory
│   ├── ModelError       a model directory, model name or weights file
│   ├── ImageError       a cover given to Model.predict
│   ├── StorageError     a path or URL that cannot be read or written
│   ├── TrainingDivergedError   the loss is not finite, or far too high
│   └── DeviceMemoryError       a training step needs more GPU memory than there is
├── RejectedError        exit code 3: the run finished, but more rows were rejected than allowed
├── RayStartError        exit code 1: Ray cannot be started on this machine
└── LedgerError          exit code 1: the row counts of a finished run do not add up
"""

import re
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST_LINE = 400


class CovergenreError(Exception):
    """Base class of all errors below. The message is a single line."""

    exit_code = 1
    code = ""
    """Distinguishes problems of the same class, in snake_case; may be empty."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        if code:
            self.code = code


class UserError(CovergenreError):
    """An error that the user can fix."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


class CatalogError(UserError):
    """A catalog cannot be parsed, or has no usable rows."""


class DatasetError(UserError):
    """A directory is not a dataset, or lacks the requested split or genres."""


class ModelError(UserError):
    """A model directory, model name or weights file cannot be used."""


class ImageError(UserError):
    """A cover cannot be read or decoded. `code`: the reason, as in schema.REASONS."""

    index: int | None
    """Position of the cover in the given list; None if it was given alone."""

    def __init__(self, message: str, *, code: str = "", index: int | None = None) -> None:
        super().__init__(message, code=code)
        self.index = index


class StorageError(UserError):
    """A path or URL cannot be read or written, or has unexpected content."""


class TrainingDivergedError(UserError):
    """The loss is not finite (NaN or Inf), or far above that of predicting the base rates."""


class DeviceMemoryError(UserError):
    """A training step does not fit in GPU memory, even if it is split into micro-batches."""


class RejectedError(CovergenreError):
    """The run finished, but rejected more rows than --max-rejected allows."""

    exit_code = 3


class RayStartError(CovergenreError):
    """Ray cannot be started: a limit of this machine, or the machine is too slow."""


class LedgerError(CovergenreError):
    """The row counts do not add up: a bug in covergenre, not a user error."""


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` if a valid name is similar, else the list of valid names."""
    names = sorted(valid)
    near = get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; valid: {', '.join(names)}" if names else ""


def essential_line(text: str) -> str:
    """The first and last line of a multi-line message, such as Ray's, joined to one line.

    The first says what failed and the last why; a traceback between them is left out.
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
