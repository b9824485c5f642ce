"""Which IP addresses covers may be downloaded from: catalogs are untrusted input."""

import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError

_NAT64 = IPv6Network("64:ff9b::/96")


class AddressRefusedError(HTTPError):
    """Requests to this address are not allowed."""


def direct_pool(in_flight: int, allow_private: bool) -> urllib3.PoolManager:
    """Connections without a proxy; each checks the address it connects to, also for redirects."""

    def connect(connection: HTTPConnection) -> socket.socket:
        host, port = connection.host.strip("[]"), connection.port or connection.default_port
        timeout = connection.timeout
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            for *_, address in found:
                check_address(address[0], allow_private)
            # By address: resolving the name again might give another one.
            return socket.create_connection(
                (str(found[0][4][0]), port), timeout if isinstance(timeout, float | int) else 5.0
            )
        except OSError as error:
            raise NewConnectionError(connection, str(error)) from error

    class Http(HTTPConnection):
        _new_conn = connect

    class Https(HTTPSConnection):
        _new_conn = connect

    class HttpPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Http

    class HttpsPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Https

    pool = urllib3.PoolManager(maxsize=in_flight, block=True)
    pool.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
    return pool


def literal_address(host: str) -> IPv4Address | IPv6Address | None:
    """The IP address that is written as the host of a URL, in any notation; None for a name."""
    host = host.strip("[]").rstrip(".").partition("%")[0]
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def check_address(address: object, allow_private: bool) -> None:
    """Raises AddressRefusedError if requests to `address` are not allowed."""
    if not is_allowed(str(address), allow_private):
        is_private = is_allowed(str(address), allow_private=True)
        hint = "; to allow it, use --allow-private-addresses" if is_private else ""
        raise AddressRefusedError(f"{address} is not a public address{hint}")


def is_allowed(address: str, allow_private: bool) -> bool:
    """Whether requests to an IP address are allowed; never to link-local and multicast ones."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or ip
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    return ip.is_global or allow_private
