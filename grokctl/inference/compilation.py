"""The cache of compiled programs, and the warnings of XLA's compiler."""

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import Final

import jax

from grokctl.events import Noted, Observer, ignore
from grokctl.own_cache import make_private
from grokctl.ownership import why_exposed

_UNREADABLE: Final = re.compile(
    r"Error reading persistent compilation cache entry for '([^']+)': (\w+): (.*)", re.DOTALL
)
"""How JAX warns of a kept program that it cannot read: its name, and what was raised."""
_OF_THE_MACHINE: Final = re.compile("RuntimeError|Timeout|OSError|(Permission|FileNotFound)Error")
"""Raised where no program was read: a package is missing, or the system refuses."""
_ABOUT_THE_CACHE: Final = re.compile(
    "Cache value for key .* exceeds the maximum cache size|Error writing persistent compilation"
    "|PERSISTENT CACHE (MISS|WRITE)"
)
"""Other warnings of JAX about its cache: a program is not kept, and the run is none the worse."""


def use_compilation_cache(folder: Path | None, *, observe: Observer = ignore) -> None:
    """Keep compiled programs under `folder`, apart for each jaxlib and platform.

    A kept program is executed, so none is read that another user could have put there; nor from the
    folder of `JAX_COMPILATION_CACHE_DIR`, which JAX keeps where `folder` will not do.

    Args:
        folder: `cache/xla` of a home, created if missing; if it cannot be written, or others can
            write to it, no program is kept. None keeps none of ours.
        observe: Receives a note then.
    """
    _set_aside_foreign(observe)
    if folder is None:
        return
    kept = folder / f"{version('jaxlib')}-{jax.default_backend()}"
    try:
        make_private(kept)
        with tempfile.TemporaryFile(dir=kept):
            pass
    except OSError as error:
        observe(Noted(message=f"{kept}: compiled programs cannot be kept ({error.strerror})"))
        return
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _set_aside_foreign(observe: Observer) -> None:
    """Let JAX read no programs where others could have put them, whoever named the folder."""
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # set at run time
    if not named:
        return
    problem = "it is not on this machine" if "://" in named else why_exposed(Path(named))
    if problem is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        message = f"JAX_COMPILATION_CACHE_DIR: no compiled programs are read there ({problem})"
        observe(Noted(message=message))


@contextmanager
def compiling(observe: Observer) -> Iterator[None]:
    """Compile in here; if a kept program cannot be read, delete it.

    JAX only warns, and never replaces a program that a full disk or a crash cut short.

    Args:
        observe: Receives a note then.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    damaged: set[str] = set()
    refused = ""
    for warning in caught:
        unreadable = _UNREADABLE.match(str(warning.message))
        if unreadable is not None and _OF_THE_MACHINE.fullmatch(unreadable[2]):
            refused = refused or unreadable[3]
        elif unreadable is not None:
            damaged.add(unreadable[1])
        elif _ABOUT_THE_CACHE.match(str(warning.message)) is None:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # set at run time
    if refused:
        observe(Noted(message=f"{folder}: compiled programs cannot be kept ({refused})"))
    if damaged and folder:
        observe(Noted(message=f"{folder}: holds damaged programs, which are compiled again"))
        with suppress(OSError):
            for name in damaged:
                for kept in Path(folder).glob(f"{escape(name)}-*"):
                    kept.unlink()
