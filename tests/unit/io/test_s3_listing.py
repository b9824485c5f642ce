"""Listings read by regular expressions against boto3's parser."""

import io
from typing import Any
from xml.sax.saxutils import escape

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError
from botocore.httpsession import URLLib3Session
from urllib3 import HTTPHeaderDict, HTTPResponse

from covergenre.io import s3_client, s3_listing
from covergenre.io.s3_errors import TruncatedResponseError
from covergenre.io.s3_listing import Page, page_of

HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
KEYS = ["a/1.jpg", "a%20b+c", "%E6%97%A5%E6%9C%AC/%F0%9F%8E%B5", "%26amp%3B%3CKey%3E%0A%0D", "日本"]


def listing(
    keys: list[str] = KEYS,
    *,
    prefixes: tuple[str, ...] = (),
    token: str = "",
    encoding: str = "<EncodingType>url</EncodingType>",
    namespace: str = NAMESPACE,
    head: str = HEAD,
    space: str = "",
) -> str:
    """The XML of a page. `space`: between elements."""
    parts = ["<Name>bucket</Name>", "<Prefix>a%20</Prefix>", "<MaxKeys>1000</MaxKeys>", encoding]
    parts += [f"<IsTruncated>{'true' if token else 'false'}</IsTruncated>"]
    parts += [f"<NextContinuationToken>{token}</NextContinuationToken>"] if token else []
    for number, key in enumerate(keys):
        fields = [f"<Key>{key}</Key>", "<LastModified>2026-01-02T03:04:05.678Z</LastModified>"]
        fields += ["<ETag>&quot;0123&quot;</ETag>", f"<Size>{number}</Size>"]
        fields += ["<Owner><ID>me</ID></Owner>", "<StorageClass>STANDARD</StorageClass>"]
        parts.append(f"<Contents>{space}{space.join(fields)}</Contents>")
    for prefix in prefixes:
        parts.append(f"<CommonPrefixes>{space}<Prefix>{prefix}</Prefix></CommonPrefixes>")
    return f"{head}<ListBucketResult{namespace}>{space}{space.join(parts)}</ListBucketResult>"


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its "body" and "status" are the response to each request."""
    response: dict[str, Any] = {"status": 200}

    def send(_: object, request: Any) -> AWSResponse:
        data = response["body"]
        headers = {"Content-Length": str(response.get("length", len(data)))}
        raw = HTTPResponse(
            io.BytesIO(data), headers, preload_content=False, enforce_content_length=False
        )
        return AWSResponse(request.url, response["status"], HTTPHeaderDict(headers), raw)

    monkeypatch.setattr(URLLib3Session, "send", send)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return response


def pages(answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Page, Page, bool]:
    """(the page, the page that boto3's parser reads, whether the first was read without it)"""
    s3_client.reset_clients()
    response = s3_client.client().list_objects_v2(Bucket="bucket")
    found = page_of(response)
    with monkeypatch.context() as patch:
        patch.setattr(s3_listing, "_parse", lambda _: None)
        expected = page_of(s3_client.client().list_objects_v2(Bucket="bucket"))
    s3_client.reset_clients()
    return found, expected, "Contents" not in response and "IsTruncated" not in response


def same(found: Page, expected: Page) -> bool:
    """Equal but for the form of dates."""
    dates = [text.replace("Z", "+00:00")[:19] for text in found.modified]
    assert dates == [text[:19] for text in expected.modified]
    return found._replace(modified=[]) == expected._replace(modified=[])


@pytest.mark.parametrize(
    "xml",
    [
        listing(),
        listing([]),
        listing(["x"] * 1000),
        listing(token="1/a+b=="),
        listing([], prefixes=("a%20b/", "c+/", "%E6%97%A5/")),
        listing(prefixes=("p/",), token="t", space="\n  "),
        listing(namespace=""),
        listing(head=""),
        listing() + "\n",
    ],
)
def test_page_is_the_one_that_boto3_reads(
    answer: dict[str, Any], xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer["body"] = xml.encode()
    found, expected, is_fast = pages(answer, monkeypatch)
    assert same(found, expected) and is_fast


@pytest.mark.parametrize(
    "xml",
    [
        listing([escape("<Key>&"), "&#13;&quot;"], encoding=""),
        listing(["a&amp;b"]),
        listing(["<![CDATA[<Key>]]>"]),
        listing(["a<!-- b -->c"]),
        listing(["a"]).replace("<Key>", '<Key a="b">'),
        listing(["a"], token="1&amp;2"),
        listing(["a"], prefixes=("b/",)).replace("<Prefix>b", '<Prefix x="y">b'),
        listing(namespace=' xmlns:s="x"')
        .replace("<", "<s:")
        .replace("<s:/", "</s:")[len(HEAD) + 2 :],
        listing(["a"]).encode().decode().replace("UTF-8", "ISO-8859-1"),
    ],
)
def test_unusual_xml_is_left_to_boto3(
    answer: dict[str, Any], xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer["body"] = xml.encode()
    found, expected, is_fast = pages(answer, monkeypatch)
    assert same(found, expected)
    assert not is_fast or "ISO" in xml


@pytest.mark.parametrize("length", [0, 1, 300, 900])
def test_incomplete_page_is_an_error(answer: dict[str, Any], length: int) -> None:
    xml = listing().encode()
    answer["body"], answer["length"] = xml[:length], len(xml)
    with pytest.raises(TruncatedResponseError):
        s3_client.client().list_objects_v2(Bucket="bucket")
    # Without a Content-Length that shows it.
    answer["length"] = length
    with pytest.raises((TruncatedResponseError, ClientError)):
        page_of(s3_client.client().list_objects_v2(Bucket="bucket"))


def test_other_responses_are_not_pages(answer: dict[str, Any]) -> None:
    answer["body"] = b"<html></html>"
    with pytest.raises(TruncatedResponseError):
        page_of(s3_client.client().list_objects_v2(Bucket="bucket"))
    answer["body"] = b"<Error><Code>SlowDown</Code></Error>"
    for status in (200, 503):
        answer["status"] = status
        with pytest.raises(ClientError, match="SlowDown"):
            s3_client.client().list_objects_v2(Bucket="bucket")
