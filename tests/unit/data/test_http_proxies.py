"""The proxy variables of the environment."""

import os

import pytest

from covergenre.data.http_proxies import bypasses, check_proxies, proxy_for
from covergenre.errors import ConfigError


@pytest.fixture(autouse=True)
def no_proxy_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def url_for(scheme: str, host: str = "host.example") -> str | None:
    proxy = proxy_for(scheme, host)
    return None if proxy is None else proxy.url


def test_there_is_no_proxy_without_variables() -> None:
    assert url_for("http") is None and url_for("https") is None


@pytest.mark.parametrize(
    ("environment", "http", "https"),
    [
        ({"http_proxy": "http://a:1"}, "http://a:1", None),
        ({"HTTP_PROXY": "http://a:1"}, "http://a:1", None),
        ({"http_proxy": "http://a:1", "HTTP_PROXY": "http://b:1"}, "http://a:1", None),
        ({"http_proxy": "", "HTTP_PROXY": "http://b:1"}, None, None),
        ({"https_proxy": "http://a:1"}, None, "http://a:1"),
        ({"all_proxy": "http://a:1"}, "http://a:1", "http://a:1"),
        ({"all_proxy": "http://a:1", "http_proxy": "http://b:2"}, "http://b:2", "http://a:1"),
        ({"http_proxy": "a:1"}, "http://a:1", None),
        ({"http_proxy": "a"}, "http://a:80", None),
        ({"http_proxy": "https://a"}, "https://a:443", None),
        ({"http_proxy": " http://10.0.0.1:3128/ "}, "http://10.0.0.1:3128", None),
        ({"http_proxy": "http://[::1]:3128"}, "http://[::1]:3128", None),
        # a client of a CGI script can set HTTP_PROXY by a header `Proxy`
        ({"HTTP_PROXY": "http://a:1", "REQUEST_METHOD": "GET"}, None, None),
        ({"http_proxy": "http://a:1", "REQUEST_METHOD": "GET"}, "http://a:1", None),
    ],
)
def test_proxy_of_http_and_https_urls(
    environment: dict[str, str],
    http: str | None,
    https: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (url_for("http"), url_for("https")) == (http, https)


def test_credentials_of_a_proxy_are_not_in_its_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:hidden%40@a:1")
    proxy = proxy_for("http", "host.example")
    assert proxy is not None
    assert proxy.authorization == "Basic dXNlcjpoaWRkZW5A"  # user:hidden@
    assert "hidden" not in repr(proxy) and "dXNlcjpoaWRkZW5A" not in repr(proxy)


@pytest.mark.parametrize(
    "value",
    [
        *("socks5://user:hidden@a:1", "http://", "http://user:hidden@a:port", "http://[::1"),
        *("http://user:hidden@a b:1", "ftp://a", "://a"),
    ],
)
@pytest.mark.parametrize("variable", ["https_proxy", "all_proxy"])
def test_error_has_the_invalid_variable(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        check_proxies(["https"])
    text = str(caught.value)
    assert text.startswith(f"{variable}: ") and "http://HOST:PORT" in text
    assert "\n" not in text and "hidden" not in text
    check_proxies([])  # not checked without covers of that scheme


def test_overridden_variable_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://a:1")
    monkeypatch.setenv("http_proxy", "http://b:1")
    check_proxies(["http"])
    with pytest.raises(ConfigError, match="all_proxy"):
        check_proxies(["http", "https"])


@pytest.mark.parametrize(
    ("no_proxy", "host", "expected"),
    [
        ("", "a.example", False),
        ("*", "a.example", True),
        ("b.example,*", "a.example", True),
        ("example", "a.example", True),
        ("a.example", "a.example", True),
        ("A.Example", "a.example", True),
        (".example", "a.example", True),
        ("*.example", "a.example", True),
        (".a.example", "a.example", True),
        ("b.example a.example", "a.example", True),
        ("ple", "a.example", False),
        ("a.example:80", "a.example", True),
        ("a.example:8080", "a.example", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "a.example", False),
        ("10.0.0.0/99", "10.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("2.3", "10.1.2.3", False),
        ("::1", "[::1]", True),
        ("[::1]", "[::1]", True),
        ("[::1]:80", "[::1]", True),
        ("[::1]:81", "[::1]", False),
        ("fd00::/8", "[fd12::1]", True),
    ],
)
def test_hosts_that_bypass_the_proxy(no_proxy: str, host: str, expected: bool) -> None:
    assert bypasses(no_proxy, host, 80) == expected
