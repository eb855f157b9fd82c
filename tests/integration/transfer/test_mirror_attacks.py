"""Mirrors that do not lie, and do not deliver either; and mirrors behind proxies."""

import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest
from servers import Handler, HttpProxy, Trickling, content_range, serving

from grokctl.checkpoint.release_files import release_paths
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.errors import StalledError
from grokctl.fetch import FetchOptions, fetch
from grokctl.transfer.mirror_reader import MirrorReader
from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.sources import Mirror
from grokctl.transfer.web import Web

LOOPBACK = {"bind": "127.0.0.1", "port": 0, "dht": False, "lsd": False, "stall_timeout_s": 20}
PIECE = 16384


@pytest.fixture
def impatient(monkeypatch):
    """Seconds become tenths."""
    monkeypatch.setattr("grokctl.transfer.mirrors._PATIENCE_S", 0.5)


def options_for(*servers, **changes):
    return FetchOptions(**{**LOOPBACK, "mirrors": tuple(s.url for s in servers), **changes})


class Endless(Handler):
    """Sends what it was asked for, and goes on."""

    def send_part(self, data, first, last):
        part = data[first : last + 1]
        self.answer_in_chunks(iter(lambda: part, None), content_range(data, first, last))


class Promising(Handler):
    """Says that an answer will follow, again and again."""

    def send_part(self, *_):
        while True:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.001)


class Lost(Handler):
    """Redirects to what is no name."""

    def respond(self):
        self.answer(302, headers={"Location": "http://xn--a/"})


class Breathless(Handler):
    """Begins every answer, and hangs up."""

    def send_part(self, data, first, last):
        headers = content_range(data, first, last)
        self.answer(206, b"", headers, length=last + 1 - first)
        self.close_connection = True


@pytest.mark.timeout(200)
@pytest.mark.parametrize("handler", [Trickling, Promising, Endless, Lost, Breathless])
def test_a_mirror_that_does_not_deliver_keeps_nobody_from_the_others(
    swarm, torrent_file, impatient, handler, tmp_path
):
    del impatient
    with serving(handler, swarm.root) as bad, serving(Handler, swarm.root) as good:
        fetched = fetch(str(torrent_file), tmp_path / "got", options_for(bad, good))

    swarm.assert_arrived(tmp_path / "got")
    # on a machine that is very busy the good one may seem slow for half a second too
    assert bad.name in [trouble.source for trouble in fetched.troubles]


@pytest.mark.timeout(200)
def test_a_mirror_that_trickles_is_a_stall_and_the_error_says_how_slow(
    swarm, torrent_file, impatient, tmp_path
):
    del impatient
    with (
        serving(Trickling, swarm.root) as server,
        pytest.raises(StalledError, match=r"127\.0\.0\.1:\d+: is too slow"),
    ):
        fetch(str(torrent_file), tmp_path / "got", options_for(server, stall_timeout_s=2))


def test_a_swarm_takes_over_at_once_what_a_mirror_does_not_bring(swarm, torrent_file, tmp_path):
    began = time.monotonic()

    with serving(Trickling, swarm.root) as server:
        options = options_for(server, peers=(swarm.peer,))
        fetch(str(torrent_file), tmp_path / "got", options)

    swarm.assert_arrived(tmp_path / "got")
    # libtorrent hangs up where it wants nothing, and calls again ten seconds later
    assert time.monotonic() - began < 8


def test_a_mirror_behind_a_proxy_is_asked_by_nobody_else(swarm, torrent_file, tmp_path):
    with serving(Handler, swarm.root) as server, serving(HttpProxy) as proxy:
        options = options_for(server, proxy=proxy.url.rstrip("/"), bind=None)
        fetched = fetch(str(torrent_file), tmp_path / "got", options)

    swarm.assert_arrived(tmp_path / "got")
    assert fetched.downloaded == swarm.metainfo.total
    assert len(proxy.asked) == len(server.asked)
    assert set(proxy.asked) == {f"127.0.0.1:{server.port}"}


@pytest.fixture
def small_files(tmp_path):
    """Many files, so that every lease takes several requests."""
    root = tmp_path / "files"
    names = [f"ckpt-0/tensor{index:05d}_000" for index in range(60)]
    (root / "ckpt-0").mkdir(parents=True)
    for number, name in enumerate(names):
        (root / name).write_bytes(bytes([number]) * 50_001)
    metainfo = parse_metainfo(build_metainfo(root, names, name="x", piece_length=PIECE), source="x")
    return SimpleNamespace(root=root, metainfo=metainfo, places=release_paths(metainfo))


def test_an_end_in_the_middle_of_everything_is_quiet(small_files, monkeypatch):
    crashed = []
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    monkeypatch.setattr("grokctl.transfer.mirrors._JOIN_S", 0.1)
    everything = range(small_files.metainfo.num_pieces)

    with serving(Handler, small_files.root) as server:
        for requests in range(0, 40, 2):
            mirrors = Mirrors(
                [Mirror.at(server.url)], Web(), small_files.metainfo, small_files.places
            )
            before = len(server.asked)
            with mirrors:
                while len(server.asked) < before + requests:
                    mirrors.offer(everything, lambda _: True)
                    mirrors.take(mirrors.room)

    assert crashed == []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_piece_that_comes_in_crumbs_takes_no_more_memory_than_it_has_bytes(small_files, size):
    class Crumbs(Handler):
        def send_part(self, data, first, last):
            part = data[first : last + 1]
            crumbs = (part[at : at + size] for at in range(0, len(part), size))
            self.answer_in_chunks(crumbs, content_range(data, first, last))

    metainfo, places = small_files.metainfo, small_files.places

    with serving(Crumbs, small_files.root) as server, Web() as web:
        reader = MirrorReader(web, server.url, metainfo, places, range(1))
        tracemalloc.start()
        try:
            arrived = list(reader.read(lambda _: None))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert arrived == [(0, bytes(PIECE))]
    assert peak < 50 * PIECE, peak  # most of it is the client's; each crumb as an object: 200
