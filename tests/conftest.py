"""Sixteen CPU devices, strict promotion, and the miniature that the project carries."""

import atexit
import gc
import os
import secrets
import shutil
import subprocess
import sys
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


_QUICK = "--quick-compilation"
_SETTINGS = tempfile.mkdtemp(prefix="grokctl-settings-")
atexit.register(shutil.rmtree, _SETTINGS, ignore_errors=True)
os.environ["XDG_CONFIG_HOME"] = _SETTINGS  # the key of this run's receipts, not the user's own


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    """A copy of the small golden release that a test may damage."""
    return shutil.copytree(TWO_LAYERS, tmp_path / "two-layers")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the compilation that takes half the time."""
    parser.addoption(
        _QUICK,
        action="store_true",
        help="compile without XLA's fusion emitters; leaves out tests marked optimized or fused",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Tell XLA, which reads its flags once, and neither grokctl nor the processes it starts."""
    given = os.environ.get("XLA_FLAGS")
    flags = f"{given or ''} --xla_cpu_use_fusion_emitters=false"
    if not config.getoption(_QUICK) or not _are_known(flags):
        return
    os.environ["XLA_FLAGS"] = flags
    from jaxlib import xla_client  # noqa: PLC0415  # after the environment above

    xla_client.CompileOptions()
    del os.environ["XLA_FLAGS"]
    if given is not None:
        os.environ["XLA_FLAGS"] = given


def _are_known(flags: str) -> bool:
    """Whether XLA has these flags: it ends the process over others, and newer ones lack this."""
    command = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    return done.returncode == 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the quick compilation is not for; the Makefile runs it afterwards."""
    as_users = [item for item in items if _compiles_as_users(item)]
    for item in as_users:
        folder = item.path.relative_to(Path(__file__).parent).parent.as_posix()
        if folder not in {"integration/inference", "unit/model"}:
            raise pytest.UsageError(f"{item.nodeid}: the Makefile looks for its mark elsewhere")
    if config.getoption(_QUICK) and as_users:
        config.hook.pytest_deselected(items=as_users)
        items[:] = [item for item in items if not _compiles_as_users(item)]


def _compiles_as_users(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("optimized", "fused"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Compile what a test marked `optimized` needs as users do, its fixtures' programs, too."""
    if item.get_closest_marker("optimized") is None:
        return (yield)
    with _optimizations():
        return (yield)


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
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles faster, but see the marks
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
