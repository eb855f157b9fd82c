"""Fixtures that run commands, in this process or in their own, on small real checkpoints."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patching import patched
from places import TWO_LAYERS
from typer.testing import CliRunner

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.cli.app import app
from grokctl.fetch import seeding

LOOPBACK = ("--no-dht", "--no-lsd", "--bind", "127.0.0.1", "--port", "0")
WORDS = replace(MINIATURE, sequence_len=64, num_layers=2, vocab_size=512, emb_size=64, key_size=8)
"""Two layers with a tokenizer; every mesh of 1 to 16 devices holds it."""
LARGE = replace(WORDS, emb_size=512, key_size=32, num_layers=6, vocab_size=1024, num_q_heads=16)
"""200 MB: a reshard takes long enough to be interrupted."""
PIECE = 16384
_CHATTER = (
    "CI",
    "FORCE_COLOR",
    "NO_COLOR",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "COLUMNS",
    "LINES",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The exit code of a command, and its output."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The only JSON object on stdout."""
        (line,) = self.stdout.splitlines()
        values = json.loads(line)
        assert isinstance(values, dict)
        return values

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of stderr, each a JSON object."""
        return [json.loads(line) for line in self.stderr.splitlines()]

    @property
    def error(self) -> str:
        """The sentence of the only error."""
        assert "Traceback" not in self.stderr, self.stderr
        found = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(found) == 1, self.stderr
        return found[0].removeprefix("error: ")

    @property
    def hint(self) -> str | None:
        """The line of advice below the error."""
        lines = self.stderr.splitlines()
        found = [line for line in lines if line.startswith("hint: ")]
        assert len(found) <= 1, self.stderr
        assert not found or lines[-1] == found[0]
        return found[0].removeprefix("hint: ") if found else None


Grokctl = Callable[..., Outcome]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a separate process: sixteen devices, and no settings of a terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in _CHATTER}
    return {**kept, "JAX_NUM_CPU_DEVICES": "16", "JAX_PLATFORMS": "cpu", **changes}


def call(*arguments: object, stdin: str | bytes | None = None) -> Outcome:
    """Run a command in this process."""
    result = CliRunner().invoke(app, list(map(str, arguments)), input=stdin, catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def start(
    *arguments: object, code: str | None = None, shell: str = "", **options: Any
) -> "subprocess.Popen[str]":
    """Start a command as a separate process.

    `code` runs before the command and may call `patch`; `shell` redirects what Popen cannot.
    """
    entry = ["-m", "grokctl"] if code is None else ["-c", patched(code)]
    command = [sys.executable, *entry, *map(str, arguments)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    settings = {
        "env": environment(),
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        **options,
    }
    return subprocess.Popen(command, **settings)


def execute(*arguments: object, timeout: float = 120, **options: Any) -> Outcome:
    """Run a command as a separate process, to its end."""
    with start(*arguments, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Outcome(process.returncode, stdout or "", stderr or "")


def await_that(condition: Callable[[], bool], *, within: float = 60, every: float = 0.002) -> None:
    """Wait for a condition in another process."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(every)


@pytest.fixture(scope="session")
def grokctl() -> Grokctl:
    """A command in this process."""
    return call


@pytest.fixture(scope="session")
def process() -> types.SimpleNamespace:
    """Commands as separate processes: `run`, `start`, `await_that`, and their `environment`."""
    return types.SimpleNamespace(
        run=execute, start=start, environment=environment, await_that=await_that
    )


@pytest.fixture(autouse=True)
def no_surroundings(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Hide the tester's terminal and home from the commands."""
    for name in _CHATTER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path_factory.getbasetemp() / "nobody's home"))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, xla_cache: Path) -> Path:
    """A home with the golden release and one with a tokenizer; tests only add to it."""
    root = tmp_path_factory.mktemp("cli") / "home"
    (root / "cache").mkdir(parents=True)
    (root / "cache" / "xla").symlink_to(xla_cache)
    shutil.copytree(TWO_LAYERS, root / "releases" / "two-layers")
    write_miniature(root / "releases" / "words", WORDS)
    return root


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Results of the reference code on the golden release."""
    with np.load(TWO_LAYERS / "reference.npz") as values:
        return {name: values[name] for name in values}


@pytest.fixture(scope="session")
def ids(golden: dict[str, Any]) -> str:
    """The golden prompt as typed token ids."""
    return ",".join(map(str, golden["tokens"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """A release seeded on the loopback interface."""

    root: Path
    peer: str
    magnet: str
    torrent: Path
    files: tuple[str, ...]
    nbytes: int


@pytest.fixture(scope="session")
def seeded(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    """The release with the tokenizer, seeded."""
    root = home / "releases" / "words"
    files = [
        path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()
    ]
    data = build_metainfo(root, files, name="words", piece_length=PIECE)
    metainfo = parse_metainfo(data, source="words")
    torrent = tmp_path_factory.mktemp("torrent") / "words.torrent"
    torrent.write_bytes(data)
    with seeding(root, data) as (host, port):
        yield Seeded(
            root=root,
            peer=f"{host}:{port}",
            magnet=f"magnet:?xt=urn:btih:{metainfo.infohash}&dn=words",
            torrent=torrent,
            files=tuple(files),
            nbytes=sum(file.length for file in metainfo.files),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A fetched and verified release, and the outcomes of both commands."""

    root: Path
    fetched: Outcome
    verified: Outcome


@pytest.fixture(scope="session")
def download(seeded: Seeded, tmp_path_factory: pytest.TempPathFactory) -> Download:
    """A release fetched and verified by the commands; read-only."""
    root = tmp_path_factory.mktemp("download") / "words"
    fetched = call("fetch", seeded.magnet, "--to", root, "--peer", seeded.peer, *LOOPBACK, "--json")
    assert fetched.exit_code == 0, fetched
    verified = call("verify", root, "--json")
    assert verified.exit_code == 0, verified
    return Download(root=root, fetched=fetched, verified=verified)


@pytest.fixture
def verified(download: Download, tmp_path: Path) -> Path:
    """A verified release to damage."""
    root = shutil.copytree(download.root, tmp_path / "words")
    assert call("verify", root).exit_code == 0
    return root


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A ready checkpoint, and the outcome of its reshard."""

    root: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def cut(home: Path) -> Callable[[str, int], Cut]:
    """Reshard a release under home for a number of devices, once."""
    made: dict[tuple[str, int], Cut] = {}

    def make(release: str, devices: int) -> Cut:
        if (release, devices) not in made:
            outcome = call("reshard", release, "--devices", devices, "--home", home, "--json")
            assert outcome.exit_code == 0, outcome
            made[release, devices] = Cut(root=Path(outcome.result["ready"]), outcome=outcome)
        return made[release, devices]

    return make


@pytest.fixture
def ready(cut: Callable[[str, int], Cut], tmp_path: Path) -> Path:
    """A ready checkpoint of two layers on four devices, to damage."""
    return shutil.copytree(cut("two-layers", 4).root, tmp_path / "ready")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A release of 200 MB."""
    root = tmp_path_factory.mktemp("large") / "large"
    write_miniature(root, LARGE, tokenizer=False)
    yield root
    shutil.rmtree(root)


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte."""
    with _mounted(tmp_path / "disk", "size=512k") as folder:
        yield folder


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A read-only disk."""
    with _mounted(tmp_path / "disk", "size=64k,ro") as folder:
        yield folder


class Attack:
    """Pickles that create a file, the canary, when they are loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    @property
    def touch(self) -> object:
        """Pickles as a call of os.system."""
        return _Call(os.system, f"touch '{self.canary}'")

    def of(self, kind: str) -> bytes:
        """The bytes of one kind of attack, seen to work."""
        data: bytes = getattr(self, f"_{kind}")()
        pickle.loads(data)
        assert self.canary.exists(), f"{kind} attacks nobody"
        self.canary.unlink()
        return data

    def _system(self) -> bytes:
        return pickle.dumps(self.touch, 4)

    def _eval(self) -> bytes:
        return pickle.dumps(_Call(eval, f"open({str(self.canary)!r}, 'w').close()"), 4)

    def _runstring(self) -> bytes:
        from numpy.testing._private.utils import runstring  # noqa: PLC0415

        return pickle.dumps(_Call(runstring, f"open({str(self.canary)!r}, 'w').close()", {}), 4)

    def _nested(self) -> bytes:
        array = np.empty(2, object)
        array[1] = [self.touch]
        return pickle.dumps(array, 4)

    def _memo(self) -> bytes:
        def text(value: str) -> bytes:
            return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode() + pickle.MEMOIZE

        def recall(place: int) -> bytes:
            return pickle.BINGET + bytes([place])

        names = text("numpy") + text("ndarray") + text(os.system.__module__) + text("system")
        away = pickle.POP * 4
        command = text(f"touch '{self.canary}'")
        function = recall(2) + recall(3) + pickle.STACK_GLOBAL
        body = names + away + function + command + pickle.TUPLE1 + pickle.REDUCE
        return pickle.PROTO + b"\x04" + body + pickle.STOP

    def _extra(self) -> bytes:
        main = sys.modules["__main__"]
        kind = type("QuantizedWeight8bit", (), {"__module__": "__main__"})
        main.QuantizedWeight8bit = kind
        weight = kind()
        weight.weight = np.zeros((64, 8), np.int8)
        weight.scales = np.zeros((1, 8), np.float32)
        weight.extra = self.touch
        return pickle.dumps(weight, 4)


class _Call:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attack:
    """Unsafe pickles, and the canary that shows whether one was loaded."""
    monkeypatch.setattr(sys.modules["__main__"], "QuantizedWeight8bit", None, raising=False)
    return Attack(tmp_path / "canary")


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="session")
def flip_bit() -> Callable[[Path], None]:
    """Damage one bit of a file."""
    return flip


@pytest.fixture(scope="session")
def loopback() -> tuple[str, ...]:
    """The options that keep a fetch on the loopback interface."""
    return LOOPBACK


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def stop_signal(request: pytest.FixtureRequest) -> signal.Signals:
    """Ctrl-C, and the signal of a batch system."""
    return request.param
