"""HTTP as strangers speak it: where redirects may lead, and answers that are none."""

import gc
import socket
import threading
import time
import tracemalloc

import httpcore
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import Handler, HttpProxy, content_range, serving

from grokctl.transfer.direct import Dialer, PrivateAddressError
from grokctl.transfer.web import (
    AbsentError,
    BusyError,
    RefusedError,
    Web,
    WebError,
    parse_content_range,
)

PUBLIC = "93.184.216.34"
PRIVATE = [
    "127.0.0.1",
    "127.1",
    "0x7f.1",
    "2130706433",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "224.0.0.1",
    "localhost",
    "[::1]",
    "[::]",
    "[::ffff:10.0.0.1]",
    "[::7f00:1]",
    "[64:ff9b::a00:1]",
    "[2002:a00:1::1]",
    "[fc00::1]",
    "[fe80::1]",
    "[fec0::1]",
]
DATA = bytes(range(256)) * 400


def redirected(place, location):
    """Where a redirect leads by the policy of `transfer.web`: public hosts cannot be asked here."""
    from grokctl.transfer.web import _next  # noqa: PLC0415

    return str(_next(httpx.URL(place), httpx.Response(302, headers={"Location": location})))


@pytest.mark.parametrize("host", PRIVATE)
def test_what_must_be_public_connects_to_no_private_address(host):
    with pytest.raises(PrivateAddressError):
        Dialer(only_public=True).connect_tcp(host.strip("[]"), 9, 0.1)


class Names:
    """A name server that lies, and the network that it leads into: all of it is this machine."""

    def __init__(self, monkeypatch, port):
        self.answers = {}
        self.asked, self.reached = [], []
        self._resolve, self._connect, self._port = (
            socket.getaddrinfo,
            socket.create_connection,
            port,
        )
        monkeypatch.setattr(socket, "getaddrinfo", self.resolve)
        monkeypatch.setattr(socket, "create_connection", self.connect)

    def resolve(self, host, port, *rest, **options):
        host = host.decode() if isinstance(host, bytes) else host
        if host not in self.answers:
            return self._resolve(host, port, *rest, **options)
        self.asked.append(host)
        answers = self.answers[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        found = [self._resolve(address, port, *rest, **options) for address in answer.split()]
        return [one for addresses in found for one in addresses]

    def connect(self, address, *rest, **options):
        self.reached.append(address[0])
        if address[0] == "10.0.0.9":
            raise ConnectionRefusedError
        if address[1] == 80:
            address = ("127.0.0.1", self._port)
        return self._connect(address, *rest, **options)


class Mirror(Handler):
    """Redirects `/x` to the file of a host whose name it owns."""

    location = "http://inside.test/y"

    def end_headers(self):
        self.send_header("Connection", "close")
        super().end_headers()

    def respond(self):
        if self.path == "/x":
            self.answer(302, headers={"Location": self.location})
        else:
            self.path = "/x"
            super().respond()


def public_read(web):
    with web.open_range("http://mirror.test/x", 10, 1000, total=len(DATA)) as chunks:
        return b"".join(chunks)


@pytest.mark.parametrize(
    ("mirror", "inside", "reached"),
    [
        pytest.param([PUBLIC], ["127.0.0.1"], [PUBLIC], id="private"),
        pytest.param([PUBLIC], [f"{PUBLIC} 10.0.0.1"], [PUBLIC], id="one-of-two"),
        pytest.param([f"10.0.0.9 {PUBLIC}"], ["10.0.0.1"], ["10.0.0.9", PUBLIC], id="closed-first"),
    ],
)
def test_a_public_server_leads_nobody_into_a_private_network(
    web, folder, monkeypatch, mirror, inside, reached
):
    with serving(Mirror, folder) as server:
        names = Names(monkeypatch, server.port)
        names.answers = {"mirror.test": mirror, "inside.test": inside}

        with pytest.raises(RefusedError, match=r"into a private network \(inside.test\)"):
            public_read(web)

    assert names.reached == reached


def test_a_public_name_in_other_letters_is_known_again(web, folder, monkeypatch):
    with serving(Mirror, folder) as server:
        names = Names(monkeypatch, server.port)
        names.answers = {"xn--bcher-kva.test": [PUBLIC], "inside.test": ["127.0.0.1"]}

        with (
            pytest.raises(RefusedError, match="into a private network"),
            web.open_range("http://bücher.test/x", 10, 1000, total=len(DATA)),
        ):
            pass


def test_a_connection_goes_to_the_address_that_was_checked(web, folder, monkeypatch):
    """A name that is public when it is checked, and private when it is asked for again."""
    with serving(Mirror, folder) as server:
        names = Names(monkeypatch, server.port)
        names.answers = {"mirror.test": [PUBLIC], "inside.test": ["1.1.1.1", "127.0.0.1"]}

        assert public_read(web) == DATA[10:1010]
        assert names.reached == [PUBLIC, "1.1.1.1"]
        assert names.asked == ["mirror.test", "inside.test"]

        # the kept target is checked for every connection, and the first host as well
        with pytest.raises(RefusedError, match="into a private network"):
            public_read(web)
        assert names.reached == [PUBLIC, "1.1.1.1"]


def test_a_public_name_does_not_become_a_private_one(web, folder, monkeypatch):
    class Plain(Mirror):
        respond = Handler.respond

    with serving(Plain, folder) as server:
        names = Names(monkeypatch, server.port)
        names.answers = {"mirror.test": [PUBLIC, f"10.0.0.1 {PUBLIC}", "10.0.0.1"]}

        assert public_read(web) == DATA[10:1010]
        assert public_read(web) == DATA[10:1010]  # of two, the public one
        with pytest.raises(RefusedError, match="into a private network"):
            public_read(web)

    assert names.reached == [PUBLIC, PUBLIC]


def test_a_chain_of_public_servers_stays_outside(web, folder, monkeypatch):
    class Chain(Handler):
        def respond(self):
            step = int(self.path[2:] or 0)
            self.answer(302, headers={"Location": f"http://h{step}.test/x{step + 1}"})

    with serving(Chain, folder) as server:
        names = Names(monkeypatch, server.port)
        public = {"mirror.test": [PUBLIC], "h0.test": ["1.1.1.1"]}
        names.answers = public | {"h1.test": ["127.0.0.1"]}

        with pytest.raises(RefusedError, match=r"into a private network \(h1.test\)"):
            public_read(web)


def test_a_server_in_the_private_network_may_lead_within_it(web, folder, monkeypatch):
    class Named(Mirror):
        hosts: list[str] = []  # noqa: RUF012

        def respond(self):
            self.hosts.append(self.headers["Host"])
            super().respond()

    with serving(Named, folder) as server:
        names = Names(monkeypatch, server.port)
        names.answers = {"mirror.test": ["10.0.0.1"], "inside.test": ["10.0.0.9 192.168.1.2"]}

        assert public_read(web) == DATA[10:1010]

    assert names.reached == ["10.0.0.1", "10.0.0.9", "192.168.1.2"]
    assert Named.hosts == ["mirror.test", "inside.test"]


def test_a_server_behind_a_proxy_leads_past_it_to_public_addresses_only(folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Redirecting(Handler):
        def respond(self):
            self.answer(302, headers={"Location": f"{target.url}x"})

    with serving(Handler, folder) as target, serving(Redirecting) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with Web() as web, pytest.raises(RefusedError, match="into a private network"):
            public_read(web)

    assert target.asked == []


def test_a_name_without_an_address_is_named(web):
    with (
        pytest.raises(WebError, match=r"nowhere\.invalid: "),
        web.open_range("http://nowhere.invalid/x", 0, 1, total=1),
    ):
        pass
    with pytest.raises(httpcore.ConnectError):
        Dialer(only_public=False).connect_tcp("a..b", 80)


@pytest.mark.parametrize("proxy", ["socks4://me:opensesame@127.0.0.1:1", "http://127.0.0.1:x"])
def test_a_proxy_of_no_usable_kind_is_a_failure_of_the_mirror(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)

    with Web() as web, pytest.raises(RefusedError, match="needs a proxy") as raised:
        public_read(web)

    assert "opensesame" not in str(raised.value)


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([b"\x01\x00"], id="another-version"),
        pytest.param([b""], id="nothing"),
        pytest.param([b"HTTP/1.1 400 Bad\r\n\r\n"], id="http"),
        pytest.param([b"\x05\x77"], id="another-login"),
        pytest.param([b"\x05\x00", b"\x1b]0;x\x07"], id="nonsense"),
        pytest.param([b"\x05\x00", b""], id="closed"),
        pytest.param([b"\x05\x00", b"\x05\xff\x00\x09aaaa"], id="unknown-kinds"),
        pytest.param([b"\x05\x00", b"\x05\x00\x00\x01a"], id="short-address"),
        pytest.param([b"\x05\x00", b"\x05\x00\x00\x03"], id="no-name"),
        pytest.param([b"\x05\x00", b"\x05\x00\x00\x03\x04\xff\xff\xff\xff\0\0"], id="odd-name"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # httpcore leaves its socket to the garbage collection
def test_a_proxy_that_answers_nonsense_is_a_failure_of_the_mirror(answers):
    def answer():
        connection, _ = listener.accept()
        with connection:
            for one in answers:
                connection.recv(300)
                connection.sendall(one)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        with Web(proxy=f"socks5://127.0.0.1:{listener.getsockname()[1]}") as web:
            with pytest.raises(WebError) as raised:
                public_read(web)
            thread.join()

    why = str(raised.value)
    del raised
    gc.collect()
    assert why.isprintable()


@pytest.mark.parametrize(
    ("location", "place"),
    [
        pytest.param("http://1.1.1.1/y", "http://1.1.1.1/y", id="another-host"),
        pytest.param("https://1.1.1.1/y?a=b#c", "https://1.1.1.1/y?a=b#c", id="to-https"),
        pytest.param("/y", f"http://{PUBLIC}/y", id="another-path"),
        pytest.param("y", f"http://{PUBLIC}/d/y", id="relative"),
        pytest.param("//1.1.1.1/y", "http://1.1.1.1/y", id="same-scheme"),
        pytest.param("http://[2606:4700::1111]/y", "http://[2606:4700::1111]/y", id="ipv6"),
        pytest.param("http://[64:ff9b::101:101]/", "http://[64:ff9b::101:101]/", id="nat64"),
    ],
)
def test_a_public_server_may_redirect_to_another_one(location, place):
    assert redirected(f"http://{PUBLIC}/d/x", location) == place


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        pytest.param("http://1.1.1.1/y", "from https to http", id="downgrade"),
        pytest.param("https://me:secret@1.1.1.1/y", "password", id="password"),
        pytest.param("https://1.1.1.1@10.0.0.1/y", "password", id="looks-public"),
        pytest.param("javascript:alert(1)", "invalid address", id="javascript"),
        pytest.param("data:,x", "invalid address", id="data"),
        pytest.param("file:///etc/passwd", "invalid address", id="file"),
        pytest.param("gopher://1.1.1.1/", "invalid address", id="gopher"),
    ],
)
def test_what_a_redirect_may_not_do(location, reason):
    with pytest.raises(RefusedError, match=reason):
        redirected(f"https://{PUBLIC}/x", location)


def test_a_secret_is_not_repeated_in_the_reason():
    with pytest.raises(RefusedError) as caught:
        redirected(f"https://{PUBLIC}/x", "https://me:secret@1.1.1.1/y")

    assert "secret" not in str(caught.value)


@given(st.text(st.characters(codec="ascii"), max_size=30))
def test_a_content_range_is_three_numbers_in_order_or_nothing(text):
    for header in (text, f"bytes {text}"):
        found = parse_content_range(header)

        assert found is None or found[0] <= found[1] < found[2]


@given(st.lists(st.integers(0, 10**18 - 1), min_size=3, max_size=3).map(sorted))
def test_a_content_range_reads_back(numbers):
    first, last, total = numbers

    found = parse_content_range(f"bytes {first}-{last}/{total}")

    assert found == ((first, last, total) if last < total else None)


@pytest.fixture
def web(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Web() as client:
        yield client


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    return tmp_path


def read(web, server):
    with web.open_range(f"{server.url}x", 10, 1000, total=len(DATA)) as chunks:
        return b"".join(chunks)


ODD = [
    pytest.param("http://xn--a/", id="no-punycode"),
    pytest.param("http://" + "a" * 300 + "/", id="a-long-name"),
    pytest.param("http://a..b/", id="an-empty-name"),
    pytest.param("http://[::1", id="half-an-address"),
    pytest.param("http://127.0.0.1:99999/", id="a-high-port"),
    pytest.param("http://127.0.0.1:-1/", id="a-low-port"),
    pytest.param("http://a\x7fb/", id="a-control-character"),
    pytest.param("/" + "y" * 60_000, id="a-long-path"),
    pytest.param("/" + "y" * 70_000, id="a-longer-path"),
    pytest.param("x?" + "&".join(f"a{i}=b" for i in range(5000)), id="many-questions"),
]


@pytest.mark.parametrize("location", ODD)
def test_whatever_a_redirect_says_it_ends_as_a_failure_of_the_mirror(web, folder, location):
    class Odd(Handler):
        def respond(self):
            if self.path == "/x":
                self.answer(302, headers={"Location": location})
            else:
                self.answer(404)

    with serving(Odd, folder) as server, pytest.raises(WebError):
        read(web, server)


@pytest.mark.parametrize(
    "said",
    [
        None,
        "",
        "bytes */{total}",
        "bytes 10-1009/*",
        "bytes 1009-10/{total}",
        "bytes 10-1009",
        "items 10-1009/{total}",
        "bytes=10-1009/{total}",
        "bytes 10-1009/{total}, 10-1009/{total}",
        "bytes +10-1009/{total}",
        "bytes 10-1009/{total}.0",
        "bytes \u0661\u0660-1009/{total}",
        "bytes 11-1010/{total}",
        "bytes 10-1010/{total}",
        "bytes 0-{last}/{total}",
        "bytes 10-1009/1010",
        "bytes 10-1009/" + "9" * 5000,
    ],
)
def test_a_range_that_is_not_the_one_is_refused_before_a_byte_is_taken(web, folder, said):
    class Odd(Handler):
        def send_part(self, data, first, last):
            told = said and said.format(total=len(data), last=len(data) - 1)
            headers = {} if told is None else {"Content-Range": told.encode().decode("latin-1")}
            self.answer(206, data[first : last + 1], headers)

    with serving(Odd, folder) as server, pytest.raises((RefusedError, AbsentError)):
        read(web, server)


@pytest.mark.parametrize("change", [-10, 10])
def test_a_body_of_another_size_than_the_range_is_noticed(web, folder, change):
    class Odd(Handler):
        def send_part(self, data, first, last):
            body = data[first : last + 1 + change]
            self.answer(206, body, content_range(data, first, last))

    reason = "more than requested" if change > 0 else "closed the connection 10 bytes early"
    with serving(Odd, folder) as server, pytest.raises(WebError, match=reason):
        read(web, server)


def test_an_answer_in_chunks_is_fine(web, folder):
    class Chunked(Handler):
        def send_part(self, data, first, last):
            part = data[first : last + 1]
            parts = [part[place : place + 7] for place in range(0, len(part), 7)]
            self.answer_in_chunks(parts, content_range(data, first, last))

    with serving(Chunked, folder) as server:
        assert read(web, server) == DATA[10:1010]


def test_an_answer_that_never_ends_is_cut_off(web, folder):
    class Endless(Handler):
        def send_part(self, data, first, last):
            part = data[first : last + 1]
            self.answer_in_chunks(iter(lambda: part, None), content_range(data, first, last))

    reason = "more than requested"
    with serving(Endless, folder) as server, pytest.raises(RefusedError, match=reason):
        read(web, server)

    assert server.sent < 100 * len(DATA)


def test_a_file_of_unknown_size_is_refused(web, folder):
    class Old(Handler):
        protocol_version = "HTTP/1.0"

        def send_part(self, data, first, last):
            del first, last
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

    with serving(Old, folder) as server, pytest.raises(RefusedError, match="size of the file"):
        read(web, server)


def test_headers_without_end_are_cut_off_and_take_no_memory(web, folder):
    class Talkative(Handler):
        def send_part(self, *_):
            self.send_response(206)
            while True:
                self.wfile.write(b"X-Header: " + b"x" * 1000 + b"\r\n")

    tracemalloc.start()
    try:
        with (
            serving(Talkative, folder) as server,
            pytest.raises(WebError, match="does not speak HTTP"),
        ):
            read(web, server)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 10 * 2**20


@pytest.mark.parametrize("answer", [b"", b"\0" * 100, b"SSH-2.0-x\r\n"])
def test_what_does_not_speak_http_is_a_failure_of_the_mirror(web, folder, answer):
    class Mute(Handler):
        def send_part(self, *_):
            self.wfile.write(answer)
            self.close_connection = True

    with serving(Mute, folder) as server, pytest.raises(WebError, match="does not speak HTTP"):
        read(web, server)


def test_a_reason_is_short_whatever_the_server_says(web, folder):
    class Talkative(Handler):
        def send_part(self, *_):
            self.send_response(503, "x" * 30_000)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving(Talkative, folder) as server, pytest.raises(WebError) as caught:
        read(web, server)

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_the_proxy_that_the_environment_names_is_asked_for_names_too(folder, monkeypatch):
    """Where one is needed, this machine often knows no address of the public Internet."""

    class Resolving(HttpProxy):
        def find(self, address):
            return {"mirror.invalid": f"127.0.0.1:{target.port}"}[address]

    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(Handler, folder) as target, serving(Resolving) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with (
            Web() as web,
            web.open_range("http://mirror.invalid/x", 10, 1000, total=len(DATA)) as chunks,
        ):
            assert b"".join(chunks) == DATA[10:1010]

    assert target.asked == ["/x"]


def test_a_client_that_was_closed_meanwhile_only_fails(web, folder):
    with serving(Handler, folder) as server:
        read(web, server)
        web.close()

        with pytest.raises(WebError):
            read(web, server)


def test_a_server_that_accepts_and_says_nothing_is_not_waited_for_long(folder, monkeypatch):
    monkeypatch.setattr("grokctl.transfer.web._TIMEOUT", httpx.Timeout(0.3))

    class Silent(Handler):
        def send_part(self, *_):
            self.rfile.read(1)

    began = time.monotonic()
    with (
        serving(Silent, folder) as server,
        Web() as web,
        pytest.raises(WebError, match="stopped sending"),
    ):
        read(web, server)

    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "99999999"}, 600),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "Fri, 21 Oct 2155 07:28:00 GMT"}, 600),
        ({"Retry-After": "soon"}, 0),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55),
        ({}, 0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_says_how_long_to_wait(status, headers, wait_s):
    class Busy(Handler):
        def respond(self):
            self.answer(status, headers=headers)

    with serving(Busy) as server, Web() as web, pytest.raises(BusyError) as caught:
        web.read(server.url, 100)

    assert caught.value.wait_s == wait_s
    assert str(status) in str(caught.value)


def test_an_answer_is_read_up_to_a_limit():
    class Long(Handler):
        def respond(self):
            self.answer(200, b"x" * 101, {"Link": "<next>"})

    with serving(Long) as server, Web() as web:
        assert web.read(server.url, 101) == (b"x" * 101, "<next>")
        with pytest.raises(RefusedError, match="sends more than 100 bytes"):
            web.read(server.url, 100)
