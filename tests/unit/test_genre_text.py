"""Parsing and normalising genre names."""

import pytest

from covergenre.genre_text import (
    MISSING_VALUES,
    GenreTextError,
    clean_name,
    clean_names,
    split_names,
)

MISSING = frozenset(word.lower() for word in MISSING_VALUES)


def names(text: str) -> list[str]:
    return clean_names(split_names(text, "|"), MISSING)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rock|pop", ["rock", "pop"]),
        ("['rock', 'pop']", ["rock", "pop"]),  # pandas
        ('["rock","pop"]', ["rock", "pop"]),  # JSON
        (" [ 'rock' ,\n 'pop' ] ", ["rock", "pop"]),
        ("['rock' 'pop'\n 'jazz']", ["rock", "pop", "jazz"]),  # numpy
        ("array(['rock', 'pop'], dtype=object)", ["rock", "pop"]),
        ("[np.str_('rock'), np.str_('pop')]", ["rock", "pop"]),  # numpy 2
        ("[b'rock', b'pop']", ["rock", "pop"]),
        ('{rock,"hip hop",NULL}', ["rock", "hip hop"]),  # PostgreSQL
        ("{Children's,Rock}", ["Children's", "Rock"]),
        ('{"a\\"b"}', ['a"b']),
        ("[rock, r&b]", ["rock", "r&b"]),  # Spark, DuckDB
        ('c("rock", "pop")', ["rock", "pop"]),  # R
        ("('rock',)", ["rock"]),
        ("{'rock', 'pop'}", ["rock", "pop"]),
        ("frozenset({'rock'})", ["rock"]),
        ("['it\\'s', \"it's\", '\\u00e9']", ["it's", "é"]),
        ("[None, 'rock', nan]", ["rock"]),
        ("['rock', 'rock',]", ["rock"]),
        ("['rock|pop', 'a, b']", ["rock|pop", "a, b"]),
        ("[]", []),
        ("{}", []),
        ("()", []),
        ("set()", []),
        ("['']", []),
        ("Soundtrack (Film)", ["Soundtrack (Film)"]),
        ("(Film)", ["(Film)"]),
        ("c (note)", ["c (note)"]),
        ('\'80s|"new" wave', ["'80s", '"new" wave']),
    ],
)
def test_list_written_as_text_is_parsed(text: str, expected: list[str]) -> None:
    assert names(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "['rock', 'po",
        "rock', 'pop']",
        "[",
        "[['rock'], ['pop']]",
        '[{"name": "rock"}]',
        "{'rock': 1}",
        "['a' 'b' ... 'z']",
        "[a, ..., z]",
        "['a' b]",
        "['a''b']",
        "[a,,b]",
        "[rock]|[pop]",
        "['\\ud800']",
        "[b'\\xff']",
        "['[rock]']",
        "Rock [Live]",
        "__import__('os').system('x')]",
        "[__import__('os')]|[",
        "[" * 50_000,
        "['" * 50_000 + "]",
    ],
)
def test_invalid_list_is_a_one_line_error(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        names(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_error_has_the_cell() -> None:
    with pytest.raises(GenreTextError) as caught:
        split_names("[a,,b]", "|")
    assert caught.value.cell == "[a,,b]"


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NULL", "null", "N/A", "n/a", "<NA>", "NA"])
def test_missing_values_are_left_out(word: str) -> None:
    assert names(word) == []
    assert names(f"rock| {word} |pop") == ["rock", "pop"]
    assert names(f"['rock', '{word}']") == ["rock"]


def test_missing_values_can_be_changed() -> None:
    assert clean_names(["None", "nan"], frozenset({"nan"})) == ["None"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Mu\u0301sica", "M\u00fasica"),  # NFD
        ("M\u00fasica", "M\u00fasica"),
        ("Rock\u200b", "Rock"),  # zero-width space
        ("\ufeffRock", "Rock"),  # byte order mark
        ("R\u200do\u2060c\u00adk", "Rock"),  # joiners, soft hyphen
        ("\u200eRock\u202c", "Rock"),  # marks of direction
        (" Hip\u00a0 Hop\n", "Hip Hop"),
        ("\u200b", ""),
    ],
)
def test_names_are_normalised(name: str, expected: str) -> None:
    assert clean_name(name) == expected
