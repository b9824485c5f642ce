"""Addresses, as they may be shown: some hold a secret, and some a whole image."""

import re

_LONGEST_SHOWN = 2000
_SHOWN_OF_LONG = 200
_DATA = re.compile(r"\A\s*(data:[^,]{0,60})", re.IGNORECASE)


def redacted(uri: str) -> str:
    """`uri` as it may be shown and kept: without a user and password, or what a query holds.

    A path is not changed. Of a data: URI only the beginning and its length are left; of
    anything too long to be a URL or a path too.
    """
    if match := _DATA.match(uri):
        comma = "," if uri[match.end() : match.end() + 1] == "," else ""
        return f"{match[1]}{comma}... ({len(uri):,} characters)"
    scheme, mark, rest = uri.partition("://")
    rest = _USER.sub("***@", rest)
    if scheme.lower() in ("http", "https"):  # a key of S3 may have a ? and a # of its own
        rest, hash_mark, _ = rest.partition("#")
        rest, question_mark, query = rest.partition("?")
        if question_mark:
            rest += "?" + "&".join(_VALUE.sub("***", part) for part in query.split("&"))
        rest += hash_mark and "#***"
    shown = f"{scheme}{mark}{rest}"
    if len(shown) > _LONGEST_SHOWN:
        return f"{shown[:_SHOWN_OF_LONG]}... ({len(uri):,} characters)"
    return shown


_USER = re.compile(r"\A(?:[^/?#]*@|[^/?#:[]*:(?!\d*(?:[/?#]|\Z)).*@)", re.DOTALL)
"""Before the host. A password with a slash in it makes no valid address, and is none to show."""
_VALUE = re.compile(r"(?<==).*|^[^=]+$", re.DOTALL)
