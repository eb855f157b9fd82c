"""The key of this user, and the MACs that show which records this user's grokctl wrote.

An archive belongs to who extracts it, and a drive brings inodes and times as it was given them: to
own a record is not to have written it. Its MAC shows that. The key lies with the user's settings
and not in the home of checkpoints, which can itself come from an archive or on a drive.
"""

import errno
import fcntl
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import platformdirs

from grokctl.own_files import create, open_own, opened_folder
from grokctl.ownership import why_exposed

MAC: Final = "mac"
"""The key of a record's MAC."""
_NAME: Final = "proof.key"
_NBYTES: Final = 32
_OTHERS: Final = 0o077


class KeyTroubleError(OSError):
    """The key of this user cannot be read, made or believed."""

    def __init__(self, path: Path | None, problem: str) -> None:
        place = "" if path is None else f", {path}"
        super().__init__(errno.EACCES, f"the key of this user{place}: {problem}")


def key_file() -> Path | None:
    """The file of the key, which need not be there; None if this user has no home folder."""
    try:
        path = platformdirs.user_config_path("grokctl", appauthor=False) / _NAME
    except RuntimeError:
        return None
    return path if path.is_absolute() else None


def sealed(kind: str, record: Mapping[str, object]) -> dict[str, object]:
    """A record with the MAC of this user; the first makes the key.

    Args:
        kind: What it is, so that it passes for nothing else.
        record: Values of JSON.

    Raises:
        KeyTroubleError: There is no key, and none can be made; or others could know or exchange it.
    """
    return {**record, MAC: _mac(_key(make=True), kind, record)}


def why_not_sealed(kind: str, record: Mapping[str, Any]) -> str | None:
    """The reason why a record may not be this user's; None if it has the right MAC.

    Args:
        kind: As for `sealed`.
        record: With its MAC.
    """
    found = record.get(MAC)
    if not isinstance(found, str):
        return "has no MAC of this user"
    try:
        expected = _mac(_key(), kind, {name: record[name] for name in record if name != MAC})
    except KeyTroubleError as error:
        return f"its MAC cannot be checked: {error.strerror}"
    except RecursionError:
        return "is nested too deeply"
    if hmac.compare_digest(found.encode("utf-8", "surrogatepass"), expected.encode()):
        return None
    return f"its MAC is of another key than that of this user, {key_file()}"


def _mac(key: bytes, kind: str, record: Mapping[str, object]) -> str:
    """HMAC-SHA256 (RFC 2104) over the values, however the JSON is laid out."""
    text = json.dumps([f"grokctl {kind}", record], sort_keys=True, separators=(",", ":"))
    return hmac.digest(key, text.encode(), "sha256").hex()


def _key(*, make: bool = False) -> bytes:
    path = key_file()
    if path is None:
        raise KeyTroubleError(None, "there is no home folder")
    try:
        if make and not os.path.lexists(path):
            _make(path)
        return _read(path)
    except KeyTroubleError:
        raise
    except OSError as error:
        raise KeyTroubleError(path, error.strerror or str(error)) from error


def _read(path: Path) -> bytes:
    _refuse_exposed(path)
    with opened_folder(path.parent) as folder:
        handle = open_own(path.name, folder, path, flags=os.O_RDONLY)
    try:
        mode, key = os.fstat(handle).st_mode, os.read(handle, _NBYTES + 1)
    finally:
        os.close(handle)
    if mode & _OTHERS:
        raise KeyTroubleError(path, "can be read by others (rm it, and everything is proven again)")
    if len(key) != _NBYTES:
        raise KeyTroubleError(path, f"expected {_NBYTES} bytes, found {len(key)} (rm it)")
    return key


def _refuse_exposed(path: Path) -> None:
    if (exposure := why_exposed(path)) is not None:
        raise KeyTroubleError(path, exposure)


def _make(path: Path) -> None:
    """Make a key, unless another process does at this moment.

    Raises:
        OSError: It cannot be made here, or nobody could believe it.
    """
    _make_folders(path)
    _refuse_exposed(path)
    with opened_folder(path.parent) as folder:
        with suppress(OSError):  # some file systems have no locks; then the last key stays
            fcntl.flock(folder, fcntl.LOCK_EX)
        if os.path.lexists(path):
            return
        temporary = f".{path.name}.{secrets.token_hex(8)}"
        handle = create(temporary, folder, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_NBYTES))
                file.flush()
                os.fsync(handle)
            os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise


def _make_folders(path: Path) -> None:
    """Make the folders above the key; root makes none in the home of somebody else (`sudo`)."""
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    above = path.parents[len(missing)]
    if above.stat().st_uid != os.geteuid():
        raise KeyTroubleError(path, f"{above} belongs to another user")
    for folder in reversed(missing):
        with suppress(FileExistsError):
            folder.mkdir(0o700)
