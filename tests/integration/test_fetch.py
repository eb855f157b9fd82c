"""Downloads from real swarms on the loopback interface."""

import http.server
import os
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import quote

import libtorrent
import pytest
from servers import libtorrent_seeder

from grokctl.checkpoint.torrent import GROK_1_MAGNET, build_metainfo, read_metainfo
from grokctl.checkpoint.trust import read_source, trusted_metainfo
from grokctl.errors import DiskFullError, FetchError, StalledError, UsageError
from grokctl.events import Advanced, Finished, Noted, Stage, Started
from grokctl.fetch import FetchOptions, default_root, fetch, plan_fetch, seeding
from grokctl.transfer.destination import select_files
from grokctl.transfer.download import Download
from grokctl.transfer.sources import FetchRequest, parse_source
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import Claims, NetworkOptions, Transfer

PIECE = 16384
LOOPBACK = {"bind": "127.0.0.1", "port": 0, "dht": False, "lsd": False, "stall_timeout_s": 20}
ELSEWHERE = "127.0.0.77"
ALONE = FetchOptions(**{**LOOPBACK, "stall_timeout_s": 0.5})


@pytest.fixture
def listener():
    """A port where nobody should call; peers of other tests look for lost ones on 127.0.0.1."""
    with socket.create_server((ELSEWHERE, 0)) as server:
        server.setblocking(False)
        yield server


def port_of(server):
    return server.getsockname()[1]


def assert_nobody_called(server):
    with pytest.raises(BlockingIOError):
        server.accept()


def stop_after(nbytes):
    """An observer that does what Ctrl-C does, once that many bytes are here."""

    def observe(event):
        if isinstance(event, Advanced) and event.stage is Stage.FETCH and event.done >= nbytes:
            raise KeyboardInterrupt

    return observe


def flip_byte(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@contextmanager
def serving(kind, handler):
    """Serve on a loopback port from a thread."""
    with kind(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class SocksServer(socketserver.BaseRequestHandler):
    """SOCKS5 with a password, CONNECT only; remembers who was asked for."""

    asked: ClassVar[list] = []

    def read(self, count):
        return self.request.recv(count, socket.MSG_WAITALL)

    def handle(self):
        _, methods = self.read(2)
        self.read(methods)
        self.request.sendall(b"\5\2")
        user = self.read(self.read(2)[1])
        password = self.read(self.read(1)[0])
        self.request.sendall(b"\1\0" if (user, password) == (b"me", b"p@ss") else b"\1\1")
        _, command, _, kind = self.read(4)
        if (command, kind) != (1, 1):
            return
        address = socket.inet_ntoa(self.read(4)), int.from_bytes(self.read(2), "big")
        self.asked.append(address)
        with socket.create_connection(address) as far:
            self.request.sendall(b"\5\0\0\1" + bytes(6))
            ends = {self.request: far, far: self.request}
            while ready := select.select(ends, [], [], 5)[0]:
                for end in ready:
                    if not (data := end.recv(65536)):
                        return
                    ends[end].sendall(data)


def test_a_magnet_and_a_peer_are_enough(swarm, tmp_path):
    events = []

    fetched = fetch(swarm.magnet, tmp_path / "got", swarm.options(), observe=events.append)

    swarm.assert_arrived(tmp_path / "got")
    assert fetched.infohash == swarm.metainfo.infohash
    assert fetched.nbytes == fetched.downloaded == swarm.metainfo.total
    assert fetched.is_complete
    assert fetched.extras == ("config.json",)
    assert events[0].stage is Stage.METADATA
    assert Started(stage=Stage.FETCH, total=fetched.nbytes) in events
    assert events[-1] == Finished(stage=Stage.FETCH)


def test_what_is_left_behind_can_be_verified_and_fetched_again(swarm, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())

    again = fetch(str(root / "release.torrent"), root, replace(ALONE, stall_timeout_s=5))

    assert trusted_metainfo(root) == swarm.metainfo
    assert read_source(root) == swarm.metainfo.infohash
    assert sorted(path.name for path in (root / ".grokctl").iterdir()) == [
        "lock", "resume", "source.json"
    ]  # fmt: skip
    assert again.downloaded == 0
    assert again.is_complete


def test_a_torrent_file_needs_nobody_for_its_metadata(swarm, torrent_file, tmp_path):
    events = []

    fetch(str(torrent_file), tmp_path / "got", swarm.options(), observe=events.append)

    swarm.assert_arrived(tmp_path / "got")
    assert not [event for event in events if getattr(event, "stage", None) is Stage.METADATA]


def test_nothing_is_ever_written_under_the_torrents_own_name(swarm, tmp_path):
    seen = set()

    def observe(event):
        del event
        seen.update(path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*"))

    fetch(swarm.magnet, tmp_path / "got", swarm.options(max_download=2_000_000), observe=observe)

    assert {parts[0] for parts in seen} == {"got"}
    assert {parts[1] for parts in seen if len(parts) > 1} <= {
        "ckpt-0", ".grokctl", "config.json", "release.torrent",
        *(name for *_, name in seen if name.startswith(".release.torrent")),
    }  # fmt: skip


def test_a_hybrid_torrent_with_pads_and_an_empty_file_is_fetched(swarm, tmp_path):
    source = tmp_path / "hybrid"
    shutil.copytree(swarm.root, source)
    (source / "EMPTY").touch()
    entries = libtorrent.list_files(str(source))
    torrent = libtorrent.create_torrent(entries, PIECE, libtorrent.create_torrent.canonical_files)
    libtorrent.set_piece_hashes(torrent, str(tmp_path))
    path = tmp_path / "hybrid.torrent"
    path.write_bytes(libtorrent.bencode(torrent.generate()))

    with seeding(source, path.read_bytes()) as (host, port):
        options = swarm.options(peers=(f"{host}:{port}",))
        some = fetch(str(path), tmp_path / "got", replace(options, only=("config.json", "EMPTY")))
        fetched = fetch(str(path), tmp_path / "got", options)

    assert any(file.is_pad for file in read_metainfo(path).files)
    assert not some.is_complete
    assert fetched.is_complete
    assert fetched.nbytes == swarm.metainfo.total
    assert (tmp_path / "got/EMPTY").read_bytes() == b""
    (tmp_path / "got/EMPTY").unlink()
    swarm.assert_arrived(tmp_path / "got")


def test_a_torrent_without_v1_pieces_is_fetched_resumed_and_proven(swarm, tmp_path):
    source = tmp_path / "v2"
    shutil.copytree(swarm.root, source)
    creator = libtorrent.create_torrent(
        libtorrent.list_files(str(source)), PIECE, libtorrent.create_torrent.v2_only
    )
    libtorrent.set_piece_hashes(creator, str(tmp_path))
    path = tmp_path / "v2.torrent"
    path.write_bytes(libtorrent.bencode(creator.generate()))

    with seeding(source, path.read_bytes()) as (host, port):
        options = swarm.options(peers=(f"{host}:{port}",))
        slowly = replace(options, max_download=400_000)
        with pytest.raises(KeyboardInterrupt):
            fetch(str(path), tmp_path / "got", slowly, observe=stop_after(300_000))
        fetched = fetch(str(path), tmp_path / "got", options)
    again = fetch(str(tmp_path / "got/release.torrent"), tmp_path / "got", ALONE)

    swarm.assert_arrived(tmp_path / "got")
    assert len(fetched.infohash) == 64
    assert fetched.downloaded < swarm.metainfo.total
    assert again.is_complete


def test_a_magnet_with_only_a_v2_infohash_is_refused(tmp_path):
    with pytest.raises(FetchError, match="only a v2 infohash") as caught:
        fetch("magnet:?xt=urn:btmh:1220" + "ab" * 32, tmp_path / "got", ALONE)

    assert caught.value.hint == "grokctl fetch FILE.torrent"


def test_only_fetches_what_matches_and_the_rest_later(swarm, tmp_path):
    root = tmp_path / "got"

    some = fetch(swarm.magnet, root, swarm.options(only=("ckpt-0/tensor0000[1-3]*",)))

    # config.json always comes along: without it nobody knows what the tensors are
    few = (*(f"ckpt-0/tensor{index:05d}_000" for index in (1, 2, 3)), "config.json")
    swarm.assert_arrived(root, files=few)
    assert not some.is_complete
    assert some.nbytes == sum((swarm.root / name).stat().st_size for name in few)

    rest = fetch(swarm.magnet, root, swarm.options())

    swarm.assert_arrived(root)
    assert rest.is_complete
    twice = some.downloaded + rest.downloaded - swarm.metainfo.total
    assert twice <= 3 * PIECE  # where the choice began, where it ended, and before config.json
    assert not list((root / ".grokctl").glob(".*.parts"))


def test_pieces_of_unwanted_files_are_not_lost_with_the_resume_data(swarm, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options(only=("tensor00001*",)))
    assert list((root / ".grokctl").glob(".*.parts"))
    (root / ".grokctl/resume").unlink()

    fetch(swarm.magnet, root, swarm.options(only=("tensor00005*", "config.json")))
    fetch(swarm.magnet, root, swarm.options())

    swarm.assert_arrived(root)
    assert not list((root / ".grokctl").glob(".*.parts"))


def test_only_takes_a_files_own_name_and_refuses_to_match_nothing(swarm, torrent_file, tmp_path):
    fetch(swarm.magnet, tmp_path / "got", swarm.options(only=("config.*",)))

    with pytest.raises(UsageError, match="matches none of 15 files"):
        fetch(str(torrent_file), tmp_path / "other", replace(ALONE, only=("*.gguf",)))

    swarm.assert_arrived(tmp_path / "got", files=("config.json",))
    assert not (tmp_path / "other").exists()


def test_an_interrupted_download_goes_on_where_it_stopped(swarm, tmp_path):
    root = tmp_path / "got"

    with pytest.raises(KeyboardInterrupt):
        fetch(swarm.magnet, root, swarm.options(max_download=400_000), observe=stop_after(200_000))
    second = fetch(swarm.magnet, root, swarm.options())

    swarm.assert_arrived(root)
    assert 0 < second.downloaded <= swarm.metainfo.total - 200_000


def test_an_interrupt_costs_no_block_of_an_unfinished_piece(tmp_path):
    source, large = tmp_path / "source", 2**20
    (source / "ckpt-0").mkdir(parents=True)
    (source / "ckpt-0/tensor00000_000").write_bytes(os.urandom(3 * large))
    torrent = build_metainfo(source, ["ckpt-0/tensor00000_000"], name="x", piece_length=2 * large)
    path = tmp_path / "given.torrent"
    path.write_bytes(torrent)

    with seeding(source, torrent) as (host, port):
        options = FetchOptions(**LOOPBACK, peers=(f"{host}:{port}",))
        slowly = replace(options, max_download=500_000)
        with pytest.raises(KeyboardInterrupt):
            fetch(str(path), tmp_path / "got", slowly, observe=stop_after(400_000))
        second = fetch(str(path), tmp_path / "got", options)

    assert second.is_complete
    assert second.downloaded <= 3 * large - 400_000 + PIECE


def test_a_killed_download_goes_on_and_ends_identical(swarm, tmp_path):
    root = tmp_path / "got"
    script = f"""
from pathlib import Path
from grokctl.fetch import FetchOptions, fetch
options = FetchOptions(peers=({swarm.peer!r},), max_download=400_000, **{LOOPBACK!r})
fetch({swarm.magnet!r}, Path({str(root)!r}), options,
      observe=lambda event: print(getattr(event, "done", 0), flush=True))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert any(int(line) > 300_000 for line in process.stdout)
        process.send_signal(signal.SIGKILL)

    fetched = fetch(swarm.magnet, root, swarm.options())

    assert process.returncode == -signal.SIGKILL
    swarm.assert_arrived(root)
    assert fetched.downloaded < swarm.metainfo.total


def believe_nothing(root):
    """Make the next fetch hash every byte on disk."""
    (root / ".grokctl/resume").unlink()


def test_a_flipped_byte_costs_one_piece_once_nothing_is_believed(swarm, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())
    flip_byte(root / "ckpt-0/tensor00003_000", 100_000)

    believed = fetch(swarm.magnet, root, swarm.options())
    believe_nothing(root)
    repaired = fetch(swarm.magnet, root, swarm.options())

    assert believed.downloaded == 0
    assert repaired.downloaded == PIECE
    swarm.assert_arrived(root)


def test_a_removed_file_costs_its_own_pieces_and_a_look_at_the_two_it_shares(swarm, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())
    (root / "ckpt-0/tensor00003_000").unlink()
    removed = swarm.metainfo.files[3]
    events = []

    fetched = fetch(swarm.magnet, root, swarm.options(), observe=events.append)

    swarm.assert_arrived(root)
    assert fetched.downloaded == len(swarm.metainfo.pieces_of(removed)) * PIECE
    assert Started(stage=Stage.VERIFY, total=2 * PIECE) in events


@pytest.mark.parametrize("resume", [b"", b"garbage", b"d4:infodee", b"0" * 70_000])
def test_broken_resume_data_is_worth_no_more_than_none(swarm, resume, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())
    (root / ".grokctl/resume").write_bytes(resume)

    fetched = fetch(swarm.magnet, root, swarm.options())

    swarm.assert_arrived(root)
    assert fetched.downloaded == 0


def test_missing_short_and_long_files_are_restored(swarm, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())
    (root / "ckpt-0/tensor00002_000").unlink()
    os.truncate(root / "ckpt-0/tensor00003_000", 1000)
    with (root / "ckpt-0/tensor00004_000").open("ab") as file:
        file.write(b"more")
    believe_nothing(root)

    repaired = fetch(swarm.magnet, root, swarm.options())

    swarm.assert_arrived(root)
    assert repaired.downloaded < swarm.metainfo.total


def test_an_interrupted_repair_leaves_no_claim_behind(swarm, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())
    flip_byte(root / "ckpt-0/tensor00003_000", 100_000)
    good = frozenset(range(swarm.metainfo.num_pieces)) - set(
        swarm.metainfo.pieces_of(swarm.metainfo.files[3])
    )

    def interrupt(event):
        raise KeyboardInterrupt(event)

    with pytest.raises(KeyboardInterrupt):
        fetch(swarm.magnet, root, swarm.options(), have=good, observe=interrupt)
    fetch(swarm.magnet, root, swarm.options())

    swarm.assert_arrived(root)


def test_a_folder_without_resume_data_is_adopted_by_force(swarm, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(swarm.root, root)
    flip_byte(root / "ckpt-0/tensor00000_000", 5)

    with pytest.raises(FetchError, match="contains a ckpt-0 that grokctl did not fetch"):
        fetch(swarm.magnet, root, swarm.options())
    adopted = fetch(swarm.magnet, root, swarm.options(force=True))

    swarm.assert_arrived(root)
    assert adopted.downloaded == PIECE


def test_a_foreign_folder_is_refused_and_left_alone(swarm, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(FetchError, match="expected an empty folder") as caught:
        fetch(swarm.magnet, tmp_path, ALONE)

    assert caught.value.hint is not None
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_another_release_is_refused(swarm, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())
    other = "magnet:?xt=urn:btih:" + "ab" * 20

    with pytest.raises(FetchError, match=f"expected release {'ab' * 20}, found"):
        fetch(other, root, ALONE)

    swarm.assert_arrived(root)


def test_a_swarm_without_peers_stalls_and_says_so(tmp_path):
    began = time.monotonic()
    trackers = ("http://127.0.0.1:9/announce",)

    with pytest.raises(StalledError, match=r"expected metadata.*0 peers.*127\.0\.0\.1") as caught:
        fetch(GROK_1_MAGNET.partition("&")[0], tmp_path / "got", replace(ALONE, trackers=trackers))

    assert time.monotonic() - began < 20
    assert "grokctl fetch" in caught.value.hint
    assert not (tmp_path / "got").exists()


def test_waiting_for_metadata_is_reported(tmp_path):
    events = []

    with pytest.raises(StalledError):
        fetch("magnet:?xt=urn:btih:" + "ab" * 20, tmp_path, ALONE, observe=events.append)

    assert Advanced(stage=Stage.METADATA, detail="waiting for metadata: 0 peers") in events


def test_a_swarm_that_falls_silent_stalls(swarm, torrent_file, tmp_path):
    with pytest.raises(StalledError, match="expected payload"):
        fetch(str(torrent_file), tmp_path / "got", ALONE)

    fetch(swarm.magnet, tmp_path / "got", swarm.options())
    swarm.assert_arrived(tmp_path / "got")


def test_a_proxy_is_the_only_way_out(swarm, tmp_path, monkeypatch):
    monkeypatch.setattr(SocksServer, "asked", [])
    with serving(socketserver.ThreadingTCPServer, SocksServer) as port:
        proxy = f"socks5://me:p%40ss@127.0.0.1:{port}"

        fetch(swarm.magnet, tmp_path / "got", swarm.options(proxy=proxy, dht=True, lsd=True))

    host, _, peer_port = swarm.peer.partition(":")
    assert set(SocksServer.asked) == {(host, int(peer_port))}
    swarm.assert_arrived(tmp_path / "got")


def test_a_dead_tracker_does_not_matter_when_a_peer_answers(swarm, tmp_path):
    dead = ("http://127.0.0.1:9/announce", "udp://127.0.0.1:9/announce")

    fetch(swarm.magnet, tmp_path / "got", swarm.options(trackers=dead))

    swarm.assert_arrived(tmp_path / "got")


def test_a_tracker_is_enough_to_find_the_swarm(swarm, tmp_path):
    host, _, port = swarm.peer.partition(":")
    reply = libtorrent.bencode(
        {b"interval": 1800, b"peers": socket.inet_aton(host) + int(port).to_bytes(2, "big")}
    )

    class Tracker(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    with serving(http.server.ThreadingHTTPServer, Tracker) as tracker:
        magnet = f"{swarm.magnet}&tr=http%3A%2F%2F127.0.0.1%3A{tracker}%2Fannounce"
        fetch(magnet, tmp_path / "got", swarm.options(peers=()))

    swarm.assert_arrived(tmp_path / "got")


def test_a_web_seed_serves_under_the_torrents_own_names(swarm, torrent_file, tmp_path):
    served = tmp_path / "www" / swarm.metainfo.name
    shutil.copytree(swarm.root, served)

    class Mirror(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = served.parent / self.path.lstrip("/").replace("%20", " ")
            data = path.read_bytes()
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_):
            pass

        protocol_version = "HTTP/1.1"

    with serving(http.server.ThreadingHTTPServer, Mirror) as port:
        options = swarm.options(peers=(), web_seeds=(f"http://127.0.0.1:{port}/",))
        fetch(str(torrent_file), tmp_path / "got", options)

    swarm.assert_arrived(tmp_path / "got")


def test_peers_and_web_seeds_that_a_magnet_brings_are_not_called(swarm, listener, tmp_path):
    port = port_of(listener)
    magnet = f"{swarm.magnet}&x.pe={ELSEWHERE}:{port}&ws=http%3A%2F%2F{ELSEWHERE}%3A{port}%2F"

    with pytest.raises(StalledError):
        fetch(magnet, tmp_path / "got", replace(ALONE, stall_timeout_s=1.5))

    assert_nobody_called(listener)


def test_trackers_that_are_no_plain_urls_are_left_out(swarm, listener, tmp_path):
    url = f"http://{ELSEWHERE}:{port_of(listener)}/announce"
    magnet = (
        f"{swarm.magnet}&tr={quote(url)}%0D%0AX:%20evil&tr={quote(url.replace('http', 'file'))}"
    )

    fetch(magnet, tmp_path / "got", swarm.options())

    assert_nobody_called(listener)


def test_web_seeds_and_nodes_that_a_torrent_brings_are_not_called(swarm, listener, tmp_path):
    url = f"http://{ELSEWHERE}:{port_of(listener)}/".encode()
    torrent = libtorrent.bdecode(swarm.torrent)
    torrent |= {b"url-list": [url], b"httpseeds": [url], b"announce": url.replace(b"http", b"ftp")}
    path = tmp_path / "hostile.torrent"
    path.write_bytes(libtorrent.bencode(torrent))

    fetch(str(path), tmp_path / "got", swarm.options(max_download=400_000))

    assert_nobody_called(listener)
    assert ELSEWHERE.encode() not in (tmp_path / "got/release.torrent").read_bytes()
    swarm.assert_arrived(tmp_path / "got")


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc", "..", "", "a\nb", "x" * 300, ".hidden", "a/b"]
)
def test_a_magnets_name_never_becomes_a_path(name, tmp_path):
    magnet = "magnet:?xt=urn:btih:" + "ab" * 20 + "&dn=" + name.replace("\n", "%0A")

    root = default_root(magnet, tmp_path)

    assert root == tmp_path / ("ab" * 8)


def test_default_roots_are_told_by_name(torrent_file, tmp_path):
    named = "magnet:?xt=urn:btih:" + "ab" * 20 + "&dn=grok-2"

    assert default_root("grok-1", tmp_path) == tmp_path / "grok-1"
    assert default_root(GROK_1_MAGNET.replace("dn=grok-1", "dn=x"), tmp_path).name == "grok-1"
    assert default_root(named, tmp_path) == tmp_path / "grok-2"
    assert default_root(str(torrent_file), tmp_path).parent == tmp_path


HOSTILE = [
    pytest.param({b"path": [b"..", b"evil"]}, id="parent"),
    pytest.param({b"path": [b"/etc/passwd"]}, id="absolute"),
    pytest.param({b"path": [b"a\\..\\b"]}, id="backslash"),
    pytest.param({b"path": [b"\x1b[2Jx"]}, id="escape"),
    pytest.param({b"path": [b".grokctl", b"resume"]}, id="ours"),
    pytest.param({b"path": [b"release.torrent"]}, id="torrent"),
    pytest.param({b"attr": b"l", b"symlink path": [b"..", b"x"]}, id="link"),
    pytest.param({b"attr": b"x"}, id="executable"),
    pytest.param({b"length": -1}, id="negative"),
    pytest.param({b"length": 2**60}, id="huge"),
    pytest.param({b"length": 2**40}, id="contradicts-pieces"),
]


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_torrent_is_refused_before_anything_is_written(swarm, change, tmp_path):
    torrent = libtorrent.bdecode(swarm.torrent)
    torrent[b"info"][b"files"][-1] |= change
    path = tmp_path / "hostile.torrent"
    path.write_bytes(libtorrent.bencode(torrent))

    with pytest.raises(FetchError) as caught:
        fetch(str(path), tmp_path / "got", ALONE)

    assert caught.type is FetchError
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.torrent"]


def test_hostile_metadata_from_a_peer_is_refused_before_anything_is_written(swarm, tmp_path):
    torrent = libtorrent.bdecode(swarm.torrent)
    torrent[b"info"][b"files"][-1][b"path"] = [b"..", b"..", b"evil"]
    info = libtorrent.load_torrent_buffer(libtorrent.bencode(torrent)).ti

    with libtorrent_seeder(libtorrent.bencode(torrent), tmp_path / "nothing", {}) as (port, _):
        options = swarm.options(peers=(f"127.0.0.1:{port}",))
        with pytest.raises(FetchError, match="file name"):
            fetch(f"magnet:?xt=urn:btih:{info.info_hash()}", tmp_path / "got", options)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["ckpt-0/tensor00003_000", "config.json", ".grokctl/resume"])
def test_a_planted_file_link_is_refused_and_its_target_untouched(swarm, place, tmp_path):
    root, victim = tmp_path / "got", tmp_path / "victim"
    fetch(swarm.magnet, root, swarm.options())
    victim.write_bytes(b"precious")
    (root / place).unlink()
    (root / place).symlink_to(victim)

    with pytest.raises(FetchError, match="found a symbolic link"):
        fetch(swarm.magnet, root, swarm.options())

    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("folder", ["ckpt-0", ".grokctl"])
def test_a_planted_folder_link_is_refused_and_its_target_untouched(swarm, folder, tmp_path):
    root, victim = tmp_path / "got", tmp_path / "victim"
    victim.mkdir()
    root.mkdir()
    (root / folder).symlink_to(victim)

    with pytest.raises(FetchError, match="found a symbolic link"):
        fetch(swarm.magnet, root, swarm.options(force=True))

    assert not list(victim.iterdir())


def test_a_lack_of_space_is_found_before_a_byte_moves(swarm, torrent_file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    with pytest.raises(DiskFullError, match=r"expected 8.* kB free, found 1.0 kB"):
        fetch(str(torrent_file), tmp_path / "got", swarm.options())

    assert not list((tmp_path / "got").iterdir())


def test_files_that_are_there_need_no_space_twice(swarm, torrent_file, tmp_path, monkeypatch):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))

    fetched = fetch(str(torrent_file), root, swarm.options())

    assert fetched.is_complete


def test_a_disk_that_fills_up_on_the_way_is_an_error_and_no_loss(swarm, tmp_path, monkeypatch):
    root = tmp_path / "small"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", root]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))

    try:
        with pytest.raises(DiskFullError, match="No space left"):
            fetch(swarm.magnet, root, swarm.options())
        subprocess.run(["mount", "-o", "remount,size=4m", root], check=True)
        rest = fetch(swarm.magnet, root, swarm.options())

        swarm.assert_arrived(root)
        assert rest.downloaded < swarm.metainfo.total
    finally:
        subprocess.run(["umount", root], check=True)


def test_a_file_that_may_not_grow_ends_a_fetch_and_the_next_one_continues(swarm, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(event):
        if event == Started(stage=Stage.FETCH, total=swarm.metainfo.total):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(DiskFullError, match="File too large") as caught:
            fetch(swarm.magnet, tmp_path / "got", swarm.options(), observe=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fetch(swarm.magnet, tmp_path / "got", swarm.options())

    assert caught.value.hint == "ulimit -f unlimited"
    swarm.assert_arrived(tmp_path / "got")


def test_a_destination_that_cannot_be_written_is_an_error(swarm, tmp_path):
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(FetchError, match="Not a directory"):
        fetch(swarm.magnet, tmp_path / "file" / "got", swarm.options())


def test_a_plan_writes_nothing_and_tells_what_a_fetch_would_take(swarm, tmp_path):
    planned = plan_fetch(swarm.magnet, tmp_path / "got", swarm.options(only=("config.json",)))

    assert planned.infohash == swarm.metainfo.infohash
    assert planned.wanted_nbytes == (swarm.root / "config.json").stat().st_size
    assert planned.present_nbytes == 0
    assert planned.fits
    assert [file.path for file in planned.files if file.is_wanted] == ["config.json"]
    assert not (tmp_path / "got").exists()


def test_seeding_ends_with_an_interrupt_and_the_download_is_whole(swarm, tmp_path):
    notes = []

    def observe(event):
        if isinstance(event, Noted):
            notes.append(event.message)
        elif isinstance(event, Advanced) and event.stage is Stage.SEED:
            raise KeyboardInterrupt

    fetched = fetch(swarm.magnet, tmp_path / "got", swarm.options(seed=True), observe=observe)

    assert fetched.is_complete
    assert fetched.uploaded == 0
    listening, stopped = notes
    assert re.fullmatch(r"seeding, listening on 127\.0\.0\.1:\d+", listening)
    assert stopped == "seeding stopped; the download is complete"


def test_a_ratio_that_is_reached_seeds_nothing_and_says_so(swarm, tmp_path):
    seen = []

    fetched = fetch(
        swarm.magnet, tmp_path / "got", swarm.options(seed_ratio=1e-9), observe=seen.append
    )

    assert fetched.uploaded == 0
    assert 0 <= fetched.seed_seconds < fetched.seconds
    assert "seed: the ratio 1e-09 is reached: 0 B of 0 B were uploaded before" in [
        event.message for event in seen if isinstance(event, Noted)
    ]
    assert not [event for event in seen if getattr(event, "stage", None) is Stage.SEED]


@pytest.mark.parametrize("ratio", [None, 1e9])
def test_a_restarted_seed_counts_this_session(swarm, ratio):
    everything = frozenset(range(swarm.metainfo.num_pieces))
    claims = Claims(have=everything, uploaded=10**9)
    events = []

    def observe(event):
        events.append(event)
        if isinstance(event, Advanced) and event.stage is Stage.SEED:
            raise KeyboardInterrupt

    with Swarm(NetworkOptions(bind="127.0.0.1", port=0, dht=False, lsd=False)) as session:
        options = swarm.options(seed=True, seed_ratio=ratio)
        request = FetchRequest(origin=parse_source(swarm.magnet), root=swarm.root, options=options)
        selection = select_files(swarm.torrent, request)
        session.add(
            Transfer(
                metainfo=selection.metainfo,
                torrent=swarm.torrent,
                root=swarm.root,
                places=selection.places,
                wanted=selection.wanted,
                claims=claims,
            )
        )
        download = Download(
            request=request,
            selection=selection,
            swarm=session,
            mirrors=None,
            observe=observe,
            watch=lambda **_: None,
        )
        sent = download.seed()

    assert sent == 0
    (started,) = [event for event in events if isinstance(event, Started)]
    (advanced,) = [event for event in events if isinstance(event, Advanced)]
    assert started.done == advanced.done == (0 if ratio is None else 10**9)
    assert advanced.detail == "up 0 B/s · 0 peers"


def test_seeding_ends_when_the_ratio_is_reached(swarm, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = port_of(probe)
    is_seeding = threading.Event()

    def observe(event):
        if isinstance(event, Started) and event.stage is Stage.SEED:
            is_seeding.set()

    options = swarm.options(seed_ratio=1.0, port=port)
    first = partial(fetch, swarm.magnet, tmp_path / "first", options, observe=observe)
    thread = threading.Thread(target=first)
    thread.start()
    assert is_seeding.wait(timeout=20)

    for name in ("second", "third"):  # libtorrent may not count what a peer got just before it left
        if thread.is_alive():
            fetch(swarm.magnet, tmp_path / name, swarm.options(peers=(f"127.0.0.1:{port}",)))
            swarm.assert_arrived(tmp_path / name)
            thread.join(timeout=10)

    assert not thread.is_alive()


def test_a_port_that_is_taken_is_an_error(swarm, tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(FetchError, match="in use"),
    ):
        fetch(swarm.magnet, tmp_path / "got", swarm.options(port=port_of(taken)))


def test_a_peer_that_sends_bad_data_is_banned_and_named(swarm, tmp_path):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(swarm.root, poisoned)
    flip_byte(poisoned / "ckpt-0/tensor00000_000", 5)
    places = {file.index: "/".join(file.path) for file in swarm.metainfo.files}
    events = []

    with libtorrent_seeder(swarm.torrent, poisoned, places, disable_hash_checks=True) as (port, _):
        options = swarm.options(peers=(f"127.0.0.1:{port}",), stall_timeout_s=2)
        with pytest.raises(StalledError):
            fetch(swarm.magnet, tmp_path / "got", options, observe=events.append)
    fetch(swarm.magnet, tmp_path / "got", swarm.options())

    assert Noted(message="peer 127.0.0.1 sent bad data and is banned") in events
    swarm.assert_arrived(tmp_path / "got")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"peers": ("nobody",)}, id="peer-without-port"),
        pytest.param({"peers": ("a:b",)}, id="peer-port"),
        pytest.param({"peers": ("u@h:1",)}, id="peer-user"),
        pytest.param({"peers": ("name:1",), "proxy": "socks5://127.0.0.1:1"}, id="peer-proxy"),
        pytest.param({"trackers": ("ftp://x/",)}, id="tracker"),
        pytest.param({"trackers": ("http://[x",)}, id="tracker-malformed"),
        pytest.param({"web_seeds": ("file:///etc/",)}, id="web-seed"),
        pytest.param({"proxy": "socks5://x"}, id="proxy-without-port"),
        pytest.param({"bind": "eth0"}, id="bind"),
        pytest.param({"port": 70000}, id="port"),
        pytest.param({"max_download": 0}, id="rate"),
        pytest.param({"connections": -1}, id="connections"),
        pytest.param({"seed_ratio": float("nan")}, id="ratio"),
        pytest.param({"only": ("",)}, id="only"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(UsageError):
        FetchOptions(**changes)


@pytest.mark.parametrize(
    "source", ["", "grok-2", "/no/such.torrent", "http://x/y.torrent", "ab" * 20]
)
def test_a_source_of_no_known_kind_is_a_usage_error(source, tmp_path):
    with pytest.raises(UsageError, match="expected grok-1, a magnet link or a"):
        fetch(source, tmp_path, ALONE)


def test_a_seed_does_not_send_what_was_damaged(swarm, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(swarm.root, damaged)
    flip_byte(damaged / "ckpt-0/tensor00000_000", 5)
    events = []

    with seeding(damaged, swarm.torrent) as (host, port):
        options = swarm.options(peers=(f"{host}:{port}",), stall_timeout_s=2)
        with pytest.raises(StalledError):
            fetch(swarm.magnet, tmp_path / "got", options, observe=events.append)

    assert not [event for event in events if isinstance(event, Noted)]
    assert max(getattr(event, "done", 0) for event in events) <= swarm.metainfo.total - PIECE


def test_outgoing_utp_waits_for_a_quiet_minute_with_few_peers(monkeypatch):
    with Swarm(NetworkOptions(bind="127.0.0.1", port=0, dht=False, lsd=False)) as session:
        session.poll(0)
        at_first = session.session.get_settings()["enable_outgoing_utp"]
        monkeypatch.setattr("grokctl.transfer.swarm._QUIET_S", 0.0)
        session.poll(0.01)

        assert not at_first
        assert session.session.get_settings()["enable_outgoing_utp"]
        assert session.session.get_settings()["enable_incoming_utp"]


def test_a_proxied_session_listens_nowhere():
    network = NetworkOptions(proxy="socks5://127.0.0.1:1")

    with Swarm(network) as session, pytest.raises(FetchError, match="no port to listen on"):
        session.port(timeout_s=0.3)
