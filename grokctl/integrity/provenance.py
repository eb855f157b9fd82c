"""Describe in one line whether the content of a checkpoint is proven."""

from pathlib import Path

from grokctl.checkpoint.receipt import Receipt
from grokctl.checkpoint.refusal import read_refusal
from grokctl.paths import quoted


def describe_proof(receipt: Receipt | None, root: Path) -> str:
    """Whether every byte of a release was proven, and when; or that the last proof failed."""
    refusal = read_refusal(root)
    if refusal is not None:
        return refusal.describe(root)
    if receipt is None:
        return f"{root.name}: its content is not proven (grokctl verify {quoted(root)})"
    since, until = receipt.since, receipt.verified_at
    when = f"on {until}" if since == until else f"between {since} and {until}"
    return f"{root.name}: every byte was proven {when}"


def describe_unhashed(root: Path) -> str:
    """That the files of a ready checkpoint are used without a look at their hashes."""
    refusal = read_refusal(root)
    if refusal is not None:
        return refusal.describe(root)
    return f"{root.name}: files not hashed before use (grokctl verify {quoted(root)} hashes them)"
