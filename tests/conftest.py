"""Sixteen CPU devices, strict promotion, and the miniature that the project carries."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest
from places import TWO_LAYERS

# bounds on time are for hangs: a loaded machine is no fault of a strategy
hypothesis.settings.register_profile(
    "loaded", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("loaded")

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    """A copy of the small golden release that a test may damage."""
    return shutil.copytree(TWO_LAYERS, tmp_path / "two-layers")


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Compile the programs of a module as users do, because its numbers depend on it.

    The memory that XLA reports does not.
    """
    with _optimizations():
        yield


@pytest.fixture
def optimized_here() -> Iterator[None]:
    """The same in one test."""
    with _optimizations():
        yield


@contextmanager
def _optimizations() -> Iterator[None]:
    import jax  # noqa: PLC0415  # after the environment above

    name = "jax_disable_most_optimizations"
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, True)


@pytest.fixture(scope="session")
def xla_cache() -> Path:
    """What `cache/xla` of a home may link to: the compiled programs of this run."""
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent


def _share_compiled_programs() -> None:
    """Compile each program once a run; a folder for each worker, as writes are not atomic."""
    folder = tempfile.mkdtemp(prefix="grokctl-xla-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/{version('jaxlib')}-cpu"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles faster, but see `optimized`


_share_compiled_programs()
