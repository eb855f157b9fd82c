"""Find the checkpoints that a run may use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grokctl.checkpoint.finding import find_checkpoint, skipped
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready, read_manifest
from grokctl.checkpoint.receipt import Receipt, Stamp, proof_of, stamps_of
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import ReleaseSource, TensorSource
from grokctl.errors import CorruptCheckpointError
from grokctl.events import Noted, Observer
from grokctl.integrity.provenance import describe_proof
from grokctl.model.config import GrokConfig
from grokctl.paths import Home, kind_of
from grokctl.planning.selection import Candidate
from grokctl.session.doubts import doubts_of_ready, doubts_of_release


@dataclass(frozen=True, slots=True)
class CandidateCheckpoint:
    """A checkpoint on disk, as a candidate for a run."""

    root: Path
    candidate: Candidate
    source: TensorSource | None
    """None while only its manifest was read, and not checked."""
    note: str = ""
    """Whether it is proven, and how it loads faster; nothing for one that was resharded."""
    proof: Receipt | None = None
    """Of a release, if it is proven."""
    stamps: Mapping[Path, Stamp | None] = field(default_factory=dict)
    """Of its files, from before it was judged."""
    doubts: tuple[str, ...] = ()
    """Why it is not proven, or what the last verification found; a line each."""

    @property
    def config(self) -> GrokConfig:
        """Of the model."""
        return self.candidate.storage.config


def find_candidates(
    home: Home, name: str | None, *, processes: int, observe: Observer
) -> list[CandidateCheckpoint]:
    """The named checkpoint, the only one, or several of one model.

    Args:
        home: Where checkpoints are kept.
        name: Under home, or a path; None leaves the choice to us.
        processes: That run it together, each with the device files of its own host.
        observe: Receives progress, and notes about what was skipped.

    Returns:
        One, opened; or several, of which only the manifests were read.

    Raises:
        GrokctlError: There is none, or it cannot be opened.
    """
    ready = home.ready_checkpoints() if name is None else []
    several = _of_one_model(ready, processes=processes, observe=observe) if len(ready) > 1 else []
    if len(several) > 1:
        return several
    root = several[0].root if several else _root_of(home, name, observe)
    if kind_of(root) == "ready":
        return [open_candidate(root, observe=observe)]
    release = open_release(root, observe=observe)
    slow = "reshards the release in memory; to load it fast: grokctl reshard --devices N"
    stamps = stamps_of(release)
    proof = proof_of(release)
    note = f"{describe_proof(proof, root)}; {slow}"
    source = ReleaseSource(release)
    candidate = Candidate(name=root.resolve().name, storage=source.storage)
    doubts = doubts_of_release(release, proof)
    return [CandidateCheckpoint(root, candidate, source, note, proof.best, stamps, doubts)]


def _root_of(home: Home, name: str | None, observe: Observer) -> Path:
    found = find_checkpoint(home, name)
    if name is not None and found.note is not None:
        observe(Noted(message=found.note))
    return found.root


def _of_one_model(
    roots: Sequence[Path], *, processes: int, observe: Observer
) -> list[CandidateCheckpoint]:
    """Those that can run, if all are the same model; else none."""
    usable: list[ReadyCheckpoint] = []
    for root in roots:
        try:
            ready = read_manifest(root, is_checked=False)
        except (CorruptCheckpointError, OSError) as error:
            observe(damaged(root.name, error))
            continue
        if ready.is_whole or len(ready.manifest.devices) * processes == ready.mesh.size:
            usable.append(ready)
        else:
            observe(
                Noted(message=f"{ready.name}: skipped, because it holds the files of one host only")
            )
    if len({(ready.source.name, ready.config) for ready in usable}) != 1:
        return []
    return [CandidateCheckpoint(ready.root, _candidate(ready), None) for ready in usable]


def open_candidate(root: Path, *, observe: Observer) -> CandidateCheckpoint:
    """Open a ready checkpoint.

    Raises:
        CorruptCheckpointError: It is damaged.
    """
    ready = open_ready(root)
    stamps = stamps_of(ready)
    doubts = doubts_of_ready(ready)
    for doubt in doubts:
        observe(Noted(message=doubt))
    return CandidateCheckpoint(root, _candidate(ready), ready, stamps=stamps, doubts=doubts)


def damaged(name: str, error: Exception) -> Noted:
    """The note about a damaged checkpoint that is skipped."""
    return Noted(message=skipped(name, error))


def _candidate(ready: ReadyCheckpoint) -> Candidate:
    return Candidate(
        name=ready.name,
        storage=ready.storage,
        mesh=ready.mesh,
        is_mapped=ready.manifest.compression is None,
    )
