"""Run every stage for real on a trained miniature: seed, fetch, verify, reshard, run, score."""

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.torrent import Magnet
from grokctl.checkpoint.trained import UNSEEN, copy_trained, read_torrent
from grokctl.errors import GrokctlError, UsageError
from grokctl.events import Observer, ignore
from grokctl.fetch import fetch, seeding
from grokctl.infer import infer
from grokctl.inference.devices import find_devices
from grokctl.inference.engine import Engine
from grokctl.inference.generation import Generation
from grokctl.inference.plan import EngineOptions
from grokctl.integrity.verdict import Verdict
from grokctl.model.placement import mesh_for
from grokctl.model.precision import Compute, Precision
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
PROMPT: Final = "This function returns the number of"
_TOKENS: Final = 48
_SCORED_ON: Final = 4
"""Devices of the two checkpoints whose precisions are compared."""
_SCORED: Final = 192
"""Tokens of the text that they are compared on."""
_CONTEXT: Final = 256
_NBYTES: Final = 100_000_000
"""More than all files of the demo."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoStep:
    """One stage of the demo."""

    name: str
    result: str
    """In a few words."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionResult:
    """What a precision costs and what it loses."""

    precision: str
    nbytes: int
    """Of the files of all devices, and the tokenizer."""
    perplexity: float
    """Of a text that training did not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """All stages of the demo, and the texts."""

    steps: tuple[DemoStep, ...]
    prompt: str
    texts: dict[int, str]
    """The continuation on each number of devices."""
    precisions: tuple[PrecisionResult, ...]
    """int8, and int4."""

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
        DiskFullError: No place for temporary files has space for it.
    """
    if folder is None:
        with _temporary() as temporary:
            return _demo(temporary, observe)
    if folder.exists():
        raise UsageError(f"{folder}: exists, expected a new folder", "--keep a-new-folder")
    return _demo(folder, observe)


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder where the system keeps temporary files, or under home if none has the space."""
    home = default_home()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(
                temporary_folder("grokctl-demo-", places=[home], suits=_has_space)
            )
        except OSError as error:
            raise refusal(error, home, hint="grokctl demo --keep DIR") from error
        yield folder.path


def _has_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NBYTES:
        reason = f"expected {format_bytes(_NBYTES)} free, found {format_bytes(free)}"
        raise OSError(errno.ENOSPC, reason, str(folder.parent))


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
    timed(
        "copy the miniature that ships",
        lambda: copy_trained(origin),
        lambda files: f"{len(files)} files, {_size(origin)}, trained on text of Python",
    )
    torrent, metainfo = timed(
        "read its torrent",
        read_torrent,
        lambda read: f"{read[1].num_pieces} pieces of {format_bytes(read[1].piece_length)}",
    )
    magnet = Magnet(infohash=metainfo.infohash, name="miniature", trackers=())
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
    texts, precisions = {}, []

    def resharded(count: int, precision: Precision) -> ReadyCheckpoint:
        return timed(
            f"reshard for {count} devices" + (f" at {precision}" if precision != "int8" else ""),
            lambda: _reshard(release, verdict, home, (count, precision), observe),
            lambda ready: f"{ready.mesh.size} files, {format_bytes(ready.nbytes)}",
        )

    def scored(ready: ReadyCheckpoint, engine: Engine) -> None:
        precision = str(ready.precision)
        perplexity = timed(
            f"score unseen text at {precision}",
            lambda: _perplexity(engine),
            lambda value: f"perplexity {value:.2f}",
        )
        precisions.append(
            PrecisionResult(precision=precision, nbytes=ready.nbytes, perplexity=perplexity)
        )

    for count in DEVICES:
        ready = resharded(count, Precision.INT8)
        engine, generation = timed(
            f"run on {count} devices",
            lambda ready=ready: _run(ready, observe),  # type: ignore[misc]
            lambda result: f"{result[1].stats.decode_tokens_per_s:.0f} tokens/s",
        )
        texts[count] = generation.text
        if count == _SCORED_ON:
            scored(ready, engine)
    ready = resharded(_SCORED_ON, Precision.INT4)
    scored(ready, _start(ready, observe))
    return Demonstration(
        steps=tuple(steps), prompt=PROMPT, texts=texts, precisions=tuple(precisions)
    )


def _verified(root: Path, observe: Observer) -> Verdict:
    verdict = verify(root, observe=observe)
    raise_for_damage(verdict, root)
    return verdict


def _proof_in_words(verdict: Verdict) -> str:
    if verdict.verified is None:  # the user keeps it where others can write
        return f"every byte is right; not proven: {verdict.doubt}"
    return f"proven by infohash {verdict.verified.receipt.infohash[:16]}…"


def _reshard(
    release: Release,
    verdict: Verdict,
    home: Home,
    form: tuple[int, Precision],
    observe: Observer,
) -> ReadyCheckpoint:
    devices, precision = form
    mesh = mesh_for(devices, release.config)
    out = home.ready / f"{release.name}-{precision}-{mesh.slug}"
    return reshard(
        plan_reshard(release, ReshardOptions(mesh=mesh, out=out, precision=precision)),
        proof=None if verdict.verified is None else verdict.verified.receipt,
        observe=observe,
    )


def _start(ready: ReadyCheckpoint, observe: Observer) -> Engine:
    options = EngineOptions(mesh=ready.mesh, compute=Compute.FLOAT32, context=_CONTEXT)
    return infer(ready, options, tokenizer=ready.tokenizer, observe=observe)


def _run(ready: ReadyCheckpoint, observe: Observer) -> tuple[Engine, Generation]:
    engine = _start(ready, observe)
    stream = engine.generate(
        engine.plan.encode(PROMPT),
        sampling=Sampling(temperature=0.0),
        max_tokens=_TOKENS,
        ignore_eos=True,
    )
    for _ in stream:
        pass
    return engine, stream.result


def _perplexity(engine: Engine) -> float:
    perplexity = engine.score(engine.plan.encode(UNSEEN)[:_SCORED]).perplexity
    assert perplexity is not None  # there is more than one token
    return perplexity


def _size(folder: Path) -> str:
    return format_bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
