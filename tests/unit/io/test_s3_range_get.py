"""Repeated GET requests to S3 against those that boto3 sends; no request leaves this process."""

import datetime
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore import auth
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, IncompleteReadError
from botocore.httpsession import URLLib3Session
from urllib3 import HTTPHeaderDict, HTTPResponse

from covergenre.io import s3_client
from covergenre.io.s3_errors import CUSTOMER_KEY_FILE, TruncatedResponseError

KEYS = [
    "covers/1.jpg",
    "a b+c%2F&=?#;:@$,'\"<>[]{}|\\^`~!*().jpg",
    "größe/日本/🎵.png",
    "/leading//double/./and/../dots/",
    "\n",
]
DATA = random.Random(0).randbytes(1000)
Answer = tuple[int, dict[str, str], bytes]


class Server:
    """Stands in for S3: `answer` has the response to a request; `requests` are those it got."""

    def __init__(self) -> None:
        self.requests: list[AWSPreparedRequest] = []
        self.answer: Callable[[AWSPreparedRequest], Answer] = content

    def send(self, request: AWSPreparedRequest) -> AWSResponse:
        self.requests.append(request)
        status, headers, body = self.answer(request)
        raw = HTTPResponse(
            io.BytesIO(body), headers, status, preload_content=False, enforce_content_length=False
        )
        return AWSResponse(request.url, status, HTTPHeaderDict(headers), raw)


def content(request: AWSPreparedRequest) -> Answer:
    first, last = text(request.headers["Range"]).removeprefix("bytes=").split("-")
    body = DATA[int(first) : int(last) + 1]
    where = f"bytes {first}-{int(first) + len(body) - 1}/{len(DATA)}"
    headers = {"Content-Length": str(len(body)), "Content-Range": where, "ETag": '"tag"'}
    return 206, headers, body


def error(status: int, code: str, **headers: str) -> Answer:
    fields = f"<Code>{code}</Code><Message>m</Message><Region>us-west-2</Region>"
    body = f"<?xml version='1.0'?><Error>{fields}</Error>".encode()
    return status, {"Content-Length": str(len(body)), **headers}, body


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    settings = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-west-3",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(URLLib3Session, "send", lambda _, request: made.send(request))
    now = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    monkeypatch.setattr(auth, "get_current_datetime", lambda **_: now)
    s3_client.reset_clients()
    yield made
    s3_client.reset_clients()


def sent_by_boto3(request: AWSPreparedRequest) -> bool:
    return "amz-sdk-invocation-id" in {name.lower() for name in request.headers}


def as_sent(request: AWSPreparedRequest) -> tuple[str, dict[str, str]]:
    """(URL, headers) without those that number boto3's requests and list features of its client."""
    headers = {name.lower(): text(value) for name, value in request.headers.items()}
    for name in ("amz-sdk-invocation-id", "amz-sdk-request", "user-agent"):
        headers.pop(name, None)
    return request.url, headers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"},
        {"AWS_ENDPOINT_URL": "https://store.example/path"},
        {"AWS_SESSION_TOKEN": "token"},
        {"AWS_USE_DUALSTACK_ENDPOINT": "true"},
        {CUSTOMER_KEY_FILE: "key", "AWS_REGION": "us-east-1"},
        {"AWS_CONFIG_FILE": "config"},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_repeated_request_is_the_one_that_boto3_sends(
    server: Server, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its URL, its headers and, at the same time of day, its signature."""
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = path\n")
    for name, value in settings.items():
        is_file = name.endswith("_FILE")
        monkeypatch.setenv(name, str(tmp_path / value) if is_file else value)
    client = s3_client.client()
    client.get_range("bucket", "first", 0, 5)
    first = client._requests["bucket"]
    for key in KEYS:
        client._requests.clear()
        assert client.get_range("bucket", key, 10, 20, '"tag"').data == DATA[10:20]
        client._requests["bucket"] = first
        assert client.get_range("bucket", key, 10, 20, '"tag"') == (DATA[10:20], 1000, '"tag"')
        by_boto3, repeated = server.requests[-2:]
        assert sent_by_boto3(by_boto3) and not sent_by_boto3(repeated)
        assert as_sent(repeated) == as_sent(by_boto3)
        assert "Authorization" in repeated.headers


def test_request_has_no_headers_of_the_first(server: Server) -> None:
    client = s3_client.client()
    client.get_range("bucket", "first", 0, 5, '"other"')
    client.get_range("bucket", "x", 5, 10)
    assert server.requests[-1].headers["Range"] == "bytes=5-9"
    assert "If-Match" not in server.requests[-1].headers
    assert not sent_by_boto3(server.requests[-1])


@pytest.mark.parametrize("status", [301, 400])
def test_bucket_in_another_region_is_found_by_boto3(server: Server, status: int) -> None:
    """Also when it is there only later: it may have been deleted, and created again."""

    def moved(request: AWSPreparedRequest) -> Answer:
        if "us-west-2" in text(request.headers["Authorization"]):
            return content(request)
        code = "PermanentRedirect" if status == 301 else "AuthorizationHeaderMalformed"
        return error(status, code, **{"x-amz-bucket-region": "us-west-2"})

    client = s3_client.client()
    for answer in (content, moved):
        server.answer = answer
        assert client.get_range("bucket", "x", 0, 9).data == DATA[:9]
    assert client.get_range("bucket", "y", 0, 9).data == DATA[:9]
    assert not sent_by_boto3(server.requests[-1])
    assert "us-west-2" in text(server.requests[-1].headers["Authorization"])
    assert "us-west-2" in server.requests[-1].url


def test_request_is_signed_with_current_credentials(server: Server) -> None:
    client = s3_client.client()
    client.get_range("bucket", "x", 0, 9)
    renewed = Credentials("renewed", "secret", "token")
    client._request_signer._credentials = renewed
    client.get_range("bucket", "x", 0, 9)
    headers = server.requests[-1].headers
    assert "Credential=renewed/" in text(headers["Authorization"])
    assert headers["X-Amz-Security-Token"] == "token" and not sent_by_boto3(server.requests[-1])


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((404, "NoSuchKey"), (404, "NoSuchBucket"), (403, "AccessDenied"), (400, "ExpiredToken")),
        *((412, "PreconditionFailed"), (416, "InvalidRange"), (503, "SlowDown"), (429, "")),
        *((500, "InternalError"), (501, "NotImplemented")),
    ],
)
def test_error_is_the_one_that_boto3_raises(server: Server, status: int, code: str) -> None:
    client = s3_client.client()
    client.get_range("bucket", "x", 0, 9)
    server.answer = lambda _: error(status, code, **{"x-amz-request-id": "id"})
    found = []
    gets: list[Callable[[], object]] = [
        lambda: client.get_range("bucket", "x", 0, 9),
        lambda: client.get_object(Bucket="bucket", Key="x"),
    ]
    for get in gets:
        with pytest.raises(ClientError) as caught:
            get()
        metadata = caught.value.response["ResponseMetadata"]
        found.append((caught.value.response["Error"], metadata["HTTPStatusCode"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("status", [206, 503])
def test_truncated_response_is_an_error(server: Server, status: int) -> None:
    client = s3_client.client()
    for is_first in (True, False):
        server.answer = lambda request: (*content(request)[:2], b"cut")
        if status == 503 and not is_first:
            server.answer = lambda _: (503, {"Content-Length": "100"}, b"<Error><Code>Slow")
        with pytest.raises((TruncatedResponseError, IncompleteReadError)):
            client.get_range("bucket", "x", 0, 9)
        server.answer = content
        client.get_range("bucket", "x", 0, 9)


def test_checksums_that_the_user_asks_for_are_checked_by_boto3(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported")
    client = s3_client.client()
    for _ in range(2):
        client.get_range("bucket", "x", 0, 9)
        assert sent_by_boto3(server.requests[-1])
