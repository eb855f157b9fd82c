"""What the unit tests share: the genuine two-layer release, and its files by name."""

import shutil
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The genuine release itself; read only."""
    return DATA / "two-layers"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the genuine release, to damage."""
    root = tmp_path / "release"
    shutil.copytree(DATA / "two-layers" / "ckpt-0", root / "ckpt-0")
    shutil.copy(DATA / "two-layers" / "config.json", root)
    return root
