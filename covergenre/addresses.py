"""Addresses, as they may be shown: some hold a secret."""

import re


def redacted(uri: str) -> str:
    """`uri` as it may be shown and kept: without a user and password, or what a query holds.

    A path stays as it is.
    """
    scheme, mark, rest = uri.partition("://")
    rest = _USER.sub("***@", rest)
    if scheme.lower() in ("http", "https"):  # a key of S3 may have a ? and a # of its own
        rest, hash_mark, _ = rest.partition("#")
        rest, question_mark, query = rest.partition("?")
        if question_mark:
            rest += "?" + "&".join(_VALUE.sub("***", part) for part in query.split("&"))
        rest += hash_mark and "#***"
    return f"{scheme}{mark}{rest}"


_USER = re.compile(r"\A(?:[^/?#]*@|[^/?#:[]*:(?!\d*(?:[/?#]|\Z)).*@)", re.DOTALL)
"""Before the host. A password with a slash in it makes no valid address, and is none to show."""
_VALUE = re.compile(r"(?<==).*|^[^=]+$", re.DOTALL)
