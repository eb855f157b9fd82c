"""What the unit tests share: the genuine two-layer release, and its files by name."""

import shutil
from pathlib import Path

import pytest
from places import TWO_LAYERS


@pytest.fixture(scope="session")
def golden() -> Path:
    """The genuine release itself; read only."""
    return TWO_LAYERS


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the genuine release, to damage."""
    root = tmp_path / "release"
    shutil.copytree(TWO_LAYERS / "ckpt-0", root / "ckpt-0")
    shutil.copy(TWO_LAYERS / "config.json", root)
    return root


@pytest.fixture
def precious(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that somebody would like to see overwritten."""
    path = tmp_path_factory.mktemp("victim") / "thesis"
    path.write_text("mine")
    return path
