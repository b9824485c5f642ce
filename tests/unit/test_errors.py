"""The errors: their tree, their exit codes, and the nearest valid name."""

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


def test_the_docstring_draws_the_tree() -> None:
    drawn = re.findall(r"^([│├└─ ]*)(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    chain: dict[int, str] = {}
    parents = {}
    for indent, name in drawn:
        depth = len(indent) // 4
        chain[depth] = name
        parents[name] = chain[depth - 1] if depth else "Exception"
    assert parents == {e.__name__: e.__base__.__name__ for e in ERRORS if e.__base__}


@pytest.mark.parametrize("error", ERRORS)
def test_exit_codes(error: type[CovergenreError]) -> None:
    other = 3 if error is RejectedError else 1
    assert error.exit_code == (2 if issubclass(error, UserError) else other)
    again = pickle.loads(pickle.dumps(error("one line")))  # workers send them to the driver
    assert type(again) is error and str(again) == "one line"


def test_a_lost_row_is_no_mistake_of_the_users() -> None:
    assert not issubclass(LedgerError, UserError)


@pytest.mark.parametrize(
    ("wrong", "valid", "said"),
    [
        ("trian", ["train", "score"], "; did you mean 'train'?"),
        ("xyz", ["b", "a"], "; valid: a, b"),
        ("xyz", [], ""),
        ("", ["a"], "; valid: a"),
        ("Train", ["train"], "; did you mean 'train'?"),
    ],
)
def test_did_you_mean(wrong: str, valid: list[str], said: str) -> None:
    assert did_you_mean(wrong, valid) == said
    assert did_you_mean(wrong, iter(valid)) == said


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
def test_the_essential_line_says_what_failed_and_why(text: str, line: str) -> None:
    assert essential_line(text) == line


def test_the_essential_line_is_not_long() -> None:
    assert len(essential_line("word " * 1000)) <= 400
