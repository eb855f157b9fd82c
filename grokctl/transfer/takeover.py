"""What lies in a folder before a fetch: proven pieces, and files of others, which are kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grokctl.checkpoint.adoption import files_to_keep, is_adopting, record_kept
from grokctl.errors import FetchError
from grokctl.events import Noted, Observer
from grokctl.integrity.backup import set_aside, unlink_targets
from grokctl.os_errors import refusal
from grokctl.paths import REPLACED
from grokctl.transfer.data_on_disk import find_claims, number_extras
from grokctl.transfer.destination import FileSelection
from grokctl.transfer.partial_files import adopt_partial
from grokctl.transfer.preflight import cut_files
from grokctl.transfer.sources import FetchRequest
from grokctl.transfer.swarm_types import Claims


def take_stock(
    request: FetchRequest,
    selection: FileSelection,
    have: frozenset[int] | None,
    observe: Observer,
    *,
    follows: bool,
) -> Claims:
    """Find the pieces that need not be downloaded; keep first whatever the others overwrite.

    Args:
        request: The download; its folder is prepared and locked.
        selection: The files to download.
        have: Pieces that were proven just now; None if nobody looked.
        observe: Receives verify in bytes, and notes.
        follows: Whether files may be links.

    Raises:
        DiskFullError: There is no room for what is kept and the download.
        FetchError: The folder cannot be read or written.
    """
    root = request.root
    is_adopted = is_adopting(root)
    with writing(root):
        number_extras(root, selection, observe)
        partial = adopt_partial(root, selection, observe)
        if not is_adopted:
            cut_files(root, selection)
        known = None if have is None else have | partial
        claims = find_claims(root, selection, known, observe, follows=follows)
        _keep_others(root, selection, claims.have, observe, is_adopted=is_adopted)
    if is_adopted:
        cut_files(root, selection)
    return claims


def _keep_others(
    root: Path,
    selection: FileSelection,
    have: frozenset[int],
    observe: Observer,
    *,
    is_adopted: bool,
) -> None:
    """Write to no target of a link; before a folder is adopted, keep what does not fit."""
    metainfo, places = selection.metainfo, selection.places
    missing = [piece for piece in selection.pieces if piece not in have]
    keeps = files_at_stake(root, selection, missing)
    unlink_targets(root, metainfo, places, missing, keeps=keeps, observe=observe)
    if not is_adopted:
        return
    count = f"{len(selection.pieces) - len(missing):,} of {len(selection.pieces):,} pieces"
    observe(Noted(message=f"{count} on disk fit the torrent"))
    kept = set_aside(
        root,
        metainfo,
        {index: places[index] for index in keeps},
        missing,
        under=REPLACED,
        observe=observe,
    )
    record_kept(root, metainfo, selection.wanted)
    if kept is not None:
        observe(Noted(message=f"what differs from the torrent is kept in {kept}"))


def files_at_stake(
    root: Path, selection: FileSelection, missing: list[int], *, is_foreign: bool = False
) -> frozenset[int]:
    """The files of others, by index, that a fetch may overwrite.

    Args:
        root: The folder.
        selection: The files to download.
        missing: The pieces to download.
        is_foreign: Whether the folder is that of others, and no fetch has begun there.
    """
    metainfo = selection.metainfo
    theirs = frozenset(selection.places) if is_foreign else files_to_keep(root, metainfo)
    # libtorrent writes to a file that is there even if it is not wanted: the rest of a piece
    touched = {file.index for piece in missing for file, _, _ in metainfo.spans(piece)}
    return theirs & (selection.wanted | touched) & selection.places.keys()


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Refusals of the operating system, as errors about a folder."""
    try:
        yield
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error
