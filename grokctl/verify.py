"""Decide whether files on disk are the ones that the torrent promises; the proof is a receipt."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from grokctl.checkpoint.export_manifest import read_export
from grokctl.checkpoint.hub_record import HUB_PROOF, trusted_hashes
from grokctl.checkpoint.ready import read_manifest
from grokctl.checkpoint.receipt import (
    Receipt,
    Stamp,
    VerifiedRelease,
    look_for_receipt,
    not_promised,
    with_built_in,
)
from grokctl.checkpoint.release import Release, damage_error
from grokctl.checkpoint.release_files import files_of, read_config, scan_file
from grokctl.checkpoint.structure import Survey, survey
from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.trust import FOUND
from grokctl.checkpoint.unfinished import (
    Unfinished,
    forget_unfinished,
    incomplete,
    read_unfinished,
    refuse_unfinished,
)
from grokctl.errors import (
    CorruptCheckpointError,
    Damage,
    Reason,
    UnsafePickleError,
    UsageError,
    certain,
)
from grokctl.events import Noted, Observer, ignore
from grokctl.integrity.content_check import ContentCheck
from grokctl.integrity.damage import Findings, find_damage, known_bytes
from grokctl.integrity.published import verify_export, verify_ready
from grokctl.integrity.trailing_check import ArrivingCheck, Notes, TrailingCheck
from grokctl.integrity.verdict import Verdict, remember, threads_of
from grokctl.model.config import GrokConfig
from grokctl.model.tensors import tensor_specs
from grokctl.os_errors import is_absence, reason_of
from grokctl.ownership import first_exposure
from grokctl.paths import CKPT, CONFIG, TOKENIZER, TORRENT, kind_of, quoted

_MOST_JOBS: Final = 64
AS_PROMISED: Final = "grokctl fetch  # another release: this torrent promises these very files"
"""The hint where the bytes are proven, and are no release."""


def verify(
    root: Path,
    *,
    quick: bool = False,
    rehash: bool = False,
    keeps: bool = True,
    jobs: int | None = None,
    observe: Observer = ignore,
) -> Verdict:
    """Prove every piece of every file against the torrent, and check every tensor's structure.

    Continues after the first damaged file, because a repair needs the whole list. Files that an
    earlier receipt covers and that are unchanged since are not hashed again. The receipt is saved
    every few seconds, so that a stopped or killed verification continues from there.

    Args:
        root: A release, or what was made of one: a ready checkpoint or an export.
        quick: Check only the structure; proves nothing about the content.
        rehash: Ignore the receipt.
        keeps: Whether the result is kept in the folder; otherwise nothing is written.
        jobs: Hashing threads; one per core by default.
        observe: Receives progress in bytes.

    Raises:
        CorruptCheckpointError: The torrent or `config.json` is malformed.
        UsageError: There is no release, or no torrent to prove it against.
        OSError: The machine refuses to read a file, which says nothing about the file.
    """
    kind = kind_of(root)
    if kind == "ready":
        return verify_ready(
            read_manifest(root), quick=quick, rehash=rehash, keeps=keeps, jobs=jobs, observe=observe
        )
    if kind == "export":
        return verify_export(
            read_export(root), quick=quick, rehash=rehash, keeps=keeps, jobs=jobs, observe=observe
        )
    if quick and (unfinished := read_unfinished(root)) is not None:
        return _unfinished_verdict(root, unfinished)
    metainfo = None if quick else trusted_hashes(root)
    if metainfo is None:
        return _structure_alone(root, quick=quick, observe=observe)
    check = _begun(root, metainfo, observe, rehash=rehash, keeps=keeps)
    check.run(threads_of(jobs))
    return _concluded(check, observe, keeps=keeps)


def verifying(root: Path, *, jobs: int | None = None, observe: Observer = ignore) -> TrailingCheck:
    """A verification of a release that trails what reads its files: they are read once.

    Args:
        root: The release.
        jobs: Hashing threads; one per core by default.
        observe: Receives notes about an earlier receipt.

    Returns:
        A context manager, whose end raises what `raise_for` does.

    Raises:
        CorruptCheckpointError: The torrent is malformed.
        UsageError: There is no torrent to prove the release against.
    """
    metainfo = trusted_hashes(root)
    if metainfo is None:
        raise _no_hashes(f"{root}: its content cannot be proven without {TORRENT}", root)
    check, notes, conclude = _apart(root, metainfo)
    notes.drain(observe)
    return TrailingCheck(check, notes, conclude, jobs=threads_of(jobs))


def verifying_arrivals(root: Path, metainfo: Metainfo) -> ArrivingCheck:
    """A verification of a release whose files are still arriving, ahead of what reads them.

    Args:
        root: The release, with its torrent.
        metainfo: The same.
    """
    check, notes, conclude = _apart(root, metainfo)
    return ArrivingCheck(check, notes, conclude, jobs=threads_of(None))


def _apart(
    root: Path, metainfo: Metainfo
) -> tuple[ContentCheck, Notes, Callable[[Observer], Receipt | None]]:
    """A check for other threads, what it notes, and its end."""
    notes = Notes()
    check = _begun(root, metainfo, notes, rehash=False, keeps=True)

    def conclude(observe: Observer) -> Receipt | None:
        check.observe = observe
        verdict = _concluded(check, observe, keeps=True)
        raise_for(verdict, root)
        return verdict.receipt

    return check, notes, conclude


def _structure_alone(root: Path, *, quick: bool, observe: Observer) -> Verdict:
    """The verdict on a release whose content is not looked at, or cannot be proven."""
    refuse_unfinished(root)
    structure = survey(root, observe=observe)
    verdict = Verdict(
        name=root.resolve().name,
        files=len(names := files_of(root, structure.config)),
        nbytes=sum(stamp.size for name in names if (stamp := Stamp.of(root / name))),
        hashed=0,
        damage=structure.damage,
        verified=None,
    )
    if quick or structure.damage:
        return verdict
    problem = f"{root}: the structure is sound, the content cannot be proven without {TORRENT}"
    raise _no_hashes(problem, root)


def _no_hashes(problem: str, root: Path) -> UsageError:
    return UsageError(problem, f"grokctl verify {quoted(root)} --torrent-file FILE  # or --quick")


def _begun(
    root: Path, metainfo: Metainfo, observe: Observer, *, rehash: bool, keeps: bool
) -> ContentCheck:
    """The check of the content, before anything is hashed."""
    saved, reason = look_for_receipt(root)
    if not rehash and reason is not None:
        observe(Noted(message=f"{reason}; hashing every file"))
    return ContentCheck(root, metainfo, saved, observe, rehash=rehash, keeps=keeps)


def _concluded(check: ContentCheck, observe: Observer, *, keeps: bool) -> Verdict:
    """The verdict of a check that has ended, kept if results are."""
    root = check.root
    verdict = _with_record(root, _conclude(check, observe), observe, keeps=keeps)
    if keeps:
        remember(root, verdict, observe)
    return verdict


def _unfinished_verdict(root: Path, unfinished: Unfinished) -> Verdict:
    """The verdict on a download that is not complete, without a look at its files."""
    return Verdict(
        name=root.resolve().name,
        files=0,
        nbytes=unfinished.nbytes,
        hashed=0,
        damage=(),
        verified=None,
        unfinished=unfinished,
    )


def _with_record(root: Path, verdict: Verdict, observe: Observer, *, keeps: bool) -> Verdict:
    """The verdict with the download that explains its damage, or the record gone.

    What is proven is counted anew, and kept if results are: no command names another number.
    """
    unfinished = read_unfinished(root)
    if unfinished is None:
        return verdict
    if not verdict.damage:
        try:
            if keeps:
                forget_unfinished(root)
        except OSError as error:
            observe(Noted(message=f"result: cannot be kept ({reason_of(error)})"))
        return verdict
    if any(item.reason is Reason.UNSAFE for item in verdict.damage):
        return verdict  # no download leaves that
    have = max(0, verdict.nbytes - verdict.mend_nbytes)
    counted = replace(unfinished, have=have, nbytes=verdict.nbytes, is_final=True)
    try:
        if keeps and counted != unfinished:
            counted.write(root)
    except OSError as error:
        observe(Noted(message=f"result: cannot be kept ({reason_of(error)})"))
    return replace(verdict, unfinished=counted)


def raise_for(verdict: Verdict, root: Path) -> None:
    """Raise the error for a damaged checkpoint.

    Raises:
        CorruptCheckpointError: Something is damaged, or the download is not complete.
    """
    if verdict.unfinished is not None:
        raise incomplete(root, verdict.unfinished)
    if verdict.damage:
        error = damage_error(verdict.damage, checked=verdict.files, root=root)
        error.hint = verdict.remedy or error.hint
        if verdict.is_as_promised:
            error.hint = AS_PROMISED
        raise error


def _conclude(check: ContentCheck, observe: Observer) -> Verdict:
    """Combine content and structure into a verdict."""
    root, metainfo = check.root, check.metainfo
    structure, config_damage = _survey(check, observe)
    known = (*config_damage, *(structure.damage if structure else ()))
    damage = find_damage(
        Findings(
            root=root,
            metainfo=metainfo,
            places=check.places,
            bad=frozenset(check.bad),
            stamps=check.stamps,
            unreadable=check.unreadable,
            trusted=check.trusted,
            structure={item.file: item for item in known},
            known=_known(check, structure.config) if structure and check.bad else {},
            odd={item.file: item.values.ranges for item in structure.odd} if structure else {},
        )
    )
    promised = {item.file for item in known} & check.files.keys() - damage.keys()
    _add(damage, (_promised(item) if item.file in promised else item for item in known))
    _add(damage, check.changed())
    if structure is None:
        # the model is unknown, but an unsafe pickle is unsafe in any model
        _add(damage, (item for name in sorted(check.files) if (item := _unsafe(root, name))))
    else:
        _add(damage, _unpromised(check, structure))
    check.distrust(item.file for item in certain(damage.values()))
    receipt = check.save()
    verified, doubt, is_exposed, proven_by = None, None, False, None
    if structure is not None and not damage:
        doubt, exposure = _doubt(check), _exposure(check)
        is_exposed, doubt = doubt is None and exposure is not None, doubt or exposure
        proven_by = None if doubt else receipt.proven_by
        if proven_by == HUB_PROOF:
            doubt = f"{check.trust.root}, and the infohash proves none of it"
    if structure is not None and not damage and doubt is None:
        release = Release(root=root, config=structure.config, tensors=structure.tensors)
        verified = VerifiedRelease(release=release, receipt=with_built_in(root, receipt))
    return Verdict(
        name=root.resolve().name,
        files=len(check.places),
        nbytes=sum(file.length for file in check.files.values()),
        hashed=check.hashed,
        damage=tuple(damage[name] for name in sorted(damage)),
        verified=verified,
        is_proven=verified is not None,
        doubt=doubt,
        is_exposed=is_exposed,
        root_of_trust=check.trust.root if proven_by is not None else None,
        proven_by=proven_by,
        receipt=with_built_in(root, receipt) if proven_by is not None else None,
        bad_pieces=frozenset(check.bad),
        mend_nbytes=sum(map(metainfo.piece_size, check.bad)),
        spared=len(check.trusted),
        since=check.receipt.since if check.receipt and check.trusted else None,
        is_as_promised=bool(damage) and damage.keys() <= promised,
    )


def _doubt(check: ContentCheck) -> str | None:
    """Why a release is not proven although each of its files is as the torrent promises."""
    if check.trust.doubt is not None:
        return f"{FOUND}: {check.trust.doubt}"
    used = [TOKENIZER] if (check.root / TOKENIZER).exists() else []
    if not_promised(check.root, used, check.files.keys()):
        return f"{TOKENIZER}: is not in the torrent"
    return None


def _exposure(check: ContentCheck) -> str | None:
    """The way in which other users can change a file that a run reads; None if they cannot."""
    used = [TOKENIZER] if (check.root / TOKENIZER).exists() else []
    return check.exposure() or first_exposure(check.root, used)


def _promised(damage: Damage) -> Damage:
    """The same about a file of which every piece is good: no repair changes it."""
    return replace(damage, detail=f"{damage.detail}, as its torrent promises")


def _survey(check: ContentCheck, observe: Observer) -> tuple[Survey | None, tuple[Damage, ...]]:
    """The structure of a release, or the damage to its configuration."""
    root = check.root
    if not (root / CKPT).is_dir():
        return None, ()
    config = check.files.get(CONFIG)
    stamp = check.stamps.get(CONFIG)
    if config is not None and (stamp is None or stamp.size != config.length):
        return None, ()
    if config is not None and not check.bad.isdisjoint(check.metainfo.pieces_of(config)):
        try:
            detail = "" if _fits(check, read_config(root)) else "does not describe these files"
        except CorruptCheckpointError as error:
            detail = error.damage[0].detail
        if detail:
            damage = Damage(CONFIG, Reason.MALFORMED, detail, ((0, config.length),))
            return None, (damage,)
    return survey(root, observe=observe), ()


def _known(check: ContentCheck, config: GrokConfig) -> dict[str, tuple[tuple[int, bytes], ...]]:
    """Bytes of each tensor's file that follow from the structure."""
    names = {f"{CKPT}/{spec.file}": spec for spec in tensor_specs(config)}
    return {
        name: known_bytes(names[name], file.length)
        for name, file in check.files.items()
        if name in names
    }


def _fits(check: ContentCheck, config: GrokConfig) -> bool:
    """Whether a configuration describes exactly the tensors that the torrent promises."""
    known = _known(check, config)
    promised = {name for name in check.files if name.startswith(f"{CKPT}/")}
    return len(known) == len(tensor_specs(config)) == len(promised) and all(known.values())


def _unpromised(check: ContentCheck, structure: Survey) -> Iterable[Damage]:
    """Files of the release that the torrent does not contain."""
    present = [f"{CKPT}/{tensor.spec.file}" for tensor in structure.tensors]
    present += [CONFIG] if (check.root / CONFIG).is_file() else []
    for name in present:
        if name not in check.files:
            yield Damage(name, Reason.UNPROVEN, "is not in the torrent")


def _add(damage: dict[str, Damage], items: Iterable[Damage]) -> None:
    """Add damage to files; where there is some already, the structure says more about it."""
    for item in items:
        known = damage.get(item.file)
        if known is None:
            damage[item.file] = item
        elif item.reason is Reason.UNSAFE:
            damage[item.file] = replace(
                known, reason=item.reason, detail=item.detail, is_certain=True
            )
        elif item.reason is Reason.MALFORMED and known.reason is not Reason.UNPROVEN:
            detail = f"{known.detail}; {item.detail}"
            damage[item.file] = replace(known, detail=detail, is_certain=True)


def _unsafe(root: Path, name: str) -> Damage | None:
    if not name.startswith(f"{CKPT}/"):
        return None
    try:
        scan_file(root, name)
    except UnsafePickleError as error:
        return error.damage[0]
    except CorruptCheckpointError:
        pass  # the pieces show it
    except OSError as error:
        if not is_absence(error):
            raise
    return None
