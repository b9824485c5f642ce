"""Genre names as catalogs write them: lists written as text, missing values, Unicode forms.

A list column that was written to CSV is text such as `['rock', 'pop']` (pandas), `["rock", "pop"]`
(JSON), `['rock' 'pop']` (numpy) or `{rock,"hip hop"}` (PostgreSQL). Such text is read as the list
it was; it is never evaluated.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Iterable

MISSING_VALUES = ("nan", "none", "null", "na", "n/a", "<na>", "#n/a")
"""What pandas and others write for a missing value. Upper and lower case are the same."""

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
    """Text of a genre column that cannot be read; its text says why, without the place."""

    def __init__(self, cell: str, why: str) -> None:
        super().__init__(f"{excerpt(cell)}: {why}")
        self.cell = cell


def split_names(text: str, separator: str) -> list[str | None]:
    """The names in a cell of text: the items of a list, or what `separator` separates.

    Raises GenreTextError where it is a list that cannot be read.
    """
    items = _list_items(text.strip())
    if items is None:
        return [*text.split(separator)]
    try:
        return _parse_items(_NUMPY_STRING.sub(r"\1", items))
    except (ValueError, SyntaxError) as error:
        raise GenreTextError(
            text,
            f"a list written as text that cannot be read ({error}); write names separated"
            f" by {separator}, or a JSON list",
        ) from error


def clean_names(names: Iterable[str | None], missing: frozenset[str]) -> list[str]:
    """The names normalised, in order; missing values, empty names and repetitions left out.

    missing: in lower case. Raises ValueError where a name has brackets: it is part of a list.
    """
    cleaned: dict[str, None] = {}
    for name in names:
        if name is None:
            continue
        normalised = clean_name(name)
        if not normalised or normalised.lower() in missing:
            continue
        if not BRACKETS.isdisjoint(normalised):
            raise ValueError(
                f"the genre name {excerpt(normalised)} has a bracket, as lists have; correct the"
                " separator or the name"
            )
        cleaned[normalised] = None
    return list(cleaned)


def clean_name(name: str) -> str:
    """NFC; without invisible format characters (zero-width space, byte order mark); white space
    stripped, and a single space within."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
        name = "".join(c for c in name if unicodedata.category(c) != "Cf")
    return " ".join(name.split())


def excerpt(text: str, limit: int = 60) -> str:
    """`text` in quotes and on one line, for a message."""
    return repr(text if len(text) <= limit else f"{text[:limit]}…")


def _list_items(text: str) -> str | None:
    """The text between the brackets of a list; None where `text` is no list."""
    if call := _CALL.fullmatch(text):  # array(['rock'], dtype=object), set(), c("rock", "pop")
        inner = call[1].strip()
        if not inner or inner[0] in "[{('\"":
            text = inner if inner[:1] in ("[", "{", "(") else f"[{inner}]"
    if len(text) < 2:
        return None
    if text[0] + text[-1] in ("[]", "{}"):
        return text[1:-1]
    # Parentheses are part of many a name; a tuple has quotes in it.
    is_tuple = text[0] + text[-1] == "()" and (text[1:-1].strip()[:1] in ("'", '"', ""))
    return text[1:-1] if is_tuple else None


def _parse_items(items: str) -> list[str | None]:
    names: list[str | None] = []
    at = 0
    previous: re.Match[str] | None = None
    while (next_item := _TEXT.search(items, at)) is not None:
        item = _ITEM.match(items, at)
        # Only quoted items may be separated by white space alone, as numpy writes them.
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
            raise ValueError(f"at {excerpt(items[next_item.start() :], 20)}")
        names.append(_bare(item["bare"].strip()) if item["bare"] else _unquoted(item["quoted"]))
        previous, at = item, item.end()
    return names


def _bare(word: str) -> str | None:
    if word in ("...", "…"):
        raise ValueError("it was cut short: ...")
    return None if word.lower() in _BARE_MISSING else word


def _unquoted(token: str) -> str:
    if token[0] == '"':
        try:
            name = json.loads(token)
        except ValueError:
            name = ast.literal_eval(token)
    else:
        name = ast.literal_eval(token)  # a string literal, as the pattern says: a value, not code
    if isinstance(name, bytes):
        name = name.decode()
    if not isinstance(name, str):
        raise ValueError("no text")
    name.encode()  # half of a surrogate pair is not text
    return name
