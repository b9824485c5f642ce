"""URLs and paths for messages, without secrets; data: URIs shortened."""

import os
import re

PathOrUri = str | os.PathLike[str]
"""A local path or a URI such as s3://bucket/key; a pathlib.Path can only be a local path."""

_MAX_CHARACTERS = 2000
_CHARACTERS_OF_LONG = 200
_DATA = re.compile(r"\A\s*(data:[^,]{0,60})", re.IGNORECASE)


def redacted(uri: PathOrUri) -> str:
    """`uri` without secrets: user and password, values of the query, and the fragment.

    A path is not changed. A data: URI, and anything too long to be a URL or a path, is cut to its
    beginning and its length.
    """
    uri = os.fspath(uri)
    if match := _DATA.match(uri):
        comma = "," if uri[match.end() : match.end() + 1] == "," else ""
        return f"{match[1]}{comma}... ({len(uri):,} characters)"
    scheme, mark, rest = uri.partition("://")
    rest = _USER.sub("***@", rest)
    if scheme.lower() in ("http", "https"):  # an S3 key may contain ? and #
        rest, hash_mark, _ = rest.partition("#")
        rest, question_mark, query = rest.partition("?")
        if question_mark:
            rest += "?" + "&".join(_VALUE.sub("***", part) for part in query.split("&"))
        rest += hash_mark and "#***"
    shown = f"{scheme}{mark}{rest}"
    if len(shown) > _MAX_CHARACTERS:
        return f"{shown[:_CHARACTERS_OF_LONG]}... ({len(uri):,} characters)"
    return shown


_USER = re.compile(r"\A(?:[^/?#]*@|[^/?#:[]*:(?!\d*(?:[/?#]|\Z)).*@)", re.DOTALL)
"""User and password, before the host, also of an invalid URL whose password contains a slash."""
_VALUE = re.compile(r"(?<==).*|^[^=]+$", re.DOTALL)
"""The value in `name=value`; all of a part of a query that has no name."""
