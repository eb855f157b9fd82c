"""Run every stage for real on a miniature: write, seed, fetch, verify, reshard, run."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.torrent import Magnet, build_metainfo, parse_metainfo
from grokctl.errors import GrokctlError, UsageError
from grokctl.events import Observer, ignore
from grokctl.fetch import fetch, seeding
from grokctl.infer import infer
from grokctl.inference.devices import find_devices
from grokctl.inference.generation import Generation
from grokctl.inference.plan import EngineOptions
from grokctl.integrity.verdict import Verdict
from grokctl.model.placement import mesh_for
from grokctl.model.precision import Compute
from grokctl.model.sampling import Sampling
from grokctl.os_errors import refusal
from grokctl.paths import Home, default_home
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.temporary import temporary_folder
from grokctl.text import format_bytes
from grokctl.transfer.sources import FetchOptions
from grokctl.verify import raise_for as raise_for_damage
from grokctl.verify import verify

DEVICES: Final = (8, 4, 16)
PROMPT: Final = "The import statement combines two operations; it searches for the named module,"
_TOKENS: Final = 24
_PIECE: Final = 2**16
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoStep:
    """One stage of the demo."""

    name: str
    result: str
    """In a few words."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """All stages of the demo, and the texts."""

    steps: tuple[DemoStep, ...]
    prompt: str
    texts: dict[int, str]
    """The continuation on each number of devices."""

    @property
    def agrees(self) -> bool:
        """Whether the text is the same on every mesh."""
        return len(set(self.texts.values())) == 1


def demo(folder: Path | None = None, *, observe: Observer = ignore) -> Demonstration:
    """Run the whole pipeline on a release that is small, and otherwise real.

    A second libtorrent session on 127.0.0.1 seeds what the first one fetches. No packet leaves
    this machine.

    Args:
        folder: A new folder that keeps all files; by default, a temporary one.
        observe: Receives the progress of every stage.

    Raises:
        UsageError: The folder exists, or no temporary one can be made.
    """
    if folder is None:
        with _temporary() as temporary:
            return _demo(temporary, observe)
    if folder.exists():
        raise UsageError(f"{folder}: exists, expected a new folder", "--keep a-new-folder")
    return _demo(folder, observe)


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder where the system keeps temporary files, or under home if it has no such place."""
    home = default_home()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder("grokctl-demo-", places=[home]))
        except OSError as error:
            raise refusal(error, home, hint="grokctl demo --keep DIR") from error
        yield folder.path


def raise_for(demonstration: Demonstration) -> None:
    """Turn texts that differ into an error.

    Raises:
        GrokctlError: They do, which is a bug.
    """
    if not demonstration.agrees:
        devices = ", ".join(map(str, demonstration.texts))
        raise GrokctlError(f"demo: the texts on {devices} devices differ", "please report this bug")


def _demo(folder: Path, observe: Observer) -> Demonstration:
    steps: list[DemoStep] = []

    def timed(name: str, work: Callable[[], _T], describe: Callable[[_T], str]) -> _T:
        started = time.perf_counter()
        value = work()
        seconds = time.perf_counter() - started
        steps.append(DemoStep(name=name, result=describe(value), seconds=seconds))
        return value

    home = Home(folder / "home")
    origin, root = folder / "miniature", home.releases / "miniature"
    files = timed(
        "write a miniature release",
        lambda: write_miniature(origin, observe=observe),
        lambda files: f"{len(files)} files, {_size(origin)}, {MINIATURE.num_layers} layers",
    )
    torrent = timed(
        "make a torrent of it",
        lambda: build_metainfo(origin, files, name="miniature", piece_length=_PIECE),
        lambda data: f"{parse_metainfo(data, source='torrent').num_pieces} pieces of 64 KiB",
    )
    magnet = Magnet(
        infohash=parse_metainfo(torrent, source="torrent").infohash, name="miniature", trackers=()
    )
    with seeding(origin, torrent) as (host, port):
        options = FetchOptions(peers=(f"{host}:{port}",), dht=False, lsd=False, bind=host, port=0)
        timed(
            "fetch it by magnet",
            lambda: fetch(str(magnet), root, options, observe=observe),
            lambda fetched: f"{format_bytes(fetched.downloaded)} from {host}:{port}",
        )
    verdict = timed(
        "verify every byte",
        lambda: _verified(root, observe),
        _proof_in_words,
    )
    release = open_release(root)
    find_devices(max(DEVICES))
    texts = {}
    for count in DEVICES:
        ready = timed(
            f"reshard for {count} devices",
            lambda count=count: _reshard(release, verdict, home, count, observe),  # type: ignore[misc]
            lambda ready: f"{ready.mesh.size} files, {format_bytes(ready.nbytes)}",
        )
        texts[count] = timed(
            f"run on {count} devices",
            lambda ready=ready: _run(ready, observe),  # type: ignore[misc]
            lambda generation: f"{generation.stats.decode_tokens_per_s:.0f} tokens/s",
        ).text
    return Demonstration(steps=tuple(steps), prompt=PROMPT, texts=texts)


def _verified(root: Path, observe: Observer) -> Verdict:
    verdict = verify(root, observe=observe)
    raise_for_damage(verdict, root)
    return verdict


def _proof_in_words(verdict: Verdict) -> str:
    if verdict.verified is None:  # the user keeps it where others can write
        return f"every byte is right; not proven: {verdict.doubt}"
    return f"proven by infohash {verdict.verified.receipt.infohash[:16]}…"


def _reshard(
    release: Release, verdict: Verdict, home: Home, devices: int, observe: Observer
) -> ReadyCheckpoint:
    mesh = mesh_for(devices, release.config)
    out = home.ready / f"{release.name}-int8-{mesh.slug}"
    return reshard(
        plan_reshard(release, ReshardOptions(mesh=mesh, out=out)),
        proof=None if verdict.verified is None else verdict.verified.receipt,
        observe=observe,
    )


def _run(ready: ReadyCheckpoint, observe: Observer) -> Generation:
    options = EngineOptions(mesh=ready.mesh, compute=Compute.FLOAT32, context=64)
    engine = infer(ready, options, tokenizer=ready.tokenizer, observe=observe)
    stream = engine.generate(
        engine.plan.encode(PROMPT),
        sampling=Sampling(temperature=0.8, seed=3),
        max_tokens=_TOKENS,
        ignore_eos=True,
    )
    for _ in stream:
        pass
    return stream.result


def _size(folder: Path) -> str:
    return format_bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
