"""The destination of a reshard or an export: checks, the partial folder, and the final rename."""

import glob
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Final

from grokctl.checkpoint.hub_record import INFOHASH_PROOF
from grokctl.checkpoint.manifest import Source
from grokctl.checkpoint.published import Checkpoint
from grokctl.checkpoint.receipt import Receipt, Stamp, changed_since, stamps_of
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.sums import proof_kind
from grokctl.errors import Damage, DiskFullError, Reason, UsageError, corrupt
from grokctl.events import Noted, Observer
from grokctl.linked_files import refuse_foreign_links
from grokctl.machine.disks import largest_file
from grokctl.marks import MARK
from grokctl.os_errors import refusal
from grokctl.own_files import ForeignFileError, names_in, opened_folder, why_not_own
from grokctl.ownership import first_exposure, is_own, links_on
from grokctl.paths import (
    CKPT,
    fsync_folder,
    kind_of,
    quoted,
)
from grokctl.resharding.output import OutputPlan
from grokctl.resharding.partial import PartialFolder
from grokctl.resharding.replaced import (
    JOURNAL,
    READY,
    FolderKind,
    delete_files,
    delete_folder,
    foreign_in,
)
from grokctl.text import format_apart

_SYSTEM_FOLDERS: Final = frozenset({"lost+found"})
"""A new file system has these, so a folder with nothing else counts as empty."""


# --- before


def destination(out: Path, kind: FolderKind = READY) -> Path:
    """The folder that is filled: also behind a link, if that is this user's own.

    Args:
        out: As the user typed it.
        kind: Of the folder that it becomes.
    """
    if not out.is_symlink():
        return out.absolute()
    with suppress(OSError):
        target = Path(os.path.realpath(out))
        if all(is_own(link) for _, link in links_on(out)) and is_filled(target, kind):
            return target
    return out.absolute()


def check_destination(plan: OutputPlan, *, force: bool) -> None:
    """Refuse a destination that this run may not replace.

    Raises:
        UsageError: It exists, and either `force` is not set or it is not just of the same kind.
    """
    out, kind = plan.out, plan.kind
    inside = next((each for each in Path(os.path.realpath(out)).parents if each.name == CKPT), None)
    if inside is not None:
        message = f"{out}: lies between the tensors of a release"
        raise UsageError(message, _elsewhere(inside.parent))
    if not os.path.lexists(out) or is_filled(out, kind):
        return
    if out.is_symlink():
        problem = "is a symbolic link, expected a new or an empty folder"
        raise UsageError(f"{out}: {problem}", f"--out {quoted(os.path.realpath(out))}")
    if not kind.is_replaceable:
        raise UsageError(f"{out}: exists", _elsewhere(out))
    if kind_of(out) != kind.name:
        raise UsageError(f"{out}: exists, and is not {kind.words}", _elsewhere(out))
    if plan.source.root.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out}: contains the source of this reshard", _elsewhere(out))
    for path in sorted(out.iterdir()):
        if foreign := None if _is_beside(path.name) else foreign_in(path, kind):
            message = f"{out}: contains {foreign!r}, which grokctl did not write"
            raise UsageError(message, _elsewhere(out))
    if not force:
        raise UsageError(f"{out}: exists", "--force  # replaces it; or --out, elsewhere")


def _elsewhere(taken: Path) -> str:
    """A destination beside one that cannot be used."""
    names = (taken.with_name(f"{taken.name}-{number}") for number in count(2))
    free = next(place for place in names if not os.path.lexists(place))
    return f"--out {quoted(free)}  # another destination"


def check_tokenizer(source: Checkpoint) -> None:
    """Refuse a tokenizer that is another user's link to a file which only this user may read.

    Raises:
        UsageError: It is.
    """
    if source.tokenizer is None:
        return
    try:
        refuse_foreign_links(source.tokenizer, source.root)
    except OSError as error:
        raise refusal(error, source.tokenizer) from error


def check_space(plan: OutputPlan, nbytes: int, free: int) -> None:
    """Refuse what does not fit.

    Raises:
        DiskFullError: Fewer bytes are free than will be written, or a file would be too large.
    """
    hint = f"df -h {quoted(disk_of(plan.out, plan.kind))}  # or --out on another disk"
    largest = max((layout.nbytes for layout in plan.layouts), default=0)
    limit, origin = largest_file(disk_of(plan.out, plan.kind))
    if limit is not None and largest > limit:
        needed, found = format_apart(largest, limit)
        message = f"{plan.out}: expected files of {needed}, found a limit of {found} ({origin})"
        raise DiskFullError(message, "ulimit -f unlimited" if "ulimit" in origin else hint)
    if nbytes > free:
        needed, found = format_apart(nbytes, free)
        raise DiskFullError(
            f"{disk_of(plan.out, plan.kind)}: expected {needed} free, found {found}", hint
        )


def is_filled(out: Path, kind: FolderKind = READY) -> bool:
    """Whether a run writes into an existing folder: an empty one, such as a mounted volume."""
    if out.is_symlink() or not out.is_dir() or (out / kind.manifest).exists():
        return False
    paths = list(out.iterdir())
    is_begun = any(_is_partial(path.name) for path in paths)
    return all(
        _is_beside(path.name) or (is_begun and foreign_in(path, kind) is None) for path in paths
    )


def disk_of(out: Path, kind: FolderKind = READY) -> Path:
    """The existing folder whose disk will be written."""
    if _is_inside(out, kind):
        return out
    folder = out.parent
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _is_inside(out: Path, kind: FolderKind) -> bool:
    """Whether files are written inside `out`: it is there, and cannot be replaced by a rename."""
    return is_filled(out, kind) or (not out.is_symlink() and os.path.ismount(out))


def _is_beside(name: str) -> bool:
    """Whether a name in a folder does not make it another's."""
    return name in _SYSTEM_FOLDERS or _is_partial(name)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Translate errors of the file system while `out` is made."""
    try:
        yield
    except OSError as error:
        raise refusal(error, out.parent) from error


# --- the partial folder


def can_be_exchanged(source: Checkpoint) -> bool:
    """Whether other users can change or exchange a file that is resharded."""
    if isinstance(source, Release):
        names = [str(tensor.path.relative_to(source.root)) for tensor in source.tensors]
    else:
        names = list(source.records)
    return first_exposure(source.root, names) is not None


def partial_folder(
    plan: OutputPlan,
    stamps: Mapping[Path, Stamp | None],
    *,
    is_exposed: bool = False,
    identity: str | None = None,
) -> tuple[Path, bool]:
    """The hidden folder that grows beside the destination, or in it if that is a folder already.

    There is one for each source and output. Its name has the same hash after a reboot, and with the
    source mounted at another place.

    Args:
        plan: Of the run.
        stamps: Of the files of the source.
        is_exposed: Whether others can exchange those now. What is read meanwhile may be of other
            files: a run that begins when they can no longer does not continue after it.
        identity: Of content that is proven before it is read, instead of stamps.

    Returns:
        The folder, and whether an earlier version began it, which did not look at the times of
        change (ctime) of the source: what it has written so far proves nothing.
    """
    if identity is not None:
        return _partial_name(plan, [identity]), False
    sources = [(path.name, s and s.lasting) for path, s in stamps.items()]
    own = _partial_name(plan, [*sources, *(["exposed"] if is_exposed else [])])
    if own.is_dir():
        return own, False
    # version 1 hashed no times of change; version 0, whole paths and devices: until the next mount
    first = _partial_name(plan, [(path.name, s and s.lasting[:-1]) for path, s in stamps.items()])
    zeroth = _partial_name(plan, [(str(path), s) for path, s in stamps.items()])
    earlier = next((folder for folder in (first, zeroth) if folder.is_dir()), None)
    return (own, False) if earlier is None else (earlier, True)


def _partial_name(plan: OutputPlan, sources: Iterable[object]) -> Path:
    hasher = hashlib.sha256(str(plan.compression).encode())
    for layout in plan.layouts:
        hasher.update(layout.header)
    for source in sources:
        hasher.update(repr(source).encode())
    name = f".{plan.out.name}.{hasher.hexdigest()[:12]}.partial"
    return plan.out / name if _is_inside(plan.out, plan.kind) else plan.out.parent / name


def leftovers(partial: Path, out: Path) -> list[Path]:
    """Hidden folders of other runs with the same destination, or of one killed at its very end."""
    name = glob.escape(out.name)
    if partial.parent == out:
        return sorted(set(out.glob(".*.partial")) - {partial})
    folders = [*out.parent.glob(f".{name}.*.partial"), *out.parent.glob(f".{name}.*.replaced")]
    return sorted(set(folders) - {partial})


def check_unchanged(
    source: Checkpoint,
    stamps: Mapping[Path, Stamp | None],
    proof: Receipt | None,
    partial: PartialFolder,
) -> None:
    """Refuse to publish if the source changed; the partial folder is then deleted.

    Args:
        source: As it is now.
        stamps: Of its files when the reshard began.
        proof: Of a release; its files must also be as they were proven.
        partial: The folder that would be published.

    Raises:
        CorruptCheckpointError: A file of the source changed.
    """
    now = stamps_of(source)
    changed = [path.name for path, stamp in stamps.items() if now.get(path) != stamp]
    if proof is not None and isinstance(source, Release):
        changed += changed_since(proof, source)
    if changed:
        partial.delete()
        command = f"grokctl verify {quoted(source.root)}"
        raise corrupt(changed[0], Reason.ALTERED, "changed while it was read", command)


def refuse_altered(source: Checkpoint, damage: Sequence[Damage], partial: PartialFolder) -> None:
    """Refuse to publish what was made from wrong bytes; the partial folder is then deleted.

    Raises:
        CorruptCheckpointError: A file of the source is damaged.
    """
    for item in damage:
        partial.delete()
        raise corrupt(item.file, item.reason, item.detail, f"grokctl verify {quoted(source.root)}")


# --- the origin, and the name


def origin_of(source: Checkpoint, proof: Receipt | None, *, is_earlier: bool) -> Source:
    """What a manifest says about its source.

    Args:
        source: Whose files were hashed while they were read, or are covered by the proof.
        proof: Of a release.
        is_earlier: Whether an earlier version, or somebody else, has written a part of the result.
    """
    if isinstance(source, Release):
        known = None if is_earlier else proof
        is_proven = known is not None and known.proven_by == INFOHASH_PROOF
        return Source(
            name=source.name,
            infohash=known.infohash if known and is_proven else None,
            proven=is_proven,
            verified_at=known.verified_at if known and is_proven else None,
            root_of_trust=known.root_of_trust if known else None,
        )
    origin = replace(source.source, precision=source.precision)
    if not is_earlier and proof_kind(source) is not None:
        return origin
    return replace(origin, proven=False, verified_at=None, root_of_trust=None)


def take_back(partial: PartialFolder, out: Path) -> None:
    """Continue after a kill during `publish` into a folder: its files are still of this run.

    What another user may have put there stays, and is replaced at the end; where others can rename
    files of this user's to our names, nothing is taken. A journal is not: `publish` deletes it
    before it moves anything, so another one is somebody's claim about the files beside it.
    """
    kind = partial.kind
    if not _is_partial(partial.name) or (out / kind.manifest).exists() or not is_filled(out, kind):
        return
    there = names_in(partial.handle)
    for name in [] if partial.is_exposed else names_in(partial.above):
        if not kind.is_own_name(name) or name in {JOURNAL, *there}:
            continue
        status = os.stat(name, dir_fd=partial.above, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and why_not_own(status) is None:
            os.rename(name, name, src_dir_fd=partial.above, dst_dir_fd=partial.handle)


def _fill(partial: PartialFolder) -> None:
    """Move the files into an existing folder; the manifest, last, makes it a checkpoint.

    Raises:
        ForeignFileError: Others can have renamed a file of this user's to the name of one.
    """
    kind = partial.kind
    names = sorted(names_in(partial.handle), key=lambda name: name == kind.manifest)
    if partial.is_exposed and (taken := set(filter(kind.is_own_name, names_in(partial.above)))):
        place = partial.path.with_name(min(taken))
        raise ForeignFileError("is there already, in a folder that others can write to", place)
    delete_files(partial.above, [kind.manifest], kind)
    delete_files(partial.above, names_in(partial.above), kind)
    delete_files(partial.handle, [JOURNAL], kind)
    for name in names:
        if name in {JOURNAL, MARK}:
            continue
        if name == kind.manifest:
            fsync_folder(partial.above)
        os.rename(name, name, src_dir_fd=partial.handle, dst_dir_fd=partial.above)
    delete_files(partial.handle, [MARK], kind)  # last: a run that continues deletes the folder
    os.rmdir(partial.name, dir_fd=partial.above)
    fsync_folder(partial.above)


def publish(partial: PartialFolder, out: Path, observe: Observer) -> None:
    """Rename the partial folder; a run that is killed during this can continue.

    Args:
        partial: The folder with every file.
        out: Its new name; a folder of this name and kind is replaced.
        observe: Receives a note about files in that one which are not of a checkpoint, and stay.

    Raises:
        ForeignFileError: Another user has replaced the folder.
        OSError: It cannot be renamed.
    """
    fsync_folder(partial.handle)
    partial.require_name(partial.name)
    if partial.path.parent == out:
        _fill(partial)
        return
    replaced = partial.path.with_suffix(".replaced").name
    if not partial.is_exposed:  # elsewhere, others can have given its name to another checkpoint
        delete_folder(replaced, partial.above, partial.kind)
    if partial.is_exposed or _exists(replaced, partial.above):  # it holds more than a checkpoint
        replaced = f"{replaced.removesuffix('.replaced')}.{secrets.token_hex(8)}.replaced"
    with ExitStack() as stack:
        old = None
        if _exists(out.name, partial.above):
            old = stack.enter_context(opened_folder(out.name, above=partial.above))
            os.rename(out.name, replaced, src_dir_fd=partial.above, dst_dir_fd=partial.above)
        os.rename(partial.name, out.name, src_dir_fd=partial.above, dst_dir_fd=partial.above)
        partial.require_name(out.name)
        partial.open_to_others()
        fsync_folder(partial.above)
        delete_files(partial.handle, [JOURNAL, MARK], partial.kind)
        if old is not None:
            delete_folder(replaced, partial.above, partial.kind, opened=old)
    if _exists(replaced, partial.above):
        place = partial.path.with_name(replaced)
        observe(Noted(message=f"{place}: contains files that grokctl did not write, and stays"))


def _exists(name: str, folder: int) -> bool:
    with suppress(FileNotFoundError):
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        return True
    return False
