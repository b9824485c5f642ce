"""Plurals, articles and shortened lists."""

import pytest

from covergenre.formatting import decimal, plural, shortened, with_article


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 machines"),
        (1, "1 machine"),
        (2, "2 machines"),
        (1024, "1,024 machines"),
        (1.0, "1 machine"),
        (0.5, "0.5 machines"),
        (16.0, "16 machines"),
    ],
)
def test_plural(count: float, expected: str) -> None:
    assert plural(count, "machine") == expected


def test_irregular_plural() -> None:
    assert plural(1, "row has", "rows have") == "1 row has"
    assert plural(2, "row has", "rows have") == "2 rows have"


def test_article_depends_on_the_first_letter() -> None:
    assert with_article("evaluate run") == "an evaluate run"
    assert with_article("train run") == "a train run"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", ""),
        ("A", "A"),
        ("AB", "A and B"),
        ("ABC", "A, B and C"),
        ("ABCD", "A, B, C and 1 more"),
        ("ABCDEFG", "A, B, C and 4 more"),
    ],
)
def test_long_list_is_shortened(names: str, expected: str) -> None:
    assert shortened(list(names)) == expected


def test_length_of_a_shortened_list() -> None:
    assert shortened(list("ABCDE"), most=2) == "A, B and 3 more"


def test_decimal_shows_missing_values() -> None:
    assert decimal(0.12345, 3) == "0.123"
    assert decimal(None, 3) == decimal(float("nan"), 3) == "n/a"
