"""Open what `run`, `score` and `bench` work with: a checkpoint, and how an engine runs it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from grokctl.checkpoint.finding import note_of
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.receipt import Receipt, Stamp, changed_since, stamps_of
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.tensor_source import ReleaseSource, TensorSource, digest_of_small
from grokctl.cluster.process_group import Cluster
from grokctl.errors import PlacementError, Reason, corrupt
from grokctl.events import Noted, Observer, ignore
from grokctl.infer import start
from grokctl.inference.devices import accelerators
from grokctl.inference.engine import Engine
from grokctl.inference.plan import EngineOptions, RunPlan, plan
from grokctl.inference.routing import counts_of
from grokctl.model.placement import MESH_SIZES, MeshShape
from grokctl.model.precision import Compute, KvType
from grokctl.paths import TOKENIZER, Home, quoted
from grokctl.planning.selection import Asked
from grokctl.session.candidates import CandidateCheckpoint, find_candidates
from grokctl.session.choice import mesh_over, settle
from grokctl.session.doubts import note_doubts

_ANY_MESH: Final = MeshShape(1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """Which checkpoint to run, and how; None leaves the choice to us."""

    home: Home
    """Where checkpoints are kept."""
    checkpoint: str | None = None
    """A name under home, or a path."""
    mesh: MeshShape | None = None
    compute: Compute | None = None
    kv: KvType = KvType.COMPUTE
    context: int | None = None
    """Tokens; by default as many as the model has, or as fit."""
    sequences: int = 1
    """Decoded at a time."""
    threads: int | None = None
    """That compute on the CPU."""
    max_memory: int | None = None
    """Most bytes of main memory for weights, cache and workspace on a CPU."""
    may_be_fewer: bool = False
    """Whether fewer will do, where so many would cost context."""


@dataclass(frozen=True)
class EngineJob:
    """An opened checkpoint and a checked plan; no weights are loaded yet."""

    name: str
    source: TensorSource
    plan: RunPlan
    stamps: Mapping[Path, Stamp | None]
    """Of its files when it was opened."""
    proof: Receipt | None = None
    """Of a release, if it is proven."""
    doubts: tuple[str, ...] = ()
    """About the files on this host; a line each."""
    cluster: Cluster | None = None
    """The processes that run it, if there are several."""

    @property
    def options(self) -> EngineOptions:
        """Mesh, types and slots."""
        return self.plan.options

    @property
    def tokenizer(self) -> Path | None:
        """The file of the tokenizer, if there is one."""
        path = _checkpoint_of(self.source).root / TOKENIZER
        return None if self.plan.tokenizer is None else path

    def tokens(self, content: str | tuple[int, ...]) -> tuple[int, ...]:
        """The token ids of a text, or the same ids.

        Raises:
            UsageError: There are none, more than the context, or impossible ones; or the
                checkpoint has no tokenizer for a text.
        """
        ids = tuple(self.plan.encode(content)) if isinstance(content, str) else content
        self.plan.check(ids)
        return ids

    def start(self, observe: Observer) -> Engine:
        """Load the weights.

        Raises:
            CorruptCheckpointError: The checkpoint changed meanwhile: what was loaded may be
                other bytes than those that were proven.
        """
        engine = start(self.source, self.plan, cluster=self.cluster, observe=observe)
        self._check_unchanged()
        if self.cluster is not None:
            self.cluster.agree("weights", {})
        return engine

    def _check_unchanged(self) -> None:
        checkpoint = _checkpoint_of(self.source)
        now = stamps_of(checkpoint)
        changed = [path.name for path, stamp in self.stamps.items() if now.get(path) != stamp]
        if self.proof is not None and isinstance(checkpoint, Release):
            changed += changed_since(self.proof, checkpoint)
        if changed:
            command = f"grokctl verify {quoted(checkpoint.root)}"
            raise corrupt(changed[0], Reason.ALTERED, "changed while it was loaded", command)


def _checkpoint_of(source: TensorSource) -> Release | ReadyCheckpoint:
    """The checkpoint whose files a source reads."""
    if isinstance(source, ReleaseSource):
        return source.release
    assert isinstance(source, ReadyCheckpoint)
    return source


def open_job(
    request: JobRequest, *, cluster: Cluster | None = None, observe: Observer = ignore
) -> EngineJob:
    """Open the checkpoint of a request, and choose what the request leaves open.

    Args:
        request: What the user has decided.
        cluster: The processes that run it, if there are several: rank 0 chooses for all.
        observe: Receives progress, and notes about the choice.

    Raises:
        HardwareError: No checkpoint fits.
        PeerError: Processes have different requests or checkpoints.
        GrokctlError: There is no checkpoint, or it cannot run like that.
    """
    if cluster is None:
        return _open_job(request, processes=1, observe=observe)
    cluster.agree(
        "options",
        {
            "mesh": request.mesh and str(request.mesh),
            "compute": request.compute,
            "kv": request.kv,
            "context": request.context,
        },
    )
    machines = cluster.machines()
    accelerators(cluster.count)  # starts JAX, which waits until all processes have
    if cluster.rank:
        request = _adopt(request, cluster.share(None))
    job = _open_job(request, processes=cluster.count, machines=machines, observe=observe)
    if cluster.rank == 0:
        cluster.share(_choice_of(job))
    mesh = job.options.mesh
    if isinstance(job.source, ReadyCheckpoint) and job.source.mesh == mesh:
        own = mesh.size // cluster.count
        devices = range(cluster.rank * own, (cluster.rank + 1) * own)
        job = replace(job, source=job.source.part(devices))
    _agree_on(cluster, job.source)
    note_doubts(cluster, job.doubts, observe)
    return replace(job, cluster=cluster)


def _choice_of(job: EngineJob) -> dict[str, object]:
    """What rank 0 has chosen, for the others."""
    options = job.options
    return {
        "checkpoint": job.name,
        "mesh": str(options.mesh),
        "compute": options.compute,
        "kv": options.kv,
        "context": job.plan.context,
        "sequences": options.slots,
    }


def _adopt(request: JobRequest, choice: Mapping[str, Any]) -> JobRequest:
    """The choice of rank 0; the checkpoint may have another name on this host."""
    return replace(
        request,
        checkpoint=request.checkpoint or choice["checkpoint"],
        mesh=MeshShape.parse(choice["mesh"]),
        compute=Compute(choice["compute"]),
        kv=KvType(choice["kv"]),
        context=choice["context"],
        sequences=choice["sequences"],
        may_be_fewer=False,
    )


def _agree_on(cluster: Cluster, source: TensorSource) -> None:
    """Check that all processes have opened parts of one checkpoint.

    Raises:
        PeerError: They have not.
    """
    sums = {}
    facts: dict[str, object] = {**source.config.to_dict()}
    facts["precision"] = str(source.storage.precision)
    if isinstance(source, ReadyCheckpoint):
        facts["source"] = source.source.name
        facts["infohash"] = source.source.infohash
        facts["made for"] = str(source.mesh)
        sums = {record.name: record.sha256 for record in source.files}
    # every device has these: they differ between releases of one name
    facts["norms and routers"] = digest_of_small(source)
    cluster.agree("checkpoint", facts)
    cluster.files("files", sums)


def _open_job(
    request: JobRequest, *, processes: int, machines: int = 1, observe: Observer
) -> EngineJob:
    """The same for this process, one of several or alone."""
    home, mesh = request.home, request.mesh
    if mesh is not None and mesh.size % processes:
        raise PlacementError(
            f"mesh {mesh}: {mesh.size} devices, which {processes} processes cannot share",
            f"--mesh {mesh_over(processes, max(MESH_SIZES))}",
        )
    checkpoints = find_candidates(home, request.checkpoint, processes=processes, observe=observe)
    asked = Asked(
        mesh=mesh,
        compute=request.compute,
        context=request.context,
        sequences=request.sequences,
        may_be_fewer=request.may_be_fewer,
        kv=request.kv,
    )
    _check_any_hardware(checkpoints[0], asked)
    chosen, choice = settle(
        checkpoints,
        asked,
        processes=processes,
        machines=machines,
        max_memory=request.max_memory,
        observe=observe,
    )
    reason = choice.reason if request.checkpoint is None or mesh is None else ""
    others = note_of(home, chosen.root) if request.checkpoint is None else None
    if said := "; ".join(filter(None, (reason, chosen.note, others))):
        observe(Noted(message=said))
    assert chosen.source is not None
    options = EngineOptions(
        mesh=choice.plan.mesh,
        compute=choice.plan.compute,
        context=choice.plan.context,
        compilation_cache=home.xla_cache,
        native_cache=home.native_cache,
        threads=request.threads,
        max_memory=request.max_memory,
        counts=None if choice.plan.residence is None else counts_of(home.routing, chosen.source),
        slots=choice.plan.slots,
        kv=request.kv,
    )
    planned = _plan(chosen, options)
    if choice.is_cut_again:
        other = f"resharded for {chosen.candidate.mesh}, runs on {options.mesh}: slower to load"
        fast = f"grokctl reshard --mesh {options.mesh} makes it fast"
        observe(Noted(message=f"{other} ({fast})"))
    return EngineJob(
        name=chosen.root.name,
        source=chosen.source,
        plan=planned,
        stamps=chosen.stamps,
        proof=chosen.proof,
        doubts=chosen.doubts,
    )


def _plan(chosen: CandidateCheckpoint, options: EngineOptions) -> RunPlan:
    tokenizer = chosen.root / TOKENIZER
    return plan(chosen.config, options, tokenizer=tokenizer if tokenizer.is_file() else None)


def _check_any_hardware(checkpoint: CandidateCheckpoint, asked: Asked) -> None:
    """Refuse what no hardware can run, before a look at this machine's."""
    mesh = asked.mesh or checkpoint.candidate.mesh or _ANY_MESH
    plan(checkpoint.config, EngineOptions(mesh=mesh, context=asked.context, slots=asked.sequences))
