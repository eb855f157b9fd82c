"""Folders that look like checkpoints, and hold nothing."""

from pathlib import Path


def make_release(path: Path) -> Path:
    """One that looks like a release."""
    (path / "ckpt-0").mkdir(parents=True)
    return path


def make_ready(path: Path) -> Path:
    """One that looks like a ready checkpoint."""
    path.mkdir(parents=True)
    (path / "grokctl.json").write_text("{}")
    return path
