"""Prove the files of a release piece by piece, continuing from a receipt."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final

from grokctl.checkpoint.hub_record import HUB_PROOF, INFOHASH_PROOF, trust_in
from grokctl.checkpoint.receipt import Receipt, Stamp, now
from grokctl.checkpoint.release_files import places_on_disk
from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.torrent_files import HUB
from grokctl.errors import Damage, Reason
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.integrity.pieces import Checked, PieceGate, check_pieces
from grokctl.os_errors import reason_of
from grokctl.ownership import exposed_files
from grokctl.text import format_number

_SAVE_EVERY_S: Final = 5.0
"""Seconds of work that a killed verification loses at most."""


def note_receipt(
    receipt: Receipt | None,
    trusted: Collection[str],
    stamps: Mapping[str, Stamp | None],
    *,
    total: int,
    observe: Observer,
) -> None:
    """Say which files of a receipt are not hashed again, and why others are.

    Args:
        receipt: None if there is none.
        trusted: Files that it covers, unchanged since.
        stamps: Of all files now.
        total: Number of all files.
        observe: Receives the notes.
    """
    if receipt is None:
        return
    if trusted:
        since = receipt.since
        count = f"{len(trusted)} of {format_number(total, 'file')}"
        verb = "is unchanged since it was" if len(trusted) == 1 else "are unchanged since they were"
        observe(Noted(message=f"{count} {verb} proven, {since}"))
    touched = sum(
        stamp is not None
        and name in receipt.stamps
        and stamp.differs_in_ctime_only(receipt.stamps[name])
        for name, stamp in stamps.items()
    )
    if touched:
        count = format_number(touched, "file")
        same = "same size and time, another time of change (ctime)"
        why = "chmod, links and altered bytes all leave that"
        observe(Noted(message=f"{count}: {same}: hashed again, because {why}"))


class ContentCheck:
    """One pass over the pieces of a torrent."""

    def __init__(
        self,
        root: Path,
        metainfo: Metainfo,
        saved: Receipt | None,
        observe: Observer,
        *,
        rehash: bool,
        keeps: bool = True,
    ) -> None:
        """Look at the stamps of the files, and hash nothing yet.

        Args:
            root: The release.
            metainfo: Holds the hashes.
            saved: The receipt on disk.
            observe: Receives progress in bytes.
            rehash: Whether to ignore the receipt.
            keeps: Whether to write a receipt.
        """
        self.root = root
        self.metainfo = metainfo
        self.trust = trust_in(root, metainfo)
        """Of the hashes."""
        self.observe = observe
        is_usable = saved is not None and saved.infohash == metainfo.infohash and not rehash
        self.receipt = receipt = saved if is_usable else None
        self.places = places_on_disk(root, metainfo)
        self.stamps = {name: Stamp.of(root / name) for name in self.places.values()}
        self.trusted = frozenset(receipt.untouched(root) if receipt else ()) & self.stamps.keys()
        """Files that the receipt covers, unchanged since."""
        self._exposed = exposed_files(root, self._present())
        """Files that others can change, which no receipt covers; with the reason."""
        self.bad: set[int] = set()
        """Pieces that do not have their hashes."""
        self.unreadable: dict[int, dict[str, str]] = {}
        """Piece -> file -> why it could not be read."""
        self.hashed = 0
        """Bytes."""
        self.files = {
            self.places[file.index]: file for file in metainfo.files if file.index in self.places
        }
        self._left = {
            name: len(metainfo.pieces_of(file))
            for name, file in self.files.items()
            if name not in self.trusted
        }
        """Untrusted file -> number of its pieces that are not proven yet."""
        self._proven: dict[str, Stamp] = {}
        self._doubted: set[str] = set()
        """Trusted files that are damaged by the evidence."""
        # an old receipt that claims more than is trusted now must be replaced
        self._is_saved = saved is None or (
            saved.stamps.keys() == self.trusted and saved.root_of_trust == self.trust.root
        )
        self._cannot_save = not keeps
        self.when_proven: Callable[[str], None] = lambda _: None
        """Is told of each file, on the thread that runs the check."""
        self._saved: Receipt | None = None
        self._save_at = time.monotonic() + _SAVE_EVERY_S

    @property
    def pieces(self) -> list[int]:
        """The pieces of all files that the receipt does not cover, ascending."""
        return sorted(
            {piece for name in self._left for piece in self.metainfo.pieces_of(self.files[name])}
        )

    def run(self, jobs: int, *, gate: PieceGate | None = None) -> None:
        """Hash every file that the receipt does not cover; save a receipt however this ends.

        Args:
            jobs: Threads.
            gate: Holds pieces back until they may be read.
        """
        pieces = self.pieces
        total = len(self.places)
        note_receipt(self.receipt, self.trusted, self.stamps, total=total, observe=self.observe)
        for name, left in self._left.items():
            if not left:
                self._prove(name)
        total = sum(map(self.metainfo.piece_size, pieces))
        self.observe(Started(stage=Stage.VERIFY, total=total))
        checks = check_pieces(self.root, self.metainfo, self.places, pieces, jobs=jobs, gate=gate)
        with closing(checks):
            try:
                for checked in checks:
                    self._take(checked)
                    self.observe(Advanced(stage=Stage.VERIFY, done=self.hashed))
            except BaseException:
                if (proven := len(self.save().stamps)) and not self._cannot_save:
                    count = f"{proven} of {format_number(len(self.places), 'file')}"
                    verb = "is" if proven == 1 else "are"
                    message = f"{count} {verb} proven; the next verify continues from there"
                    self.observe(Noted(message=message))
                raise
        self.save()
        self.observe(Finished(stage=Stage.VERIFY))

    def look_again(self, name: str) -> None:
        """Look at a file that has arrived since this began; none of it was read before."""
        self.stamps[name] = Stamp.of(self.root / name)
        self._exposed |= exposed_files(self.root, [name])
        if not self._left.get(name, 1):
            self._prove(name)

    def names_of(self, piece: int) -> list[str]:
        """The files that have a part of a piece."""
        spans = self.metainfo.spans(piece)
        return [self.places[file.index] for file, _, _ in spans if file.index in self.places]

    def save(self) -> Receipt:
        """Write the receipt of everything that is proven by now."""
        if self._is_saved and self._saved is not None:
            return self._saved  # the same, with the time that was written
        receipt = self._saved = self._new_receipt()
        if not self._is_saved and not self._cannot_save:
            self._is_saved = True
            try:
                receipt.write(self.root)
            except OSError as error:
                self._cannot_save = True
                self.observe(Noted(message=f"receipt: cannot be written ({reason_of(error)})"))
        self._save_at = time.monotonic() + _SAVE_EVERY_S
        return receipt

    def distrust(self, names: Iterable[str]) -> None:
        """Leave files out of the receipt, although they are unchanged since they were proven.

        A file that only shares a bad piece with one that has changed stays in it: so the next
        verification knows which of the two is damaged.
        """
        if doubted := self.trusted.intersection(names):
            self._doubted |= doubted
            self._is_saved = False

    def changed(self) -> Iterator[Damage]:
        """Files whose pieces were good, but which changed during the check."""
        for name, file in self.files.items():
            stamp = self.stamps[name]
            is_good = stamp is not None and stamp.size == file.length and not self._left.get(name)
            if is_good and Stamp.of(self.root / name) != stamp:
                whole = ((0, file.length),) if file.length else ()
                yield Damage(name, Reason.UNPROVEN, "changed while it was verified", whole)

    def exposure(self) -> str | None:
        """The way in which other users can change a file; None if they cannot and could not."""
        found = self._exposed | exposed_files(self.root, self._present())
        return next((found[name] for name in sorted(found)), None)

    def _present(self) -> list[str]:
        return sorted(name for name, stamp in self.stamps.items() if stamp is not None)

    def _take(self, checked: Checked) -> None:
        self.hashed += checked.nbytes
        names = self.names_of(checked.piece)
        if checked.unreadable:
            self.unreadable[checked.piece] = dict(checked.unreadable)
        if not checked.is_good:
            self.bad.add(checked.piece)
            return
        for name in names:
            if name not in self.trusted:
                self._left[name] -= 1
                if not self._left[name]:
                    self._prove(name)
        if time.monotonic() > self._save_at:
            self.save()

    def _prove(self, name: str) -> None:
        """Every piece of a file is good: it is proven, unless it changed during the check."""
        stamp = self.stamps[name]
        has_size = stamp is not None and stamp.size == self.files[name].length
        is_private = name not in self._exposed
        if stamp is not None and has_size and stamp == Stamp.of(self.root / name) and is_private:
            self._proven[name] = stamp
            self._is_saved = False
            self.when_proven(name)

    def _new_receipt(self) -> Receipt:
        trusted = self.trusted - self._doubted
        times, stamps = {}, dict(self._proven)
        if self.receipt is not None:
            times = {name: self.receipt.proven_at(name) for name in trusted}
            stamps |= {name: self.receipt.stamps[name] for name in trusted}
        if self.receipt is not None and not self._proven and trusted == self.receipt.stamps.keys():
            earlier, at = self.receipt.earlier, self.receipt.verified_at
        else:
            earlier, at = times, now() if self._proven else max(times.values(), default=now())
        return Receipt(
            infohash=self.metainfo.infohash,
            verified_at=at,
            stamps=stamps,
            earlier=earlier,
            is_complete=stamps.keys() == self.files.keys(),
            root_of_trust=self.trust.root,
            proven_by=HUB_PROOF if self.metainfo.version == HUB else INFOHASH_PROOF,
        )
