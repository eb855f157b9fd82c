"""Describe in one line whether the content of a checkpoint is proven."""

from pathlib import Path

from grokctl.checkpoint.published import Published
from grokctl.checkpoint.ready_receipt import hashed_before, read_ready_receipt
from grokctl.checkpoint.receipt import Proof
from grokctl.checkpoint.refusal import read_refusal
from grokctl.checkpoint.sums import doubt_of, doubt_unhashed
from grokctl.paths import quoted


def describe_proof(proof: Proof, root: Path) -> str:
    """Whether every byte of a release was proven, and when; or that the last proof failed."""
    refusal = read_refusal(root)
    if refusal is not None:
        return refusal.describe(root)
    receipt = proof.receipt
    if proof.by_hub is not None:
        command = f"grokctl verify {quoted(root)} --torrent-file FILE"
        words = proof.by_hub.root_of_trust
        return f"{root.name}: every file has {words}; the infohash proves none of it ({command})"
    if receipt is None:
        reason = f": {proof.reason}" if proof.reason else ""
        return f"{root.name}: its content is not proven{reason} (grokctl verify {quoted(root)})"
    since, until = receipt.since, receipt.verified_at
    when = f"on {until}" if since == until else f"between {since} and {until}"
    return f"{root.name}: every byte was proven {when}"


def describe_unhashed(source: Published) -> str:
    """That the files of a ready checkpoint are used without a look at their hashes."""
    root = source.root
    refusal = read_refusal(root)
    if refusal is not None:
        return refusal.describe(root)
    doubt = doubt_unhashed(source)
    what = f"; not proven: {doubt}" if doubt else ""
    command = f"grokctl verify {quoted(root)} hashes them"
    return f"{root.name}: files not hashed before use ({command}){what}"


def describe_hashed(source: Published) -> str:
    """That files of a ready checkpoint are hashed on the way or before; what that proves."""
    refusal = read_refusal(source.root)
    if refusal is not None:
        return refusal.describe(source.root)
    doubt = doubt_of(source)
    what = f"; not proven: {doubt}" if doubt else ""
    receipt = read_ready_receipt(source)
    if receipt is not None and hashed_before(source, receipt) >= source.records.keys():
        return f"{source.root.name}: unchanged since its files were hashed, {receipt.since}{what}"
    return f"{source.root.name}: its files are hashed while they are read{what}"
