"""Keep what this version of grokctl writes, in a folder named after its commit, for later ones.

Run it with the Python of the version's own environment, in which `import grokctl` finds that
version and git knows its commit; the script itself may be a newer one:

    .venv/bin/python tests/data/yesterday/make.py

Every file comes from a real command: downloads over a real swarm on 127.0.0.1, kills by SIGKILL.
Torrent, int8 and int4 device files and results are the same each time; times, inodes and the exact
place of a kill are not. It takes minutes, because a fetch writes resume data every 30 seconds, and
the killed one has to have some. Add a folder when a format changes, not with every release: each
takes half a megabyte, and ten seconds of every run of the tests.

All folders share `release/`, which is written if it is missing, and never again.
"""

import argparse
import getpass
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final

import grokctl
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.fetch import seeding

HERE: Final = Path(__file__).parent
RELEASE: Final = HERE / "release"
AT: Final = Path("/srv/grokctl")
"""Libtorrent's resume data name the folder, so it says nothing about anybody's machine."""
SMALL: Final = replace(
    MINIATURE,
    vocab_size=400,
    sequence_len=64,
    emb_size=16,
    widening_factor=4,
    key_size=8,
    num_q_heads=4,
    num_kv_heads=2,
    num_layers=2,
    num_experts=4,
)
"""64 kB, four pieces."""
SEED: Final = 37
"""With this one the text below is of unlike tokens, each the likeliest by far."""
PIECE: Final = 2**14
LOOPBACK: Final = ("--no-dht", "--no-lsd", "--bind", "127.0.0.1", "--port", "0")
PROMPT: Final = "The import statement"
TOKENS: Final = 6
IDS: Final = "17,300,5,120,399,64"
READY: Final = {
    "miniature-int8-2": ("--mesh", "model=2"),
    "miniature-int8-2x1-zst": ("--mesh", "expert=2,model=1", "--compress", "zstd:3"),
    "miniature-int4-2": ("--mesh", "model=2", "--precision", "int4"),
}
KILLED: Final = {
    "int8": ("--mesh", "model=2"),
    "int4-zst": ("--mesh", "model=2", "--precision", "int4", "--compress", "zstd:3"),
}
TYPED: Final = (PROMPT, "/set temperature 0.5")
FETCHED: Final = "home/releases/miniature"
_TRIES: Final = 500

Progress = IO[str]
"""What a command says on stderr: JSON lines."""


@dataclass(frozen=True)
class Maker:
    """A neutral folder to work in, and the commands so far."""

    at: Path
    said: list[str] = field(default_factory=list)

    def run(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        """Run a command to its end; its JSON object."""
        self.say(*arguments)
        done = subprocess.run(
            self._command(*arguments, "--json"),
            cwd=self.at,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, (arguments, done)
        values = json.loads(done.stdout)
        assert isinstance(values, dict)
        return values

    def stop(self, *arguments: object, by: signal.Signals, when: Callable[[Progress], bool]) -> int:
        """Start a command, and send it a signal once something holds; how it ended."""
        with subprocess.Popen(
            self._command(*arguments, "--json"),
            cwd=self.at,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            while process.poll() is None and not when(process.stderr):
                pass  # what it waits for may take milliseconds
            process.send_signal(by)
            process.communicate()
        return process.returncode

    def type(self, *arguments: object, lines: tuple[str, ...]) -> None:
        """Run a command on a terminal, and type some lines and Ctrl-D."""
        self.say(*arguments, how=f"typed: {', '.join(lines)}, Ctrl-D")
        leader, follower = os.openpty()
        with subprocess.Popen(
            self._command(*arguments),
            cwd=self.at,
            env=self._environment | {"TERM": "dumb"},
            stdin=follower,
            stdout=follower,
            stderr=follower,
        ) as process:
            os.close(follower)
            for line in (*(f"{line}\n" for line in lines), "\x04"):
                seen = b""
                while not seen.endswith(b"> "):
                    seen += os.read(leader, 1)
                os.write(leader, line.encode())
            try:
                while os.read(leader, 1024):
                    pass
            except OSError:  # it has ended
                pass
        os.close(leader)
        assert process.returncode == 0

    def copy(self, root: Path) -> None:
        """Make a copy of the release that was fetched and verified."""
        shutil.copytree(self.at / FETCHED, root)
        self.said.append(f"    cp -a {FETCHED} {root.name}")

    def say(self, *arguments: object, how: str = "") -> None:
        """Write a command of grokctl down, and what was done to it."""
        command = re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", shlex.join(map(str, arguments)))
        self.said.append(f"    grokctl {command}" + (how and f"  # {how}"))

    def _command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "grokctl", *map(str, arguments)]

    @property
    def _environment(self) -> dict[str, str]:
        own = {
            "GROKCTL_HOME": str(self.at / "home"),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return {**os.environ, **own}


def main() -> None:
    """Make the folder of the commit whose grokctl is imported."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", type=Path, default=AT, help="a new folder with a neutral name")
    at = parser.parse_args().at.absolute()
    commit = commit_of(Path(grokctl.__file__).parent)
    out = HERE / commit
    assert not out.exists(), f"{out} exists"
    if not RELEASE.exists():
        write_miniature(RELEASE, SMALL, seed=SEED)
    at.mkdir(parents=True)
    try:
        maker = Maker(at)
        made = make(maker)
        check_neutral(made)
        write_readme(maker, made, commit)
        shutil.copytree(made, out)
    finally:
        shutil.rmtree(at)


def commit_of(package: Path) -> str:
    """The commit of a checkout without changes."""
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert not commit.endswith("dirty"), f"{package} differs from its commit"
    return commit


def make(maker: Maker) -> Path:
    """Let grokctl write all of it; the folder of what is kept."""
    kept = maker.at / "kept"
    source = shutil.copytree(RELEASE, maker.at / "source")
    files = [f"ckpt-0/{path.name}" for path in sorted((source / "ckpt-0").iterdir())]
    files += ["config.json", "tokenizer.model"]
    torrent = build_metainfo(source, files, name="miniature", piece_length=PIECE)
    infohash = parse_metainfo(torrent, source="miniature").infohash
    magnet = f"magnet:?xt=urn:btih:{infohash}&dn=miniature"
    with seeding(source, torrent) as (host, port):
        fetch = (magnet, "--peer", f"{host}:{port}", *LOOPBACK)
        expected = keep_home(maker, kept, fetch)
        keep_killed_fetch(maker, kept, fetch)
    keep_stopped_verify(maker, kept)
    keep_failed_repair(maker, kept)
    for name, options in KILLED.items():
        keep_killed_reshard(maker, kept, name, options)
    expected |= {"infohash": infohash, "magnet": magnet}
    (kept / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    return kept


def keep_home(maker: Maker, kept: Path, fetch: tuple[object, ...]) -> dict[str, Any]:
    """A release that was fetched and verified, ready checkpoints of it, and the history."""
    maker.run("fetch", *fetch)
    maker.run("verify", "miniature")
    for options in READY.values():
        maker.run("reshard", "miniature", *options)
    results: dict[str, dict[str, Any]] = {}
    for name, options in READY.items():
        how = (name, *options[:2], "--compute", "float32")
        score = maker.run("score", *how, "--token-ids", IDS)
        results[name] = {"mesh": options[1], "nll": score["nll"]}
    first = next(iter(READY))
    greedy = ("-p", PROMPT, "--temperature", 0, "-n", TOKENS, "--ignore-eos")
    text = maker.run("run", first, *READY[first][:2], "--compute", "float32", *greedy)
    maker.type("run", "miniature-int8-2", "-n", 1, lines=TYPED)
    keep_private(maker.at / FETCHED, kept / FETCHED)
    shutil.copytree(maker.at / "home/ready", kept / "home/ready")
    shutil.copy(maker.at / "home/history", kept / "home/history")
    continued = {"prompt": PROMPT, "max_tokens": TOKENS, "text": text["text"]}
    return {**continued, "ids": IDS, "ready": results}


def keep_killed_fetch(maker: Maker, kept: Path, fetch: tuple[object, ...]) -> None:
    """A fetch that was killed after it had written resume data."""
    root = maker.at / "killed-fetch"
    arguments = ("fetch", *fetch, "--max-download", "1700", "--to", root.name)
    begun = root / ".grokctl/resume.begun"

    def is_begun(_: Progress) -> bool:
        time.sleep(0.01)
        return begun.exists()

    assert maker.stop(*arguments, by=signal.SIGKILL, when=is_begun) == -signal.SIGKILL
    maker.say(*arguments, how="SIGKILL")
    shutil.copytree(root, kept / root.name)


def keep_stopped_verify(maker: Maker, kept: Path) -> None:
    """A receipt of the files that were proven until Ctrl-C."""
    root = maker.at / "stopped-verify"
    maker.copy(root)
    receipt = root / ".grokctl/receipt.json"
    arguments = ("verify", root.name, "--jobs", 1)
    files = sum(path.is_file() for path in RELEASE.rglob("*"))

    def hashes(progress: Progress) -> bool:
        return '"started"' in progress.readline()

    for _ in range(_TRIES):
        receipt.unlink(missing_ok=True)
        code = maker.stop(*arguments, by=signal.SIGINT, when=hashes)
        proven = json.loads(receipt.read_text())["files"] if receipt.exists() else ()
        if code == 130 and 0 < len(proven) < files:
            maker.said.append(f"    rm {receipt.relative_to(maker.at)}")
            maker.say(*arguments, how="Ctrl-C")
            keep_private(root, kept / root.name)
            return
    raise AssertionError("it was never stopped midway")


def keep_failed_repair(maker: Maker, kept: Path) -> None:
    """A repair that nobody answered: the damaged bytes are set aside."""
    root = maker.at / "failed-repair"
    maker.copy(root)
    maker.run("verify", root.name)
    damaged = "ckpt-0/tensor00004_000"
    data = bytearray((root / damaged).read_bytes())
    data[-100] ^= 1
    (root / damaged).write_bytes(data)
    maker.said.append(f"    # one bit of {root.name}/{damaged} changes")
    maker.run("verify", root.name, "--repair", "--stall-timeout", 2, *LOOPBACK, code=11)
    keep_private(root, kept / root.name)
    for path in filter(Path.is_file, RELEASE.rglob("*")):
        name = path.relative_to(RELEASE).as_posix()
        assert (path.read_bytes() == (root / name).read_bytes()) is (name != damaged), name
    (kept / root.name / "ckpt-0").mkdir()
    shutil.copy(root / damaged, kept / root.name / damaged)


def keep_killed_reshard(maker: Maker, kept: Path, name: str, options: tuple[str, ...]) -> None:
    """A reshard that was killed midway."""
    out = maker.at / "killed-reshard" / name
    arguments = ("reshard", "miniature", *options, "--jobs", 1, "--out", out.relative_to(maker.at))

    def journalled() -> int:
        try:
            (journal,) = out.parent.glob(f".{name}.*.partial/journal")
            return journal.read_bytes().count(b"\n")
        except (ValueError, FileNotFoundError):
            return 0

    for _ in range(_TRIES):
        shutil.rmtree(out.parent, ignore_errors=True)
        code = maker.stop(*arguments, by=signal.SIGKILL, when=lambda _: journalled() >= 10)
        if code == -signal.SIGKILL and not out.exists() and 10 <= journalled() <= 30:
            maker.say(*arguments, how="SIGKILL")
            shutil.copytree(out.parent, kept / out.parent.name, dirs_exist_ok=True)
            return
    raise AssertionError(f"{name} was never killed midway")


def keep_private(root: Path, kept: Path) -> None:
    """All of a release but its own files, which `release/` has."""
    shutil.copytree(root / ".grokctl", kept / ".grokctl")
    shutil.copy(root / "release.torrent", kept / "release.torrent")


def check_neutral(kept: Path) -> None:
    """Refuse to keep what names this machine."""
    package = Path(grokctl.__file__).resolve().parents[1]
    places = {Path.home(), Path(tempfile.gettempdir()), HERE.resolve(), package}
    names = {socket.gethostname(), getpass.getuser()}
    for path in filter(Path.is_file, kept.rglob("*")):
        data = path.read_bytes()
        is_random = path.name.startswith(("tensor", "device-")) or path.suffix == ".parts"
        for place in places:
            assert f"{place}/".encode() not in data, f"{path} names {place}"
        for name in () if is_random else names:  # which has any short name somewhere
            word = rb"\b%s\b" % re.escape(name).encode()
            assert not re.search(word, data), f"{path} names {name}"


def write_readme(maker: Maker, kept: Path, commit: str) -> None:
    """Say what made it."""
    text = f"""# What grokctl {grokctl.__version__} of commit {commit} left behind

Made by `../make.py` from `../release`, below {maker.at}, with `GROKCTL_HOME={maker.at}/home`:

{chr(10).join(maker.said)}

Kept is everything but JAX's cache, and the release's own files where they are whole: those are in
`../release`. `expected.json` holds the results of `run` and `score`.
"""
    (kept / "README.md").write_text(text)


if __name__ == "__main__":
    main()
