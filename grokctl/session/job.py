"""What `run`, `score` and `bench` begin with: the checkpoint meant, and how to run it."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready, read_manifest
from grokctl.checkpoint.receipt import proof_of
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import ReleaseSource, TensorSource, digest_of_small
from grokctl.cluster.process_group import Cluster
from grokctl.errors import CorruptCheckpointError, HardwareError, PlacementError, UsageError
from grokctl.events import Observer
from grokctl.infer import start
from grokctl.inference import devices as hardware
from grokctl.inference.engine import Engine
from grokctl.inference.plan import EngineOptions, RunPlan, plan
from grokctl.machine.memory import memory
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MESH_SIZES, MeshShape, read_mesh
from grokctl.model.precision import Compute, read_kv
from grokctl.parse import read_token_ids
from grokctl.paths import TOKENIZER, Home, kind_of
from grokctl.planning.plans import Hardware, accelerated
from grokctl.planning.selection import Asked, Candidate, Choice, choose
from grokctl.screen import verify as screen
from grokctl.screen.console import Console


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

    name: str
    source: TensorSource
    options: EngineOptions
    plan: RunPlan
    cluster: Cluster | None = None
    """The processes that run it, if there are several."""

    def tokens(self, text: str | None, token_ids: str | None) -> list[int]:
        """Token ids of what was given, checked."""
        ids = read_token_ids(token_ids) if token_ids is not None else self.plan.encode(text or "")
        self.plan.check(ids)
        return ids

    def start(self, observe: Observer) -> Engine:
        """Load the weights."""
        engine = start(self.source, self.options, self.plan, cluster=self.cluster, observe=observe)
        if self.cluster is not None:
            self.cluster.agree("weights", {})
        return engine


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


def open_job(
    console: Console,
    home: Home,
    wanted: Wanted,
    observe: Observer,
    *,
    cluster: Cluster | None = None,
) -> Job:
    """Open whatever checkpoint is meant, and choose what the options leave open.

    Args:
        console: Told what was chosen, unless checkpoint and mesh were given.
        home: Where checkpoints are.
        wanted: What the options say.
        observe: Receives progress.
        cluster: The processes that run it, if there are several: rank 0 chooses for all.

    Raises:
        HardwareError: Nothing that is there fits.
        PeerError: Processes mean different things.
        GrokctlError: There is no checkpoint, or what is asked of it cannot be.
    """
    if cluster is None:
        return _open_job(console, home, wanted, observe, processes=1)
    cluster.agree(
        "options",
        {
            "mesh": wanted.mesh or (wanted.devices and f"model={wanted.devices}"),
            "compute": wanted.compute,
            "kv": wanted.kv,
            "context": wanted.context,
        },
    )
    hardware.accelerators(cluster.count)  # all start JAX together: each tells what it has
    if cluster.rank:
        told = cluster.share("choice", None)
        named = wanted.checkpoint or told.pop("checkpoint")
        wanted = replace(wanted, **{**told, "checkpoint": named})
    job = _open_job(console, home, wanted, observe, processes=cluster.count)
    options = job.options
    if cluster.rank == 0:
        chosen = {
            "checkpoint": job.name,
            "devices": None,
            "mesh": str(options.mesh),
            "compute": str(options.compute),
            "kv": str(options.kv),
            "context": job.plan.context,
            "streams": options.streams,
        }
        cluster.share("choice", chosen)
    if isinstance(job.source, ReadyCheckpoint) and job.source.mesh == options.mesh:
        own = options.mesh.size // cluster.count
        devices = range(cluster.rank * own, (cluster.rank + 1) * own)
        job = replace(job, source=job.source.part(devices))
    _agree_on(cluster, job)
    return replace(job, cluster=cluster)


def _agree_on(cluster: Cluster, job: Job) -> None:
    """Find out whether all processes have opened parts of the same.

    Raises:
        PeerError: They have not.
    """
    source, sums = job.source, {}
    facts: dict[str, object] = {**source.config.to_dict()}
    facts["precision"] = str(source.storage.precision)
    if isinstance(source, ReadyCheckpoint):
        facts["source"] = source.source.name
        facts["infohash"] = source.source.infohash
        facts["cut for"] = str(source.mesh)
        sums = {record.name: record.sha256 for record in source.files}
    # what every device has tells apart what was cut from different releases of one name
    facts["norms and routers"] = digest_of_small(source)
    cluster.agree("checkpoint", facts)
    cluster.files("files", sums)


def _open_job(
    console: Console, home: Home, wanted: Wanted, observe: Observer, *, processes: int
) -> Job:
    """The same for one of some processes."""
    if wanted.compute is not None and wanted.compute not in set(Compute):
        raise UsageError(f"compute type {wanted.compute!r} is neither bfloat16 nor float32")
    kv, mesh = read_kv(wanted.kv), read_mesh(wanted.devices, wanted.mesh)
    if mesh is not None and mesh.size % processes:
        raise PlacementError(
            f"mesh {mesh} has {mesh.size} devices, which {processes} processes cannot share",
            f"--mesh {_over(processes, max(MESH_SIZES))}",
        )
    found = _find(console, home, wanted.checkpoint, observe, processes=processes)
    asked = Asked(
        mesh=mesh,
        compute=None if wanted.compute is None else Compute(wanted.compute),
        context=wanted.context,
        streams=wanted.streams,
        kv=kv,
    )
    _check(found[0], asked)
    one, choice = _settle(console, found, asked, processes=processes)
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
    return Job(name=one.root.name, source=one.source, options=options, plan=planned)


def _check(found: _Found, asked: Asked) -> None:
    """Refuse what no hardware makes possible, before it is looked at."""
    mesh = asked.mesh or found.candidate.mesh or MeshShape(1, 1)
    options = EngineOptions(mesh=mesh, context=asked.context, streams=asked.streams)
    plan(found.config, options)


def _find(
    console: Console, home: Home, name: str | None, observe: Observer, *, processes: int
) -> list[_Found]:
    """Every checkpoint that may be meant: the only one, opened, or several of the same model."""
    ready = home.ready_checkpoints() if name is None else []
    several = _of_one_model(console, ready, processes=processes) if len(ready) > 1 else []
    if len(several) > 1:
        return several
    root = several[0].root if several else home.find(name)
    if kind_of(root) == "ready":
        return [_opened(console, root)]
    release = open_release(root, observe=observe)
    console.note(screen.proof(proof_of(release), root))
    console.note("cuts the release in memory; grokctl reshard --devices N once makes this fast")
    source = ReleaseSource(release)
    return [_Found(root, Candidate(name=root.resolve().name, storage=source.storage), source)]


def _of_one_model(console: Console, roots: Sequence[Path], *, processes: int) -> list[_Found]:
    """Those that can run, if they are the same model; else nothing."""
    usable: list[ReadyCheckpoint] = []
    for root in roots:
        try:
            ready = read_manifest(root, is_checked=False)
        except (CorruptCheckpointError, OSError) as error:
            console.note(f"{root.name}: left out, because it is damaged ({error})")
            continue
        if ready.is_whole or len(ready.manifest.devices) * processes == ready.mesh.size:
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


def _settle(
    console: Console, found: list[_Found], asked: Asked, *, processes: int
) -> tuple[_Found, Choice]:
    """Choose, and open what was chosen; what turns out to be damaged is left out."""
    there = accelerated(hardware.accelerators(processes), is_whole=False)
    if processes > 1:
        if there is not None:  # the others say themselves if they have less
            there = replace(there, count=there.count * processes)
        if asked.mesh is None:
            asked, found = _shared(asked, found, there, processes)
    cpu = Hardware(
        platform="cpu",
        name="CPU",
        count=1,
        memory=memory().usable * processes,
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


def _shared(
    asked: Asked, found: list[_Found], there: Hardware | None, processes: int
) -> tuple[Asked, list[_Found]]:
    """The mesh where nobody named one, and the checkpoints that suit it.

    Experts are spread over processes, because their sums cross the network once a layer, and
    everything else stays within a process; unless all that is there was cut in another way.
    """
    usual = _over(processes, there.count if there else max(MESH_SIZES))
    own = [one.candidate.mesh for one in found if one.candidate.mesh]
    possible = [mesh for mesh in own if mesh.size % processes == 0]
    mesh = usual if usual in possible or not possible else possible[0]
    suiting = [one for one in found if one.candidate.mesh == mesh]
    return replace(asked, mesh=mesh), suiting or found


def _over(processes: int, devices: int) -> MeshShape:
    """Experts over processes, and as many of so many devices as a mesh can have."""
    size = max((size for size in MESH_SIZES if processes <= size <= devices), default=processes)
    return MeshShape(processes, size // processes)


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
