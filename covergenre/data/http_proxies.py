"""HTTP proxies from the environment: http_proxy, https_proxy, all_proxy and no_proxy.

The names are read in lower or upper case; lower case has precedence. HTTP_PROXY is ignored in a CGI
script, where a client could set it (httpoxy).
"""

import re
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from urllib.parse import unquote_to_bytes
from urllib.request import getproxies_environment

from urllib3.exceptions import LocationValueError
from urllib3.util import Url, parse_url

from covergenre.errors import ConfigError


@dataclass(frozen=True)
class Proxy:
    """A proxy and the credentials for it."""

    url: str
    """Without a user and password."""
    host: str
    """host:port, for messages."""
    authorization: str | None = field(repr=False)
    """Value of the Proxy-Authorization header."""


def proxy_for(scheme: str, host: str, port: int | None = None) -> Proxy | None:
    """The proxy for URLs of this scheme ("http" or "https") and host; None: connect directly.

    port: the URL's, if any. Raises ConfigError if the variable is not a valid proxy URL.
    """
    found = getproxies_environment()
    if bypasses(found.get("no", ""), host, port or (443 if scheme == "https" else 80)):
        return None
    name = next((name for name in (scheme, "all") if found.get(name, "").strip()), None)
    return None if name is None else _parse(f"{name}_proxy", found[name].strip())


def check_proxies(schemes: Iterable[str]) -> None:
    """Raises ConfigError if the variable for one of `schemes` is not a valid proxy URL."""
    for scheme in schemes:
        proxy_for(scheme, "host.invalid")


def basic_authorization(user_and_password: str) -> str:
    """The value of a header for the percent-encoded `user:password` of a URL."""
    return "Basic " + b64encode(unquote_to_bytes(user_and_password)).decode()


def _parse(variable: str, value: str) -> Proxy:
    # The value is not in error messages: it may contain a password.
    scheme, mark, _ = value.partition("://")
    if mark and scheme.lower() not in ("http", "https"):
        raise ConfigError(
            f"{variable}: {scheme}:// proxies are not supported; set it to an HTTP proxy,"
            " http://HOST:PORT, or unset it"
        )
    try:
        url = parse_url(value if mark else f"http://{value}")
    except (LocationValueError, UnicodeError):
        url = Url()
    if not url.host:
        raise ConfigError(f"{variable}: not a valid proxy URL; write it as http://HOST:PORT")
    port = url.port or (443 if url.scheme == "https" else 80)
    return Proxy(
        url=Url(scheme=url.scheme, host=url.host, port=port).url,
        host=f"{url.host}:{port}",
        authorization=basic_authorization(url.auth) if url.auth else None,
    )


def bypasses(no_proxy: str, host: str, port: int) -> bool:
    """Whether `no_proxy` lists the host: by its name, a domain above it, its address, a network
    (10.0.0.0/8), or `*` for every host. An entry may end with a port."""
    host = host.strip("[]").rstrip(".").lower()
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        if entry == "*":
            return True
        if address is not None and "/" in entry:
            try:
                if address in ip_network(entry, strict=False):
                    return True
            except ValueError:
                pass  # not a network
            continue
        # With more than one colon and no brackets, it is an IPv6 address without a port.
        match = re.fullmatch(r"(?:\[([^]]*)\]|([^:]*)):(\d+)", entry)
        if match and int(match[3]) != port:
            continue
        name = (match[1] or match[2] if match else entry).strip("[]").removeprefix("*")
        name = name.strip(".")
        if name and (host == name or (address is None and host.endswith(f".{name}"))):
            return True
    return False
