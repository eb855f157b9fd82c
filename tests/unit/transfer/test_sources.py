"""Which trackers a download asks, and whether it leaves this machine."""

import pytest

from grokctl.transfer.sources import FetchOptions

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
    ],
)
def test_the_trackers_that_are_asked(options, asked):
    assert set(FetchOptions(**options).asked(FAR + NEAR)) == set(asked)
    assert len(FetchOptions(**options).asked(FAR + NEAR)) == len(asked)
