"""The only importer of httpx: ranges of files over HTTP, through redirects that can be trusted."""

import ipaddress
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from types import TracebackType
from typing import Final, Self
from urllib.request import getproxies, proxy_bypass

import certifi
import httpx

from grokctl import __version__
from grokctl.text import printable

_TIMEOUT: Final = httpx.Timeout(30.0, connect=15.0)
_MOST_HOPS: Final = 5
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_ABSENT: Final = frozenset({404, 410, 416})
_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
"""Ends in an IPv4 address, which a gateway connects to."""
_SIX_TO_FOUR: Final = ipaddress.ip_network("2002::/16")
"""Wraps an IPv4 address, also a private one."""
_FORBIDDEN: Final = frozenset({401, 403, 407, 451})
_STALE: Final = frozenset({400, 401, 403, 404, 410})
"""What a signed address answers when its time is over."""


class WebError(Exception):
    """A request that brought nothing usable; the text says why, in a few words."""


class AbsentError(WebError):
    """The server does not have this file, or one of another size."""


class RefusedError(WebError):
    """The server will not give this, now or later: asking again is no use."""


class Web:
    """HTTP client for several threads, as a context manager.

    It follows redirects itself: to http and https only, never from https to http, and never from
    a public server into a private network. Where a file was found in the end is remembered, so
    that the next range of it costs no redirect; a signed address that ran out is asked for anew.
    """

    def __init__(
        self, *, bind: str | None = None, proxy: str | None = None, connections: int = 16
    ) -> None:
        """Open no connection yet.

        Args:
            bind: The only local address to connect from.
            proxy: `socks5://` or `http://` URL that everything goes through; without one, the
                usual environment variables count.
            connections: At most so many at a time.
        """
        self._is_proxied = proxy is not None
        self._uses_environment = proxy is None and bind is None
        self._found: dict[str, httpx.URL] = {}
        self._lock = Lock()
        self._sockets: set[socket.socket] = set()
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        context = _certificates()
        transport = None
        if bind is not None and proxy is None:
            transport = httpx.HTTPTransport(verify=context, limits=limits, local_address=bind)
        self._client = httpx.Client(
            verify=context,
            limits=limits,
            transport=transport,
            proxy=proxy,
            trust_env=proxy is None,
            timeout=_TIMEOUT,
            headers={"User-Agent": f"grokctl/{__version__}", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections, and wake threads that wait for the rest of an answer."""
        with self._lock:
            waiting = tuple(self._sockets)
        for wire in waiting:
            with suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
        self._client.close()

    @contextmanager
    def open_range(
        self, url: str, start: int, length: int, *, total: int
    ) -> Iterator[Iterator[bytes]]:
        """Ask for a part of a file.

        Args:
            url: Where the file is said to be.
            start: First byte.
            length: How many bytes.
            total: Bytes of the whole file.

        Yields:
            The bytes in chunks, exactly `length` in all.

        Raises:
            AbsentError: There is no such file, or it has another size.
            RefusedError: The server refuses, knows no ranges, or redirects where it may not.
            WebError: It cannot be reached, breaks off, or is out of order; also while iterating.
        """
        try:
            with self._answer(url, start, length) as response:
                _check(response, start, length, total, is_first=response.url == url)
                with self._shown(response):
                    yield _body(response, length)
        except httpx.HTTPError as error:
            raise WebError(_reason(error)) from error
        except (httpx.InvalidURL, httpx.StreamError, UnicodeError) as error:
            raise RefusedError(f"leads to no web address ({_short(error)})") from error
        except RuntimeError as error:  # httpx's word for a client that was closed meanwhile
            raise WebError("was interrupted") from error

    @contextmanager
    def _shown(self, response: httpx.Response) -> Iterator[None]:
        """Let `close` find the socket that an answer comes from."""
        stream = response.extensions.get("network_stream")
        wire = stream.get_extra_info("socket") if stream is not None else None
        with self._lock:
            self._sockets |= {wire} if wire is not None else set()
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(wire)

    @contextmanager
    def _answer(self, url: str, start: int, length: int) -> Iterator[httpx.Response]:
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        with self._lock:
            known = self._found.get(url)
        if known is not None:
            with self._client.stream("GET", known, headers=headers) as response:
                if response.status_code not in _STALE | _REDIRECTS:
                    yield response
                    return
        place = httpx.URL(url)
        is_proxied = self._is_proxied or (self._uses_environment and _has_proxy(place))
        is_local = is_proxied or not _is_public(place)
        for _ in range(_MOST_HOPS + 1):
            with self._client.stream("GET", place, headers=headers) as response:
                if response.status_code not in _REDIRECTS:
                    if response.is_success:
                        with self._lock:
                            self._found[url] = place
                    yield response
                    return
                place = _next(place, response, is_local=is_local)
        raise RefusedError(f"redirects more than {_MOST_HOPS} times")


def parse_content_range(header: str) -> tuple[int, int, int] | None:
    """Read `bytes FIRST-LAST/TOTAL`; None if it says anything else."""
    match = _CONTENT_RANGE.fullmatch(header.strip())
    if match is None:
        return None
    first, last, total = map(int, match.groups())
    return (first, last, total) if first <= last < total else None


def _check(
    response: httpx.Response, start: int, length: int, total: int, *, is_first: bool
) -> None:
    """Refuse an answer that is not exactly the range that was asked for.

    Where a redirect led to, a refusal only means that its signature has run out.
    """
    status = response.status_code
    answer = f"answers {status} {_short(response.reason_phrase)}".rstrip()
    if status in _ABSENT:
        raise AbsentError(answer)
    if status in _FORBIDDEN and is_first:
        raise RefusedError(answer)
    if status not in {httpx.codes.OK, httpx.codes.PARTIAL_CONTENT}:
        raise WebError(answer)
    if "content-encoding" in response.headers:
        raise RefusedError("sends something encoded")
    found = _range_in(response)
    if found[2] != total:
        raise AbsentError(f"has {found[2]:,} bytes, expected {total:,}")
    if found[:2] != (start, start + length - 1):
        what = "knows no ranges" if status == httpx.codes.OK else "answers another range"
        raise RefusedError(what)


def _range_in(response: httpx.Response) -> tuple[int, int, int]:
    """First and last byte of an answer, and the size of the whole file."""
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        found = parse_content_range(response.headers.get("content-range", ""))
        if found is None:
            raise RefusedError("answers a range without saying which")
        return found
    size = response.headers.get("content-length", "")
    if not _LENGTH.fullmatch(size):
        raise RefusedError("does not say how large its files are")
    return 0, int(size) - 1, int(size)


def _body(response: httpx.Response, length: int) -> Iterator[bytes]:
    left = length
    try:
        for chunk in response.iter_raw():
            if len(chunk) > left:
                raise RefusedError("sends more than it was asked for")
            left -= len(chunk)
            yield chunk
    except (httpx.HTTPError, httpx.StreamError, OSError, RuntimeError) as error:
        raise WebError(_reason(error)) from error
    if left:
        raise WebError(f"broke off {left:,} bytes early")


def _next(place: httpx.URL, response: httpx.Response, *, is_local: bool) -> httpx.URL:
    """Where a redirect leads, if it may lead there."""
    target = place.join(response.headers.get("location", ""))
    if target.scheme not in {"http", "https"} or not target.host:
        raise RefusedError("redirects to something that is no web address")
    if place.scheme == "https" and target.scheme != "https":
        raise RefusedError(f"redirects from https to http ({_short(target.host)})")
    if target.userinfo:
        raise RefusedError("redirects with a password")
    if not is_local and not _is_public(target):
        raise RefusedError(f"redirects into a private network ({_short(target.host)})")
    return target


def _has_proxy(url: httpx.URL) -> bool:
    """Whether the usual variables send a request through a proxy, which finds hosts itself."""
    return bool({url.scheme, "all"} & getproxies().keys()) and not proxy_bypass(url.host)


def _is_public(url: httpx.URL) -> bool:
    """Whether every address of a host is one of the public Internet."""
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        found = socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise WebError(
            f"{_short(url.host)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return all(_is_global(str(address[0])) for *_, address in found)


def _is_global(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if found in _NAT64:
        found = ipaddress.ip_address(int(found) & 0xFFFFFFFF)
    if isinstance(found, ipaddress.IPv6Address) and (
        found not in _GLOBAL_UNICAST or found in _SIX_TO_FOUR
    ):
        return False
    return found.is_global and not found.is_multicast


def _certificates() -> ssl.SSLContext:
    """The system's certificate authorities; where it has none, those that httpx brings along."""
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        context.load_verify_locations(certifi.where())
    return context


def _reason(error: Exception) -> str:
    match error:
        case httpx.ConnectTimeout():
            return "cannot be reached in time"
        case httpx.TimeoutException():
            return "fell silent"
        case httpx.RemoteProtocolError():
            return "broke off, or speaks no proper HTTP"
        case _:
            return _short(error) or type(error).__name__


def _short(text: object) -> str:
    """What a stranger's server said, as far as a line has room for it."""
    return printable(str(text), limit=80)
