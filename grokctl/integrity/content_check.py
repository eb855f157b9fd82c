"""Prove the files of a release piece by piece, resuming from a receipt."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from grokctl.checkpoint.receipt import (
    Receipt,
    Stamp,
    now,
)
from grokctl.checkpoint.release import (
    release_paths,
)
from grokctl.checkpoint.torrent import Metainfo
from grokctl.errors import (
    Damage,
    Reason,
)
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.integrity.pieces import Checked, check_pieces
from grokctl.os_errors import reason_of

_KEEP_EVERY_S: Final = 5.0
"""Seconds of work that a killed verification loses at most."""


class ContentCheck:
    """One pass over the pieces of a torrent."""

    def __init__(
        self,
        root: Path,
        metainfo: Metainfo,
        kept: Receipt | None,
        observe: Observer,
        *,
        rehash: bool,
    ) -> None:
        self.root = root
        self.metainfo = metainfo
        is_ours = kept is not None and kept.infohash == metainfo.infohash
        self.receipt = receipt = kept if is_ours and not rehash else None
        self.observe = observe
        self.places = release_paths(metainfo)
        self.stamps = {name: Stamp.of(root / name) for name in self.places.values()}
        self.trusted = frozenset(receipt.untouched(root) if receipt else ()) & self.stamps.keys()
        self.bad: set[int] = set()
        self.refused: dict[int, dict[str, str]] = {}
        self.hashed = 0
        self.files = {
            self.places[file.index]: file for file in metainfo.files if file.index in self.places
        }
        self._left = {
            name: len(metainfo.pieces_of(file))
            for name, file in self.files.items()
            if name not in self.trusted
        }
        self._proven: dict[str, Stamp] = {}
        self._doubted: set[str] = set()
        # an old receipt that claims more than is believed now must not stay
        self._is_kept = kept is None or kept.stamps.keys() == self.trusted
        self._is_refused = False
        self._keep_at = time.monotonic() + _KEEP_EVERY_S

    def run(self, jobs: int) -> None:
        """Hash what no receipt covers; whatever happens, keep a receipt of what was proven."""
        pieces = sorted(
            {piece for name in self._left for piece in self.metainfo.pieces_of(self.files[name])}
        )
        if self.receipt is not None and self.trusted:
            many = f"{len(self.trusted)} of {len(self.places)} files are untouched"
            self.observe(Noted(message=f"{many} since their last proof, {self.receipt.since}"))
        for name, left in self._left.items():
            if not left:
                self._prove(name)
        total = sum(map(self.metainfo.piece_size, pieces))
        self.observe(Started(stage=Stage.VERIFY, total=total))
        checks = check_pieces(self.root, self.metainfo, self.places, pieces, jobs=jobs)
        with closing(checks):
            try:
                for checked in checks:
                    self._take(checked)
                    self.observe(Advanced(stage=Stage.VERIFY, done=self.hashed))
            except BaseException:
                if proven := len(self.keep().stamps):
                    kept = f"{proven} of {len(self.places)} files are proven"
                    self.observe(Noted(message=f"{kept}, the next verify goes on from there"))
                raise
        self.keep()
        self.observe(Finished(stage=Stage.VERIFY))

    def keep(self) -> Receipt:
        """Write down what is proven by now."""
        receipt = self._receipt()
        if not self._is_kept and not self._is_refused:
            self._is_kept = True
            try:
                receipt.write(self.root)
            except OSError as error:
                self._is_refused = True
                self.observe(Noted(message=f"the receipt could not be kept ({reason_of(error)})"))
        self._keep_at = time.monotonic() + _KEEP_EVERY_S
        return receipt

    def changed(self) -> Iterator[Damage]:
        """Files whose pieces were good, and that somebody touched meanwhile."""
        for name, file in self.files.items():
            stamp = self.stamps[name]
            is_good = stamp is not None and stamp.size == file.length and not self._left.get(name)
            if is_good and Stamp.of(self.root / name) != stamp:
                whole = ((0, file.length),) if file.length else ()
                yield Damage(name, Reason.UNPROVEN, "changed while it was verified", whole)

    def _take(self, checked: Checked) -> None:
        self.hashed += checked.nbytes
        names = [
            self.places[file.index]
            for file, _, _ in self.metainfo.spans(checked.piece)
            if file.index in self.places
        ]
        if checked.unreadable:
            self.refused[checked.piece] = dict(checked.unreadable)
        if not checked.is_good:
            self.bad.add(checked.piece)
            if doubted := self.trusted.intersection(names):
                self._doubted |= doubted
                self._is_kept = False
            return
        for name in names:
            if name not in self.trusted:
                self._left[name] -= 1
                if not self._left[name]:
                    self._prove(name)
        if time.monotonic() > self._keep_at:
            self.keep()

    def _prove(self, name: str) -> None:
        """All pieces of a file are good: believe it, unless it changed while they were read."""
        stamp = self.stamps[name]
        is_right = stamp is not None and stamp.size == self.files[name].length
        if stamp is not None and is_right and stamp == Stamp.of(self.root / name):
            self._proven[name] = stamp
            self._is_kept = False

    def _receipt(self) -> Receipt:
        believed = self.trusted - self._doubted
        if self.receipt is None:
            return Receipt(
                infohash=self.metainfo.infohash, verified_at=now(), stamps=dict(self._proven)
            )
        if not self._proven and believed == self.receipt.stamps.keys():
            return self.receipt
        times = {name: self.receipt.proven_at(name) for name in believed}
        return Receipt(
            infohash=self.metainfo.infohash,
            verified_at=now() if self._proven else max(times.values(), default=now()),
            stamps={name: self.receipt.stamps[name] for name in believed} | self._proven,
            earlier=times,
        )
