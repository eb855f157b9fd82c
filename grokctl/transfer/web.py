"""Ranges of files over HTTP, through safe redirects."""

import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from email.utils import parsedate_to_datetime
from threading import Lock
from types import TracebackType
from typing import Final, Self
from urllib.request import getproxies, proxy_bypass

import certifi
import httpx

from grokctl import __version__
from grokctl.text import printable, shown_url
from grokctl.transfer.direct import Dialer, Direct, PrivateAddressError, Proxied

_TIMEOUT: Final = httpx.Timeout(30.0, connect=15.0)
_MOST_HOPS: Final = 5
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_ABSENT: Final = frozenset({404, 410, 416})
_FORBIDDEN: Final = frozenset({401, 403, 407, 451})
_STALE: Final = frozenset({400, 401, 403, 404, 410})
"""Answers of a signed address that has expired."""


_BUSY: Final = frozenset({429, 503})
_LONGEST_WAIT_S: Final = 600.0
_RESET: Final = re.compile(r";\s*t=([0-9]{1,9})")
"""Seconds until a limit is lifted, in the header `RateLimit` of the hub."""


class WebError(Exception):
    """A request that brought nothing usable; the text gives the reason in a few words."""


class AbsentError(WebError):
    """The server does not have this file, or one of a different size."""


class RefusedError(WebError):
    """The server refuses for good: another request would fail too."""


class BusyError(WebError):
    """The server asks for patience, and may say how long."""

    def __init__(self, answer: str, wait_s: float) -> None:
        super().__init__(f"{answer}, asks to wait {wait_s:.0f} s" if wait_s else answer)
        self.wait_s = wait_s
        """Seconds until another request; 0 if it does not say."""


class Web:
    """HTTP client for several threads, as a context manager.

    It follows redirects itself: to http and https only, never from https to http, and never from
    a public server into a private network: it connects to the addresses that it has checked. It
    remembers the final address of each file, so that the next range costs no redirect; an expired
    signed address is requested again.
    """

    def __init__(
        self, *, bind: str | None = None, proxy: str | None = None, connections: int = 16
    ) -> None:
        """Open no connection yet.

        Args:
            bind: The only local address to connect from.
            proxy: `socks5://` or `http://` URL for all requests; without one, the usual
                environment variables apply.
            connections: At a time, at most.
        """
        self._final: dict[str, tuple[httpx.URL, bool]] = {}
        """Final address of each file, and whether it must be on the public Internet."""
        self._lock = Lock()
        self._sockets: set[socket.socket] = set()
        self._limits = httpx.Limits(
            max_connections=connections, max_keepalive_connections=connections
        )
        self._context = _certificates()
        self._proxies = {"all": proxy} if proxy else {} if bind else _environment()
        self._asks_bypass = proxy is None
        self._through = {url: self._proxied(url) for url in set(self._proxies.values())}
        self._dialer = Dialer(only_public=False)
        self._anywhere = self._direct(self._dialer, bind)
        self._outside = self._direct(Dialer(only_public=True), bind)

    def _direct(self, dialer: Dialer, bind: str | None) -> httpx.Client:
        return self._client(Direct(dialer, self._context, self._limits, bind))

    def _proxied(self, url: str) -> httpx.Client | None:
        """Requests through a proxy; None if it is of no kind that can be used."""
        try:
            transport = Proxied(verify=self._context, limits=self._limits, proxy=url)
        except (ValueError, httpx.InvalidURL):
            return None
        return self._client(transport)

    @staticmethod
    def _client(transport: httpx.BaseTransport) -> httpx.Client:
        return httpx.Client(
            transport=transport,
            trust_env=False,
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
        """Close all connections, and wake threads that wait for the rest of a response."""
        with self._lock:
            waiting = tuple(self._sockets)
        for wire in waiting:
            with suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
        for client in (self._anywhere, self._outside, *self._through.values()):
            if client is not None:
                client.close()

    @contextmanager
    def open_range(
        self, url: str, start: int, length: int, *, total: int
    ) -> Iterator[Iterator[bytes]]:
        """Request a part of a file.

        Args:
            url: Address of the file; may redirect.
            start: First byte.
            length: Number of bytes.
            total: Bytes of the whole file.

        Yields:
            The bytes in chunks, exactly `length` in all.

        Raises:
            AbsentError: There is no such file, or it has a different size.
            RefusedError: The server refuses, supports no ranges, or redirects unsafely.
            WebError: The server cannot be reached, fails, or closes the connection; also while
                iterating.
        """
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        with _failures(), self._response(url, headers) as response:
            _check(response, start, length, total, is_first=response.url == url)
            with self._closable(response):
                yield _body(response, length)

    def read(self, url: str, most: int) -> tuple[bytes, str]:
        """The whole answer to a request that says something about files.

        Args:
            url: Its address; may redirect.
            most: Bytes that it may have.

        Returns:
            The bytes, and the `Link` header.

        Raises:
            WebError: As for `open_range`, or it has more bytes.
        """
        data = bytearray()
        with _failures(), self._response(url, {}) as response:
            _check_status(response, is_first=response.url == url)
            with self._closable(response):
                try:
                    for chunk in response.iter_raw():
                        data += chunk
                        if len(data) > most:
                            raise RefusedError(f"sends more than {most:,} bytes")
                except (httpx.StreamError, OSError) as error:
                    raise WebError(_reason(error)) from error
            return bytes(data), response.headers.get("link", "")

    @contextmanager
    def _closable(self, response: httpx.Response) -> Iterator[None]:
        """Let `close` find the socket of a response."""
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
    def _response(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        with self._lock:
            known = self._final.get(url)
        if known is not None:
            with self._asked(known[0], headers, is_outside=known[1]) as response:
                if response.status_code not in _STALE | _REDIRECTS:
                    yield response
                    return
        place, is_outside = httpx.URL(url), False
        for _ in range(_MOST_HOPS + 1):
            with self._asked(place, headers, is_outside=is_outside) as response:
                if response.status_code not in _REDIRECTS:
                    if response.is_success:
                        with self._lock:
                            self._final[url] = place, is_outside
                    yield response
                    return
                host = place.raw_host.decode("ascii")  # as it is asked for, if it has other letters
                # a server behind a proxy is as strange as a public one
                is_outside |= bool(self._proxy(place)) or not self._dialer.is_local(host)
                place = _next(place, response)
        raise RefusedError(f"redirects more than {_MOST_HOPS} times")

    def _asked(
        self,
        place: httpx.URL,
        headers: dict[str, str],
        *,
        is_outside: bool,
    ) -> AbstractContextManager[httpx.Response]:
        """The answer of a server, which is outside of private networks unless a proxy finds it."""
        proxy = self._proxy(place)
        direct = self._outside if is_outside else self._anywhere
        client = direct if proxy is None else self._through[proxy]
        if client is None:
            why = shown_url(proxy or "")
            raise RefusedError(f"needs a proxy, and {_short(why)} is no usable one")
        return client.stream("GET", place, headers=headers)

    def _proxy(self, place: httpx.URL) -> str | None:
        """The proxy for a request, which resolves the host; None for a direct one."""
        proxy = self._proxies.get(place.scheme) or self._proxies.get("all")
        return None if proxy and self._asks_bypass and proxy_bypass(place.host) else proxy


def parse_content_range(header: str) -> tuple[int, int, int] | None:
    """Read `bytes FIRST-LAST/TOTAL`; None for anything else."""
    match = _CONTENT_RANGE.fullmatch(header.strip())
    if match is None:
        return None
    first, last, total = map(int, match.groups())
    return (first, last, total) if first <= last < total else None


def _check(
    response: httpx.Response, start: int, length: int, total: int, *, is_first: bool
) -> None:
    """Refuse a response that is not exactly the requested range."""
    status = response.status_code
    _check_status(response, is_first=is_first)
    first, last, size = _range_of(response)
    if size != total:
        raise AbsentError(f"has {size:,} bytes, expected {total:,}")
    if (first, last) != (start, start + length - 1):
        is_whole = status == httpx.codes.OK
        raise RefusedError("does not support ranges" if is_whole else "sends a different range")


def _check_status(response: httpx.Response, *, is_first: bool) -> None:
    """Refuse a response without the content that was asked for.

    After a redirect, a refusal only means that the signed address has expired.
    """
    status = response.status_code
    answer = f"answers {status} {_short(response.reason_phrase)}".rstrip()
    if status in _ABSENT:
        raise AbsentError(answer)
    if status in _FORBIDDEN and is_first:
        raise RefusedError(answer)
    if status in _BUSY:
        raise BusyError(answer, _wait_of(response.headers))
    if status not in {httpx.codes.OK, httpx.codes.PARTIAL_CONTENT}:
        raise WebError(answer)
    if "content-encoding" in response.headers:
        raise RefusedError("sends an encoded body")


def _range_of(response: httpx.Response) -> tuple[int, int, int]:
    """First and last byte of a response, and the size of the whole file."""
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        content_range = parse_content_range(response.headers.get("content-range", ""))
        if content_range is None:
            raise RefusedError("sends a range without a valid Content-Range")
        return content_range
    size = response.headers.get("content-length", "")
    if not _LENGTH.fullmatch(size):
        raise RefusedError("does not send the size of the file")
    return 0, int(size) - 1, int(size)


def _body(response: httpx.Response, length: int) -> Iterator[bytes]:
    left = length
    try:
        for chunk in response.iter_raw():
            if len(chunk) > left:
                raise RefusedError("sends more than requested")
            left -= len(chunk)
            yield chunk
    except (httpx.HTTPError, httpx.StreamError, OSError, RuntimeError) as error:
        raise WebError(_reason(error)) from error
    if left:
        raise WebError(f"closed the connection {left:,} bytes early")


def _next(place: httpx.URL, response: httpx.Response) -> httpx.URL:
    """The target of a redirect, if its form is safe; its address is checked on connecting."""
    target = place.join(response.headers.get("location", ""))
    if target.scheme not in {"http", "https"} or not target.host:
        raise RefusedError("redirects to an invalid address")
    if place.scheme == "https" and target.scheme != "https":
        raise RefusedError(f"redirects from https to http ({_short(target.host)})")
    if target.userinfo:
        raise RefusedError("redirects to an address with a password")
    return target


def _wait_of(headers: httpx.Headers) -> float:
    """Seconds that a server asks to wait, at most ten minutes; 0 if it does not say."""
    given = headers.get("retry-after", "").strip()
    if _LENGTH.fullmatch(given):
        return min(float(given), _LONGEST_WAIT_S)
    with suppress(ValueError, TypeError, OverflowError):
        left = parsedate_to_datetime(given).timestamp() - time.time()
        return min(max(left, 0.0), _LONGEST_WAIT_S)
    reset = _RESET.search(headers.get("ratelimit", ""))
    return min(float(reset[1]), _LONGEST_WAIT_S) if reset else 0.0


@contextmanager
def _failures() -> Iterator[None]:
    """Failures of a request, in the words of this module."""
    try:
        yield
    except httpx.HTTPError as error:
        raise WebError(_reason(error)) from error
    except PrivateAddressError as error:
        raise RefusedError(f"leads into a private network ({_short(error)})") from error
    except (httpx.InvalidURL, httpx.StreamError, UnicodeError) as error:
        raise RefusedError(f"has an invalid address ({_short(error)})") from error
    except RuntimeError as error:  # httpx raises it when the client was closed meanwhile
        raise WebError("was interrupted") from error


def _environment() -> dict[str, str]:
    """The proxies that the environment names, by the scheme of a request."""
    return {
        scheme: proxy if "://" in proxy else f"http://{proxy}"
        for scheme, proxy in getproxies().items()
        if scheme in {"http", "https", "all"} and proxy
    }


def _certificates() -> ssl.SSLContext:
    """The system's certificate authorities; without any, those of the certifi package."""
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        context.load_verify_locations(certifi.where())
    return context


def _reason(error: Exception) -> str:
    match error:
        case httpx.ConnectTimeout():
            return "connection timed out"
        case httpx.TimeoutException():
            return "stopped sending"
        case httpx.RemoteProtocolError():
            return "closed the connection, or does not speak HTTP"
        case _:
            return _short(error) or type(error).__name__


def _short(text: object) -> str:
    """Text from an untrusted server, shortened to a part of a line."""
    return printable(str(text), limit=80)
