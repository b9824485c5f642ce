"""Exceptions: class tree, exit codes, and helpers for messages."""

import pickle
import re
from inspect import getmembers, isclass

import pytest

from covergenre import errors
from covergenre.errors import (
    CovergenreError,
    LedgerError,
    RejectedError,
    UserError,
    did_you_mean,
    essential_line,
)

ERRORS = [e for _, e in getmembers(errors, isclass) if issubclass(e, CovergenreError)]


def test_docstring_has_the_class_tree() -> None:
    entries = re.findall(r"^([│├└─ ]*)(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    chain: dict[int, str] = {}
    parents = {}
    for indent, name in entries:
        depth = len(indent) // 4
        chain[depth] = name
        parents[name] = chain[depth - 1] if depth else "Exception"
    assert parents == {e.__name__: e.__base__.__name__ for e in ERRORS if e.__base__}


@pytest.mark.parametrize("error", ERRORS)
def test_exit_codes_and_pickling(error: type[CovergenreError]) -> None:
    other = 3 if error is RejectedError else 1
    assert error.exit_code == (2 if issubclass(error, UserError) else other)
    again = pickle.loads(pickle.dumps(error("one line")))  # workers send errors to the driver
    assert type(again) is error and str(again) == "one line"


def test_ledger_error_is_not_a_user_error() -> None:
    assert not issubclass(LedgerError, UserError)


@pytest.mark.parametrize(
    ("wrong", "valid", "expected"),
    [
        ("trian", ["train", "score"], "; did you mean 'train'?"),
        ("xyz", ["b", "a"], "; valid: a, b"),
        ("xyz", [], ""),
        ("", ["a"], "; valid: a"),
        ("Train", ["train"], "; did you mean 'train'?"),
    ],
)
def test_did_you_mean(wrong: str, valid: list[str], expected: str) -> None:
    assert did_you_mean(wrong, valid) == expected
    assert did_you_mean(wrong, iter(valid)) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one line.", "one line."),
        (
            "what failed.\nTraceback (most recent call last):\n  File x\nOSError: why\n\n",
            "what failed: OSError: why",
        ),
        ("Traceback (most recent call last):\n  File x\nOSError: why\n.", "OSError: why"),
        ("\x1b[36mray::f()\x1b[39m (pid=1)\n  File x\nOSError: why", "OSError: why"),
        ("\n \n", "no reason was given"),
    ],
)
def test_essential_line_is_the_first_and_last_line(text: str, line: str) -> None:
    assert essential_line(text) == line


def test_essential_line_is_shortened() -> None:
    assert len(essential_line("word " * 1000)) <= 400
