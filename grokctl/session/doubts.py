"""What is doubtful about the files of a run: said on this host, and for every rank by rank 0."""

from typing import Final

from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.receipt import Proof
from grokctl.checkpoint.refusal import read_refusal
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.sums import doubt_unhashed
from grokctl.cluster.exchange import Exchange
from grokctl.errors import PeerError
from grokctl.events import Noted, Observer
from grokctl.integrity.provenance import describe_proof
from grokctl.text import printable

_LONGEST: Final = 1000
"""Characters of what another rank says."""


def doubts_of_ready(checkpoint: ReadyCheckpoint) -> tuple[str, ...]:
    """The damage that the last verification found, and why a ready checkpoint is not proven."""
    refusal, doubt = read_refusal(checkpoint.root), doubt_unhashed(checkpoint)
    found = [] if refusal is None else [refusal.describe(checkpoint.root)]
    if doubt is not None:
        found.append(f"{checkpoint.name}: not proven: {doubt}")
    return tuple(found)


def doubts_of_release(release: Release, proof: Proof) -> tuple[str, ...]:
    """The same of a release, in one line."""
    is_fine = proof.receipt is not None and read_refusal(release.root) is None
    return () if is_fine else (describe_proof(proof, release.root),)


def note_doubts(cluster: Exchange, doubts: tuple[str, ...], observe: Observer) -> None:
    """Note on rank 0 what is doubtful on the other hosts; every process calls this.

    Args:
        cluster: The processes of the run.
        doubts: About the files of this one, which were said here.
        observe: Receives a note for each line that rank 0 has not said of its own files.

    Raises:
        PeerError: A rank is lost, or answers nonsense.
    """
    ranks: dict[str, list[int]] = {}
    for rank, facts in enumerate(cluster.everyones("doubts", {"doubts": doubts})):
        theirs = facts.get("doubts")
        if not isinstance(theirs, list):
            raise PeerError(f"rank {rank}: expected a list of doubts, found {theirs!r:.40}")
        for doubt in map(str, theirs):
            ranks.setdefault(printable(doubt, limit=_LONGEST), []).append(rank)
    for doubt, several in ranks.items():
        if cluster.rank == 0 and 0 not in several:
            names = ", ".join(map(str, several))
            observe(Noted(message=f"rank{'s' * (len(several) > 1)} {names}: {doubt}"))
