"""How fast a release comes over loopback, beside aria2c, transmission, bare libtorrent and cp."""

import argparse
import filecmp
import http.server
import json
import mmap
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo

TENSORS = 100
PIECE = 4 * 2**20
EXTRAS = {"README.md": 3_217, "config.json": 1_044, "tokenizer.model": 2_229_219}
HOST = "127.0.0.1"
NO_DISCOVERY = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)
MISSING = {"aria2c": "aria2", "transmission-cli": "transmission-cli"}  # Debian's packages


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What is downloaded, and from whom."""

    root: Path
    files: tuple[str, ...]
    nbytes: int
    torrent: Path
    port: int
    """Where the seeder listens, on the loopback address and on this machine's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One process, from its start to its end."""

    seconds: float
    cpu: float
    rss: int


Measure = Callable[[Release, Path], Sample]


# --- roles that this file plays as a process of its own


def seed(torrent: str, root: str, port: str) -> None:
    """Serve everything, with settings that make nobody wait for the seeder."""
    import libtorrent as lt  # noqa: PLC0415

    params = lt.load_torrent_file(torrent)
    params.save_path = root
    params.flags = lt.torrent_flags.seed_mode
    for index in range(params.ti.layout().num_files()):
        # without the torrent's own folder
        path = params.ti.layout().file_path(index).partition("/")[2]
        params.renamed_files = {**params.renamed_files, index: path}
    session = lt.session({
        **NO_DISCOVERY,
        "listen_interfaces": f"0.0.0.0:{port}",
        "allow_multiple_connections_per_ip": True,
        "enable_outgoing_utp": False,
        "enable_incoming_utp": False,
        "send_buffer_watermark": 3 * 2**20,
        "send_buffer_low_watermark": 2**20,
        "file_pool_size": 1000,
    })  # fmt: skip
    session.add_torrent(params)
    print(session.listen_port(), flush=True)
    sys.stdin.read()


def bare(torrent: str, root: str, port: str, then: str) -> None:
    """Run libtorrent with grokctl's settings, and nothing around it.

    It ends when the last piece is good, with gigabytes still on their way to the disk; `then`
    "fsync" makes it wait for them, as grokctl does.
    """
    import libtorrent as lt  # noqa: PLC0415

    from grokctl.transfer.swarm_settings import settings_pack  # noqa: PLC0415
    from grokctl.transfer.swarm_types import NetworkOptions  # noqa: PLC0415

    network = NetworkOptions(bind=HOST, port=0, dht=False, lsd=False, allows_shared_addresses=True)
    params = lt.load_torrent_file(torrent)
    params.save_path = root
    params.flags = lt.torrent_flags.default_flags & ~lt.torrent_flags.auto_managed
    params.flags &= ~lt.torrent_flags.paused
    params.peers = [(HOST, int(port))]
    session = lt.session(settings_pack(network))
    handle = session.add_torrent(params)

    def wait_for(kind: type[lt.alert]) -> None:
        while not any(
            isinstance(alert, kind)
            for alert in (session.wait_for_alert(1000), session.pop_alerts())[1]
        ):
            pass

    wait_for(lt.torrent_finished_alert)
    if then == "fsync":
        handle.flush_cache()
        wait_for(lt.cache_flushed_alert)
        for path in Path(root).rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())


def warm(nbytes: str) -> None:
    """Take and give back memory: a virtual machine gets its own from the host only slowly."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, int(nbytes), flags=flags).close()


# --- what is measured


def grokctl(release: Release, target: Path) -> Sample:
    here = (*("--bind", HOST), *("--port", "0"), "--no-dht", "--no-lsd")
    peer = ("--peer", f"{HOST}:{release.port}")
    command = (sys.executable, "-m", "grokctl", "fetch", release.torrent, "--to", target)
    return timed(*command, *peer, *here, "--json")


def bare_loop(release: Release, target: Path) -> Sample:
    return timed(sys.executable, __file__, "bare", release.torrent, target, release.port, "")


def bare_and_fsync(release: Release, target: Path) -> Sample:
    return timed(sys.executable, __file__, "bare", release.torrent, target, release.port, "fsync")


def aria2c(release: Release, target: Path) -> Sample:
    off = ("dht", "dht6", "peer-exchange")
    with tracker() as announce:
        return timed(
            *("aria2c", "--no-conf", "--quiet", "--seed-time=0", "--file-allocation=none"),
            *(f"--enable-{name}=false" for name in off),
            *("--bt-enable-lpd=false", f"--interface={HOST}", f"--dir={target}"),
            *(f"--bt-tracker={announce(HOST, release.port)}", release.torrent),
        )


def transmission(release: Release, target: Path) -> Sample:
    """transmission-cli never ends by itself: until it has called its script."""
    own = own_address()
    with tracker() as announce, tempfile.TemporaryDirectory() as folder:
        config, done = Path(folder), Path(folder) / "done"
        off = dict.fromkeys(("dht", "lpd", "pex", "utp", "port-forwarding"), False)
        settings = {f"{name}-enabled": value for name, value in off.items()}
        settings |= {"bind-address-ipv4": own, "preallocation": 0, "peer-port": free_port()}
        (config / "settings.json").write_text(json.dumps(settings))
        torrent = config / "announced.torrent"
        url = announce(own, release.port).encode()
        bare_bytes = release.torrent.read_bytes()
        torrent.write_bytes(b"d8:announce%d:%s" % (len(url), url) + bare_bytes[1:])
        script = config / "script"
        script.write_text(f"#!/bin/sh\necho > {done}\n")
        script.chmod(0o755)
        os.mkfifo(done)
        target.mkdir()
        command = ("transmission-cli", "-g", config, "-M", "-w", target, "-f", script, torrent)
        return timed(*command, until=done)


def copy(release: Release, target: Path) -> Sample:
    return timed("cp", "-r", release.root, target)


def copy_and_sync(release: Release, target: Path) -> Sample:
    script = 'cp -r "$0" "$1" && find "$1" -type f -exec sync -d {} +'
    return timed("sh", "-c", script, release.root, target)


def timed(*command: object, until: Path | None = None) -> Sample:
    """Run a process to its end, or until somebody writes to a pipe."""
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    env = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        seconds = 0.0
        if until is not None:
            until.read_text()
            seconds = time.perf_counter() - began
            process.send_signal(signal.SIGINT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = seconds or time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        assert process.returncode == 0 or until, log.read().decode()[-2000:]
    cpu = usage.ru_utime + usage.ru_stime
    return Sample(seconds=seconds, cpu=cpu, rss=usage.ru_maxrss * 1024)


# --- the swarm


@contextmanager
def tracker() -> Iterator[Callable[[str, int], str]]:
    """A tracker that knows one peer, the one in its announce URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host, port = self.path.split("?")[0].split("/")[1:]
            peer = socket.inet_aton(host) + int(port).to_bytes(2)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"d8:intervali600e5:peers6:" + peer + b"e")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:  # noqa: S104
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        own = server.server_address[1]
        try:
            yield lambda host, port: f"http://{host}:{own}/{host}/{port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def release_of(nbytes: int, folder: Path) -> Iterator[Release]:
    root = folder / "source"
    (root / "ckpt-0").mkdir(parents=True)
    # no file begins where a piece does
    sizes = {f"ckpt-0/tensor{n:05d}_000": nbytes // TENSORS + 61 * n for n in range(TENSORS)}
    sizes |= EXTRAS
    for name, size in sizes.items():
        (root / name).write_bytes(os.urandom(size))
    torrent = folder / "release.torrent"
    torrent.write_bytes(build_metainfo(root, list(sizes), name="release", piece_length=PIECE))
    total = parse_metainfo(torrent.read_bytes(), source="release").total
    with subprocess.Popen(
        [sys.executable, __file__, "seed", torrent, root, str(free_port())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as seeder:
        assert seeder.stdin is not None
        assert seeder.stdout is not None
        port = int(seeder.stdout.readline())
        yield Release(root=root, files=tuple(sizes), nbytes=total, torrent=torrent, port=port)
        seeder.stdin.close()


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def own_address() -> str:
    """This machine's address on some network: transmission calls nobody on 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        address: str = probe.getsockname()[0]
        return address


# --- rounds and report


def run(name: str, measure: Measure, release: Release, folder: Path, *, compare: bool) -> Sample:
    target = folder / name
    os.sync()
    for file in release.files:  # what the seeder sends lies in memory
        (release.root / file).read_bytes()
    subprocess.run([sys.executable, __file__, "warm", str(3 * release.nbytes)], check=True)
    sample = measure(release, target)
    came = target / "release" if (target / "release").exists() else target
    sizes = {file: (came / file).stat().st_size for file in release.files}
    assert sum(sizes.values()) == release.nbytes, name
    if compare:
        _, differ, failed = filecmp.cmpfiles(came, release.root, release.files, shallow=False)
        assert not differ + failed, (name, differ, failed)
    shutil.rmtree(target)
    return sample


def measures() -> dict[str, Measure]:
    found: dict[str, Measure] = {
        "grokctl fetch": grokctl,
        "bare libtorrent": bare_loop,
        "bare libtorrent, then fsync": bare_and_fsync,
    }
    peers = {"aria2c": aria2c, "transmission-cli": transmission}
    for program, measure in peers.items():
        if shutil.which(program) is None:
            print(f"{program} is left out: apt-get install {MISSING[program]}")
        elif measure is transmission and not own_address():
            print(f"{program} is left out: it needs a network, this machine has only loopback")
        else:
            found[program] = measure
    return found | {"cp": copy, "cp, then sync": copy_and_sync}


def report(samples: dict[str, list[Sample]], nbytes: int) -> None:
    rates = {name: [nbytes / s.seconds / 1e6 for s in found] for name, found in samples.items()}
    middle = {name: statistics.median(values) for name, values in rates.items()}
    ours = middle["grokctl fetch"]
    print("| program | MB/s, median (slowest to fastest) | CPU s | peak RSS | grokctl is |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, found in samples.items():
        spread = f"{middle[name]:.0f} ({min(rates[name]):.0f} to {max(rates[name]):.0f})"
        cpu = statistics.median(sample.cpu for sample in found)
        rss = max(sample.rss for sample in found)
        ratio = f"{ours / middle[name]:.2f}x"
        print(f"| {name} | {spread} | {cpu:.1f} | {rss / 1e6:.0f} MB | {ratio} |")
    judge("aria2c", "at least 1.3x aria2c", lambda: ours >= 1.3 * middle["aria2c"], rates)
    for name in ("bare libtorrent", "bare libtorrent, then fsync"):
        limit = rates[name]
        noise = (max(limit) - min(limit)) / middle[name]
        least = (1 - noise) * middle[name]
        claim = f"at least {name}, with the same settings, less the noise of {noise:.0%}"
        judge(name, claim, lambda least=least: ours >= least, rates)
    rss = max(sample.rss for sample in samples["grokctl fetch"])
    judge("grokctl fetch", "peak RSS below 300 MB", lambda: rss < 300e6, rates)


def judge(peer: str, claim: str, holds: Callable[[], bool], rates: dict[str, Any]) -> None:
    if peer in rates:
        print(f"{'PASS' if holds() else 'FAIL'}: {claim}")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=2e9, help="bytes to download")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; holds twice the size")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        with release_of(int(options.size), folder) as release:
            chosen = measures()
            samples: dict[str, list[Sample]] = {name: [] for name in chosen}
            for turn in range(options.rounds):
                for name, measure in chosen.items():
                    sample = run(name, measure, release, folder, compare=turn == 0)
                    samples[name].append(sample)
            report(samples, release.nbytes)
            print(f"{release.nbytes / 1e9:.2f} GB in {len(release.files)} files, ", end="")
            print(f"pieces of {PIECE >> 20} MiB, {os.cpu_count()} cores, one seeder on them too")


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {"seed": seed, "bare": bare, "warm": warm}
    if sys.argv[1:] and sys.argv[1] in roles:
        roles[sys.argv[1]](*sys.argv[2:])
    else:
        main(sys.argv[1:])
