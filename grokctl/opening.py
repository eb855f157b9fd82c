"""What `run`, `score` and `bench` begin with: the checkpoint meant, and how to run it."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from grokctl import hardware, render
from grokctl.arguments import read_mesh, read_token_ids
from grokctl.checkpoint.logical import ReleaseSource, TensorSource
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready, read_manifest
from grokctl.checkpoint.receipt import proof_of
from grokctl.checkpoint.release import open_release
from grokctl.choosing import Asked, Candidate, Choice, choose
from grokctl.console import Console
from grokctl.errors import CorruptCheckpointError, HardwareError, UsageError
from grokctl.events import Observer
from grokctl.infer import Engine, EngineOptions, RunPlan, plan, start
from grokctl.machine.memory import memory
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType
from grokctl.paths import TOKENIZER, Home, kind_of
from grokctl.plans import Hardware, accelerated


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options say about the checkpoint, and about how to run it; None is left to us."""

    checkpoint: str | None
    devices: int | None
    mesh: str | None
    _: KW_ONLY
    compute: str | None
    kv: str
    context: int | None
    streams: int = 1
    """Sequences that run at a time."""


@dataclass(frozen=True)
class Job:
    """A checkpoint, how to run it, and what is known before its weights are loaded."""

    source: TensorSource
    options: EngineOptions
    plan: RunPlan

    def tokens(self, text: str | None, token_ids: str | None) -> list[int]:
        """Token ids of what was given, checked."""
        ids = read_token_ids(token_ids) if token_ids is not None else self.plan.encode(text or "")
        self.plan.check(ids)
        return ids

    def start(self, observe: Observer) -> Engine:
        """Load the weights."""
        return start(self.source, self.options, self.plan, observe=observe)


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint that may be meant."""

    root: Path
    candidate: Candidate
    source: TensorSource | None
    """None as long as only its manifest was read, and that not checked."""

    @property
    def config(self) -> GrokConfig:
        return self.candidate.storage.config


def open_job(console: Console, home: Home, wanted: Wanted, observe: Observer) -> Job:
    """Open whatever checkpoint is meant, and choose what the options leave open.

    Args:
        console: Told what was chosen, unless checkpoint and mesh were given.
        home: Where checkpoints are.
        wanted: What the options say.
        observe: Receives progress.

    Raises:
        HardwareError: Nothing that is there fits.
        GrokctlError: There is no checkpoint, or what is asked of it cannot be.
    """
    if wanted.compute is not None and wanted.compute not in set(Compute):
        raise UsageError(f"compute type {wanted.compute!r} is neither bfloat16 nor float32")
    if wanted.kv not in set(KvType):
        raise UsageError(f"type of the cache {wanted.kv!r} is neither compute nor int8")
    mesh = read_mesh(wanted.devices, wanted.mesh)
    found = _find(console, home, wanted.checkpoint, observe)
    asked = Asked(
        mesh=mesh,
        compute=None if wanted.compute is None else Compute(wanted.compute),
        context=wanted.context,
        streams=wanted.streams,
        kv=KvType(wanted.kv),
    )
    _check(found[0], asked)
    one, choice = _settle(console, found, asked)
    if wanted.checkpoint is None or mesh is None:
        console.note(choice.reason)
    assert one.source is not None
    options = EngineOptions(
        mesh=choice.plan.mesh,
        compute=choice.plan.compute,
        context=choice.plan.context,
        compilation_cache=home.xla_cache,
        streams=wanted.streams,
        kv=asked.kv,
    )
    tokenizer = one.root / TOKENIZER if (one.root / TOKENIZER).is_file() else None
    planned = plan(one.config, options, tokenizer=tokenizer)
    if choice.is_cut_again:
        console.note(
            f"cut for {one.candidate.mesh}, runs on {options.mesh}: slower to load "
            f"(grokctl reshard --mesh {options.mesh} makes it fast)"
        )
    return Job(source=one.source, options=options, plan=planned)


def _check(found: _Found, asked: Asked) -> None:
    """Refuse what no hardware makes possible, before it is looked at."""
    mesh = asked.mesh or found.candidate.mesh or MeshShape(1, 1)
    options = EngineOptions(mesh=mesh, context=asked.context, streams=asked.streams)
    plan(found.config, options)


def _find(console: Console, home: Home, name: str | None, observe: Observer) -> list[_Found]:
    """Every checkpoint that may be meant: the only one, opened, or several of the same model."""
    ready = home.ready_checkpoints() if name is None else []
    several = _of_one_model(console, ready) if len(ready) > 1 else []
    if len(several) > 1:
        return several
    root = several[0].root if several else home.find(name)
    if kind_of(root) == "ready":
        return [_opened(console, root)]
    release = open_release(root, observe=observe)
    console.note(render.proof(proof_of(release), root))
    console.note("cuts the release in memory; grokctl reshard --devices N once makes this fast")
    source = ReleaseSource(release)
    return [_Found(root, Candidate(name=root.resolve().name, storage=source.storage), source)]


def _of_one_model(console: Console, roots: Sequence[Path]) -> list[_Found]:
    """Those that can run, if they are the same model; else nothing."""
    usable: list[ReadyCheckpoint] = []
    for root in roots:
        try:
            ready = read_manifest(root, is_checked=False)
        except (CorruptCheckpointError, OSError) as error:
            console.note(f"{root.name}: left out, because it is damaged ({error})")
            continue
        if ready.is_whole:
            usable.append(ready)
        else:
            console.note(f"{ready.name}: left out, because it is the part of one host")
    if len({(ready.source.name, ready.config) for ready in usable}) != 1:
        return []
    return [_Found(ready.root, _candidate(ready), None) for ready in usable]


def _candidate(ready: ReadyCheckpoint) -> Candidate:
    return Candidate(
        name=ready.name,
        storage=ready.storage,
        mesh=ready.mesh,
        is_mapped=ready.manifest.compression is None,
    )


def _opened(console: Console, root: Path) -> _Found:
    ready = open_ready(root)
    if not ready.source.proven:
        console.note(f"{ready.name}: was cut from a release whose content was not proven")
    return _Found(root, _candidate(ready), ready)


def _settle(console: Console, found: list[_Found], asked: Asked) -> tuple[_Found, Choice]:
    """Choose, and open what was chosen; what turns out to be damaged is left out."""
    there = accelerated(hardware.accelerators(), is_whole=False)
    cpu = Hardware(
        platform="cpu",
        name="CPU",
        count=1,
        memory=memory().usable,
        bandwidth=None,
        has_fast_bfloat16=hardware.has_fast_bfloat16(),
    )
    while True:
        choice = _choose(there, cpu, [one.candidate for one in found], asked)
        one = next(one for one in found if one.candidate is choice.candidate)
        if one.source is not None:
            return one, choice
        try:
            return replace(_opened(console, one.root), candidate=one.candidate), choice
        except CorruptCheckpointError as error:
            if len(found) == 1:
                raise
            console.note(f"{one.candidate.name}: left out, because it is damaged ({error})")
            found = [other for other in found if other is not one]


def _choose(
    there: Hardware | None, cpu: Hardware, candidates: Sequence[Candidate], asked: Asked
) -> Choice:
    """Among accelerators and the CPU: the CPU has as many devices as anybody wants."""
    if there is None or (asked.mesh is not None and asked.mesh.size > there.count):
        return choose(cpu, candidates, asked)
    try:
        return choose(there, candidates, asked, cpu=cpu)
    except HardwareError as error:
        larger = [one for one in candidates if one.mesh and one.mesh.size > there.count]
        if asked.mesh is not None or not larger:
            raise
        try:
            return choose(cpu, larger, asked)
        except HardwareError:
            raise error from None
