"""The receipt of a ready checkpoint or an export: which files were hashed, as they were then."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from grokctl.checkpoint.hub_record import HUB_PROOF, INFOHASH_PROOF
from grokctl.checkpoint.published import Published
from grokctl.checkpoint.ready import SUMS
from grokctl.checkpoint.receipt import Receipt, Stamp, forget_receipt, now, read_receipt
from grokctl.checkpoint.trust import root_in_words
from grokctl.events import Noted, Observer
from grokctl.os_errors import reason_of
from grokctl.ownership import why_exposed
from grokctl.paths import MANIFEST


def read_ready_receipt(checkpoint: Published) -> Receipt | None:
    """The receipt of a ready checkpoint; None if there is none that is believed, or of another."""
    receipt = read_receipt(checkpoint.root)
    is_usable = receipt is not None and receipt.infohash == checkpoint.manifest_sha256
    return receipt if is_usable else None


def hashed_before(checkpoint: Published, receipt: Receipt | None) -> frozenset[str]:
    """Files that had their hashes, and are unchanged since.

    The hash of a file that is not in the manifest is a line of SHA256SUMS: that must be unchanged,
    too.

    Args:
        checkpoint: With its manifest as it is now.
        receipt: From `read_ready_receipt`.
    """
    untouched = frozenset(receipt.untouched(checkpoint.root) if receipt else ())
    known = untouched if SUMS in untouched else untouched & checkpoint.records.keys()
    return known - {checkpoint.manifest_name, SUMS}


def proven_by(checkpoint: Published, receipt: Receipt | None) -> str:
    """The root of trust of the source from which this machine made a ready checkpoint.

    That of a hub if its hashes alone proved the source, which the manifest says.

    Whoever owns a copy need not have made it: its manifest is a claim. No copy, archive or drive
    can bring a receipt that fits, which has the inode and the time of change (ctime) of the
    manifest, and the MAC of this user.

    Args:
        checkpoint: With its manifest as it is now.
        receipt: From `read_ready_receipt`.

    Returns:
        In words; empty if the receipt does not show it.
    """
    if receipt is None or checkpoint.manifest_name not in receipt.untouched(checkpoint.root):
        return ""
    return receipt.root_of_trust and root_in_words(
        receipt.root_of_trust, checkpoint.source.infohash
    )


def receipt_now(
    root: Path,
    manifest_sha256: str,
    names: Iterable[str],
    *,
    root_of_trust: str = "",
    proven_by: str = INFOHASH_PROOF,
    manifest: str = MANIFEST,
) -> Receipt:
    """The receipt of files that were hashed just now, and nothing will change their stamps.

    Args:
        root: The ready checkpoint.
        manifest_sha256: Of the bytes of its manifest.
        names: Of all files with a hash in the manifest.
        root_of_trust: Of the proven source that it was made from just now; empty otherwise.
        proven_by: What that goes back to.
        manifest: The name of its manifest.
    """
    stamps = {name: Stamp.of(root / name) for name in (*names, manifest, SUMS)}
    return Receipt(
        infohash=manifest_sha256,
        verified_at=now(),
        stamps={name: stamp for name, stamp in stamps.items() if stamp is not None},
        is_complete=None not in stamps.values(),
        root_of_trust=root_of_trust,
        proven_by=proven_by,
    )


def continued(
    checkpoint: Published,
    receipt: Receipt | None,
    before: Iterable[str],
    good: Mapping[str, Stamp],
    *,
    root_of_trust: str,
) -> Receipt:
    """A receipt of what was hashed now, and of what was hashed before.

    Args:
        checkpoint: With its manifest.
        receipt: The one before; None if there is none.
        before: Files of it that were not hashed again.
        good: The stamps of all files that are not damaged.
        root_of_trust: From `proven_by`, also if the receipt is ignored: hashing finds none.
    """
    times = {} if receipt is None else {name: receipt.proven_at(name) for name in before}
    manifest = checkpoint.manifest_name
    is_hashed = bool(good.keys() - times.keys() - {manifest, SUMS})
    at = now() if is_hashed else max(times.values(), default=now())
    return Receipt(
        infohash=checkpoint.manifest_sha256,
        verified_at=at,
        stamps=good,
        earlier={name: time for name, time in times.items() if time != at and name in good},
        is_complete={*checkpoint.records, manifest, SUMS} <= good.keys(),
        root_of_trust=root_of_trust,
        proven_by=HUB_PROOF if root_of_trust and not checkpoint.source.proven else INFOHASH_PROOF,
    )


def keep_ready_receipt(
    root: Path, receipt: Receipt, observe: Observer, *, manifest: str = MANIFEST
) -> None:
    """Write the receipt of a ready checkpoint, or delete that which is there if it has no files.

    Where other users can write it would not be believed, and they could have changed the files.

    Args:
        root: The ready checkpoint.
        receipt: Covers the manifest, unless that is damaged: then nothing is covered.
        observe: Receives a note if it cannot be written.
        manifest: The name of its manifest.
    """
    try:
        if manifest not in receipt.stamps or why_exposed(root / manifest) is not None:
            forget_receipt(root)
        elif read_receipt(root) != receipt:
            receipt.write(root)
    except OSError as error:
        observe(Noted(message=f"receipt: cannot be written ({reason_of(error)})"))
