"""Pages of S3's ListObjectsV2, read from the XML in a tenth of the CPU time of boto3.

boto3 parses the XML to a tree, makes a dict of each object, and parses its date.
"""

import re
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from covergenre.io.s3_errors import TruncatedResponseError

_PAGE = "Page"
"""The field that `add_page` adds to a response."""
_START = re.compile(r"\s*(<\?xml[^<]*\?>)?\s*<ListBucketResult[\s>]")
_END = re.compile(r"</ListBucketResult>\s*\Z")
_PREFIX = re.compile(r"<CommonPrefixes>\s*<Prefix>([^<]*)</Prefix>\s*</CommonPrefixes>")


class Page(NamedTuple):
    """A page of a listing."""

    keys: list[str]
    sizes: list[int]
    """In bytes, of the object of each key."""
    modified: list[str]
    """When the object of each key was written, in ISO 8601."""
    prefixes: list[str]
    """Common prefixes of keys up to the delimiter, if the request had one."""
    next_token: str | None
    """Continuation token of the next page; None on the last one."""


def register(client: Any) -> None:
    """Let `page_of` be fast for the responses of a boto3 client."""
    # This wildcard comes before botocore's own handlers, one of which would parse the XML, too.
    client.meta.events.register("before-parse.*.ListObjectsV2", _add_page)


def page_of(response: dict[str, Any]) -> Page:
    """The page in a response of boto3's `list_objects_v2`.

    Raises TruncatedResponseError if a required field is missing.
    """
    if _PAGE in response:
        page: Page = response[_PAGE]
        return page
    if "IsTruncated" not in response:
        raise TruncatedResponseError("ListObjectsV2")
    objects = response.get("Contents", ())
    return Page(
        [found["Key"] for found in objects],
        [found["Size"] for found in objects],
        [found["LastModified"].isoformat() for found in objects],
        [found["Prefix"] for found in response.get("CommonPrefixes", ())],
        response["NextContinuationToken"] if response["IsTruncated"] else None,
    )


def _add_page(
    response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
) -> None:
    """A handler of botocore's event `before-parse`: adds the field _PAGE, if it can."""
    body = response_dict["body"]
    if response_dict["status_code"] == 200 and (page := _parse(body)) is not None:
        customized_response_dict[_PAGE] = page
        # What is left for botocore to parse; of the same length, which `_check_length` compares.
        response_dict["body"] = b"<ListBucketResult/>".ljust(len(body))


def _parse(body: bytes) -> Page | None:
    """None if the XML is incomplete, or has another form than S3 and similar stores write.

    The regular expressions find the same as an XML parser: there are no comments, CDATA sections or
    attributes, and keys are percent-encoded, without XML entities.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None

    def texts(name: str) -> list[str]:
        return re.findall(f"<{name}>([^<]*)</{name}>", text)

    keys, sizes, modified = texts("Key"), texts("Size"), texts("LastModified")
    prefixes = _PREFIX.findall(text)
    end, tokens = texts("IsTruncated"), texts("NextContinuationToken")
    is_plain = (
        _START.match(text)
        and _END.search(text, max(len(text) - 100, 0))
        and "<!" not in text
        and text.find("<?", 1) == -1
        and texts("EncodingType") == ["url"]
        and not any("&" in name for name in (*keys, *prefixes, *tokens))
        and len(keys) == len(sizes) == len(modified) == text.count("<Contents>")
        and len(prefixes) == text.count("<CommonPrefixes>")
        and (end, len(tokens)) in ((["false"], 0), (["true"], 1))
    )
    if not is_plain:
        return None
    return Page(
        [unquote_plus(key) for key in keys],
        [int(size) for size in sizes],
        modified,
        [unquote_plus(prefix) for prefix in prefixes],
        tokens[0] if tokens else None,
    )
