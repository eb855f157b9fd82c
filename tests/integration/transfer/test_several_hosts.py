"""Several who have it, or want it: liars, neighbours, and nodes that share a slow line."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from servers import HttpProxy, libtorrent_seeder, serving

from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.errors import InvalidValueError, StalledError
from grokctl.events import Advanced, Noted, Stage, Started
from grokctl.fetch import FetchOptions, fetch
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import NetworkOptions

LOOPBACK = {"bind": "127.0.0.1", "port": 0, "dht": False, "lsd": False, "stall_timeout_s": 20}
PIECE = 16384
SIZE = 1_500_000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three megabytes in two files, and a torrent of them."""
    root = tmp_path_factory.mktemp("source")
    names = [f"ckpt-0/tensor{index:05d}_000" for index in range(2)]
    (root / "ckpt-0").mkdir()
    for name in names:
        (root / name).write_bytes(os.urandom(SIZE))
    torrent = build_metainfo(root, names, name="x", piece_length=PIECE)
    path = root / "x.torrent"
    path.write_bytes(torrent)
    metainfo = parse_metainfo(torrent, source="x")
    places = {file.index: "/".join(file.path) for file in metainfo.files}

    def assert_arrived(got):
        for name in names:
            assert (got / name).read_bytes() == (root / name).read_bytes(), name

    return SimpleNamespace(
        root=root,
        torrent=torrent,
        path=path,
        metainfo=metainfo,
        places=places,
        assert_arrived=assert_arrived,
    )


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def node(source, root, **options):
    """A node that fetches and then seeds, in a thread; yields its peers' name for it."""
    port = free_port()
    wanted = FetchOptions(**{**LOOPBACK, "port": port, "seed": True, **options})
    state = SimpleNamespace(
        peer=f"127.0.0.1:{port}",
        has_begun=threading.Event(),
        has_it_all=threading.Event(),
        has_sent_it=threading.Event(),
        may_end=threading.Event(),
        uploaded=0,
        fetched=None,
    )

    def observe(event):
        match event:
            case Started(stage=Stage.FETCH):
                state.has_begun.set()
            case Started(stage=Stage.SEED):
                state.has_it_all.set()
            case Advanced(stage=Stage.SEED, done=uploaded):
                state.uploaded = uploaded
                if uploaded > source.metainfo.total:
                    state.has_sent_it.set()
        if state.may_end.is_set() and isinstance(event, Advanced):
            raise KeyboardInterrupt

    def run():
        state.fetched = fetch(str(source.path), root, wanted, observe=observe)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert state.has_begun.wait(timeout=20)
        yield state
    finally:
        state.may_end.set()
        thread.join(timeout=20)
    assert not thread.is_alive()


@contextmanager
def slow_origin(source, rate):
    """Somebody far away who has it all."""
    with libtorrent_seeder(source.torrent, source.root, source.places) as (port, handle):
        handle.set_upload_limit(rate)
        yield f"127.0.0.1:{port}", handle


def sent_by(handle):
    return handle.status().total_payload_upload


def test_a_liar_among_good_seeders_is_named_and_costs_little(source, tmp_path):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(source.root, poisoned)
    for path in (poisoned / "ckpt-0").iterdir():
        path.write_bytes(bytes(SIZE))
    notes = []

    with (
        libtorrent_seeder(source.torrent, poisoned, source.places, disable_hash_checks=True) as (
            liar,
            lying,
        ),
        libtorrent_seeder(source.torrent, source.root, source.places) as (honest, handle),
    ):
        handle.set_upload_limit(3_000_000)
        lying.set_upload_limit(1_000_000)  # what arrives before the first piece is checked is spent
        options = FetchOptions(
            **LOOPBACK,
            peers=(f"127.0.0.1:{liar}", f"127.0.0.1:{honest}"),
            trackers=("http://127.0.0.1:9/announce", "udp://127.0.0.1:9"),
        )
        fetched = fetch(
            str(source.path),
            tmp_path / "got",
            options,
            observe=lambda event: notes.append(event) if isinstance(event, Noted) else None,
        )

    source.assert_arrived(tmp_path / "got")
    assert fetched.is_complete
    assert [trouble.source for trouble in fetched.troubles] == ["peer 127.0.0.1"]
    assert "bad data" in fetched.troubles[0].reason
    assert any("banned" in note.message for note in notes)
    assert fetched.downloaded < 1.5 * source.metainfo.total


def test_two_more_nodes_get_most_of_it_from_the_one_next_door(source, tmp_path):
    with slow_origin(source, 100_000) as (origin, handle):
        shutil.copytree(source.root / "ckpt-0", tmp_path / "a" / "ckpt-0")
        with node(source, tmp_path / "a", force=True) as first:
            assert first.has_it_all.wait(timeout=20)
            peers = (first.peer, origin)
            with (
                node(source, tmp_path / "b", peers=peers) as second,
                node(source, tmp_path / "c", peers=peers) as third,
            ):
                assert second.has_it_all.wait(timeout=30)
                assert third.has_it_all.wait(timeout=30)
                assert first.has_sent_it.wait(timeout=10)  # counted once a second
        from_afar = sent_by(handle)

    source.assert_arrived(tmp_path / "b")
    source.assert_arrived(tmp_path / "c")
    assert first.fetched.downloaded == 0
    assert from_afar < 0.2 * first.uploaded


def test_nodes_that_begin_together_fetch_it_once_and_share(source, tmp_path):
    with (
        slow_origin(source, 2_000_000) as (origin, handle),
        node(source, tmp_path / "a", peers=(origin,)) as first,
        # these know nobody but the first, which has nothing yet
        node(source, tmp_path / "b", peers=(first.peer,)) as second,
        node(source, tmp_path / "c", peers=(first.peer,)) as third,
    ):
        for state in (first, second, third):
            assert state.has_it_all.wait(timeout=60)
        from_afar = sent_by(handle)

    for name in "abc":
        source.assert_arrived(tmp_path / name)
    assert from_afar < 1.5 * source.metainfo.total


@pytest.fixture
def two_machines():
    """Two network namespaces, joined by a cable; yields how to run a command in each."""
    names = [f"grokctl-{side}-{os.getpid()}" for side in "ab"]
    ends = [f"gk{side}{os.getpid() % 100_000}" for side in "ab"]
    setup = [
        *(["ip", "netns", "add", name] for name in names),
        ["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]],
    ]
    for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
        inside = ["ip", "-n", name]
        setup += [
            ["ip", "link", "set", end, "netns", name],
            [*inside, "addr", "add", f"192.168.77.{number}/24", "dev", end],
            [*inside, "link", "set", "lo", "up"],
            [*inside, "link", "set", end, "up"],
            [*inside, "route", "add", "default", "dev", end],
        ]
    try:
        for command in setup:
            if _fails(command):
                pytest.skip("only root can make network namespaces here")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            _fails(["ip", "netns", "del", name])


def _fails(command):
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode != 0
    except FileNotFoundError:
        return True


def test_neighbours_find_each_other_without_being_told(source, two_machines, tmp_path):
    here, there = two_machines
    shutil.copytree(source.root / "ckpt-0", tmp_path / "a" / "ckpt-0")
    grokctl = [sys.executable, "-m", "grokctl", "fetch", str(source.path), "--no-dht", "--json"]
    adopt = ["--to", str(tmp_path / "a"), "--force", "--seed"]
    with subprocess.Popen(
        [*here, *grokctl, *adopt], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        try:
            assert any('"stage": "seed"' in line for line in first.stderr)
            second = subprocess.run(
                [*there, *grokctl, "--to", str(tmp_path / "b"), "--stall-timeout", "60"],
                capture_output=True,
                text=True,
                timeout=90,
                check=False,
            )
        finally:
            first.send_signal(signal.SIGINT)
            first.communicate(timeout=20)

    assert second.returncode == 0, second.stderr
    source.assert_arrived(tmp_path / "b")


def open_sockets():
    found = psutil.Process().net_connections("inet")
    return {
        (entry.type, entry.laddr.port)
        for entry in found
        if entry.status == psutil.CONN_LISTEN or entry.type == socket.SOCK_DGRAM
    }


DHT_PING = b"d1:ad2:id20:abcdefghij0123456789e1:q4:ping1:t2:aa1:y1:qe"
UTP_SYN = b"\x41\0" + b"\0\1" + bytes(8) + b"\0\x10\0\0" + b"\0\1" + b"\0\0"


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "http", None])
def test_behind_a_proxy_nothing_listens_or_answers(scheme):
    before = open_sockets()
    proxy = {"proxy": f"{scheme}://127.0.0.1:9"} if scheme else {"bind": "127.0.0.1"}

    with (
        Swarm(NetworkOptions(**proxy, dht=True, lsd=True, port=0)) as swarm,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller,
    ):
        caller.settimeout(0.5)
        swarm.poll(0.3)
        opened = open_sockets() - before
        for _, port in opened:
            for datagram in (DHT_PING, UTP_SYN):
                caller.sendto(datagram, ("127.0.0.1", port))
        try:
            answer = caller.recv(1000)
        except (TimeoutError, ConnectionError):
            answer = b""

    has_listener = any(kind is socket.SOCK_STREAM for kind, _ in opened)
    # without a proxy both are there, or else this would prove nothing
    assert has_listener is (scheme in {None, "http"})  # libtorrent's way to an HTTP proxy
    assert bool(answer) is (scheme is None)


def test_an_http_proxy_is_the_only_one_who_is_called(swarm, tmp_path):
    path = tmp_path / "given.torrent"
    path.write_bytes(swarm.torrent)
    with socket.create_server(("127.0.0.1", 0)) as tracker, serving(HttpProxy) as proxy:
        port = tracker.getsockname()[1]
        options = replace(
            swarm.options(max_download=1_000_000, proxy=proxy.url.rstrip("/")),
            bind=None,
            trackers=(f"http://127.0.0.1:{port}/announce",),
        )
        fetched = fetch(str(path), tmp_path / "got", options)

        asked = list(proxy.asked)

    swarm.assert_arrived(tmp_path / "got")
    assert fetched.downloaded == swarm.metainfo.total
    assert set(asked) == {swarm.peer, f"127.0.0.1:{port}"}


class NamesAlone(HttpProxy):
    """Knows that there are no hosts of these names."""

    def do_CONNECT(self):  # noqa: N802 (the name that the base class calls)
        self.server.asked.append(self.path)
        self.send_error(502)


def test_an_http_proxy_gets_names_that_this_machine_cannot_look_up(swarm, tmp_path):
    path = tmp_path / "given.torrent"
    path.write_bytes(swarm.torrent)
    with serving(NamesAlone) as proxy:
        options = replace(
            swarm.options(proxy=proxy.url.rstrip("/"), stall_timeout_s=5),
            bind=None,
            peers=(),
            trackers=("https://tracker.invalid/announce", "http://plain.invalid:81/announce"),
            web_seeds=("https://seed.invalid/x/",),
        )
        with pytest.raises(StalledError):
            fetch(str(path), tmp_path / "got", options)

    assert set(proxy.asked) == {"tracker.invalid:443", "plain.invalid:81", "seed.invalid:443"}
    assert not [thread for thread in threading.enumerate() if thread.name == "proxy-bridge"]


def test_an_udp_tracker_that_an_http_proxy_cannot_reach_is_refused():
    with pytest.raises(InvalidValueError, match=r"tracker .*expected http or https"):
        FetchOptions(proxy="http://127.0.0.1:9", trackers=("udp://tracker.example.org:80",))
