import base64
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torrents import HASH, HASH_V2, is_one_clean_line

from grokctl.checkpoint.torrent import (
    GROK_1_MAGNET,
    folder_name,
    parse_magnet,
)
from grokctl.errors import FetchError
from grokctl.text import printable

XT_V2 = f"magnet:?xt=urn:btmh:1220{HASH_V2}"


XT = f"magnet:?xt=urn:btih:{HASH}"


def test_the_published_magnet_is_the_root_of_trust():
    magnet = parse_magnet(GROK_1_MAGNET)

    assert magnet.infohash == "5f96d43576e3d386c9ba65b883210a393b68210e"
    assert magnet.name == "grok-1"
    assert len(magnet.trackers) == 3
    assert parse_magnet(str(magnet)) == magnet


@pytest.mark.parametrize(
    "link",
    [
        pytest.param(XT, id="lower-case"),
        pytest.param(XT.upper().replace("MAGNET:?XT=URN:BTIH", "magnet:?xt=urn:btih"), id="upper"),
        pytest.param(
            "magnet:?xt=urn:btih:" + base64.b32encode(bytes.fromhex(HASH)).decode(), id="base32"
        ),
        pytest.param(
            "magnet:?xt=urn:btih:" + base64.b32encode(bytes.fromhex(HASH)).decode().lower(),
            id="base32-lower-case",
        ),
        pytest.param(f"{XT}&xt=urn:btmh:1220{'ab' * 32}", id="hybrid"),
        pytest.param(f"magnet:?dn=x&xt=urn%3Abtih%3A{HASH}", id="quoted"),
        pytest.param(f"MAGNET:?xt=urn:btih:{HASH}", id="scheme-in-capitals"),
    ],
)
def test_a_magnet_names_its_infohash(link):
    assert parse_magnet(link).infohash == HASH


def test_a_hybrid_magnet_keeps_both_infohashes_and_has_one_of_each():
    link = f"{XT}&xt=urn:btmh:1220{HASH_V2.upper()}"

    magnet = parse_magnet(link)

    assert (magnet.infohash, magnet.v2_infohash) == (HASH, HASH_V2)
    assert parse_magnet(str(magnet)) == magnet
    assert parse_magnet(XT).v2_infohash == parse_magnet(XT_V2).v2_infohash == ""
    with pytest.raises(FetchError, match="expected one BitTorrent infohash, found 2"):
        parse_magnet(f"{link}&xt=urn:btmh:1220{'ab' * 32}")


@pytest.mark.parametrize(
    "link",
    [
        pytest.param(XT_V2, id="lower-case"),
        pytest.param(XT_V2.replace(HASH_V2, HASH_V2.upper()), id="upper-case"),
        pytest.param(f"magnet:?xt=urn%3Abtmh%3A1220{HASH_V2}", id="quoted"),
        pytest.param(f"{XT_V2}&xt=urn:sha1:{HASH}", id="beside-another-hash"),
    ],
)
def test_a_magnet_of_a_v2_torrent_names_its_64_digits_and_is_written_as_it_was_read(link):
    magnet = parse_magnet(f"{link}&dn=grok-1&tr=udp://t.example:1")

    assert magnet.infohash == HASH_V2
    assert str(magnet).startswith(XT_V2)
    assert parse_magnet(str(magnet)) == magnet


@pytest.mark.parametrize(
    "link",
    [
        pytest.param("", id="nothing"),
        pytest.param("magnet:", id="only-the-scheme"),
        pytest.param("magnet:?dn=grok-1", id="no-xt"),
        pytest.param(f"{XT_V2}&xt=urn:btmh:1220{'ab' * 32}", id="two-v2-xt"),
        pytest.param(XT_V2[:-1], id="v2-63-digits"),
        pytest.param(f"{XT_V2}0", id="v2-65-digits"),
        pytest.param(f"magnet:?xt=urn:btmh:1120{HASH_V2}", id="multihash-of-another-kind"),
        pytest.param(f"magnet:?xt=urn:btmh:{HASH_V2}", id="no-multihash"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH_V2}", id="v2-digits-as-v1"),
        pytest.param(f"{XT}&xt=urn:btih:{'f' * 40}", id="two-xt"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH[:-1]}", id="39-digits"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH}0", id="41-digits"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH[:-1]}g", id="no-digit"),
        pytest.param(f"magnet:?xt=urn:btih:{'1' * 32}", id="no-base32"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH}%0a", id="newline-behind"),
        pytest.param("magnet:?xt=urn:btih:" + "\uff11" * 40, id="full-width-digits"),
        pytest.param(f"https://example.org/?xt=urn:btih:{HASH}", id="another-scheme"),
        pytest.param(f"magnet:?xt=urn:sha1:{HASH}", id="another-hash"),
        pytest.param("magnet://[", id="a-broken-address"),
        pytest.param("magnet:?" + "\x1b[2J\n" * 100, id="control-characters"),
    ],
)
def test_a_magnet_without_one_infohash_is_a_fetch_error_that_can_be_printed(link):
    with pytest.raises(FetchError) as caught:
        parse_magnet(link)

    assert is_one_clean_line(str(caught.value))
    assert len(str(caught.value)) < 500
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("fields", [200, 100_000])
def test_a_magnet_with_very_many_fields_is_a_magnet_or_a_fetch_error(fields):
    try:
        found = parse_magnet(XT + "&tr=udp://t.example:1" * fields).infohash
    except FetchError as error:
        found = error.exit_code

    assert found in {HASH, 10}


def test_two_infohashes_are_not_called_none():
    with pytest.raises(FetchError) as caught:
        parse_magnet(f"{XT}&xt=urn:btih:{'f' * 40}")

    assert "names no" not in str(caught.value)


def test_a_magnet_name_is_for_people_and_never_a_path():
    magnet = parse_magnet(f"{XT}&dn=../../evil%1b%5b2J%0a%e2%80%ae")

    assert is_one_clean_line(magnet.name)
    assert folder_name(magnet.name, magnet.infohash) == HASH[:16]


def test_peers_and_web_seeds_of_a_magnet_are_dropped():
    link = (
        f"{XT}&x.pe=10.0.0.1:22&x.pe=[::1]:80&ws=http://169.254.169.254/latest&as=http://a&xs=http://b"
        "&tr=http://t.example/announce"
    )

    magnet = parse_magnet(link)

    assert magnet.trackers == ("http://t.example/announce",)
    assert not re.search("10.0.0.1|::1|169.254|as=|xs=|ws=", str(magnet))


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("ws://t.example", id="websocket"),
        pytest.param("javascript:alert(1)", id="script"),
        pytest.param("//t.example/announce", id="no-scheme"),
        pytest.param("http://[t.example", id="a-broken-address"),
        pytest.param("http://t.example/%1b%5b2J", id="escape"),
        pytest.param("http://t.example/%0d%0aX-Header:1", id="header-injection"),
        pytest.param("", id="nothing"),
    ],
)
def test_a_tracker_of_another_kind_is_dropped_and_the_rest_kept(url):
    magnet = parse_magnet(f"{XT}&tr={url}&tr=udp://t.example:1")

    assert magnet.trackers == ("udp://t.example:1",)


def test_a_magnet_with_many_trackers_is_still_a_magnet():
    link = XT + "".join(f"&tr=udp://t{n}.example:1" for n in range(98))

    assert len(parse_magnet(link).trackers) == 98


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_behind_a_magnet_gives_a_magnet_or_a_fetch_error(text):
    for link in (text, XT + text, f"{XT}&{text}", f"{XT}&tr={text}&dn={text}"):
        try:
            shown = parse_magnet(link).name
        except FetchError as error:
            shown = str(error)

        assert is_one_clean_line(shown)


@given(st.text(max_size=300))
def test_printable_text_has_no_control_characters_and_an_end(text):
    shown = printable(text)

    assert len(shown) <= 120
    assert is_one_clean_line(shown)
