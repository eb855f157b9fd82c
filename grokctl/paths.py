"""Paths: home, checkpoint names and file names; atomic writes, and locks."""

import errno
import fcntl
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from grokctl.errors import GrokctlError, UsageError

CKPT = "ckpt-0"
TOKENIZER = "tokenizer.model"
CONFIG = "config.json"
TORRENT = "release.torrent"
MANIFEST = "grokctl.json"
PRIVATE = ".grokctl"
"""The folder of grokctl's own files in a release."""


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of all checkpoints and caches."""

    root: Path

    @property
    def releases(self) -> Path:
        """The folder of downloads."""
        return self.root / "releases"

    @property
    def ready(self) -> Path:
        """The folder of ready checkpoints."""
        return self.root / "ready"

    @property
    def xla_cache(self) -> Path:
        """JAX's persistent compilation cache."""
        return self.root / "cache" / "xla"

    def ready_checkpoints(self) -> list[Path]:
        """All ready checkpoints, by name."""
        return sorted(path for path in _folders(self.ready) if _is_kind(path, "ready"))

    def find(self, name: str | None, *, releases: bool = True, ready: bool = True) -> Path:
        """Find a checkpoint.

        Args:
            name: A name under home, a path, or None for the only candidate.
            releases: Whether a release is acceptable.
            ready: Whether a ready checkpoint is acceptable.

        Returns:
            The folder of the checkpoint.

        Raises:
            UsageError: There is none, there are several, or it is of the wrong kind.
        """
        kinds = [kind for kind, wanted in (("ready", ready), ("release", releases)) if wanted]
        if name is not None:
            return self._named(name, kinds)
        for kind in kinds:
            folder = self.ready if kind == "ready" else self.releases
            candidates = sorted(path for path in _folders(folder) if _is_kind(path, kind))
            if len(candidates) > 1:
                names = ", ".join(path.name for path in candidates)
                raise UsageError(
                    f"several checkpoints under {folder}: {names}",
                    f"name one, such as {candidates[0]}",
                )
            if candidates:
                return candidates[0]
        raise UsageError(
            f"no checkpoint under {self.root}",
            "grokctl fetch" if releases else "grokctl reshard --devices 8",
        )

    def _named(self, name: str, kinds: list[str]) -> Path:
        candidates = [self.ready / name, self.releases / name] if os.sep not in name else []
        for path in [*candidates, Path(name)]:
            if kind_of(path) in kinds:
                return path
        for path in [*candidates, Path(name)]:
            if kind_of(path) is not None:
                raise UsageError(
                    f"{name}: expected a {kinds[0]} checkpoint, found a {kind_of(path)} one"
                )
        if _is_folder(Path(name)):
            raise UsageError(f"{name}: expected a checkpoint, found neither {CKPT}/ nor {MANIFEST}")
        raise UsageError(
            f"{name}: no such checkpoint", f"ls {quoted(self.releases)} {quoted(self.ready)}"
        )


def default_home() -> Path:
    """`$GROKCTL_HOME`, or the platform's folder for user data.

    Raises:
        UsageError: The user has no home, as in a container with an arbitrary user id.
    """
    named = os.environ.get("GROKCTL_HOME")
    if named:
        return Path(named)
    try:
        return platformdirs.user_data_path("grokctl", appauthor=False)
    except RuntimeError as error:
        raise UsageError(
            "home: this user has no home folder for checkpoints",
            "export GROKCTL_HOME=/a/folder",
        ) from error


def kind_of(path: Path) -> str | None:
    """The kind of checkpoint in a folder: `ready`, `release`, or None.

    Raises:
        OSError: The machine refuses to look at it.
    """
    try:
        if (path / MANIFEST).is_file():
            return "ready"
        is_release = (path / CKPT).is_dir() or (path / PRIVATE / UNFINISHED).is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise
    return "release" if is_release else None


def _is_kind(path: Path, kind: str) -> bool:
    """Whether a folder of ours is of a kind; one that others closed to us is of none."""
    try:
        return kind_of(path) == kind
    except PermissionError:
        return False


def quoted(value: Path | str) -> str:
    """A path or a word, quoted for a shell."""
    return shlex.quote(str(value))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _folders(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that its name has either the old content or all of the new one, on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, *, busy: GrokctlError, is_folder: bool = False) -> Iterator[None]:
    """Lock a file or a folder; the system releases the lock however this process ends.

    Args:
        path: A file, created if needed, or an existing folder.
        busy: Raised if another process has the lock.
        is_folder: Whether it is a folder.

    Raises:
        GrokctlError: `busy`.
        OSError: It cannot be opened.
    """
    makes = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY if is_folder else makes, 0o644)
    try:
        with suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise busy from error
        yield
    finally:
        os.close(handle)


UNFINISHED: Final = "unfinished.json"
"""Record of a download that has begun and is not complete."""

REFUSAL: Final = "refusal.json"
"""Record of the last full verification that found damage."""

RESUME: Final = "resume"
"""Resume data from the end of a fetch, in the release's private folder."""

BEGUN: Final = "resume.begun"
"""Resume data from a fetch that is running, or was killed."""

LOCK: Final = "lock"
"""Locked by a running fetch; it is never deleted, because that would be a race."""
