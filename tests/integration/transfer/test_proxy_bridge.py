"""What libtorrent, or a stranger, gets from the SOCKS5 proxy in front of an HTTP proxy."""

import select
import socket
import time
from base64 import b64encode
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import HttpProxy, serving

from grokctl.transfer.proxy_bridge import ProxyBridge

FINE, REFUSED, UNKNOWN = (bytes([5, code, 0, 1, 0, 0, 0, 0, 0, 0]) for code in (0, 5, 7))
CONNECT, UDP_ASSOCIATE = 1, 3


class Proxy(HttpProxy):
    """Notes credentials; refuses a host of one name."""

    def do_CONNECT(self):  # noqa: N802 (the name that the base class calls)
        self.server.asked.append(self.headers["Proxy-Authorization"])
        if self.path.startswith("refused."):
            self.send_error(403)
        else:
            super().do_CONNECT()


@pytest.fixture
def proxy():
    with serving(Proxy) as server:
        yield server


@pytest.fixture
def bridge(proxy):
    credentials = proxy.url.rstrip("/").replace("//", "//me:p%40ss@")
    with ProxyBridge(credentials, bind="127.0.0.1") as bridge:
        yield bridge


def calling(bridge) -> socket.socket:
    parts = urlsplit(bridge.url)
    assert parts.hostname == "127.0.0.1"
    return closing(socket.create_connection((parts.hostname, parts.port), timeout=20))


def entered(wire, bridge) -> None:
    """Greet, and show the password."""
    parts = urlsplit(bridge.url)
    user, password = parts.username.encode(), parts.password.encode()
    wire.sendall(b"\5\2\0\2")
    assert wire.recv(2) == b"\5\2"
    wire.sendall(b"\1" + bytes([len(user)]) + user + bytes([len(password)]) + password)
    assert wire.recv(2) == b"\1\0"


def request(place: tuple[str, int], command: int = CONNECT) -> bytes:
    host, port = place
    try:
        address = b"\1" + socket.inet_aton(host)
    except OSError:
        address = b"\3" + bytes([len(host)]) + host.encode()
    return bytes([5, command, 0]) + address + port.to_bytes(2, "big")


def received(wire) -> bytes:
    """All that comes until the other end closes."""
    data = b""
    while chunk := wire.recv(2**16):
        data += chunk
    return data


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_bytes_go_both_ways_and_so_does_the_end(bridge, proxy, host):
    with socket.create_server(("127.0.0.1", 0)) as server, calling(bridge) as wire:
        port = server.getsockname()[1]
        entered(wire, bridge)
        wire.sendall(request((host, port)))
        assert wire.recv(len(FINE)) == FINE
        far, _ = server.accept()
        with far:
            far.sendall(b"to you" * 100_000)
            far.shutdown(socket.SHUT_WR)
            assert received(wire) == b"to you" * 100_000

    expected = b64encode(b"me:p@ss").decode()
    assert proxy.asked == [f"Basic {expected}", f"{host}:{port}"]


def test_what_the_proxy_refuses_is_refused(bridge):
    with calling(bridge) as wire:
        entered(wire, bridge)
        wire.sendall(request(("refused.example.org", 80)))

        assert received(wire) == REFUSED


def test_no_udp_is_carried(bridge, proxy):
    with calling(bridge) as wire:
        entered(wire, bridge)
        wire.sendall(request(("127.0.0.1", 80), UDP_ASSOCIATE))

        assert received(wire) == UNKNOWN
    assert not proxy.asked


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        pytest.param(b"\5\1\0", b"\5\xff", id="no-password"),
        pytest.param(b"\5\1\2\1\2me\1x", b"\5\2\1\1", id="wrong-password"),
        pytest.param(b"\5\1\2\1\0\0", b"\5\2\1\1", id="empty-password"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 300, b"\5\xff", id="http"),
        pytest.param(b"\4\1\0\x50\1\1\1\1\0", b"\5\xff", id="socks4"),
    ],
)
def test_a_stranger_is_carried_nowhere(bridge, proxy, said, answer):
    with calling(bridge) as wire:
        wire.sendall(said + request(("127.0.0.1", 80)))

        assert received(wire) == answer
    assert not proxy.asked


@pytest.mark.parametrize("wrong", ["username", "password"])
def test_half_of_the_password_is_none(bridge, wrong):
    parts = urlsplit(bridge.url)
    user, password = (
        (b"me" if name == wrong else getattr(parts, name).encode())
        for name in ("username", "password")
    )
    with calling(bridge) as wire:
        wire.sendall(b"\5\1\2\1" + bytes([len(user)]) + user + bytes([len(password)]) + password)

        assert received(wire) == b"\5\2\1\1"


@pytest.mark.parametrize("host", ["a b", "x\r\nHost: y", "a\tb", ""])
def test_a_name_cannot_smuggle_a_line(bridge, proxy, host):
    with calling(bridge) as wire:
        entered(wire, bridge)
        wire.sendall(request((host, 80)))

        assert received(wire) == b""
    assert not proxy.asked


def test_a_peer_that_never_closes_is_not_waited_for():
    with ExitStack() as stack:
        proxy = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        bridge = stack.enter_context(ProxyBridge(f"http://127.0.0.1:{proxy.getsockname()[1]}"))
        with calling(bridge) as wire:
            entered(wire, bridge)
            wire.sendall(request(("peer.example.org", 80)))
            far, _ = proxy.accept()
            stack.enter_context(far)
            far.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            assert wire.recv(len(FINE)) == FINE
            open_before = num_open()

        # this end, and both of the bridge
        until(lambda: num_open() <= open_before - 3)


def test_strangers_who_say_nothing_are_few(bridge):
    with ExitStack() as stack:
        strangers = [stack.enter_context(calling(bridge)) for _ in range(140)]
        until(lambda: sum(is_closed(wire) for wire in strangers) == 12)
    until(lambda: is_greeted(bridge))  # they are gone


def is_greeted(bridge) -> bool:
    with calling(bridge) as wire, suppress(ConnectionError):
        wire.sendall(b"\5\1\2")
        return wire.recv(2) == b"\5\2"
    return False


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_closed(wire) -> bool:
    return bool(select.select([wire], [], [], 0)[0])


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closing_ends_what_is_open(proxy, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with ProxyBridge(proxy.url.rstrip("/")) as bridge:
            place = urlsplit(bridge.url)
            with calling(bridge) as wire:
                entered(wire, bridge)
                wire.sendall(request(server.getsockname()))
                assert wire.recv(len(FINE)) == FINE
                bridge.close()
                assert received(wire) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((place.hostname, place.port), timeout=20)
    assert not caplog.records  # nothing for the terminal
