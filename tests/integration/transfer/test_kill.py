"""What `kill -9` costs at any moment of a download, counted by the one who sends it all again."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import libtorrent
import pytest

from grokctl.checkpoint.torrent import build_metainfo

MB = 1_000_000
_FILES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeder:
    """A peer of its own, and what it has sent."""

    root: Path
    torrent: Path
    files: tuple[str, ...]
    nbytes: int
    session: libtorrent.session
    handle: libtorrent.torrent_handle

    @property
    def sent(self) -> int:
        """Payload bytes that went into sockets, whoever may have lost them since."""
        return self.handle.status().total_payload_upload

    def command(self, target: Path) -> list[str]:
        """Fetch from this peer and look nowhere else."""
        return [
            *(sys.executable, "-m", "grokctl", "fetch", str(self.torrent), "--to", str(target)),
            *("--peer", f"127.0.0.1:{self.session.listen_port()}", "--no-dht", "--no-lsd"),
            *("--bind", "127.0.0.1", "--port", "0", "--quiet"),
        ]


@contextmanager
def seeder(folder: Path, *, nbytes: int, piece: int, rate: int) -> Iterator[Seeder]:
    """Random tensors, sent at so many bytes per second."""
    root = folder / "source"
    (root / "ckpt-0").mkdir(parents=True)
    # no file begins where a piece does
    sizes = {f"ckpt-0/tensor{n:05d}_000": nbytes // _FILES + 61 * n for n in range(_FILES)}
    for name, size in sizes.items():
        (root / name).write_bytes(os.urandom(size))
    torrent = folder / "given.torrent"
    torrent.write_bytes(build_metainfo(root, list(sizes), name="killed", piece_length=piece))
    params = libtorrent.load_torrent_file(str(torrent))
    params.save_path = str(root)
    params.renamed_files = dict(enumerate(sizes))
    params.flags = libtorrent.torrent_flags.seed_mode
    params.upload_limit = rate
    quiet = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)
    session = libtorrent.session({
        "listen_interfaces": "127.0.0.1:0",
        "allow_multiple_connections_per_ip": True,  # the killed and the next share an address
        "send_socket_buffer_size": 2**17,  # what waits in here was not downloaded by anybody
        **quiet,
    })  # fmt: skip
    handle = session.add_torrent(params)
    while not session.listen_port():
        session.wait_for_alert(100)
    yield Seeder(
        root=root,
        torrent=torrent,
        files=tuple(sizes),
        nbytes=sum(sizes.values()),
        session=session,
        handle=handle,
    )
    session.remove_torrent(handle)


@pytest.fixture
def room(tmp_path):
    """A folder that does not outlive the test: it holds much."""
    folder = tmp_path / "room"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def kill_at(process, seeder, *, sent, after_s):
    """Kill a download once so many bytes were sent and it is so many seconds old."""
    earliest = time.monotonic() + after_s
    while process.poll() is None and (seeder.sent < sent or time.monotonic() < earliest):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.002)
    process.kill()
    process.wait()


def is_same(one, other):
    with one.open("rb") as left, other.open("rb") as right:
        return all(
            a == b
            for a, b in itertools.zip_longest(
                iter(lambda: left.read(2**20), b""), iter(lambda: right.read(2**20), b"")
            )
        )


def assert_kills_cost_little(seeder, target, *, kills, slack):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    marks = sorted(rng.uniform(0, 0.9 * seeder.nbytes) for _ in range(kills))
    history = [f"seed {seed}"]

    for mark in marks:
        # so young that it is still starting, or looks at what lies there, or older
        after_s = rng.uniform(0, 0.8)
        with subprocess.Popen(seeder.command(target)) as process:
            kill_at(process, seeder, sent=mark, after_s=after_s)
        history.append(f"{mark / MB:.0f} MB, {after_s:.2f} s: {seeder.sent / MB:.1f} MB sent")
        assert process.returncode == -signal.SIGKILL, history
    last = subprocess.run(seeder.command(target), check=False, capture_output=True, text=True)

    history.append(f"end: {seeder.sent / MB:.1f} MB sent for {seeder.nbytes / MB:.1f}")
    assert last.returncode == 0, (history, last.stderr)
    assert all(is_same(target / name, seeder.root / name) for name in seeder.files), history
    assert seeder.nbytes <= seeder.sent <= 1.05 * seeder.nbytes + slack, history
    print(*history, sep="\n")  # noqa: T201


def test_three_kills_cost_what_was_in_flight(room):
    with seeder(room, nbytes=60 * MB, piece=2**18, rate=30 * MB) as other:
        assert_kills_cost_little(other, room / "got", kills=3, slack=12 * MB)


@pytest.mark.slow
def test_ten_kills_of_a_gigabyte_cost_a_twentieth_and_64_megabytes(room):
    with seeder(room, nbytes=1000 * MB, piece=2**22, rate=100 * MB) as other:
        assert_kills_cost_little(other, room / "got", kills=10, slack=64 * MB)
