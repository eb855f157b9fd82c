"""Downloads from HTTP mirrors on the loopback interface, good ones and others."""

import os
import shutil
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
from servers import Handler, content_range, serving

from grokctl.checkpoint.release_files import release_paths
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.errors import StalledError, UsageError
from grokctl.events import Advanced, Noted, Stage
from grokctl.fetch import FetchOptions, fetch, seeding
from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.sources import Mirror
from grokctl.transfer.web import AbsentError, RefusedError, Web, WebError

PIECE = 16384
LOOPBACK = {"bind": "127.0.0.1", "port": 0, "dht": False, "lsd": False, "stall_timeout_s": 20}


class Truncating(Handler):
    """Promises all, and hangs up half way."""

    def send_part(self, data, first, last):
        part = data[first : last + 1]
        half = part[: len(part) // 2]
        self.answer(206, half, content_range(data, first, last), length=len(part))
        self.close_connection = True


class Lying(Handler):
    def send_part(self, data, first, last):
        super().send_part(bytes(len(data)), first, last)


class Ignorant(Handler):
    """Knows no ranges."""

    def send_part(self, data, first, last):
        del first, last
        self.answer(200, data)


class Elsewhere(Handler):
    """Answers another range than it was asked for."""

    def send_part(self, data, first, last):
        part = data[: last + 1 - first]
        self.answer(206, part, {"Content-Range": f"bytes 0-{last - first}/{len(data)}"})


class Encoding(Handler):
    def send_part(self, data, first, last):
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}", "Content-Encoding": "gzip"}
        self.answer(206, data[first : last + 1], headers)


class Forbidding(Handler):
    def send_part(self, *_):
        self.answer(403)


class Failing(Handler):
    """Out of order the first times."""

    def send_part(self, data, first, last):
        if len(self.server.asked) < 4:
            self.answer(503)
        else:
            super().send_part(data, first, last)


class Redirecting(Handler):
    """Sends every file elsewhere, under an address that is good for two requests."""

    target = None

    def respond(self):
        self.server.asked.append(self.path)
        signature = len(self.server.asked)
        place = f"{self.target.url}{self.path[1:]}?signature={signature}"
        self.answer(302, headers={"Location": place})


class Signed(Handler):
    """What a redirect leads to."""

    def respond(self):
        if "signature" not in self.path or self.server.asked.count(self.path) >= 2:
            self.server.asked.append(self.path)
            self.answer(403)
        else:
            super().respond()


def alone(server, **changes):
    """Options for a mirror and nobody else."""
    return FetchOptions(**{**LOOPBACK, "mirrors": (server.url,), **changes})


def notes_of(events):
    return [event.message for event in events if isinstance(event, Noted)]


def share(fetched, source):
    return next(share.nbytes for share in fetched.contributions if share.source.startswith(source))


def test_a_mirror_alone_is_enough_and_sends_every_byte_once(swarm, torrent_file, tmp_path):
    events = []

    with serving(Handler, swarm.root) as server:
        fetched = fetch(str(torrent_file), tmp_path / "got", alone(server), observe=events.append)

    swarm.assert_arrived(tmp_path / "got")
    assert fetched.is_complete
    assert server.sent == fetched.downloaded == swarm.metainfo.total
    assert share(fetched, "mirror") == swarm.metainfo.total
    assert fetched.troubles == ()
    facts = [dict(event.facts) for event in events if isinstance(event, Advanced) and event.facts]
    assert server.name in facts[-1]


@pytest.fixture
def large(tmp_path):
    """Twelve megabytes in two files."""
    root = tmp_path / "source"
    names = [f"ckpt-0/tensor{index:05d}_000" for index in range(2)]
    (root / "ckpt-0").mkdir(parents=True)
    for name in names:
        (root / name).write_bytes(os.urandom(6_000_001))
    torrent = build_metainfo(root, names, name="x", piece_length=PIECE)
    path = tmp_path / "large.torrent"
    path.write_bytes(torrent)
    metainfo = parse_metainfo(torrent, source="x")
    return SimpleNamespace(root=root, names=names, torrent=torrent, path=path, metainfo=metainfo)


def test_neighbouring_pieces_are_asked_for_together(large, tmp_path):
    with serving(Handler, large.root) as server:
        fetch(str(large.path), tmp_path / "got", alone(server))

    assert len(server.asked) < large.metainfo.num_pieces / 2


def test_swarm_and_mirror_work_together_and_no_piece_comes_twice(large, tmp_path):
    with serving(Handler, large.root) as server, seeding(large.root, large.torrent) as (host, port):
        options = alone(server, peers=(f"{host}:{port}",), max_download=4_000_000)
        fetched = fetch(str(large.path), tmp_path / "got", options)

    for name in large.names:
        assert (tmp_path / "got" / name).read_bytes() == (large.root / name).read_bytes()
    assert share(fetched, "swarm") > 0
    assert share(fetched, "mirror") > 0
    # but for the end, where whoever is first wins
    assert fetched.downloaded <= 1.1 * large.metainfo.total


def test_a_list_too_long_to_be_looked_through_each_time_is_worked_off_all_the_same(
    large, tmp_path, monkeypatch
):
    monkeypatch.setattr("grokctl.transfer.piece_scheduler._FEW", 0)

    with serving(Handler, large.root) as server, seeding(large.root, large.torrent) as (host, port):
        options = alone(server, peers=(f"{host}:{port}",), max_download=4_000_000)
        fetched = fetch(str(large.path), tmp_path / "got", options)

    for name in large.names:
        assert (tmp_path / "got" / name).read_bytes() == (large.root / name).read_bytes()
    assert fetched.downloaded <= 1.1 * large.metainfo.total


def test_an_interrupted_download_from_a_mirror_goes_on(swarm, torrent_file, tmp_path):
    root = tmp_path / "got"

    def interrupt(event):
        if isinstance(event, Advanced) and event.stage is Stage.FETCH and event.done > 300_000:
            raise KeyboardInterrupt

    with serving(Handler, swarm.root) as server:
        slowly = alone(server, max_download=400_000)
        with pytest.raises(KeyboardInterrupt):
            fetch(str(torrent_file), root, slowly, observe=interrupt)
        second = fetch(str(torrent_file), root, alone(server))

    swarm.assert_arrived(root)
    assert second.downloaded <= swarm.metainfo.total - 300_000 + PIECE


def test_a_redirect_is_followed_once_a_file_and_a_stale_address_is_asked_for_anew(
    swarm, torrent_file, tmp_path
):
    with serving(Signed, swarm.root) as target:
        handler = type("Here", (Redirecting,), {"target": target})
        with serving(handler, swarm.root) as server:
            fetched = fetch(str(torrent_file), tmp_path / "got", alone(server))

    swarm.assert_arrived(tmp_path / "got")
    assert fetched.is_complete
    assert 0 < len(server.asked) < len(target.asked)


def test_a_mirror_that_truncates_is_named_and_costs_nothing_but_time(swarm, torrent_file, tmp_path):
    events = []

    with serving(Truncating, swarm.root) as server, serving(Handler, swarm.root) as good:
        options = alone(server, mirrors=(server.url, good.url))
        fetched = fetch(str(torrent_file), tmp_path / "got", options, observe=events.append)

    swarm.assert_arrived(tmp_path / "got")
    (trouble,) = fetched.troubles
    assert trouble.source == server.name
    assert "closed the connection" in trouble.reason
    assert any("closed the connection" in note for note in notes_of(events))


def test_a_mirror_that_lies_is_dropped_by_name(swarm, tmp_path, torrent_file):
    events = []

    with serving(Lying, swarm.root) as server:
        options = alone(server, peers=(swarm.peer,), max_download=400_000)
        fetched = fetch(str(torrent_file), tmp_path / "got", options, observe=events.append)

    swarm.assert_arrived(tmp_path / "got")
    (trouble,) = fetched.troubles
    assert trouble.source == server.name
    assert trouble.reason.startswith("sent wrong bytes (ckpt-0/tensor")
    assert trouble.reason.endswith("dropped")
    assert [note for note in notes_of(events) if "sent wrong bytes" in note]


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        pytest.param(Ignorant, "does not support ranges", id="no-ranges"),
        pytest.param(Elsewhere, "sends a different range", id="another-range"),
        pytest.param(Encoding, "sends an encoded body", id="encoded"),
        pytest.param(Forbidding, "answers 403", id="forbidden"),
    ],
)
def test_a_mirror_that_cannot_be_used_is_dropped_and_the_stall_names_it(
    swarm, torrent_file, handler, reason, tmp_path
):
    with serving(handler, swarm.root) as server, pytest.raises(StalledError, match=reason):
        fetch(str(torrent_file), tmp_path / "got", alone(server, stall_timeout_s=1))


def test_a_mirror_that_is_out_of_order_is_asked_again(swarm, torrent_file, tmp_path):
    with serving(Failing, swarm.root) as server:
        fetched = fetch(str(torrent_file), tmp_path / "got", alone(server))

    swarm.assert_arrived(tmp_path / "got")
    assert "503" in fetched.troubles[0].reason


def test_files_that_a_mirror_lacks_come_from_the_swarm(swarm, torrent_file, tmp_path):
    partial = tmp_path / "partial"
    shutil.copytree(swarm.root, partial)
    (partial / "ckpt-0/tensor00000_000").unlink()
    (partial / "ckpt-0/tensor00003_000").write_bytes(b"of another size")

    with serving(Handler, partial) as server:
        options = alone(server, peers=(swarm.peer,))
        fetched = fetch(str(torrent_file), tmp_path / "got", options)

    swarm.assert_arrived(tmp_path / "got")
    assert share(fetched, "swarm") > 0
    assert not any(trouble.reason.endswith("dropped") for trouble in fetched.troubles)


def test_another_edition_of_a_small_file_is_no_lie(swarm, tmp_path):
    source, mirrored = tmp_path / "source", tmp_path / "mirrored"
    shutil.copytree(swarm.root, source)
    (source / "README.md").write_bytes(b"the torrent's")
    shutil.copytree(source, mirrored)
    (mirrored / "README.md").write_bytes(b"the mirror's!")
    names = [*("/".join(file.path) for file in swarm.metainfo.files), "README.md"]
    torrent = build_metainfo(source, names, name="x", piece_length=PIECE)
    path = tmp_path / "given.torrent"
    path.write_bytes(torrent)

    with serving(Handler, mirrored) as server, seeding(source, torrent) as (host, port):
        options = alone(server, peers=(f"{host}:{port}",))
        fetched = fetch(str(path), tmp_path / "got", options)

    assert (tmp_path / "got/README.md").read_bytes() == b"the torrent's"
    assert not any(trouble.reason.endswith("dropped") for trouble in fetched.troubles)


def test_a_mirror_of_something_else_is_found_out(torrent_file, tmp_path):
    (tmp_path / "empty").mkdir()

    with (
        serving(Handler, tmp_path / "empty") as server,
        pytest.raises(StalledError, match="does not hold this release"),
    ):
        fetch(str(torrent_file), tmp_path / "got", alone(server, stall_timeout_s=2))

    assert len(set(server.asked)) <= 8


def test_all_of_them_at_once_and_the_report_names_the_liars(swarm, tmp_path):
    dead = ("http://127.0.0.1:9/announce",)
    with ExitStack() as stack:
        target = stack.enter_context(serving(Signed, swarm.root))
        handlers = (type("Here", (Redirecting,), {"target": target}), Truncating, Lying)
        servers = [stack.enter_context(serving(handler, swarm.root)) for handler in handlers]
        options = FetchOptions(
            **LOOPBACK,
            peers=(swarm.peer,),
            trackers=dead,
            mirrors=tuple(server.url for server in servers),
            max_download=600_000,
        )
        fetched = fetch(swarm.magnet, tmp_path / "got", options)

    swarm.assert_arrived(tmp_path / "got")
    named = {trouble.source for trouble in fetched.troubles}
    _, truncating, lying = (server.name for server in servers)
    assert named == {truncating, lying}


def test_a_rate_limit_holds_for_mirrors_too(swarm, torrent_file, tmp_path):
    began = time.monotonic()

    with serving(Handler, swarm.root) as server:
        fetch(str(torrent_file), tmp_path / "got", alone(server, max_download=400_000))

    assert time.monotonic() - began > 0.7 * swarm.metainfo.total / 400_000


@pytest.fixture
def web():
    with Web() as client:
        yield client


def read(web, url, start, length, total):
    with web.open_range(url, start, length, total=total) as chunks:
        return b"".join(chunks)


def test_a_range_is_exactly_what_was_asked_for(swarm, web):
    name = "ckpt-0/tensor00000_000"
    data = (swarm.root / name).read_bytes()

    with serving(Handler, swarm.root) as server:
        assert read(web, server.url + name, 5, 70_000, len(data)) == data[5:70_005]
        with pytest.raises(AbsentError, match=f"has {len(data):,} bytes, expected 9"):
            read(web, server.url + name, 0, 9, 9)
        with pytest.raises(AbsentError, match="404"):
            read(web, server.url + "nothing", 0, 9, 9)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("ftp://127.0.0.1/x", "invalid address"),
        ("file:///etc/passwd", "invalid address"),
        ("http://u:p@127.0.0.1/x", "password"),
    ],
)
def test_a_redirect_to_something_odd_is_refused(swarm, web, location, reason):
    class Odd(Handler):
        def respond(self):
            self.answer(302, headers={"Location": location})

    with serving(Odd, swarm.root) as server, pytest.raises(RefusedError, match=reason):
        read(web, server.url + "x", 0, 9, 9)


def test_redirects_in_a_circle_end(swarm, web):
    class Circle(Handler):
        def respond(self):
            self.server.asked.append(self.path)
            self.answer(302, headers={"Location": self.path})

    with serving(Circle, swarm.root) as server, pytest.raises(RefusedError, match="more than 5"):
        read(web, server.url + "x", 0, 9, 9)

    assert len(server.asked) == 6


def test_a_server_that_is_not_there_is_said_so(web):
    with pytest.raises(WebError, match="refused"):
        read(web, "http://127.0.0.1:9/x", 0, 9, 9)


def test_mirrors_end_soon_also_in_the_middle_of_a_silence(swarm):
    is_asked = threading.Event()
    may_go = threading.Event()

    class Silent(Handler):
        def send_part(self, *_):
            is_asked.set()
            may_go.wait(20)

    places = release_paths(swarm.metainfo)
    with serving(Silent, swarm.root) as server:
        with Mirrors([Mirror.at(server.url)], Web(), swarm.metainfo, places) as mirrors:
            mirrors.offer(range(swarm.metainfo.num_pieces), lambda _: True)
            assert is_asked.wait(20)
            began = time.monotonic()
        assert time.monotonic() - began < 15
        may_go.set()


def test_a_piece_that_is_leased_is_not_offered_twice_and_comes_back(swarm):
    places = release_paths(swarm.metainfo)
    everything = range(swarm.metainfo.num_pieces)

    with (
        serving(Forbidding, swarm.root) as server,
        Mirrors([Mirror.at(server.url)], Web(), swarm.metainfo, places) as mirrors,
    ):
        given = mirrors.offer(everything, lambda _: True)
        assert not given & mirrors.offer(everything, lambda _: True)
        back = set()
        deadline = time.monotonic() + 10
        while mirrors.leased and time.monotonic() < deadline:
            assert mirrors.take(5) == []
            back |= mirrors.take_returned()

    assert given <= back
    assert mirrors.states()[0].is_dropped


@pytest.mark.parametrize("name", ["ftp://x/", "hugging", "http://", "http://h/\n"])
def test_mirrors_that_cannot_be_meant_are_refused(name):
    with pytest.raises(UsageError, match=r"mirror .*: expected hf or http or https://host"):
        replace(FetchOptions(), mirrors=(name,))
