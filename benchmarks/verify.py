"""How fast 2 GB are proven, warm and cold, beside the hash alone and those who check torrents."""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.torrent import build_metainfo, read_metainfo
from grokctl.integrity.pieces import check_pieces

MODEL = replace(MINIATURE, sequence_len=64, num_layers=8, emb_size=1408, key_size=88)
PIECE = 4 * 2**20
JOBS = os.cpu_count() or 1
NO_NETWORK = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)
TOOLS = {"aria2c": "aria2", "transmission-cli": "transmission-cli"}
"""Programs, and the Debian packages that hold them."""
OURS = "grokctl, its pieces"
PROCESS = "grokctl verify --rehash"
HASHING, COPYING = f"SHA-1 in memory, {JOBS} threads", "reading, not hashing"
DEFAULT, TUNED = "libtorrent recheck", f"libtorrent, hashing_threads {JOBS}"
TORF, ARIA, TRANSMISSION = "torf", "aria2c --check-integrity", "transmission-cli --verify"


@dataclass(frozen=True, slots=True)
class Release:
    """What is checked."""

    root: Path
    files: tuple[str, ...]
    nbytes: int
    torrent: Path


@dataclass(frozen=True, slots=True)
class Sample:
    """One run."""

    rate: float
    """Bytes a second."""
    rss: int


# --- roles that this file plays as a process of its own; each prints its seconds


def check(root: str, torrent: str) -> float:
    metainfo = read_metainfo(Path(torrent))
    places = {file.index: "/".join(file.path) for file in metainfo.files}
    began = time.perf_counter()
    pieces = range(metainfo.num_pieces)
    is_good = [c.is_good for c in check_pieces(Path(root), metainfo, places, pieces, jobs=JOBS)]
    seconds = time.perf_counter() - began
    assert all(is_good), len(is_good)
    return seconds


def recheck(root: str, torrent: str, threads: str) -> float:
    import libtorrent as lt  # noqa: PLC0415

    tuned = {"hashing_threads": int(threads)} if threads != "0" else {}
    session = lt.session({**NO_NETWORK, "listen_interfaces": "127.0.0.1:0", **tuned})
    params = lt.load_torrent_file(torrent)
    params.save_path = str(Path(root).parent)
    flags = lt.torrent_flags
    params.flags = (params.flags | flags.upload_mode) & ~flags.auto_managed & ~flags.paused
    began = time.perf_counter()
    handle = session.add_torrent(params)
    checking = {lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data}
    while (status := handle.status()).state in checking:
        session.wait_for_alert(5)
    seconds = time.perf_counter() - began
    assert status.progress == 1, status.progress
    return seconds


def verify_with_torf(root: str, torrent: str) -> float:
    import torf  # noqa: PLC0415

    metainfo = torf.Torrent.read(torrent)
    began = time.perf_counter()
    assert metainfo.verify(root)
    return time.perf_counter() - began


WHOLE = {PROCESS, ARIA, TRANSMISSION}
"""Timed with the start of their process, and compared with ours."""
ROLES: dict[str, Callable[..., float]] = {
    "check": check,
    "recheck": recheck,
    "torf": verify_with_torf,
}


# --- the limits


def hash_rate(release: Release) -> float:
    """SHA-1 by all threads at once, over buffers that the caches of their cores hold."""
    buffer, turns = os.urandom(2**18), release.nbytes // JOBS // 2**18

    def hash_it() -> None:
        hasher = hashlib.sha1(usedforsecurity=False)
        for _ in range(turns):
            hasher.update(buffer)

    began = time.perf_counter()
    with ThreadPoolExecutor(JOBS) as pool:
        for future in [pool.submit(hash_it) for _ in range(JOBS)]:
            future.result()
    return JOBS * turns * len(buffer) / (time.perf_counter() - began)


def copy_rate(release: Release) -> float:
    """What all threads together read from the page cache, and do nothing with."""
    lock, waiting = threading.Lock(), iter(release.files)

    def read() -> None:
        buffer = memoryview(bytearray(2**20))
        while True:
            with lock:
                name = next(waiting, None)
            if name is None:
                return
            with (release.root / name).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    began = time.perf_counter()
    with ThreadPoolExecutor(JOBS) as pool:
        for future in [pool.submit(read) for _ in range(JOBS)]:
            future.result()
    return release.nbytes / (time.perf_counter() - began)


# --- runs


def peak_of(pid: int) -> int:
    with suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return 0


def watch(process: "subprocess.Popen[bytes]") -> int:
    """Wait for the end of a process; its largest memory."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_of(process.pid))
        time.sleep(0.005)
    return peak


def play(release: Release, role: str, *arguments: str) -> Sample:
    command = [sys.executable, __file__, "--role", role, str(release.root), str(release.torrent)]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE) as process:
        peak = watch(process)
        assert process.stdout is not None
        seconds = json.loads(process.stdout.read())
    return Sample(release.nbytes / seconds, peak)


def run(release: Release, command: list[str]) -> Sample:
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        peak = watch(process)
        seconds = time.perf_counter() - began
    assert process.returncode == 0, (command, process.returncode)
    return Sample(release.nbytes / seconds, peak)


def aria2c(release: Release) -> Sample:
    options = ["--check-integrity=true", "--hash-check-only=true", "--enable-dht=false"]
    options += ["--bt-enable-lpd=false", "--seed-time=0", f"--dir={release.root.parent}"]
    return run(release, ["aria2c", *options, str(release.torrent)])


def transmission(release: Release) -> Sample:
    """Until it says that it has all, which it does 5 times a second: it never ends by itself."""
    with tempfile.TemporaryDirectory() as config:
        command = ["transmission-cli", "--verify", "--no-portmap", "--config-dir", config]
        command += ["--download-dir", str(release.root.parent), str(release.torrent)]
        terminal, its_end = os.openpty()  # anywhere else it says nothing for a long time
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=its_end, stderr=its_end) as process:
            said, peak = b"", 0
            while b"Seeding" not in said:
                said = said[-100:] + os.read(terminal, 4096)
                peak = max(peak, peak_of(process.pid))
            seconds = time.perf_counter() - began
            process.kill()
        os.close(terminal)
        os.close(its_end)
    return Sample(release.nbytes / seconds, peak)


def contenders(release: Release) -> Iterator[tuple[str, Callable[[], Sample]]]:
    yield HASHING, lambda: Sample(hash_rate(release), 0)
    yield COPYING, lambda: Sample(copy_rate(release), 0)
    grokctl = [sys.executable, "-m", "grokctl", "verify", str(release.root), "--rehash", "--quiet"]
    yield OURS, lambda: play(release, "check")
    yield PROCESS, lambda: run(release, grokctl)
    yield DEFAULT, lambda: play(release, "recheck", "0")
    yield TUNED, lambda: play(release, "recheck", str(JOBS))
    try:
        import torf  # noqa: F401, PLC0415
    except ImportError:
        print("torf is not installed: it is in pyproject.toml's dependency group `bench`")
    else:
        yield TORF, lambda: play(release, "torf")
    runs = {"aria2c": (ARIA, aria2c), "transmission-cli": (TRANSMISSION, transmission)}
    for tool, (name, play_tool) in runs.items():
        if shutil.which(tool) is None:
            print(f"{tool} is not installed: apt-get install {TOOLS[tool]}")
        else:
            yield name, partial(play_tool, release)


def warm(release: Release) -> None:
    """Have everything in the page cache: libtorrent takes out what it has read."""
    copy_rate(release)


def cold(release: Release) -> None:
    """Have nothing of it there; a disk's own cache, or a hypervisor's, is nobody's to empty."""
    for name in release.files:
        handle = os.open(release.root / name, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@contextmanager
def made(folder: Path | None) -> Iterator[Release]:
    with tempfile.TemporaryDirectory(prefix="grokctl-bench-", dir=folder) as parent:
        root = Path(parent) / "release"
        files = tuple(write_miniature(root, MODEL, tokenizer=False))
        data = build_metainfo(root, files, name=root.name, piece_length=PIECE)
        (root / "release.torrent").write_bytes(data)
        os.sync()
        nbytes = sum((root / name).stat().st_size for name in files)
        yield Release(root, files, nbytes, root / "release.torrent")


def median(samples: list[Sample]) -> Sample:
    return Sample(
        statistics.median(sample.rate for sample in samples),
        max(sample.rss for sample in samples),
    )


def measure(release: Release, prepare: Callable[[Release], None], rounds: int) -> dict[str, Sample]:
    found: dict[str, list[Sample]] = {}
    runs = dict(contenders(release))
    for turn in range(rounds):
        for name in (list(runs), list(reversed(runs)))[turn % 2]:
            prepare(release)
            found.setdefault(name, []).append(runs[name]())
    return {name: median(found[name]) for name in runs}


def report(title: str, found: dict[str, Sample]) -> None:
    print(f"\n| {title} | MB/s | ours is | peak RSS |")
    print("| --- | ---: | ---: | ---: |")
    for name, sample in found.items():
        ours = found[PROCESS if name in WHOLE else OURS].rate
        print(
            f"| {name} | {sample.rate / 1e6:,.0f} | {ours / sample.rate:.2f}x "
            f"| {f'{sample.rss / 1e6:.0f} MB' if sample.rss else ''} |"
        )


def judge(name: str, *, ok: bool, found: str) -> None:
    print(f"{'PASS' if ok else 'FAIL'}  {name}: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to make 2 GB; default: TMPDIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, *arguments = options.role
        print(json.dumps(ROLES[role](*arguments)))
        return
    with made(options.folder) as release:
        print(
            f"{release.nbytes / 1e9:.2f} GB in {len(release.files)} files, pieces of 4 MiB, ",
            end="",
        )
        print(f"{JOBS} threads, medians of {options.rounds} interleaved rounds")
        at_work = measure(release, warm, options.rounds)
        at_rest = measure(release, cold, max(1, options.rounds - 2))
    report("warm", at_work)
    report("cold (posix_fadvise DONTNEED)", at_rest)
    limit = at_work[HASHING].rate
    both = 1 / (1 / limit + 1 / at_work[COPYING].rate)
    print(f"\nhashing after one copy out of the page cache: {both / 1e6:,.0f} MB/s\n")
    ours = at_work[OURS].rate
    share = ours / limit
    judge(f"0.9 of {HASHING}, warm", ok=share >= 0.9, found=f"{share:.2f}")
    share = ours / both
    judge("0.9 of hashing after one copy, warm", ok=share >= 0.9, found=f"{share:.2f}")
    for name, goal in ((DEFAULT, 3.0), (TORF, 1.5)):
        if name in at_work:
            ratio = ours / at_work[name].rate
            judge(f"{goal:g} times {name}, warm", ok=ratio >= goal, found=f"{ratio:.2f}")
    for name, sample in at_rest.items():
        if name not in {OURS, PROCESS, HASHING, COPYING}:
            ratio = at_rest[PROCESS if name in WHOLE else OURS].rate / sample.rate
            judge(f"never slower than {name}, cold", ok=ratio >= 1, found=f"{ratio:.2f}")
    rss = max(found[PROCESS].rss for found in (at_work, at_rest))
    judge("under 120 MB RSS", ok=rss < 120e6, found=f"{rss / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
