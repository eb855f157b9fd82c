"""Fetch the damaged pieces of a release again, and prove the result."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.adoption import end_adoption, is_adopting, is_for_repair
from grokctl.checkpoint.hub_record import trusted_hashes
from grokctl.checkpoint.release_files import release_paths
from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.torrent_files import HUB
from grokctl.errors import UsageError, bounds_of, certain, count_range, possible
from grokctl.events import Noted, Observer, ignore
from grokctl.fetch import fetch, refetch
from grokctl.integrity.backup import DAMAGED, begun_nbytes, forget, set_aside, unlink_targets
from grokctl.integrity.room import measure
from grokctl.integrity.verdict import Verdict
from grokctl.machine.disks import existing
from grokctl.paths import CKPT, REPLACED, TORRENT, quoted
from grokctl.transfer.exposure import refuse_exposed
from grokctl.transfer.fetched import Fetched
from grokctl.transfer.sources import FetchOptions
from grokctl.verify import raise_for, verify

_DEFAULTS: Final = FetchOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """A repair, and the verdict on the release after it."""

    verdict: Verdict
    fetched: Fetched


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """What a repair would fetch, and the room that it needs."""

    download_bytes: int
    pieces: int
    kept_bytes: int
    """Damaged bytes that are copied until the repair is proven."""
    copied_bytes: int
    """Bytes of linked files that are copied, so that nothing is written through a link."""
    required_bytes: int
    """Room for all these copies, in whole blocks, and for what the download adds."""
    free_bytes: int

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.required_bytes <= self.free_bytes


def plan_repair(root: Path, verdict: Verdict, *, place: Path | None = None) -> RepairPlan:
    """Plan a `repair`; changes nothing, and asks no peer.

    Args:
        root: The release, as it was verified.
        verdict: A verification of it that found damage.
        place: The folder in which the repair would work, if that is another one. If it is not
            there yet, it would hold the same links as `root`.

    Raises:
        GrokctlError: As `repair` does, except for a full disk, which is part of the plan.
    """
    metainfo = _torrent_for(root, verdict)
    place = place or root
    measured = place if (place / CKPT).is_dir() else root
    backup = measure(measured, metainfo, release_paths(metainfo), verdict.bad_pieces)
    return RepairPlan(
        download_bytes=verdict.mend_nbytes,
        pieces=len(verdict.bad_pieces),
        kept_bytes=backup.kept,
        copied_bytes=backup.copied,
        required_bytes=backup.required,
        free_bytes=shutil.disk_usage(existing(place)).free + begun_nbytes(place),
    )


def repair(
    root: Path,
    verdict: Verdict,
    options: FetchOptions = _DEFAULTS,
    *,
    jobs: int | None = None,
    observe: Observer = ignore,
) -> Repaired:
    """Fetch the bad pieces of a release, and verify it again.

    The bytes that a repair overwrites are copied first, and deleted only after every byte of the
    release is proven.

    Args:
        root: The release.
        verdict: A verification of it that found damage.
        options: Peers, mirrors and limits.
        jobs: Hashing threads; as many as cores by default.
        observe: Receives progress in bytes, and a note for each damaged file.

    Raises:
        UsageError: The checkpoint is a ready one, or has no torrent.
        CorruptCheckpointError: Every damaged file is as its torrent promises.
        DiskFullError: No space for the copies and the download; nothing was changed.
        GrokctlError: As `fetch` and `verify` do.
    """
    metainfo = _torrent_for(root, verdict)
    if verdict.unfinished is not None:
        observe(Noted(message=f"incomplete, {verdict.unfinished.share}: fetching the rest"))
    if verdict.unfinished is None:
        for damage in certain(verdict.damage):
            observe(Noted(message=f"damaged: {damage}"))
        for damage in possible(verdict.damage):
            observe(Noted(message=f"perhaps damaged: {damage}"))
    places = release_paths(metainfo)
    bad = verdict.bad_pieces
    # files of others that a fetch began to take over: nobody said that they are damaged
    is_adopted = is_adopting(root) and not is_for_repair(root)
    refuse_exposed(root, places.values(), ignore, force=options.force, is_repair=True)
    unlink_targets(root, metainfo, places, bad, observe=observe)
    under = REPLACED if is_adopted else DAMAGED
    backup = set_aside(root, metainfo, places, bad, under=under, observe=observe)
    end_adoption(root)
    have = frozenset(range(metainfo.num_pieces)) - verdict.bad_pieces
    after = verdict
    try:
        if metainfo.version == HUB:
            fetched = refetch(root, options, have=have, observe=observe)
        else:
            fetched = fetch(str(root / TORRENT), root, options, have=have, observe=observe)
        # the receipt covers the good files: only the repaired ones are hashed
        after = verify(root, jobs=jobs, observe=observe)
    finally:
        if backup is not None and (after.damage or is_adopted):
            observe(Noted(message=f"the bytes that the repair overwrote are kept in {backup}"))
    if not after.damage:
        forget(root)
    return Repaired(verdict=after, fetched=fetched)


def _torrent_for(root: Path, verdict: Verdict) -> Metainfo:
    """The torrent to repair a release from, if it can be repaired at all."""
    least, most = bounds_of(verdict.damage)
    damaged = f"{count_range(least, most)} damaged file{'s' * (most != 1)}"
    if verdict.remedy is not None:
        raise UsageError(f"{root}: {damaged}; a ready checkpoint has no torrent", verdict.remedy)
    if verdict.is_as_promised:
        raise_for(verdict, root)
    metainfo = trusted_hashes(root)
    if metainfo is None:
        hint = f"grokctl verify {quoted(root)} --repair --torrent-file FILE"
        raise UsageError(f"{root}: {damaged}, and no {TORRENT} to fetch from", hint)
    return metainfo
