"""Bytes, rates, numbers and times as people read them."""

import json
import math
import shlex
import subprocess
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.events import Advanced, Stage
from grokctl.inference.generation import Score, Stats
from grokctl.screen import score as screen
from grokctl.screen.console import Console
from grokctl.text import (
    format_apart,
    format_exact,
    format_number,
    format_seconds,
    format_speed,
    harmless,
    has_secret,
    printable,
    shown_url,
    to_copy,
    to_json,
)
from grokctl.transfer.swarm import rate_limit


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 peers"), (1, "1 peer"), (2, "2 peers"), (1000, "1,000 peers")]
)
def test_one_is_one_and_all_others_are_many(count, text):
    assert format_number(count, "peer") == text


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null_in_json_wherever_it_stands(value):
    text = to_json({"a": value, "b": [1.5, value], "c": {"d": (value, "x")}, "e": asdict(Stats())})

    values = json.loads(text, parse_constant=no_constant)
    assert (values["a"], values["b"], values["c"]) == (None, [1.5, None], {"d": [None, "x"]})


def test_the_result_and_the_events_of_a_command_are_json(capsys):
    console = Console(as_json=True)

    console.emit({"rate": math.inf})
    with console.observing() as observe:
        observe(Advanced(stage=Stage.FETCH, done=1, parts=(math.nan,)))

    out, err = capsys.readouterr()
    assert json.loads(out, parse_constant=no_constant) == {"rate": None}
    assert json.loads(err, parse_constant=no_constant)["parts"] == [None]


@pytest.mark.parametrize("mean", [710.0, 5000.0, 123456.7])
def test_a_perplexity_beyond_all_numbers_is_null_and_a_power_in_words(capsys, mean):
    result = Score(tokens=4, nll=3 * mean)

    screen.score(Console(as_json=True), result, None)
    screen.score(Console(), result, None)

    first, *rest = capsys.readouterr().out.splitlines()
    expected = {"tokens": 4, "nll": 3 * mean, "perplexity": None}
    assert json.loads(first, parse_constant=no_constant) == expected
    assert f"e^{mean:.1f}" in "".join(rest)


def test_the_largest_perplexity_is_a_number():
    assert Score(tokens=2, nll=709.0).perplexity == math.exp(709.0)


@pytest.mark.parametrize(
    ("rate", "limit"),
    [(None, -1), (0.2, 1), (2e7, 20_000_000), (3e9, 2**31 - 1), (1e300, 2**31 - 1)],
)
def test_a_rate_is_a_limit_that_libtorrent_can_hold(rate, limit):
    assert rate_limit(rate) == limit


@pytest.mark.parametrize(
    ("counts", "texts"),
    [
        ((7_327_341, 74_248_544_256), ("7.3 MB", "74.2 GB")),
        ((7_327_341, 7_327_340), ("7,327,341 bytes", "7,327,340 bytes")),
        ((7_327_341, 7_327_341), ("7.3 MB", "7.3 MB")),
        ((1, 0), ("1 B", "0 B")),
    ],
)
def test_sizes_to_compare_never_read_alike(counts, texts):
    assert format_apart(*counts) == texts


def test_exact_sizes_have_separators():
    assert format_exact(1_611_137_347) == "1,611,137,347 bytes"
    assert format_exact(1) == "1 byte"


@pytest.mark.parametrize("seconds", [7.7e-05, 0.0009, 0.002, 0.77, 7.7, 77, 7.7e4, 7.7e6])
def test_no_time_or_rate_has_an_exponent(seconds):
    assert "e" not in format_seconds(seconds) + format_speed(seconds)


def test_short_times_and_none():
    assert [format_seconds(each) for each in (0.0, 7.7e-05, 0.0012, 9.4)] == [
        *("0 s", "<0.001 s", "0.0012 s", "9.4 s")
    ]


@pytest.mark.parametrize("code", [0x202E, 0x2066, 0x200E, 0x061C, 0x200B, 0xFEFF, 0xE0041, 0x00AD])
def test_no_terminal_gets_what_turns_or_hides_text(code):
    assert harmless(f"a{chr(code)}b\x1b[2J") == "ab[2J"


@pytest.mark.parametrize(
    "code",
    [
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x2800, 0x3164, 0xFFA0, 0xFE00, 0xFE0F, 0xE0100, 0xE01EF),
        *(0x200C, 0x200D, 0x202E, 0x7, 0xE000, 0x2028, 0x0378),
    ],
)
def test_no_name_has_what_nobody_sees(code):
    assert printable(f"README{chr(code)}.md") == "README?.md"


@pytest.mark.parametrize("text", ["plain", "ﷺ für ß", "名前", "Ελλάδα a·b", "🚀"])
def test_a_name_that_is_seen_stays(text):
    assert printable(text) == text


@given(st.text())
def test_what_is_printed_of_a_name_is_seen(text):
    shown = printable(text, limit=1000)

    assert len(shown) == min(len(text), 1000)
    assert printable(shown, limit=1000) == shown
    assert all(c.isprintable() or c.isspace() for c in shown)
    assert not set(shown) & set("\n\r\v\f\x85\u2028\u2029")


@pytest.mark.parametrize("text", ["👩‍🚀", "می‌خواهم", "؀١٢", "a\tb\n"])
def test_joiners_and_signs_of_usual_text_stay(text):
    assert harmless(text) == text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("socks5://me:opensesame@proxy", "socks5://…@proxy"),
        ("http://me:open/ses?ame#x@y@proxy:1", "http://…"),
        ("me:opensesame@proxy:1", "…@proxy:1"),
        ("http://opensesame@tracker/announce", "http://…@tracker/announce"),
        ("http://tracker/0a1b2c3d4e5f60718293/announce", "http://tracker/…/announce"),
        ("http://tracker/announce?passkey=opensesame&x=1", "http://tracker/announce?passkey=…&x=…"),
        ("http://tracker/announce?opensesame", "http://tracker/announce?…"),
        ("https://mirror/grok-1/ckpt-0/#opensesame", "https://mirror/grok-1/ckpt-0/#…"),
        ("udp://tracker.example.org:1337/announce", "udp://tracker.example.org:1337/announce"),
        ("https://host/xai-org/grok-1/resolve/main/", "https://host/xai-org/grok-1/resolve/main/"),
        ("http://[2001:db8::5]:80/x", "http://[2001:db8::5]:80/x"),
        ("http://host/a@b", "http://…"),
        ("http://us/er:opensesame@h:1/", "http://…"),
        ("//user:opensesame@h:80/", "//…@h:80/"),
        (":opensesame@h:1", "…@h:1"),
        ("opensesame@h", "…@h"),
        ("http:user:opensesame@h", "…@h"),
        (" https://user:opensesame@h/", "https://…@h/"),
        ("https:\\\\user:opensesame@h\\", "https:\\\\…@h\\"),
        ("http://t/announce?passkey=b3BlbnNlc2FtZQ==", "http://t/announce?passkey=…"),
        ("http://t/a?token=open=sesame", "http://t/a?token=…"),
        ("http://t/a?token=open?sesame", "http://t/a?token=…?…"),
        ("http://t/a?0p3nSesame=", "http://t/a?…"),
        ("http://t/eyJhbGci.eyJzdWIi.abc/announce", "http://t/…/announce"),
        ("http://t/pass.SESAME/announce.php", "http://t/…/announce.php"),
        ("http://t/pass,sesame/announce", "http://t/…/announce"),
        ("http://t/OpenSesaMe/announce", "http://t/…/announce"),
        ("http://t/OPENSESAME/scrape", "http://t/…/scrape"),
        ("http://t/qwrtzpsdfg/announce", "http://t/…/announce"),
        ("http://t/123456789/announce", "http://t/…/announce"),
        ("http://t/announce;k=opensesame", "http://t/announce;…"),
        ("http://t/a%3Fpasskey%3Dopen/announce", "http://t/…/announce"),
        ("http://0p3n5e54m3012345678.t.example/announce", "http://….t.example/announce"),
        ("http://t:opensesame/announce", "http://…/announce"),
        ("tracker.example/0a1b2c3d4e5f6071/announce", "tracker.example/…/announce"),
        ("https://raw.githubusercontent.com/xai-org/grok-1/",) * 2,
        ("http://192.168.100.200:8080/mirror/grok-1-int8-2x8/",) * 2,
        ("203.0.113.7:6881",) * 2,
        ("/tmp/release-2024-of-me/0a1b2c3d4e5f6071.torrent",) * 2,
        ("localhost,.example.org",) * 2,
        ("hf",) * 2,
        ("",) * 2,
        ("magnet:?xt=urn:btih:0a&dn=x&tr=udp%3A%2F%2Fa%3A1%2Fannounce",) * 2,
        (
            "magnet:?xt=urn:btih:0a&tr=http%3A%2F%2Fa%2Fannounce%3Fpasskey%3Dopensesame&dn=x",
            "magnet:?xt=urn:btih:0a&dn=x",
        ),
        *(
            (f"magnet:?xt=urn:btih:0a{field}", "magnet:?xt=urn:btih:0a")
            for field in (
                "&ws=https%3A%2F%2Fh%2Ff%3Fsig%3Dopensesame",
                "&as=https%3A%2F%2Fh%2Ff",
                "&xs=https%3A%2F%2Fh%2Ff",
                "&TR=https%3A%2F%2Fh%2Fa%3Fk%3Dopensesame",
                "&t%72=https%3A%2F%2Fh%2Fa%3Fk%3Dopensesame",
                "&tr=opensesame@h",
                "&tr=udp://h/0a1b2c3d4e5f6071",
                "&dn=https://opensesame@h",
                ";tr=https://h/a%3Fk%3Dopensesame",
                "#opensesame",
            )
        ),
        ("MAGNET:?xt=urn:btih:0a&tr=http://u:opensesame@h", "MAGNET:?xt=urn:btih:0a"),
    ],
)
def test_a_url_is_shown_without_what_lets_its_bearer_in(url, shown):
    assert shown_url(url) == shown
    assert has_secret(url) is (url != shown)
    assert shown_url(shown) == shown


@given(st.text(max_size=40), st.text(max_size=20))
def test_no_password_is_shown_whatever_is_in_it(password, user):
    secret = f"<{password}>"

    assert secret not in shown_url(f"http://{user.replace('/', '')}:{secret}@proxy:1/x")


@pytest.mark.parametrize(
    "name",
    [
        "a\u202eb",
        "it's\u2066 a 'name'",
        "a\nb\tc",
        "back\\now\x1b[2J",
        "\U000e0041 tag",
        "\x9b31m",
        "da\u200dta",
        "README\u3164.md",
        "a\ufe0fb\u2800c\u034fd",
    ],
)
def test_a_command_names_the_file_with_invisible_characters_when_it_is_pasted(name):
    shown = to_copy(f"other's: to delete it: rm -r {shlex.quote(name)}  # it's gone then")

    assert printable(shown, limit=1000) == shown
    command = shown.partition("rm -r ")[2].partition("  #")[0]
    script = ["bash", "-c", f"printf %s {command}"]
    assert subprocess.run(script, capture_output=True, check=True).stdout == name.encode()


@pytest.mark.parametrize(
    "text", ["rm -r 'a b'", "it's a file of somebody's", "rm -r plain", 'say "it\'s"', "'für ß'"]
)
def test_a_command_without_invisible_characters_stays_as_it_is(text):
    assert to_copy(text) == text
