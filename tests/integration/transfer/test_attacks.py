"""Hostile torrents, magnets, peers and folders: nothing outside the destination is touched."""

import os
import shutil
import socket
import stat
import time
import tracemalloc
from dataclasses import replace

import libtorrent
import pytest
from servers import libtorrent_seeder

from grokctl.errors import FetchError, StalledError, UsageError
from grokctl.events import Noted
from grokctl.fetch import FetchOptions, fetch, plan_fetch

LOOPBACK = {"bind": "127.0.0.1", "port": 0, "dht": False, "lsd": False, "stall_timeout_s": 20}
ALONE = FetchOptions(**{**LOOPBACK, "stall_timeout_s": 0.5})
MEGABYTE = 2**20


def tree(folder):
    """Everything below a folder: kind and content, and when it was changed."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = None
        if stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        found[path.relative_to(folder)] = status.st_mode, status.st_mtime_ns, content
    return found


@pytest.fixture(scope="module")
def arrived(swarm, tmp_path_factory):
    """A finished download; look, and touch nothing."""
    root = tmp_path_factory.mktemp("arrived") / "small"
    fetch(swarm.magnet, root, swarm.options())
    return root


@pytest.fixture
def root(arrived, tmp_path):
    """A finished download of one's own."""
    return shutil.copytree(arrived, tmp_path / "got")


def put_away(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


PLANTS = {
    "link": lambda path, victim: path.symlink_to(victim / "secret"),
    "link-to-nothing": lambda path, victim: path.symlink_to(victim / "new"),
    "link-to-folder": lambda path, victim: path.symlink_to(victim),
    "pipe": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
    "file": lambda path, _: path.touch(),
}
FILES = (
    "ckpt-0/tensor00003_000",
    "config.json",
    "release.torrent",
    ".grokctl/resume",
    ".grokctl/resume.begun",
    ".grokctl/lock",
    ".grokctl/.{infohash}.parts",
)
FOLDERS = ("ckpt-0", ".grokctl")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("verb", [fetch, plan_fetch], ids=["fetch", "plan"])
@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant != "file"])
@pytest.mark.parametrize("place", FILES)
def test_what_is_planted_for_a_file_is_refused(swarm, root, victim, place, plant, verb):
    planted = root / place.format(infohash=swarm.metainfo.infohash)
    put_away(planted)
    PLANTS[plant](planted, victim)
    before = tree(root), tree(victim)

    # the source names no metadata to ask for, so nobody has to be asked
    source = root.parent / "given.torrent"
    source.write_bytes(swarm.torrent)
    with pytest.raises(FetchError, match="expected a file") as caught:
        verb(str(source), root, swarm.options())

    assert caught.type is FetchError
    assert str(planted) in str(caught.value)
    assert (tree(root), tree(victim)) == before


@pytest.mark.timeout(120)
@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant != "folder"])
@pytest.mark.parametrize("place", FOLDERS)
def test_what_is_planted_for_a_folder_is_refused(swarm, root, torrent_file, victim, place, plant):
    put_away(root / place)
    PLANTS[plant](root / place, victim)
    before = tree(root), tree(victim)

    with pytest.raises(FetchError, match="expected a folder"):
        fetch(str(torrent_file), root, swarm.options(force=True))

    assert (tree(root), tree(victim)) == before


@pytest.mark.parametrize("plant", ["link", "link-to-nothing"])
@pytest.mark.parametrize("name", ["source.json", "receipt.json"])
def test_links_for_what_grokctl_writes_itself_are_replaced_and_not_followed(
    swarm, root, victim, name, plant
):
    put_away(root / ".grokctl" / name)
    PLANTS[plant](root / ".grokctl" / name, victim)
    before = tree(victim)

    fetched = fetch(swarm.magnet, root, swarm.options())

    assert fetched.is_complete
    assert not fetched.is_proven
    assert tree(victim) == before


@pytest.mark.timeout(120)
@pytest.mark.parametrize("plant", ["pipe", "folder"])
@pytest.mark.parametrize("name", ["source.json", "receipt.json"])
def test_nobody_waits_for_a_pipe_among_what_grokctl_reads(swarm, root, victim, name, plant):
    put_away(root / ".grokctl" / name)
    PLANTS[plant](root / ".grokctl" / name, victim)

    try:
        fetched = fetch(swarm.magnet, root, swarm.options())
    except FetchError as error:
        assert name in str(error)  # noqa: PT017 (either is fine, waiting is not)
    else:
        assert not fetched.is_proven


def test_a_release_may_be_a_link_to_a_folder_on_a_larger_disk(swarm, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "got").symlink_to(tmp_path / "large disk")

    fetch(swarm.magnet, tmp_path / "got", swarm.options())

    assert (tmp_path / "got").is_symlink()
    swarm.assert_arrived(tmp_path / "large disk")


def test_a_release_that_is_a_link_to_nothing_is_an_error(swarm, torrent_file, tmp_path):
    (tmp_path / "got").symlink_to(tmp_path / "unplugged")

    with pytest.raises(FetchError, match="got"):
        fetch(str(torrent_file), tmp_path / "got", swarm.options())

    assert not (tmp_path / "unplugged").exists()


def with_file(**entry):
    """The last file of the torrent becomes another one."""

    def change(info):
        info[b"files"][-1] |= {
            key.replace("_", " ").encode(): value for key, value in entry.items()
        }

    return change


def another(*path):
    """One more file, which is empty and belongs to no piece."""

    def change(info):
        info[b"files"].append({b"length": 0, b"path": list(path)})

    return change


def with_info(**changes):
    def change(info):
        info |= {key.replace("_", " ").encode(): value for key, value in changes.items()}

    return change


NAMES = [
    pytest.param(with_file(path=[b"..", b"..", b"etc", b"passwd"]), id="above"),
    pytest.param(with_file(path=[b"../../etc/passwd"]), id="above-in-one"),
    pytest.param(with_file(path=[b"/etc/passwd"]), id="absolute"),
    pytest.param(with_file(path=[b"", b"etc", b"passwd"]), id="absolute-in-parts"),
    pytest.param(with_file(path=[b"..\\..\\x"]), id="backslash"),
    pytest.param(with_file(path=[b"."]), id="here"),
    pytest.param(with_file(path=[b""]), id="empty"),
    pytest.param(with_file(path=[]), id="no-path"),
    pytest.param(with_file(path=b"config.json"), id="no-list"),
    pytest.param(with_file(path=[b"a\0b"]), id="nul"),
    pytest.param(with_file(path=[b"\x1b[2J"]), id="escape"),
    pytest.param(with_file(path=[b"a\nb"]), id="two-lines"),
    pytest.param(with_file(path=["nosj\u202egnp.exe".encode()]), id="right-to-left"),
    pytest.param(with_file(path=[b"\xff\xfe"]), id="no-utf-8"),
    pytest.param(with_file(path=[b"x" * 300]), id="long"),
    pytest.param(with_file(path=[b"x "]), id="blank-at-the-end"),
    pytest.param(with_file(path=[b"d"] * 101), id="deep"),
    pytest.param(with_file(path=[b".grokctl", b"resume"]), id="ours"),
    pytest.param(with_file(path=[b".GROKCTL", b"source.json"]), id="ours-for-some-disks"),
    pytest.param(with_file(path=[b"release.torrent"]), id="our-torrent"),
    pytest.param(with_file(path=[b"grokctl.json"]), id="our-manifest"),
    pytest.param(with_file(path=[b"ckpt-0"]), id="our-folder"),
    pytest.param(with_file(attr=b"l", symlink_path=[b"..", b"x"]), id="link-up"),
    pytest.param(with_file(attr=b"l", symlink_path=[b"ckpt-0"]), id="link-within"),
    pytest.param(with_file(attr=b"x"), id="executable"),
    pytest.param(another(b"CONFIG.JSON"), id="twice-for-some-disks"),
    pytest.param(another(b"config.json", b"x"), id="file-and-folder"),
    pytest.param(another(b"elsewhere", b"tensor00003_000"), id="one-place-for-two"),
    pytest.param(with_file(length=-1), id="negative"),
    pytest.param(with_file(length=2**62), id="huge"),
    pytest.param(with_info(piece_length=0), id="no-pieces"),
    pytest.param(with_info(piece_length=100), id="tiny-pieces"),
    pytest.param(with_info(piece_length=2**30), id="huge-pieces"),
    pytest.param(with_info(pieces=b"x" * 20), id="too-few-hashes"),
    pytest.param(with_info(length=5), id="one-file-and-several"),
    pytest.param(with_info(files=[]), id="no-files"),
]


def changed(swarm, change):
    torrent = libtorrent.bdecode(swarm.torrent)
    change(torrent[b"info"])
    return libtorrent.bencode(torrent)


@pytest.mark.parametrize("change", NAMES)
def test_a_hostile_torrent_writes_nothing(swarm, change, tmp_path):
    (tmp_path / "hostile.torrent").write_bytes(changed(swarm, change))
    (tmp_path / "got").mkdir()
    before = tree(tmp_path)

    with pytest.raises(FetchError) as caught:
        fetch(str(tmp_path / "hostile.torrent"), tmp_path / "got", ALONE)

    assert caught.type is FetchError
    assert str(caught.value).isprintable()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [b"..", b"/etc", b"a/../../b", b"\x1b[2J", b"x" * 300])
def test_a_torrents_own_name_is_no_path(swarm, name, tmp_path):
    torrent = changed(swarm, with_info(name=name))
    (tmp_path / "x.torrent").write_bytes(torrent)
    params = libtorrent.load_torrent_buffer(torrent)
    places = {file.index: "/".join(file.path) for file in swarm.metainfo.files}

    with libtorrent_seeder(torrent, swarm.root, places) as (port, _):
        options = swarm.options(peers=(f"127.0.0.1:{port}",))
        fetched = fetch(str(tmp_path / "x.torrent"), tmp_path / "got", options)

    swarm.assert_arrived(tmp_path / "got")
    assert fetched.infohash == str(params.info_hashes.v1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "x.torrent"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_file(path=[b"..", b"..", b"evil"]), id="above"),
        pytest.param(with_file(path=[b"/etc/passwd"]), id="absolute"),
        pytest.param(with_file(path=[b".grokctl", b"resume"]), id="ours"),
        pytest.param(with_file(attr=b"l", symlink_path=[b"/etc"]), id="link"),
    ],
)
def test_hostile_metadata_from_a_peer_writes_nothing(swarm, change, tmp_path, tmp_path_factory):
    torrent = changed(swarm, change)
    infohash = libtorrent.load_torrent_buffer(torrent).info_hashes.v1
    (tmp_path / "got").mkdir()
    before = tree(tmp_path)

    # a folder of its own: this peer makes the links that the torrent asks for
    with libtorrent_seeder(torrent, tmp_path_factory.mktemp("seeder"), {}) as (port, _):
        options = swarm.options(peers=(f"127.0.0.1:{port}",))
        with pytest.raises(FetchError) as caught:
            fetch(f"magnet:?xt=urn:btih:{infohash}&dn=../../evil", tmp_path / "got", options)

    assert caught.type is FetchError
    assert tree(tmp_path) == before


def test_metadata_larger_than_any_release_is_not_taken_from_a_peer(tmp_path):
    pieces = 500_000
    info = {
        b"files": [{b"length": 16384 * pieces, b"path": [b"ckpt-0", b"tensor00000_000"]}],
        b"name": b"x",
        b"piece length": 16384,
        b"pieces": bytes(20 * pieces),
    }
    torrent = libtorrent.bencode({b"info": info})
    infohash = libtorrent.load_torrent_buffer(torrent).info_hashes.v1

    with libtorrent_seeder(torrent, tmp_path, {}) as (port, _):
        options = FetchOptions(**{**LOOPBACK, "stall_timeout_s": 1.5}, peers=(f"127.0.0.1:{port}",))
        with pytest.raises(StalledError, match="expected metadata"):
            fetch(f"magnet:?xt=urn:btih:{infohash}", tmp_path / "got", options)

    assert list(tmp_path.iterdir()) == []


def ten_million_pieces(path):
    """200 MB of hashes, which a disk need not store."""
    count = 10_000_000
    length = b"d6:lengthi%de4:pathl6:ckpt-015:tensor00000_000ee" % (16384 * count)
    head = b"d4:infod5:filesl%se4:name1:x12:piece lengthi16384e6:pieces%d:" % (length, 20 * count)
    with path.open("wb") as file:
        file.write(head)
        file.seek(20 * count, os.SEEK_CUR)
        file.write(b"ee")


def pieces_without_hashes(path):
    """Ten million pieces, and no hash."""
    length = b"d6:lengthi%de4:pathl6:ckpt-015:tensor00000_000ee" % (16384 * 10_000_000)
    path.write_bytes(b"d4:infod5:filesl%se4:name1:x12:piece lengthi16384e6:pieces0:ee" % length)


def ten_million_values(path):
    path.write_bytes(b"d4:infol" + b"i0e" * 10_000_000 + b"ee")


def ten_million_folders(path):
    path.write_bytes(b"d4:info" + b"l" * 10_000_000 + b"e" * 10_000_000 + b"e")


@pytest.mark.parametrize(
    "write", [ten_million_pieces, pieces_without_hashes, ten_million_values, ten_million_folders]
)
def test_a_torrent_of_ten_million_things_is_refused_at_once_and_in_little_memory(write, tmp_path):
    path = tmp_path / "bomb.torrent"
    write(path)
    tracemalloc.start()
    began = time.monotonic()

    try:
        with pytest.raises(FetchError):
            fetch(str(path), tmp_path / "got", ALONE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert time.monotonic() - began < 40
    assert peak < 100 * MEGABYTE
    assert [entry.name for entry in tmp_path.iterdir()] == ["bomb.torrent"]


UNFINISHED = [
    pytest.param([{b"piece": -1, b"bitmask": b"\xff"}], id="before-the-first"),
    pytest.param([{b"piece": 2**31 - 1, b"bitmask": b"\xff"}], id="behind-the-last"),
    pytest.param([{b"piece": 2, b"bitmask": b"\xff" * 100_000}], id="too-many-blocks"),
    pytest.param([{b"piece": 2, b"bitmask": b""}], id="no-blocks"),
    pytest.param([{b"piece": 2, b"bitmask": b"\xff"}] * 1000, id="many-times"),
]


@pytest.mark.parametrize("unfinished", UNFINISHED)
def test_planted_resume_data_leads_nowhere_and_calls_nobody(swarm, unfinished, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options(only=("tensor00001*",)))
    evil = tmp_path / "evil"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}/announce".encode()
        resume = {
            b"file-format": b"libtorrent resume file",
            b"file-version": 1,
            b"info-hash": bytes.fromhex(swarm.metainfo.infohash),
            b"mapped_files": [b"../evil", str(evil).encode(), b"x"],
            b"peers": socket.inet_aton("127.0.0.1") + port.to_bytes(2, "big"),
            b"pieces": bytes(swarm.metainfo.num_pieces),
            b"save_path": str(evil).encode(),
            b"total_uploaded": -5,
            b"trackers": [[url]],
            b"unfinished": unfinished,
            b"url-list": [url],
        }
        (root / ".grokctl/resume").write_bytes(libtorrent.bencode(resume))

        fetch(swarm.magnet, root, swarm.options())

        with pytest.raises(BlockingIOError):
            listener.accept()
    swarm.assert_arrived(root)
    assert [path.name for path in tmp_path.iterdir()] == ["got"]


def test_a_planted_torrent_of_another_release_is_not_believed(swarm, root):
    torrent = changed(swarm, with_file(path=[b"other.json"]))
    (root / "release.torrent").write_bytes(torrent)
    (root / ".grokctl/source.json").unlink()
    before = tree(root)

    with pytest.raises(FetchError, match="that grokctl did not fetch"):
        fetch(swarm.magnet, root, swarm.options())

    assert tree(root) == before


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(lambda swarm: changed(swarm, with_info(name=b"y")), "infohash", id="another"),
        pytest.param(lambda _: b"garbage", "invalid torrent", id="garbage"),
        pytest.param(lambda _: b"", "invalid torrent", id="empty"),
        pytest.param(lambda swarm: swarm.torrent[:-1], "invalid torrent", id="cut-off"),
    ],
)
def test_a_given_torrent_that_is_not_the_one_is_refused(swarm, write, message, tmp_path):
    path = tmp_path / "given.torrent"
    path.write_bytes(write(swarm))

    with pytest.raises(FetchError, match=message) as caught:
        fetch(swarm.magnet, tmp_path / "got", replace(ALONE, torrent_file=path))

    assert caught.type is FetchError
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize("given", ["missing.torrent", ".", "grok-1", "magnet:?xt=urn:btih:"])
def test_a_given_torrent_that_is_no_file_is_a_usage_error(swarm, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = type(tmp_path)(given)

    with pytest.raises(UsageError, match="torrent") as caught:
        fetch(swarm.magnet, tmp_path / "got", replace(ALONE, torrent_file=path))

    assert given.split(":")[0] in str(caught.value)
    assert not (tmp_path / "got").exists()


def test_a_given_torrent_spares_the_wait_for_metadata(swarm, torrent_file, tmp_path):
    notes = []
    options = swarm.options(torrent_file=torrent_file)

    fetched = fetch(
        f"magnet:?xt=urn:btih:{swarm.metainfo.infohash}",
        tmp_path / "got",
        options,
        observe=lambda event: notes.append(event) if isinstance(event, Noted) else None,
    )

    assert fetched.is_complete
    assert notes == []
    swarm.assert_arrived(tmp_path / "got")
