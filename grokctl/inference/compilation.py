"""The cache of compiled programs, and the warnings of XLA's compiler."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import jax

from grokctl.events import Noted, Observer, ignore


def use_compilation_cache(folder: Path, *, observe: Observer = ignore) -> None:
    """Keep compiled programs under `folder`, apart for each jaxlib and platform.

    Args:
        folder: Created if missing; if it cannot be written, no program is kept.
        observe: Receives a note then.
    """
    kept = folder / f"{version('jaxlib')}-{jax.default_backend()}"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kept):
            pass
    except OSError as error:
        observe(Noted(message=f"{kept}: compiled programs cannot be kept ({error.strerror})"))
        return
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@contextmanager
def compiling(observe: Observer) -> Iterator[None]:
    """Compile in here; if a kept program cannot be read, delete all of them.

    JAX only warns, and never replaces a program that a full disk or a crash cut short.

    Args:
        observe: Receives a note then.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    is_broken = False
    for warning in caught:
        if "persistent compilation cache" in str(warning.message):
            is_broken = True
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # set at run time
    if is_broken and folder:
        observe(Noted(message=f"{folder}: holds damaged programs, so all are compiled again"))
        with suppress(OSError):
            for kept in Path(folder).glob("jit_*"):
                kept.unlink()
