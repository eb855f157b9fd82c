"""The result of a verification, and how it is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.adoption import end_adoption
from grokctl.checkpoint.receipt import Receipt, VerifiedRelease
from grokctl.checkpoint.refusal import forget_refusal, write_refusal
from grokctl.checkpoint.unfinished import Unfinished
from grokctl.errors import Damage
from grokctl.events import Noted, Observer
from grokctl.os_errors import reason_of
from grokctl.system import usable_cores

_MOST_JOBS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of a verification."""

    name: str
    files: int
    nbytes: int
    """Bytes of all files."""
    hashed: int
    """Bytes read and hashed now; an earlier receipt covers the rest."""
    damage: tuple[Damage, ...]
    verified: VerifiedRelease | None
    """The proof of a release; None if something is damaged, or not proven."""
    is_proven: bool = False
    """Whether every byte that a run reads is proven."""
    doubt: str | None = None
    """Why it is not proven although nothing is damaged; None if it is, or was not looked at."""
    is_exposed: bool = False
    """Whether the doubt is that other users can change a file."""
    root_of_trust: str | None = None
    """What the proof goes back to, in words; None if nothing is proven."""
    bad_pieces: frozenset[int] = frozenset()
    """Pieces that a repair must fetch; all others are good."""
    mend_nbytes: int = 0
    """Bytes of those pieces."""
    spared: int = 0
    """Files that were not hashed: a receipt covers them, and they are unchanged since."""
    since: str | None = None
    """When the first of those files was proven."""
    remedy: str | None = None
    """The command that replaces a checkpoint that cannot be repaired."""
    unfinished: Unfinished | None = None
    """The download that is not complete, which explains all damage."""
    is_as_promised: bool = False
    """Whether every damaged file is as its torrent promises: no repair changes it."""
    proven_by: str | None = None
    """`infohash`, or `hub sha256` if every byte has the hash that a hub names; None if neither."""
    receipt: Receipt | None = None
    """Of a release that is proven by either."""


def remember(root: Path, verdict: Verdict, observe: Observer) -> None:
    """Keep a bad result until a later one is good.

    Args:
        root: The checkpoint.
        verdict: The result.
        observe: Is told if it cannot be kept.
    """
    if verdict.unfinished is not None:
        return
    try:
        if verdict.damage:
            write_refusal(root, verdict.damage)
        else:
            forget_refusal(root)
            end_adoption(root)
    except OSError as error:
        observe(Noted(message=f"result: cannot be kept ({reason_of(error)})"))


def threads_of(jobs: int | None) -> int:
    """Hashing threads: as many as asked for, or one per core."""
    return min(jobs or usable_cores(), _MOST_JOBS)
