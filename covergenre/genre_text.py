"""Parsing and normalizing genre names: lists written as text, missing values, Unicode forms.

A list column in a CSV file is text such as `['rock', 'pop']` (pandas), `["rock", "pop"]` (JSON),
`['rock' 'pop']` (numpy) or `{rock,"hip hop"}` (PostgreSQL). It is parsed as a list, never
evaluated.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Iterable

MISSING_VALUES = ("nan", "none", "null", "na", "n/a", "<na>", "#n/a")
"""How pandas and other tools write a missing value, in any case."""

BRACKETS = frozenset("[]{}")
_CALL = re.compile(
    r"(?:array|list|tuple|set|frozenset|c)\((.*?)(?:,\s*dtype=[^\[\](){}]*)?\)", re.DOTALL
)
_QUOTED = r"""b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*\""""
_NUMPY_STRING = re.compile(rf"np\.str_\(({_QUOTED})\)", re.DOTALL)
_ITEM = re.compile(
    rf"""\s*(?:(?P<quoted>{_QUOTED})|(?P<bare>[^\s,'"\[\]{{}}][^,"\[\]{{}}]*))\s*(?P<comma>,?)""",
    re.DOTALL,
)
_TEXT = re.compile(r"\S")
_BARE_MISSING = frozenset({"nan", "none", "null", "<na>"})


class GenreTextError(ValueError):
    """A cell of a genre column cannot be parsed. The message does not name the file and line."""

    def __init__(self, cell: str, why: str) -> None:
        super().__init__(f"{excerpt(cell)}: {why}")
        self.cell = cell


def split_names(text: str, separator: str) -> list[str | None]:
    """The names in a cell: the items if it is a list, else the text split at `separator`.

    Raises GenreTextError if it is a list that cannot be parsed.
    """
    items = _list_items(text.strip())
    if items is None:
        return [*text.split(separator)]
    try:
        return _parse_items(_NUMPY_STRING.sub(r"\1", items))
    except (ValueError, SyntaxError) as error:
        raise GenreTextError(
            text,
            f"cannot be parsed as a list ({error}); separate names by {separator}, or write a JSON"
            " list",
        ) from error


def clean_names(names: Iterable[str | None], missing: frozenset[str]) -> list[str]:
    """Normalized names, in order, without missing values, empty names and duplicates.

    missing: in lower case. Raises ValueError if a name has brackets: it is part of a list.
    """
    cleaned: dict[str, None] = {}
    for name in names:
        if name is None:
            continue
        normalized = clean_name(name)
        if not normalized or normalized.lower() in missing:
            continue
        if not BRACKETS.isdisjoint(normalized):
            raise ValueError(
                f"the genre name {excerpt(normalized)} contains a bracket; correct the separator or"
                " the name"
            )
        cleaned[normalized] = None
    return list(cleaned)


def clean_name(name: str) -> str:
    """Unicode NFC, without format characters (zero-width space, byte order mark), white space
    stripped and collapsed to single spaces."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
        name = "".join(c for c in name if unicodedata.category(c) != "Cf")
    return " ".join(name.split())


def excerpt(text: str, limit: int = 60) -> str:
    """`text` in quotes on one line, shortened, for a message."""
    return repr(text if len(text) <= limit else f"{text[:limit]}…")


def _list_items(text: str) -> str | None:
    """The text between the brackets of a list; None if `text` is not a list."""
    if call := _CALL.fullmatch(text):  # array(['rock'], dtype=object), set(), c("rock", "pop")
        inner = call[1].strip()
        if not inner or inner[0] in "[{('\"":
            text = inner if inner[:1] in ("[", "{", "(") else f"[{inner}]"
    if len(text) < 2:
        return None
    if text[0] + text[-1] in ("[]", "{}"):
        return text[1:-1]
    # Genre names may have parentheses; in a tuple, a quote follows the opening one.
    is_tuple = text[0] + text[-1] == "()" and (text[1:-1].strip()[:1] in ("'", '"', ""))
    return text[1:-1] if is_tuple else None


def _parse_items(items: str) -> list[str | None]:
    names: list[str | None] = []
    at = 0
    previous: re.Match[str] | None = None
    while (next_item := _TEXT.search(items, at)) is not None:
        item = _ITEM.match(items, at)
        # Only quoted items may be separated by white space alone, as by numpy.
        is_separated = (
            previous is None
            or previous["comma"]
            or (
                item is not None
                and item["quoted"] is not None
                and previous["quoted"] is not None
                and items[at - 1].isspace()
            )
        )
        if item is None or not is_separated:
            raise ValueError(f"unexpected {excerpt(items[next_item.start() :], 20)}")
        names.append(_bare(item["bare"].strip()) if item["bare"] else _unquoted(item["quoted"]))
        previous, at = item, item.end()
    return names


def _bare(word: str) -> str | None:
    if word in ("...", "…"):
        raise ValueError("it is truncated with ...")
    return None if word.lower() in _BARE_MISSING else word


def _unquoted(token: str) -> str:
    if token[0] == '"':
        try:
            name = json.loads(token)
        except ValueError:
            name = ast.literal_eval(token)
    else:
        name = ast.literal_eval(token)  # matches _QUOTED: a string literal, not code
    if isinstance(name, bytes):
        name = name.decode()
    if not isinstance(name, str):
        raise ValueError("not text")
    name.encode()  # raises if it has half of a surrogate pair
    return name
