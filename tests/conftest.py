"""Sixteen CPU devices, strict promotion, and the miniature that the project carries."""

import atexit
import gc
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
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


_SETTINGS = tempfile.mkdtemp(prefix="grokctl-settings-")
atexit.register(shutil.rmtree, _SETTINGS, ignore_errors=True)
os.environ["XDG_CONFIG_HOME"] = _SETTINGS  # the key of this run's receipts, not the user's own


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


def _share_compiled_programs() -> Path:
    """Compile each program once a run; a folder for each worker, as writes are not atomic."""
    # a name that nobody guesses: JAX executes what it finds there
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex(16))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = Path(tempfile.gettempdir(), f"grokctl-xla-{run}", worker, f"{version('jaxlib')}-cpu")
    folder.mkdir(parents=True)
    atexit.register(_delete, folder.parent)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles faster, but see `optimized`
    return folder


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # others are still there
        folder.parent.rmdir()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage among modules and tests, which stay to the end: now, or at any test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


_PROGRAMS = _share_compiled_programs()
_WRITTEN_S = 2.0
"""Age of a program that is written completely; others are looked for as often."""


def pytest_runtest_setup() -> None:
    """Link the programs that other workers have compiled.

    Not before each test: to look through some thousand names takes as long as most tests.
    """
    now = time.time()
    if now < _looked[-1] + _WRITTEN_S:
        return
    _looked[:] = [now]
    for folder in _PROGRAMS.parents[1].glob(f"*/{_PROGRAMS.name}"):
        with suppress(FileNotFoundError):  # the worker has ended
            for entry in os.scandir(folder):
                if entry.name not in _linked and entry.stat().st_mtime < now - _WRITTEN_S:
                    _linked.add(entry.name)
                    with suppress(FileExistsError):
                        os.link(entry.path, _PROGRAMS / entry.name)


_looked = [0.0]
"""When other workers' programs were looked for."""
_linked: set[str] = set()
"""Names of the programs that lie in this worker's folder for good."""
