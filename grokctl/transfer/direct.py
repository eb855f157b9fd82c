"""Connections to the very addresses that were checked, and what a proxy answers in words."""

import ipaddress
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Final

import httpcore
import httpx
import socksio

_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
"""Ends in an IPv4 address, to which a gateway connects."""
_SIX_TO_FOUR: Final = ipaddress.ip_network("2002::/16")
"""Contains an IPv4 address, possibly a private one."""
_KEPT_S: Final = 5.0
"""Seconds for which an idle connection is kept."""
_NONSENSE: Final = (socksio.SOCKSError, AssertionError, LookupError, TypeError, ValueError)
"""What the libraries of proxies raise for an answer that is none."""


class PrivateAddressError(Exception):
    """A host that has to be on the public Internet has an address elsewhere; names the host."""


class Dialer(httpcore.NetworkBackend):
    """Opens connections: resolves a name once for each, and connects to what was checked.

    A name that was once reached on the public Internet is never followed into a private network:
    its owner may let it point elsewhere with every answer.

    Args:
        only_public: Whether every address of a host must be on the public Internet.
    """

    def __init__(self, *, only_public: bool) -> None:
        self._only_public = only_public
        self._backend = httpcore.SyncBackend()
        self._reached: set[str] = set()
        """Hosts that were connected to on the public Internet."""
        self._lock = Lock()

    def is_local(self, host: str) -> bool:
        """Whether a host was never reached on the public Internet."""
        with self._lock:
            return host not in self._reached

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of a host that answers.

        Raises:
            PrivateAddressError: The host may not have the address that its name has.
            httpcore.ConnectError: The name has no address, or none answers.
            httpcore.ConnectTimeout: The last one did not answer in time.
        """
        error: httpcore.ConnectError | httpcore.ConnectTimeout | None = None
        for address in self._checked(host, port):
            try:
                stream = self._backend.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
                continue
            if is_global(address):
                with self._lock:
                    self._reached.add(host)
            return stream
        raise error or httpcore.ConnectError(f"{host}: no address")

    def _checked(self, host: str, port: int) -> list[str]:
        """The addresses to connect to."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise httpcore.ConnectError(f"{host}: {why}") from error
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        public = [address for address in addresses if is_global(address)]
        if self._only_public and public != addresses:
            raise PrivateAddressError(host)
        if self.is_local(host):
            return addresses
        if not public:
            raise PrivateAddressError(host)
        return public


class Direct(httpx.BaseTransport):
    """Requests without a proxy.

    Args:
        dialer: Opens the connections.
        context: Checks certificates.
        limits: Of connections.
        bind: The only local address to connect from.
    """

    def __init__(
        self, dialer: Dialer, context: ssl.SSLContext, limits: httpx.Limits, bind: str | None
    ) -> None:
        self._pool = httpcore.ConnectionPool(
            ssl_context=context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=_KEPT_S,
            local_address=bind,
            network_backend=dialer,
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request to the host of its URL."""
        url = request.url
        with _translated():
            response = self._pool.handle_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=url.raw_scheme,
                        host=url.raw_host,
                        port=url.port,
                        target=url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=b"",
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response),
            extensions=response.extensions,
        )

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class Proxied(httpx.HTTPTransport):
    """Requests through a proxy, which resolves the names of hosts."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request through the proxy.

        Raises:
            httpx.ProxyError: The proxy answers nonsense.
        """
        try:
            return super().handle_request(request)
        except UnicodeError:
            raise  # an impossible name of a host
        except _NONSENSE as error:
            raise httpx.ProxyError("the proxy does not speak its protocol") from error


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _translated():
            yield from self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


@contextmanager
def _translated() -> Iterator[None]:
    """Raise httpx's errors for those of httpcore."""
    try:
        yield
    except httpcore.ConnectTimeout as error:
        raise httpx.ConnectTimeout(str(error)) from error
    except httpcore.TimeoutException as error:
        raise httpx.ReadTimeout(str(error)) from error
    except httpcore.RemoteProtocolError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
        raise httpx.NetworkError(str(error)) from error


def is_global(address: str) -> bool:
    """Whether an address is on the public Internet."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if ip in _NAT64:
        ip = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in _GLOBAL_UNICAST or ip in _SIX_TO_FOUR):
        return False
    return ip.is_global and not ip.is_multicast
