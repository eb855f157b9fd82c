"""Copies of a release, as grokctl and other tools leave them."""

import os
import shutil
from pathlib import Path

TENSOR = "ckpt-0/tensor00003_000"


def copied(seeded, root: Path) -> Path:
    """The release as a clone of the hub's repository has it."""
    for name in seeded.files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(seeded.root / name, root / name)
    return root


def linked(seeded, root: Path, blobs: Path) -> Path:
    """The release as the hub's cache has it."""
    blobs.mkdir()
    for number, name in enumerate(seeded.files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(seeded.root / name, blobs / str(number))
        (root / name).symlink_to(os.path.relpath(blobs / str(number), (root / name).parent))
    return root


def flip(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return bytes(data)
