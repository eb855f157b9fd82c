"""SHA256SUMS of a published folder against its manifest, and whether what that claims counts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from grokctl.checkpoint.file_sizes import regular_size
from grokctl.checkpoint.hub_record import HUB_PROOF, INFOHASH_PROOF
from grokctl.checkpoint.manifest import FileRecord
from grokctl.checkpoint.published import Published
from grokctl.checkpoint.ready import SUMS
from grokctl.checkpoint.ready_receipt import hashed_before, proven_by, read_ready_receipt
from grokctl.checkpoint.receipt import Receipt
from grokctl.errors import Damage, Reason, corrupt
from grokctl.ownership import first_exposure
from grokctl.paths import TOKENIZER, quoted

_LARGEST: Final = 2**20
"""Bytes: a line has about a hundred, and a mesh at most sixteen files."""
_LINE: Final = re.compile(r"([0-9a-f]{64}) [ *]([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True, slots=True)
class Sums:
    """The lines of SHA256SUMS, compared with the manifest."""

    damage: tuple[Damage, ...] = ()
    """At most one for each file."""
    others: tuple[FileRecord, ...] = field(default=())
    """Files that have a line and are not in the manifest."""


def read_sums(checkpoint: Published) -> Sums:
    """Compare every line of SHA256SUMS with the manifest as it was read.

    Raises:
        OSError: The machine refuses to read it.
    """
    path = checkpoint.root / SUMS
    size = regular_size(path)
    if size is None:
        reason = Reason.UNREADABLE if path.exists() or path.is_symlink() else Reason.MISSING
        return Sums((Damage(SUMS, reason, "expected a line for every file"),))
    if size > _LARGEST:
        detail = f"expected at most {_LARGEST:,} bytes, found {size:,}"
        return Sums((Damage(SUMS, Reason.MALFORMED, detail),))
    lines: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or lines.setdefault(match[2], match[1]) != match[1]:
            detail = f"line {number}: expected the sha256 and the name of one file"
            return Sums((Damage(SUMS, Reason.MALFORMED, detail),))
    return _compared(checkpoint, lines)


def _compared(checkpoint: Published, lines: Mapping[str, str]) -> Sums:
    damage: dict[str, Damage] = {}
    wanted = {record.name: record.sha256 for record in checkpoint.records.values()}
    manifest = checkpoint.manifest_name
    wanted[manifest] = checkpoint.manifest_sha256
    for name, sha256 in wanted.items():
        line = lines.get(name)
        if line is None:
            damage.setdefault(SUMS, Damage(SUMS, Reason.MALFORMED, f"has no line for {name}"))
        elif line != sha256:
            place = manifest if name == manifest else SUMS
            origin = "" if name == manifest else f"{name}: "
            detail = f"{origin}expected sha256 {sha256[:16]}…, found {line[:16]}…"
            if name == manifest:
                detail = f"expected sha256 {line[:16]}… of {SUMS}, found {sha256[:16]}…"
            damage.setdefault(place, Damage(place, Reason.ALTERED, detail))
    others = []
    for name in lines.keys() - wanted.keys():
        size = regular_size(checkpoint.root / name)
        if size is None:
            damage[name] = Damage(name, Reason.MISSING, f"has a line in {SUMS}")
        else:
            others.append(FileRecord(name=name, nbytes=size, sha256=lines[name]))
    return Sums(tuple(damage[name] for name in sorted(damage)), tuple(others))


def require_sums(checkpoint: Published) -> None:
    """Refuse a manifest that SHA256SUMS contradicts.

    Raises:
        CorruptCheckpointError: A line is missing, malformed, or another.
    """
    for damage in read_sums(checkpoint).damage:
        if damage.reason is not Reason.MISSING or damage.file == SUMS:
            command = f"grokctl verify {quoted(checkpoint.root)}"
            raise corrupt(damage.file, damage.reason, damage.detail, command)


def exposure_of(checkpoint: Published) -> str | None:
    """The way in which other users can change what a run reads; None if they cannot."""
    used = [checkpoint.manifest_name, *sorted(checkpoint.records)]
    used += [TOKENIZER] if checkpoint.tokenizer is not None else []
    return first_exposure(checkpoint.root, used)


def not_made_here(checkpoint: Published) -> str:
    """The doubt about a folder that claims a proof, and no receipt of this machine shows it."""
    name, again = checkpoint.manifest_name, f"grokctl {checkpoint.verb} RELEASE"
    source = checkpoint.source
    claim = "was proven" if source.proven else f"had {source.root_of_trust}"
    return (
        f"its manifest says that the source {claim}; this copy was not made here, or {name} was "
        f"touched since ({again} makes one that is proven)"
    )


def doubt_of(checkpoint: Published) -> str | None:
    """Why a ready checkpoint is not proven, whatever its hashes; None if it is.

    A manifest that says `proven` counts where only this user and root can change the files, and
    where the receipt shows that this machine made them.
    """
    return _doubt(checkpoint, read_ready_receipt(checkpoint))


def proof_kind(checkpoint: Published, *, is_hashed: bool = True) -> str | None:
    """What the proof of a published folder goes back to.

    Args:
        checkpoint: From its manifest.
        is_hashed: Whether the caller hashes its files; otherwise they must be unchanged since they
            were hashed.

    Returns:
        `infohash` if it is proven; `hub sha256` if this machine made it from a release of which
        every file had the hash that a hub names, which is less; None otherwise.
    """
    receipt = read_ready_receipt(checkpoint)
    doubt = _doubt_of_claim(checkpoint, receipt)
    if doubt is not None or not (
        is_hashed or checkpoint.records.keys() <= hashed_before(checkpoint, receipt)
    ):
        return None
    return INFOHASH_PROOF if checkpoint.source.proven else HUB_PROOF


def _doubt(checkpoint: Published, receipt: Receipt | None) -> str | None:
    if (doubt := _doubt_of_claim(checkpoint, receipt)) is not None or checkpoint.source.proven:
        return doubt
    words = checkpoint.source.root_of_trust
    return f"made from a release that had {words}; the infohash proved none of it"


def _doubt_of_claim(checkpoint: Published, receipt: Receipt | None) -> str | None:
    """Why what a manifest says about its source does not count; None if it does."""
    if not checkpoint.source.proven and checkpoint.source.root_of_trust is None:
        return "made from a release that was not proven"
    if (exposure := exposure_of(checkpoint)) is not None:
        return exposure
    if checkpoint.tokenizer is not None and TOKENIZER not in checkpoint.records:
        return f"{TOKENIZER}: is not in {checkpoint.manifest_name}"
    if not proven_by(checkpoint, receipt):
        return not_made_here(checkpoint)
    return None


def doubt_unhashed(checkpoint: Published) -> str | None:
    """Why a ready checkpoint is not proven as it is now, if nobody hashes it; None if it is."""
    receipt = read_ready_receipt(checkpoint)
    if (doubt := _doubt(checkpoint, receipt)) is not None:
        return doubt
    changed = sorted(checkpoint.records.keys() - hashed_before(checkpoint, receipt))
    return f"{changed[0]}: changed since it was hashed" if changed else None
