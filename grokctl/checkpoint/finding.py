"""Which checkpoint a command means: the same rule for all commands."""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.adopted import adopt, is_adopted
from grokctl.checkpoint.folders import ReleaseFolder, release_folder, words_for
from grokctl.checkpoint.ready import read_manifest
from grokctl.errors import GrokctlError, UsageError
from grokctl.ownership import why_exposed
from grokctl.paths import CKPT, MANIFEST, TORRENT, Home, expanded, kind_of, quoted
from grokctl.text import printable

_MOST_LISTED: Final = 8
_LONGEST_NAME: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint, and where it came from."""

    root: Path
    """A folder that holds `ckpt-0` or a manifest."""
    shown: Path
    """The folder as the user knows it: another one if the root is one of links under home."""
    folder: ReleaseFolder | None = None
    """The release, if it lies elsewhere than grokctl would put it."""
    note: str | None = None
    """What was taken, and what else was there; None if nothing else was meant."""


def find_checkpoint(
    home: Home, name: str | None, *, releases: bool = True, ready: bool = True
) -> Found:
    """Find a checkpoint.

    Without a name, a ready checkpoint comes before a release, and of several ready checkpoints of
    one model the one that was made last. Several models are never guessed between.

    Args:
        home: Where checkpoints are kept.
        name: A name under home, a path, or None.
        releases: Whether the command works on a release.
        ready: Whether the command works on a ready checkpoint.

    Raises:
        UsageError: There is none, there are several, or it is of the wrong kind.
    """
    kinds = [kind for kind, wanted in (("ready", ready), ("release", releases)) if wanted]
    return _unnamed(home, kinds) if name is None else _named(home, name, kinds)


def _unnamed(home: Home, kinds: Sequence[str]) -> Found:
    for kind in kinds:
        candidates = home.ready_checkpoints() if kind == "ready" else home.kept_releases()
        if not candidates:
            continue
        if len(candidates) > 1:
            last = _last_of_one_model(candidates) if kind == "ready" else None
            if last is None:
                names = ", ".join(path.name for path in candidates)
                raise UsageError(
                    f"several checkpoints under {candidates[0].parent}: {names}",
                    f"CHECKPOINT {quoted(candidates[0])}",
                )
        else:
            (last,) = candidates
        return Found(root=last, shown=last, note=note_of(home, last))
    raise UsageError(
        f"no checkpoint under {home.root}",
        "grokctl fetch" if "release" in kinds else "grokctl reshard --devices 8",
    )


def note_of(home: Home, taken: Path) -> str | None:
    """The line about a checkpoint that was taken without a name; None if it is the only one."""
    others = [path for path in _kept(home) if path != taken]
    if not others:
        return None
    return f"checkpoint: {_kind_and_name(taken)}; also there: {_listed(others)}"


def _last_of_one_model(roots: Sequence[Path]) -> Path | None:
    """The ready checkpoint that was made last, if all are of one model."""
    try:
        manifests = [read_manifest(root, is_checked=False) for root in roots]
        times = [(root / MANIFEST).stat().st_mtime_ns for root in roots]
    except (GrokctlError, OSError):
        return None
    if len({(ready.source.name, ready.config) for ready in manifests}) != 1:
        return None
    return max(zip(times, roots, strict=True))[1]


def _named(home: Home, name: str, kinds: Sequence[str]) -> Found:
    candidates = [home.ready / name, home.releases / name] if os.sep not in name else []
    candidates.append(expanded(name))
    for path in candidates:
        if kind_of(path) in kinds:
            return _found(home, path)
    for path in candidates:
        if (kind := kind_of(path)) is not None:
            raise UsageError(f"{name}: expected a {kinds[0]} checkpoint, found a {kind} one")
    path = expanded(name)
    folder, words = _looked_at(path)
    if folder is not None and "release" in kinds:
        return _elsewhere(home, path, folder)
    raise _not_found(home, name, "a release" if folder is not None else words)


def _looked_at(path: Path) -> tuple[ReleaseFolder | None, str | None]:
    """The release at a path, or words for what is there."""
    try:
        return release_folder(path), words_for(path)
    except ValueError:  # no file can have this name
        return None, None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return None, None


def _not_found(home: Home, name: str, words: str | None) -> UsageError:
    if words is not None:
        problem = f"found {words}" if words != "a folder" else f"found neither {CKPT}/ nor "
        problem += MANIFEST if words == "a folder" else ""
        return UsageError(f"{name}: expected a checkpoint, {problem}", _list_of(home))
    shown = printable(name, limit=_LONGEST_NAME)
    there = list(_kept(home))
    message = f"{shown}: no such checkpoint; there is {_listed(there) if there else 'none'}"
    return UsageError(f"{message} under {home.root}", _list_of(home))


def _list_of(home: Home) -> str:
    kept = [folder for folder in (home.releases, home.ready) if folder.is_dir()]
    return f"ls {' '.join(map(quoted, kept))}" if kept else "grokctl fetch"


def _found(home: Home, path: Path) -> Found:
    """A folder of the usual shape; one with its torrent under home is the folder of links.

    A torrent that others could have put there does not replace the one under home.
    """
    if kind_of(path) == "release" and (path / CKPT).is_dir():
        folder = ReleaseFolder(path, path / CKPT)
        has_torrent = (path / TORRENT).is_file()
        is_believed = has_torrent and why_exposed(path / TORRENT) is None
        if not is_believed and is_adopted(home, folder):
            root = adopt(home, folder)
            return Found(root=root, shown=path, folder=folder)
        if not has_torrent:
            return Found(root=path, shown=path, folder=folder)
    return Found(root=path, shown=path)


def _elsewhere(home: Home, path: Path, folder: ReleaseFolder) -> Found:
    """A release in another shape, as a folder of links under home if it needs one."""
    note = f"{path}: the release is {folder.tensors if not folder.is_usual else folder.root}"
    if folder.is_usual:
        found = _found(home, folder.root)
        return Found(root=found.root, shown=found.shown, folder=found.folder, note=note)
    return Found(root=adopt(home, folder), shown=path, folder=folder, note=note)


def _kept(home: Home) -> Iterator[Path]:
    yield from home.ready_checkpoints()
    yield from home.kept_releases()


def _kind_and_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _listed(paths: Sequence[Path]) -> str:
    names = [_kind_and_name(path) for path in paths[:_MOST_LISTED]]
    more = len(paths) - _MOST_LISTED
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")
