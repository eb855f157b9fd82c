"""Paths: home, checkpoint names and file names; atomic writes, and locks."""

import errno
import fcntl
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from grokctl.errors import GrokctlError, UsageError
from grokctl.os_errors import NotAFileError, TooLargeError, located
from grokctl.own_files import FOLDER, create, opened_folder, why_not_own
from grokctl.system import optional

CKPT = "ckpt-0"
TOKENIZER = "tokenizer.model"
CONFIG = "config.json"
TORRENT = "release.torrent"
MANIFEST = "grokctl.json"
EXPORT_MANIFEST: Final = "grokctl-export.json"
ADOPTED: Final = "adopted"
"""The folder of links to releases elsewhere, in home."""
PRIVATE = ".grokctl"
"""The folder of grokctl's own files in a release."""
LARGEST_TOKENIZER: Final = 64 * 2**20
"""Bytes of a tokenizer; Grok-1's has two million."""
_STEP: Final = 2**16
_LONGEST_PREFIX: Final = 60
"""Characters of a name that a temporary name keeps: even of four bytes each, it fits."""


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
    def exports(self) -> Path:
        """The folder of exports."""
        return self.root / "exports"

    @property
    def adopted(self) -> Path:
        """Links to releases elsewhere, and their proofs."""
        return self.root / ADOPTED

    @property
    def xla_cache(self) -> Path:
        """JAX's persistent compilation cache."""
        return self.root / "cache" / "xla"

    @property
    def native_cache(self) -> Path:
        """Libraries of the CPU's kernel that were compiled here."""
        return self.root / "cache" / "native"

    @property
    def routing(self) -> Path:
        """Counts of the experts that texts have used."""
        return self.root / "routing"

    @property
    def cluster_key(self) -> Path:
        """The secret by which the processes of a run know each other."""
        return self.root / "cluster.key"

    def ready_checkpoints(self) -> list[Path]:
        """All ready checkpoints, by name."""
        return sorted(path for path in folders_in(self.ready) if _is_kind(path, "ready"))

    def kept_releases(self) -> list[Path]:
        """All releases, by name."""
        return sorted(path for path in folders_in(self.releases) if _is_kind(path, "release"))


def default_home() -> Path:
    """`$GROKCTL_HOME`, or the platform's folder for user data.

    Raises:
        UsageError: The user has no home, as in a container with an arbitrary user id.
    """
    named = os.environ.get("GROKCTL_HOME", "").strip()
    if named:
        return typed_path(unquoted(named), "GROKCTL_HOME")
    try:
        folder = platformdirs.user_data_path("grokctl", appauthor=False)
    except RuntimeError as error:
        raise UsageError(
            "home: this user has no home folder for checkpoints",
            "export GROKCTL_HOME=/a/folder",
        ) from error
    return typed_path(str(folder), "home")


def unquoted(value: str) -> str:
    """The value of a variable without the quotes that files of variables keep."""
    is_quoted = value[:1] in {"'", '"'} and value[0] == value[-1]
    return value[1:-1] if is_quoted else value


def typed_path(text: str, name: str) -> Path:
    """A path as a user typed it, with the user's home for `~` and `$HOME`.

    Shells leave them in `--to=~/grok`, in quotes, in Dockerfiles and in service files.

    Args:
        text: As it was typed.
        name: Of the option or variable, for errors.

    Raises:
        UsageError: It is empty, not UTF-8, or begins in a home that this user does not have.
    """
    if not text:
        raise UsageError(f"{name}: expected a path, found nothing", f"{name} ./folder")
    path = expanded(text)
    require_utf8(path, name)
    return path


def expanded(text: str) -> Path:
    """A path with the user's home for `~`, `~user` and `$HOME` at its beginning.

    Raises:
        UsageError: This user has no home folder.
    """
    match = re.match(r"(?:~|\$HOME|\$\{HOME\})(?=/|$)", text)
    typed = text if match is None else f"~{text[match.end() :]}"
    whole = os.path.expanduser(typed)  # noqa: PTH111 (pathlib takes ./~ for ~, and raises)
    if match is not None and (whole == typed or os.environ.get("HOME") == ""):
        raise UsageError(f"{text}: this user has no home folder", "echo $HOME")
    if typed.startswith("~") and whole == typed and not os.path.lexists(typed):
        raise UsageError(f"{text}: no such user", quoted(f"./{text}"))
    return Path(whole)


def require_utf8(path: Path, name: str) -> None:
    """Refuse a path whose bytes on the disk are not UTF-8: C++ libraries need that.

    Raises:
        UsageError: They are not, or an older locale gives them another meaning.
    """
    whole = os.path.abspath(path)  # noqa: PTH100 (pathlib's looks no different, and keeps ..)
    with suppress(UnicodeError):
        if os.fsencode(whole) == whole.encode():
            return
    data = os.fsencode(whole) if whole.isascii() else whole.encode("utf-8", "surrogateescape")
    shown = repr(data)[2:-1]
    raise UsageError(
        f"{name}: expected a path in UTF-8, found {shown}",
        "export LC_ALL=C.UTF-8  # or rename the folder",
    )


PUBLISHED: Final = frozenset({"ready", "export"})
"""Kinds of folders that are made of a checkpoint, with a manifest that has the sums of files."""


def kind_of(path: Path) -> str | None:
    """The kind of checkpoint in a folder: `ready`, `export`, `release`, or None.

    Raises:
        OSError: The machine refuses to look at it.
    """
    try:
        if (path / MANIFEST).is_file():
            return "ready"
        if (path / EXPORT_MANIFEST).is_file():
            return "export"
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


def folders_in(path: Path) -> list[Path]:
    """The folders in a folder, and links to such; none if it is not there."""
    return [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that its name has either the old content or all of the new one, on disk.

    Args:
        path: The file.
        data: All of its new content.
        mode: Its permissions, as far as the umask allows them.

    Raises:
        OSError: The file cannot be written, or the name belongs to a folder, a device or a pipe.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _folder_of(path) as folder:
        with suppress(FileNotFoundError):
            kind = os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode
            if not any(is_type(kind) for is_type in (stat.S_ISREG, stat.S_ISLNK, stat.S_ISDIR)):
                raise OSError(errno.EINVAL, "is not a regular file", str(path))
        handle, temporary = _create_hidden(path.name, folder, mode)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                with optional():
                    os.fsync(file.fileno())
            os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            if error.filename in {None, temporary}:
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise
        fsync_folder(folder)


def delete_record(path: Path) -> None:
    """Delete a file of our own, if it is there; our private folder is never a link.

    Raises:
        OSError: It cannot be deleted, or is in a folder that is a link to somewhere else.
    """
    if os.path.lexists(path):
        with suppress(FileNotFoundError), _folder_of(path) as folder:
            os.unlink(path.name, dir_fd=folder)


def rename_record(path: Path, name: str) -> None:
    """Give a file of our own another name in its folder, which is never a link if it is private.

    Raises:
        OSError: It is not there, or is in a folder that is a link to somewhere else.
    """
    with _folder_of(path) as folder:
        os.rename(path.name, name, src_dir_fd=folder, dst_dir_fd=folder)


@contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    """Open the folder of a file that we write: our private one is never a link."""
    if path.parent.name != PRIVATE:
        with opened_folder(path.parent) as folder:
            yield folder
        return
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link, expected a folder", str(path.parent))
    with opened_folder(path.parent.parent) as root, opened_folder(PRIVATE, above=root) as folder:
        yield folder


def read_limited(path: Path, most: int) -> bytes:
    """Read a small file that others may have made; a large one, also one of holes, costs nothing.

    Args:
        path: The file.
        most: Bytes that a file of its kind can have.

    Raises:
        TooLargeError: It has more, or grows.
        OSError: It cannot be read, or is a pipe, which one would wait for, or a device.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise NotAFileError(path)
        if status.st_size > most:
            raise TooLargeError(path, most=most, found=status.st_size)
        with open(handle, "rb", closefd=False) as file:
            data = file.read(min(most, status.st_size) + 1)
            # it grows, or hides its size
            while more := file.read(min(_STEP, most + 1 - len(data))):
                data += more
    except OSError as error:
        raise located(error, path) from error
    finally:
        os.close(handle)
    if len(data) > most:
        raise TooLargeError(path, most=most, found=len(data))
    return data


def create_beside(path: Path, mode: int = 0o666) -> tuple[int, Path]:
    """Create a hidden file in the folder of another; the umask limits its mode.

    Returns:
        A descriptor to write to, and the path.
    """
    with _folder_of(path) as folder:
        handle, name = _create_hidden(path.name, folder, mode)
    return handle, path.with_name(name)


def _create_hidden(name: str, folder: int, mode: int = 0o666) -> tuple[int, str]:
    while True:
        temporary = f".{name[:_LONGEST_PREFIX]}.{secrets.token_hex(4)}"
        with suppress(FileExistsError):
            return create(temporary, folder, mode), temporary


def fsync_folder(folder: int) -> None:
    """Make renames and new names in an open folder durable, where that is possible."""
    # CIFS refuses with the first, and a folder that may not be listed with the second
    with optional(errno.EACCES, errno.EBADF):
        os.fsync(folder)


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
    handle = os.open(path, FOLDER) if is_folder else _open_lock(path)
    try:
        with locked_open(handle, busy=busy):
            yield
    finally:
        os.close(handle)


@contextmanager
def locked_open(handle: int, *, busy: GrokctlError) -> Iterator[None]:
    """The same of an open file or folder; it is unlocked when it is closed.

    Raises:
        GrokctlError: `busy`.
    """
    with suppress(OSError):  # some file systems have no locks
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
    yield


def _open_lock(path: Path) -> int:
    """Open or create a file to lock; one that another user created may only be readable.

    Whoever can open it can lock it, so it is closed to all who cannot write to its folder.
    """
    with _folder_of(path) as folder:
        mode = 0o600
        for who, rights in ((stat.S_IWGRP, 0o060), (stat.S_IWOTH, 0o006)):
            mode |= rights if os.fstat(folder).st_mode & who else 0
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = os.open(path.name, flags | os.O_RDWR | os.O_CREAT, mode, dir_fd=folder)
        except PermissionError:
            return os.open(path.name, flags | os.O_RDONLY, dir_fd=folder)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    status = os.fstat(handle)
    if why_not_own(status) is None and stat.S_IMODE(status.st_mode) & ~mode:
        with optional():  # an earlier version let everybody read it
            os.fchmod(handle, stat.S_IMODE(status.st_mode) & mode)
    return handle


UNFINISHED: Final = "unfinished.json"
"""Record of a download that has begun and is not complete."""

REFUSAL: Final = "refusal.json"
"""Record of the last full verification that found damage."""

RESUME: Final = "resume"
"""Resume data from the end of a fetch, in the release's private folder."""

BEGUN: Final = "resume.begun"
"""Resume data from a fetch that is running, or was killed."""

REPLACED: Final = "replaced"
"""Folder of what a fetch found in place of its own files."""

ADOPTION: Final = "adoption.json"
"""Record of a folder of others that a fetch has not yet made its own."""

LOCK: Final = "lock"
"""Locked by a running fetch; it is never deleted, because that would be a race."""
