"""Which trackers a download asks, and whether it leaves this machine."""

import hashlib
from dataclasses import replace

import pytest

from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo, raw_values
from grokctl.errors import FetchError, InvalidValueError
from grokctl.transfer.destination import select_files, typed_options
from grokctl.transfer.sources import FetchOptions, FetchRequest, Origin, find_mirror, parse_source

FAR = ("udp://tracker.example.org:80", "http://203.0.113.7/announce")
NEAR = ("http://127.0.0.1:9/announce", "http://localhost:9/announce", "udp://[::1]:9")
OWN = ("http://own.example.org/announce",)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        pytest.param({}, FAR + NEAR, id="all"),
        pytest.param({"trackers": (*OWN, FAR[0])}, FAR + NEAR + OWN, id="each-once"),
        pytest.param({"source_trackers": False}, (), id="none"),
        pytest.param({"source_trackers": False, "trackers": OWN}, OWN, id="only-ours"),
        pytest.param({"bind": "127.0.0.1"}, NEAR, id="from-loopback"),
        pytest.param({"bind": "::1"}, NEAR, id="from-loopback-6"),
        pytest.param({"bind": "127.0.0.1", "trackers": OWN}, NEAR + OWN, id="ours-anyway"),
        pytest.param({"bind": "192.0.2.1"}, FAR + NEAR, id="from-an-address"),
        pytest.param(
            {"bind": "127.0.0.1", "proxy": "socks5://127.0.0.1:9050"}, FAR + NEAR, id="by-proxy"
        ),
        pytest.param({"proxy": "http://192.0.2.1:3128"}, (FAR[1], *NEAR[:2]), id="by-http-proxy"),
        pytest.param({"proxy": "HTTP://[2001:db8::1]:1"}, (FAR[1], *NEAR[:2]), id="in-capitals"),
        pytest.param(
            {"proxy": "http://192.0.2.1:3128", "trackers": OWN},
            (FAR[1], *NEAR[:2], *OWN),
            id="ours-by-http-proxy",
        ),
        pytest.param({"proxy": "socks5h://tor:9050"}, FAR + NEAR, id="by-socks-proxy"),
    ],
)
def test_the_trackers_that_are_asked(options, asked):
    assert set(FetchOptions(**options).asked(FAR + NEAR)) == set(asked)
    assert len(FetchOptions(**options).asked(FAR + NEAR)) == len(asked)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("proxy", "socks5://me:opensesame@proxy", id="proxy-without-port"),
        pytest.param("proxy", "me:opensesame@proxy:1080", id="proxy-without-scheme"),
        pytest.param("mirrors", "ftp://me:opensesame@mirror/", id="mirror"),
        pytest.param("mirrors", "https://mirror/?key=opensesame", id="mirror-with-key"),
        pytest.param("web_seeds", "ftp://mirror/0pensesame1234/", id="web-seed"),
        pytest.param("trackers", "ws://tracker/announce?passkey=opensesame", id="tracker"),
        pytest.param("peers", "me:opensesame@peer", id="peer"),
    ],
)
def test_an_address_that_is_refused_is_shown_without_its_secret(field, value):
    with pytest.raises(InvalidValueError, match="expected") as raised:
        FetchOptions(**{field: value if field == "proxy" else (value,)})

    assert "pensesame" not in f"{raised.value} {raised.value.hint}"
    assert value.partition("://")[0].rpartition("@")[2] in str(raised.value)


@pytest.mark.parametrize("url", ["udp://tracker.example.org:80", "UDP://192.0.2.1:1/announce"])
def test_no_tracker_behind_an_http_proxy_is_asked_by_udp(url):
    with pytest.raises(InvalidValueError, match="expected http"):
        FetchOptions(trackers=(url,), proxy="http://192.0.2.1:3128")

    assert FetchOptions(trackers=(url,), proxy="socks5://192.0.2.1:3128").asked(()) == (url,)


def test_a_magnet_link_that_is_refused_is_shown_without_passkeys():
    tracker = "http%3A%2F%2Ftracker%2Fannounce%3Fpasskey%3Dopensesame"

    with pytest.raises(FetchError) as raised:
        parse_source(f"magnet:?xt=urn:btmh:1220{'0' * 64}&tr={tracker}")

    assert "opensesame" not in str(raised.value)


def test_a_mirror_without_a_host_is_named_without_its_secret():
    assert "opensesame" not in find_mirror("http:///x?key=opensesame").name


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        ("socks5://me:opensesame@proxy:1080", "socks5://…@proxy:1080"),
        ("http://opensesame@203.0.113.7:3128", "http://…@203.0.113.7:3128"),
        ("socks5h://proxy:1080", "socks5h://proxy:1080"),
    ],
)
def test_no_command_that_continues_goes_past_the_proxy(proxy, shown):
    words = list(typed_options(FetchOptions(proxy=proxy)))

    assert words == ["--proxy", shown]
    if proxy != shown:  # pasted as it is, it connects to nobody
        with pytest.raises(InvalidValueError, match="proxy"):
            FetchOptions(proxy=shown)


def test_the_command_that_continues_keeps_every_option_but_urls_with_a_secret():
    options = FetchOptions(
        peers=("203.0.113.7:6881",),
        mirrors=("hf", "http://192.168.100.200:8080/grok-1/", "https://h/0a1b2c3d4e5f6071/"),
        trackers=("udp://t.example:1/announce", "http://t.example/announce?opensesame="),
        web_seeds=("https://s.example/OpenSesame/",),
        proxy="socks5://me:opensesame@proxy:1",
        max_download=123_456_789_000,
    )

    words = list(typed_options(options))

    assert words == [
        *("--peer", "203.0.113.7:6881", "--tracker", "udp://t.example:1/announce"),
        *("--mirror", "hf", "--mirror", "http://192.168.100.200:8080/grok-1/"),
        *("--proxy", "socks5://…@proxy:1", "--max-download", "123456789000B"),
    ]


def test_a_mirror_is_not_named_after_a_passkey():
    assert find_mirror("https://0p3n5e54m3012345678.m.example:8/x").name == "….m.example:8"
    assert find_mirror("https://[2001:db8::5]:8/x").name == "2001:db8::5:8"


def test_the_file_of_a_torrent_is_named_as_it_is():
    origin = Origin(source="a@b.torrent", infohash="0" * 40, name="", trackers=(), torrent=b"")

    assert origin.shown == "a@b.torrent"
    assert replace(origin, source="me:pw@b", torrent=None).shown == "…@b"


def test_metadata_have_both_infohashes_of_a_magnet_that_has_two(two_layers, tmp_path):
    files = sorted(f"ckpt-0/{path.name}" for path in (two_layers / "ckpt-0").iterdir())
    torrent = build_metainfo(two_layers, files, name="small", piece_length=16384)
    first = parse_metainfo(torrent, source="").infohash
    second = hashlib.sha256(raw_values(torrent)[b"info"]).hexdigest()

    def selected(v2):
        origin = parse_source(f"magnet:?xt=urn:btih:{first}{v2}")
        request = FetchRequest(origin=origin, root=tmp_path, options=FetchOptions())
        return select_files(torrent, request).metainfo.infohash

    assert selected("") == selected(f"&xt=urn:btmh:1220{second}") == first
    with pytest.raises(FetchError, match=f"expected v2 infohash {'f' * 64}, found {second}"):
        selected(f"&xt=urn:btmh:1220{'f' * 64}")
