"""The cache of compiled programs loses what is damaged, and nothing else."""

import warnings

import jax
import pytest

from grokctl.inference.compilation import compiling

READING = "Error reading persistent compilation cache entry for"


@pytest.fixture
def cache(tmp_path):
    """A cache with two programs."""
    for name in ("jit_run-1a-cache", "jit_zeros-2b-cache"):
        (tmp_path / name).write_bytes(b"program")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def compiled(*messages):
    """The notes of a compilation in which JAX warns."""
    notes = []
    with compiling(lambda event: notes.append(event.message)):
        for message in messages:
            warnings.warn(message, UserWarning, stacklevel=1)
    return notes


def names(cache):
    return sorted(path.name for path in cache.iterdir())


def test_only_the_program_that_cannot_be_read_is_deleted(cache):
    (note,) = compiled(f"{READING} 'jit_run': ZstdError: zstd decompress error")

    assert "holds damaged programs" in note
    assert names(cache) == ["jit_zeros-2b-cache"]


def test_the_key_of_a_program_names_it_as_well(cache):
    compiled(f"{READING} 'jit_run-1a': EOFError: ends early")

    assert names(cache) == ["jit_zeros-2b-cache"]


@pytest.mark.parametrize(
    "reason",
    [
        "RuntimeError: Please install the `filelock` package",
        "PermissionError: [Errno 13] Permission denied",
        "Timeout: the lock is held",
    ],
)
def test_a_program_that_was_not_read_is_not_damaged(cache, reason):
    (note,) = compiled(f"{READING} 'jit_run': {reason}", f"{READING} 'jit_zeros': {reason}")

    assert "cannot be kept" in note
    assert len(names(cache)) == 2


@pytest.mark.parametrize(
    "message",
    [
        "Cache value for key 'a' of size 9 bytes exceeds the maximum cache size of 1 bytes",
        "Error writing persistent compilation cache entry for 'jit_run': OSError: full",
        "PERSISTENT CACHE WRITE with key jit_run-1a, this is unexpected",
    ],
)
def test_what_jax_says_of_a_program_that_it_does_not_keep_is_no_damage(cache, message):
    assert compiled(message) == []
    assert len(names(cache)) == 2


def test_a_warning_about_another_matter_is_passed_on(cache):
    about = "PGLE collected an empty trace. Consider populating a persistent compilation cache"

    with pytest.warns(UserWarning, match="PGLE collected"):
        assert compiled(about) == []
    assert len(names(cache)) == 2
