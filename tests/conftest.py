"""Sixteen CPU devices, strict promotion, and the miniature that the project carries."""

import os
import shutil
from pathlib import Path

import pytest
from places import TWO_LAYERS

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    """A copy of the small golden release that a test may damage."""
    return shutil.copytree(TWO_LAYERS, tmp_path / "two-layers")
