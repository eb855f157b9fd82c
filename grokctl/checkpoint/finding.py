"""Which checkpoint a command means: the same rule for all commands."""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from grokctl.checkpoint.adopted import adopt, adopted_root, is_adopted, is_proven_at_home
from grokctl.checkpoint.folders import (
    TAR,
    ReleaseFolder,
    is_of_links,
    release_folder,
    releases_in,
    words_for,
)
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
    home: Home,
    name: str | None,
    *,
    releases: bool = True,
    ready: bool = True,
    exports: bool = False,
) -> Found:
    """Find a checkpoint.

    Without a name, a ready checkpoint comes before a release, and of several ready checkpoints of
    one model the one that was made last. Several models are never guessed between.

    Args:
        home: Where checkpoints are kept.
        name: A name under home, a path, or None.
        releases: Whether the command works on a release.
        ready: Whether the command works on a ready checkpoint.
        exports: Whether it works on an export, which is never meant without a name.

    Raises:
        UsageError: There is none, there are several, or it is of the wrong kind.
    """
    kinds = [kind for kind, wanted in (("ready", ready), ("release", releases)) if wanted]
    if name is None:
        return _unnamed(home, kinds)
    return _named(home, name, [*kinds, "export"] if exports else kinds)


def shown_places(home: Home, name: str | None) -> Iterator[tuple[Path, Path]]:
    """Folders of links under home that the checkpoint of a command may have, and what they are of.

    Messages name the second, which the user knows.

    Args:
        home: Where checkpoints are kept.
        name: A name under home, a path, or None.
    """
    for path in home.kept_releases() if name is None else _places(home, name):
        folder = _looked_at(path)[0]
        if folder is not None:
            root = adopted_root(home, folder).absolute()
            if not folder.is_usual:
                yield root / CKPT, folder.tensors
            yield root, folder.root if folder.is_usual else path


def _places(home: Home, name: str) -> list[Path]:
    """Where a checkpoint of this name may be."""
    folders = (home.ready, home.releases, home.exports)
    under_home = [folder / name for folder in folders] if os.sep not in name else []
    return [*under_home, expanded(name)]


def _unnamed(home: Home, kinds: Sequence[str]) -> Found:
    for kind in kinds:
        candidates = home.ready_checkpoints() if kind == "ready" else home.kept_releases()
        if not candidates:
            continue
        notes: list[str] = []
        if kind == "ready" and len(candidates) > 1:
            candidates, notes = _undamaged(candidates)
        if len(candidates) > 1:
            last = _last_of_one_model(candidates) if kind == "ready" else None
            how = ", made last"
            if last is None:
                names = ", ".join(path.name for path in candidates)
                raise UsageError(
                    f"several checkpoints under {candidates[0].parent}: {names}",
                    f"CHECKPOINT {quoted(candidates[0])}",
                )
        else:
            (last,), how = candidates, ""
        found = _found(home, last)
        note = "; ".join(filter(None, (*notes, note_of(home, last, how)))) or None
        if found.root == last:
            return Found(root=last, shown=last, note=note)
        return replace(found, note=note)
    there = list(_kept(home))
    if there and "ready" not in kinds:
        raise UsageError(
            f"no release under {home.root}; there is {_listed(there)}",
            f"grokctl reshard {quoted(there[-1].name)} --devices 8",
        )
    raise UsageError(
        f"no checkpoint under {home.root}",
        "grokctl fetch" if "release" in kinds else "grokctl reshard --devices 8",
    )


def note_of(home: Home, taken: Path, how: str = "") -> str | None:
    """The line about a checkpoint that was taken without a name; None if it is the only one.

    Args:
        home: Has the others.
        taken: The checkpoint.
        how: It was chosen, such as `, made last`.
    """
    others = [path for path in _kept(home) if path != taken]
    if not others:
        return None
    return f"checkpoint: {_kind_and_name(taken)}{how}; also there: {_listed(others)}"


def skipped(name: str, error: Exception) -> str:
    """The line about a damaged checkpoint that is skipped."""
    why = "it cannot be read" if isinstance(error, OSError) else "it is damaged"
    return f"{name}: skipped, because {why} ({error})"


def _undamaged(roots: list[Path]) -> tuple[list[Path], list[str]]:
    """The ready checkpoints whose manifests can be read, and lines about the others.

    If there are none, nothing is skipped.
    """
    usable, notes = [], []
    for root in roots:
        try:
            read_manifest(root, is_checked=False)
        except (GrokctlError, OSError) as error:
            notes.append(skipped(root.name, error))
        else:
            usable.append(root)
    return (usable, notes) if usable else (roots, [])


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
    candidates = _places(home, name)
    for number, path in enumerate(candidates):
        if kind_of(path) in kinds:
            found = _found(home, path)
            others = [
                _called(other) for other in candidates[number + 1 :] if _is_other(other, path)
            ]
            if not others:
                return found
            line = f"{name}: {_called(path)} is meant; also there: {', '.join(others)}"
            return replace(found, note=line)
    for path in candidates:
        if (kind := kind_of(path)) is not None:
            found_one = "an export" if kind == "export" else f"a {kind} one"
            hint = f"grokctl reshard {quoted(path)} --devices 8" if kind == "export" else None
            raise UsageError(f"{name}: expected a {kinds[0]} checkpoint, found {found_one}", hint)
    path = expanded(name)
    folder, words = _looked_at(path)
    if words not in {None, "a folder"} and kind_of(path.parent) in kinds:
        raise UsageError(
            f"{name}: expected a checkpoint, found a file of one",
            f"grokctl verify {quoted(path.parent)}",
        )
    if folder is not None and "release" in kinds:
        return _elsewhere(home, path, folder)
    raise _not_found(home, name, "a release" if folder is not None else words)


def _is_other(path: Path, taken: Path) -> bool:
    """Whether another checkpoint has the name of the one that was taken."""
    return _looked_at(path)[0] is not None or (
        kind_of(path) is not None and os.path.realpath(path) != os.path.realpath(taken)
    )


def _called(path: Path) -> str:
    """A checkpoint under home, or here, by its kind and name."""
    return _kind_and_name(path) if path.is_absolute() else f".{os.sep}{path}"


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
        return _not_one(home, name, words)
    shown = printable(name, limit=_LONGEST_NAME)
    there = list(_kept(home))
    message = f"{shown}: no such checkpoint; there is {_listed(there) if there else 'none'}"
    return UsageError(f"{message} under {home.root}", _list_of(home))


def _not_one(home: Home, name: str, words: str) -> UsageError:
    """The error about a file or folder that is no checkpoint."""
    path, hint = expanded(name), _list_of(home)
    problem = f"found {words}"
    if words == TAR:
        hint = f"tar xf {quoted(path)}  # then its folder"
    if words == "a folder":
        inside = releases_in(path)
        problem = f"found neither {CKPT}/ nor {MANIFEST}"
        if inside:
            names = [printable(str(entry.relative_to(path))) for entry in inside]
            problem = f"found a folder of checkpoints: {_cut(names)}"
            hint = f"name one, such as {quoted(inside[0])}"
    return UsageError(f"{name}: expected a checkpoint, {problem}", hint)


def _list_of(home: Home) -> str:
    kept = [folder for folder in (home.releases, home.ready) if folder.is_dir()]
    return f"ls {' '.join(map(quoted, kept))}" if kept else "grokctl fetch"


def _found(home: Home, path: Path) -> Found:
    """A folder of the usual shape; one with its torrent under home is the folder of links.

    A torrent that others could have put there does not replace the one under home, and neither
    does one in a folder that cannot keep a proof.
    """
    if kind_of(path) == "release" and (path / CKPT).is_dir() and not is_of_links(path):
        folder = ReleaseFolder(path, path / CKPT)
        has_torrent = (path / TORRENT).is_file()
        is_believed = has_torrent and why_exposed(path / TORRENT) is None
        is_at_home = is_proven_at_home if is_believed else is_adopted
        if is_at_home(home, folder):
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
    return _cut([_kind_and_name(path) for path in paths])


def _cut(names: Sequence[str]) -> str:
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
