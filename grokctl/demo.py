"""All of grokctl, for real, on a miniature: write, seed, fetch, verify, reshard, run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.receipt import VerifiedRelease
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.torrent import Magnet, build_metainfo, parse_metainfo
from grokctl.events import Observer, ignore
from grokctl.fetch import fetch, seeding
from grokctl.infer import infer
from grokctl.inference.devices import find_devices
from grokctl.inference.generation import Generation
from grokctl.inference.plan import EngineOptions
from grokctl.model.placement import mesh_for
from grokctl.model.precision import Compute
from grokctl.model.sampling import Sampling
from grokctl.paths import Home
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.transfer.sources import FetchOptions
from grokctl.verify import raise_for, verify

DEVICES: Final = (8, 4, 16)
PROMPT: Final = "The import statement combines two operations; it searches for the named module,"
_TOKENS: Final = 24
_PIECE: Final = 2**16
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that the demo did."""

    name: str
    result: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """What happened, and what was said."""

    steps: tuple[Step, ...]
    prompt: str
    texts: dict[int, str]
    """Continuation by number of devices."""

    @property
    def agrees(self) -> bool:
        """Whether every mesh said the same."""
        return len(set(self.texts.values())) == 1


def demo(folder: Path, *, observe: Observer = ignore) -> Demonstration:
    """Run the whole pipeline below a folder, with nothing simulated but the size.

    A second libtorrent session on 127.0.0.1 seeds what the first one fetches; no packet leaves
    this machine.

    Args:
        folder: An empty folder; the caller decides whether to keep it.
        observe: Receives every stage's progress.
    """
    steps: list[Step] = []

    def timed(name: str, work: Callable[[], _T], describe: Callable[[_T], str]) -> _T:
        started = time.perf_counter()
        value = work()
        steps.append(Step(name=name, result=describe(value), seconds=time.perf_counter() - started))
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
            lambda fetched: f"{fetched.downloaded / 1e6:.1f} MB from {host}:{port}",
        )
    verified = timed(
        "verify every byte",
        lambda: _verified(root, observe),
        lambda v: f"proven by infohash {v.receipt.infohash[:16]}…",
    )
    release = open_release(root)
    find_devices(max(DEVICES))
    texts = {}
    for count in DEVICES:
        ready = timed(
            f"reshard for {count} devices",
            lambda count=count: _reshard(release, verified, home, count, observe),  # type: ignore[misc]
            lambda ready: f"{ready.mesh.size} files, {ready.nbytes / 1e6:.1f} MB",
        )
        texts[count] = timed(
            f"run on {count} devices",
            lambda ready=ready: _run(ready, observe),  # type: ignore[misc]
            lambda generation: f"{generation.stats.decode_tokens_per_s:.0f} tokens/s",
        ).text
    return Demonstration(steps=tuple(steps), prompt=PROMPT, texts=texts)


def _verified(root: Path, observe: Observer) -> VerifiedRelease:
    verdict = verify(root, observe=observe)
    raise_for(verdict, root)
    assert verdict.verified is not None
    return verdict.verified


def _reshard(
    release: Release, verified: VerifiedRelease, home: Home, devices: int, observe: Observer
) -> ReadyCheckpoint:
    mesh = mesh_for(devices, release.config)
    out = home.ready / f"{release.name}-int8-{mesh.slug}"
    return reshard(
        plan_reshard(release, ReshardOptions(mesh=mesh, out=out)),
        proof=verified.receipt,
        observe=observe,
    )


def _run(ready: ReadyCheckpoint, observe: Observer) -> Generation:
    options = EngineOptions(mesh=ready.mesh, compute=Compute.FLOAT32, context=64)
    engine = infer(ready, options, tokenizer=ready.tokenizer, observe=observe)
    generation = engine.generate(
        engine.plan.encode(PROMPT),
        sampling=Sampling(temperature=0.8, seed=3),
        max_tokens=_TOKENS,
        ignore_eos=True,
    )
    for _ in generation:
        pass
    return generation


def _size(folder: Path) -> str:
    return (
        f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"
    )
