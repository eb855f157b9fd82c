"""Decide whether the files on disk are the files the torrent promised, and return the proof."""

import hashlib
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.receipt import (
    Receipt,
    Stamp,
    VerifiedRelease,
    now,
    read_receipt,
    trusted_metainfo,
)
from grokctl.checkpoint.release import Release, damage_error, release_paths, scan_file, survey
from grokctl.checkpoint.torrent import Metainfo, TorrentFile
from grokctl.errors import (
    CorruptCheckpointError,
    Damage,
    Reason,
    UnsafePickleError,
    UsageError,
)
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, ignore
from grokctl.model.tensors import tensor_specs
from grokctl.paths import CKPT, CONFIG, TORRENT

_BUFFER = 2**20
"""Bytes read at a time; measured: everything from 256 KiB to 4 MiB hashes at the same rate."""
_AHEAD = 4
"""Pieces queued for each worker."""
_MOST_JOBS = 64
_GLANCE_S = 0.1
"""Seconds between two looks at how far the workers are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verification found."""

    name: str
    files: int
    nbytes: int
    """Bytes that the verdict covers."""
    hashed: int
    """Bytes read and hashed now; the rest is covered by an earlier receipt."""
    damage: tuple[Damage, ...]
    verified: VerifiedRelease | None
    """The proof; None when something is damaged or only the structure was looked at."""


def verify(
    root: Path,
    *,
    quick: bool = False,
    rehash: bool = False,
    jobs: int | None = None,
    observe: Observer = ignore,
) -> Verdict:
    """Hash every piece of every file against the torrent, and look at every tensor's structure.

    Goes on after the first damaged file, because a repair needs the whole list. Files that an
    earlier receipt covers and nobody touched since are not hashed again.

    Args:
        root: A release.
        quick: Only look at the structure; proves nothing about the content.
        rehash: Ignore the receipt.
        jobs: Hashing threads; as many as cores by default.
        observe: Receives progress in bytes.

    Raises:
        CorruptCheckpointError: The torrent or `config.json` is not what it should be.
        UsageError: There is no release, or no torrent to prove it by.
    """
    metainfo = None if quick else trusted_metainfo(root)
    if metainfo is None:
        structure = survey(root, observe=observe)
        verdict = Verdict(
            name=root.resolve().name,
            files=len(tensor_specs(structure.config)),
            nbytes=sum(tensor.path.stat().st_size for tensor in structure.tensors),
            hashed=0,
            damage=structure.damage,
            verified=None,
        )
        if quick or structure.damage:
            return verdict
        raise UsageError(
            f"{root}: holds no {TORRENT}, so its content cannot be proven; its structure is sound",
            f"grokctl verify {shlex.quote(str(root))} --quick",
        )
    receipt = None if rehash else read_receipt(root)
    if receipt is not None and receipt.infohash != metainfo.infohash:
        receipt = None
    check = _ContentCheck(root, metainfo, proven=receipt.untouched(root) if receipt else set())
    if check.proven:
        observe(Noted(message=f"{len(check.proven)} files are untouched since their last proof"))
    check.run(min(jobs or os.cpu_count() or 1, _MOST_JOBS), observe)
    return _conclude(check, receipt, observe)


def verify_ready(
    checkpoint: ReadyCheckpoint,
    *,
    quick: bool = False,
    jobs: int | None = None,
    observe: Observer = ignore,
) -> Verdict:
    """Hash every file of a ready checkpoint against its manifest.

    Args:
        checkpoint: Opened, so all files are there and have their sizes.
        quick: Leave it at that.
        jobs: Hashing threads; as many as cores by default.
        observe: Receives progress in bytes.
    """
    damage: list[Damage] = []
    counter, is_cancelled = _Counter(), Event()
    observe(Started(stage=Stage.VERIFY, total=0 if quick else checkpoint.nbytes))
    with ThreadPoolExecutor(min(jobs or os.cpu_count() or 1, _MOST_JOBS)) as pool:
        try:
            waiting = {
                pool.submit(_sha256, checkpoint.root / record.name, counter, is_cancelled): record
                for record in (() if quick else checkpoint.files)
            }
            while waiting:
                done, _ = wait(waiting, timeout=_GLANCE_S, return_when=FIRST_COMPLETED)
                observe(Advanced(stage=Stage.VERIFY, done=counter.value))
                for future in done:
                    record = waiting.pop(future)
                    if future.result() != record.sha256:
                        detail = f"its sha256 is not {record.sha256[:16]}…, the manifest's"
                        ranges = ((0, record.nbytes),)
                        damage.append(Damage(record.name, Reason.ALTERED, detail, ranges))
        except BaseException:
            is_cancelled.set()
            pool.shutdown(cancel_futures=True)
            raise
    observe(Finished(stage=Stage.VERIFY))
    return Verdict(
        name=checkpoint.name,
        files=len(checkpoint.files),
        nbytes=checkpoint.nbytes,
        hashed=counter.value,
        damage=tuple(sorted(damage, key=lambda item: item.file)),
        verified=None,
    )


class _Counter:
    """Bytes hashed so far, by all workers."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.value += count


class _ContentCheck:
    """One pass over the pieces of a torrent."""

    def __init__(self, root: Path, metainfo: Metainfo, *, proven: set[str]) -> None:
        self.root = root
        self.metainfo = metainfo
        self.places = release_paths(metainfo)
        self.proven = proven & set(self.places.values())
        self.stamps = {name: Stamp.of(root / name) for name in self.places.values()}
        self.wrong_size = {
            name: damage
            for file in metainfo.files
            if (name := self.places.get(file.index)) is not None
            and (damage := _size_damage(root, name, file.length, self.stamps[name])) is not None
        }
        self.bad_pieces: set[int] = set()
        self.unreadable: dict[str, str] = {}
        self.hashed = 0

    def run(self, jobs: int, observe: Observer) -> None:
        pieces = sorted(
            {
                piece
                for file in self.metainfo.files
                if self.places.get(file.index) not in self.proven and not file.is_pad
                for piece in self.metainfo.pieces_of(file)
            }
        )
        observe(Started(stage=Stage.VERIFY, total=sum(map(self.metainfo.piece_size, pieces))))
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for piece, is_good in _windowed(pool, self.check, pieces, window=_AHEAD * jobs):
                    if not is_good:
                        self.bad_pieces.add(piece)
                    self.hashed += self.metainfo.piece_size(piece)
                    observe(Advanced(stage=Stage.VERIFY, done=self.hashed))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        observe(Finished(stage=Stage.VERIFY))

    def check(self, piece: int) -> bool:
        """Whether a piece is what the torrent promised; a worker's whole job."""
        hasher = hashlib.sha1(usedforsecurity=False)
        buffer = bytearray(_BUFFER)
        for file, offset, length in self.metainfo.spans(piece):
            name = self.places.get(file.index)
            if name is None:
                hasher.update(bytes(length))
                continue
            if self.stamps[name] is None:
                return False
            try:
                if not _hash_range(self.root / name, offset, length, hasher, buffer):
                    return False
            except OSError as error:
                self.unreadable[name] = error.strerror or str(error)
                return False
        return hasher.digest() == self.metainfo.piece_hash(piece)

    def damage(self) -> dict[str, Damage]:
        """Everything that is wrong, by file."""
        found: dict[str, Damage] = {}
        for file in self.metainfo.files:
            name = self.places.get(file.index)
            if name is None:
                continue
            bad = [piece for piece in self.metainfo.pieces_of(file) if piece in self.bad_pieces]
            ranges = tuple(_merged(self._range(file, piece) for piece in bad))
            if name in self.wrong_size:
                known = self.wrong_size[name]
                found[name] = Damage(name, known.reason, known.detail, ranges or known.ranges)
            elif name in self.unreadable:
                found[name] = Damage(name, Reason.UNREADABLE, self.unreadable[name], ranges)
            elif bad:
                found[name] = self._altered(name, file, bad, ranges)
        return found

    def _altered(
        self, name: str, file: TorrentFile, bad: list[int], ranges: tuple[tuple[int, int], ...]
    ) -> Damage:
        sharers = [self._sharers(piece) - {name} for piece in bad]
        broken = [others & (self.wrong_size.keys() | self.unreadable.keys()) for others in sharers]
        if all(broken):
            return Damage(name, Reason.UNPROVEN, f"shares a piece with {min(broken[0])}", ranges)
        detail = f"{len(bad)} of {len(self.metainfo.pieces_of(file))} pieces"
        if all(sharers):
            detail += f", or the piece's other file {min(sharers[0])}"
        return Damage(name, Reason.ALTERED, detail, ranges)

    def _sharers(self, piece: int) -> set[str]:
        """Files that a piece covers."""
        spans = self.metainfo.spans(piece)
        return {self.places[file.index] for file, _, _ in spans if file.index in self.places}

    def _range(self, file: TorrentFile, piece: int) -> tuple[int, int]:
        start = piece * self.metainfo.piece_length - file.offset
        return max(0, start), min(file.length, start + self.metainfo.piece_size(piece))


def _conclude(check: _ContentCheck, receipt: Receipt | None, observe: Observer) -> Verdict:
    """Put content and structure together, and keep a receipt of what is proven."""
    root, metainfo = check.root, check.metainfo
    damage = check.damage()
    release = _look_at_structure(check, damage, observe)
    stamps = {name: receipt.stamps[name] for name in check.proven} if receipt else {}
    stamps |= {
        name: stamp
        for name, stamp in check.stamps.items()
        if name not in damage and stamp is not None and Stamp.of(root / name) == stamp
    }
    proof = Receipt(infohash=metainfo.infohash, verified_at=now(), stamps=stamps)
    if receipt is not None and not check.hashed:
        proof = receipt
    else:
        try:
            proof.write(root)
        except OSError as error:
            observe(Noted(message=f"the receipt could not be kept ({error.strerror})"))
    return Verdict(
        name=root.resolve().name,
        files=len(check.places),
        nbytes=sum(file.length for file in metainfo.files if file.index in check.places),
        hashed=check.hashed,
        damage=tuple(damage[name] for name in sorted(damage)),
        verified=VerifiedRelease(release=release, receipt=proof) if release else None,
    )


def _look_at_structure(
    check: _ContentCheck, damage: dict[str, Damage], observe: Observer
) -> Release | None:
    """Add what is wrong with the structure to what is wrong with the content.

    Returns:
        The release, if nothing at all is wrong.
    """
    root, places = check.root, set(check.places.values())
    if CONFIG in damage or not (root / CKPT).is_dir():
        # nobody knows which model this should be; what is unsafe is unsafe in any
        found = [item for name in sorted(places) if (item := _unsafe(root, name)) is not None]
        _add(damage, found)
        return None
    structure = survey(root, observe=observe)
    _add(damage, structure.damage)
    present = [f"{CKPT}/{tensor.spec.file}" for tensor in structure.tensors]
    present += [CONFIG] if (root / CONFIG).is_file() else []
    for name in present:
        if name not in places and name not in damage:
            damage[name] = Damage(name, Reason.UNPROVEN, "the torrent says nothing about it")
    if damage:
        return None
    return Release(root=root, config=structure.config, tensors=structure.tensors)


def _add(damage: dict[str, Damage], found: Iterable[Damage]) -> None:
    """Content says more than structure, but for what is unsafe."""
    for item in found:
        known = damage.get(item.file)
        if known is None or item.reason is Reason.UNSAFE:
            ranges = known.ranges if known else ()
            damage[item.file] = Damage(item.file, item.reason, item.detail, ranges)


def _unsafe(root: Path, name: str) -> Damage | None:
    if not name.startswith(f"{CKPT}/"):
        return None
    try:
        scan_file(root, name)
    except UnsafePickleError as error:
        return error.damage[0]
    except (CorruptCheckpointError, OSError):
        pass  # the pieces have said so already
    return None


def _size_damage(root: Path, name: str, expected: int, stamp: Stamp | None) -> Damage | None:
    if stamp is None and os.path.lexists(root / name):
        return Damage(name, Reason.UNREADABLE, "is no regular file", ((0, expected),))
    if stamp is None:
        return Damage(name, Reason.MISSING, f"expected {expected} bytes", ((0, expected),))
    detail = f"expected {expected} bytes, found {stamp.size}"
    if stamp.size < expected:
        return Damage(name, Reason.SHORT, detail, ((stamp.size, expected),))
    if stamp.size > expected:
        return Damage(name, Reason.LONG, detail, ((expected, stamp.size),))
    return None


def _hash_range(
    path: Path, offset: int, length: int, hasher: "hashlib._Hash", buffer: bytearray
) -> bool:
    """Feed a range of a file to a hasher; False if the file ends early."""
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while length:
            count = file.readinto(view[: min(length, len(buffer))])
            if not count:
                return False
            hasher.update(view[:count])
            length -= count
    return True


def _sha256(path: Path, counter: _Counter, is_cancelled: Event) -> str:
    hasher = hashlib.sha256()
    buffer = bytearray(_BUFFER)
    with path.open("rb", buffering=0) as file:
        while not is_cancelled.is_set() and (count := file.readinto(buffer)):
            hasher.update(memoryview(buffer)[:count])
            counter.add(count)
    return hasher.hexdigest()


def _windowed(
    pool: ThreadPoolExecutor, function: Callable[[int], bool], items: Sequence[int], *, window: int
) -> Iterator[tuple[int, bool]]:
    """Map in order with a bounded number of items under way."""
    waiting: deque[tuple[int, Future[bool]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) >= window:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join ranges that touch; they come in ascending order."""
    current: tuple[int, int] | None = None
    for low, high in ranges:
        if current is not None and low <= current[1]:
            current = (current[0], high)
            continue
        if current is not None:
            yield current
        current = (low, high)
    if current is not None:
        yield current


def raise_for(verdict: Verdict, root: Path) -> None:
    """Turn damage into the error that carries it.

    Raises:
        CorruptCheckpointError: Something is damaged.
    """
    if verdict.damage:
        raise damage_error(verdict.damage, checked=verdict.files, root=root)
