"""Which files are damaged, and where: bad pieces, sizes and structure combined."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Final

from grokctl.checkpoint import pickle_writer
from grokctl.checkpoint.file_sizes import file_damage
from grokctl.checkpoint.pickle_writer import Hole
from grokctl.checkpoint.receipt import Stamp
from grokctl.checkpoint.release_files import released_payloads
from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.torrent_files import TorrentFile
from grokctl.errors import Damage, Reason
from grokctl.integrity.pieces import open_regular
from grokctl.model.tensors import TensorSpec
from grokctl.os_errors import is_absence, located

KnownBytes = tuple[tuple[int, bytes], ...]
"""Offsets in a file, and the bytes that it must have there."""

_MOST_TRIES: Final = 64
"""Pieces that are hashed again with their known bytes corrected."""
_CHUNK: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All results of checking a release."""

    root: Path
    metainfo: Metainfo
    places: Mapping[int, str]
    """File index -> path in the release."""
    bad: frozenset[int]
    """Pieces that do not have their hashes."""
    stamps: Mapping[str, Stamp | None]
    """The stamps of the files before they were hashed."""
    unreadable: Mapping[int, Mapping[str, str]]
    """Piece -> file -> why it could not be read."""
    trusted: frozenset[str]
    """Files that an earlier proof covers, unchanged since."""
    structure: Mapping[str, Damage]
    """Damage to the structure, by file."""
    known: Mapping[str, KnownBytes]
    """Bytes that follow from the structure, by file."""
    odd: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """Ranges with unusual values, by file: in a bad piece, evidence against the file."""


def known_bytes(spec: TensorSpec, length: int) -> KnownBytes:
    """The bytes of a tensor's file outside its payloads: they follow from its shape and size.

    Returns:
        Nothing if no file of this tensor has this size, with any number of scale groups.
    """
    weight, scales = released_payloads(spec)
    for candidate in _possible_scales(spec, scales, length):
        outline = pickle_writer.outline(weight, candidate)
        if outline.nbytes == length:
            refs = [ref for ref in (outline.tensor.weight, outline.tensor.scales) if ref]
            holes = [(ref.offset, ref.offset + ref.nbytes) for ref in refs]
            return tuple(_outside(holes, outline.parts))
    return ()


def find_damage(findings: Findings) -> dict[str, Damage]:
    """All damage to the files of a torrent, by file.

    A bad piece of several files is attributed to the file with other evidence against it: missing
    bytes, or a wrong structure. If the piece is good with its structure corrected, nothing else in
    it is damaged. Without any evidence, the damage of each file names the others.
    """
    attribution = _Attribution(findings)
    damage: dict[str, Damage] = {}
    for file in findings.metainfo.files:
        name = findings.places.get(file.index)
        if name is not None and (one := attribution.damage_of(file, name)) is not None:
            damage[name] = one
    return damage


@dataclass(slots=True)
class _BadPieces:
    """The bad pieces of one file."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)
    certain: int = 0
    """Pieces that are certainly bad because of this file."""
    exact: int = 0
    """Pieces in which every damaged byte is known."""
    suspects: set[str] = field(default_factory=set)
    """Other files that may be the damaged ones."""
    culprits: set[str] = field(default_factory=set)
    """Other files that are the damaged ones instead, by the evidence."""


@dataclass(frozen=True, slots=True)
class _Span:
    """The part of a piece that is in one file."""

    name: str
    file: TorrentFile
    low: int
    high: int


class _Attribution:
    """Attributes every bad piece to the files that it covers."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.metainfo = findings.metainfo
        self.bad_pieces: dict[str, _BadPieces] = {}
        self.trusted_known: dict[str, KnownBytes] = {}
        self.tries = 0
        for piece in sorted(findings.bad):
            self._attribute(piece)

    def damage_of(self, file: TorrentFile, name: str) -> Damage | None:
        """The damage to a file."""
        bad = self.bad_pieces.get(name, _BadPieces())
        stamp = self.findings.stamps[name]
        pieces = tuple(merged((piece, piece + 1) for piece in bad.pieces))
        ranges = tuple(merged(bad.ranges))
        cost = sum(map(self.metainfo.piece_size, bad.pieces))
        size = file_damage(
            self.findings.root, name, expected=file.length, size=stamp.size if stamp else None
        )
        if size is not None:
            # no piece covers the bytes beyond the end
            tail = size.ranges if size.reason is Reason.LONG or not ranges else ()
            return replace(size, ranges=ranges + tail, pieces=pieces, mend_nbytes=cost)
        reasons = [files[name] for files in self.findings.unreadable.values() if name in files]
        if reasons:
            return Damage(name, Reason.UNREADABLE, reasons[0], ranges, pieces, cost)
        if not bad.pieces:
            return None
        if not bad.certain and not bad.suspects:
            detail = f"shares a piece with {_several(bad.culprits)}"
            return Damage(name, Reason.UNPROVEN, detail, ranges, pieces, cost, is_certain=False)
        detail = f"{len(bad.pieces)} of {len(self.metainfo.pieces_of(file))} pieces"
        if bad.exact == len(bad.pieces):
            detail += ", only in bytes known from its structure"
        if not bad.certain:
            detail += f", or {_several(bad.suspects)}, which shares the piece"
        is_certain = bad.certain > 0
        return Damage(name, Reason.ALTERED, detail, ranges, pieces, cost, is_certain=is_certain)

    def _attribute(self, piece: int) -> None:
        """Decide which files a bad piece is damaged in."""
        spans = self._spans(piece)
        wrong = {span.name: list(self._wrong_bytes(span)) for span in spans}
        wrong = {name: ranges for name, ranges in wrong.items() if ranges}
        if wrong and self._is_good_when_corrected(piece, spans):
            for span in spans:
                if span.name in wrong:
                    bad = self._add(span, piece, wrong[span.name])
                    bad.certain += 1
                    bad.exact += 1
            return
        names = {span.name for span in spans}
        certain = {
            span.name for span in spans if span.name in wrong or self._is_broken(piece, span)
        }
        suspects = names - self.findings.trusted or names
        if not certain and len(suspects) > 1:
            certain = {
                span.name
                for span in spans
                if span.name in suspects and self._is_damaged_elsewhere(span)
            }
        if not certain and len(suspects) == 1:
            certain = suspects
        for span in spans:
            bad = self._add(span, piece, [(span.low, span.high)])
            if span.name in certain:
                bad.certain += 1
            elif certain:
                bad.culprits |= certain
            elif span.name in suspects:
                bad.suspects |= suspects - {span.name}
            else:
                bad.culprits |= suspects

    def _add(self, span: _Span, piece: int, ranges: Iterable[tuple[int, int]]) -> _BadPieces:
        bad = self.bad_pieces.setdefault(span.name, _BadPieces())
        bad.pieces.append(piece)
        bad.ranges.extend(ranges)
        return bad

    def _spans(self, piece: int) -> list[_Span]:
        places = self.findings.places
        return [
            _Span(places[file.index], file, offset, offset + length)
            for file, offset, length in self.metainfo.spans(piece)
            if file.index in places
        ]

    def _is_missing(self, piece: int, span: _Span) -> bool:
        """Whether some of these bytes are missing or unreadable."""
        stamp = self.findings.stamps[span.name]
        unreadable = self.findings.unreadable.get(piece, {})
        return stamp is None or stamp.size < span.high or span.name in unreadable

    def _is_broken(self, piece: int, span: _Span) -> bool:
        """Whether some of these bytes are missing, or contradict the structure."""
        structure = self.findings.structure.get(span.name)
        ranges = (*(structure.ranges if structure else ()), *self.findings.odd.get(span.name, ()))
        return self._is_missing(piece, span) or any(
            low < span.high and span.low < high for low, high in ranges
        )

    def _is_damaged_elsewhere(self, span: _Span) -> bool:
        """Whether the file is also damaged in its size, its structure, or a neighbouring piece."""
        stamp = self.findings.stamps[span.name]
        first = (span.file.offset + span.low) // self.metainfo.piece_length
        return (
            stamp is None
            or stamp.size != span.file.length
            or span.name in self.findings.structure
            or any(
                piece in self.findings.bad and [s.name for s in self._spans(piece)] == [span.name]
                for piece in (first - 1, first + 1)
            )
        )

    def _wrong_bytes(self, span: _Span) -> Iterator[tuple[int, int]]:
        """Ranges of a span that differ from its known bytes."""
        for offset, expected in self._known(span.name, span.file):
            low, high = max(offset, span.low), min(offset + len(expected), span.high)
            if low >= high:
                continue
            actual = _bytes_at(self.findings.root / span.name, low, high - low)
            if len(actual) < high - low:
                yield low, high
                continue
            wanted = expected[low - offset : high - offset]
            yield from merged(
                (low + place, low + place + 1)
                for place, (a, b) in enumerate(zip(actual, wanted, strict=True))
                if a != b
            )

    def _known(self, name: str, file: TorrentFile) -> KnownBytes:
        """The known bytes of a file; none if its good pieces contradict them."""
        if name not in self.trusted_known:
            known, length = self.findings.known.get(name, ()), self.metainfo.piece_length
            for offset, expected in known:
                first = (file.offset + offset) // length
                last = (file.offset + offset + len(expected) - 1) // length
                actual = _bytes_at(self.findings.root / name, offset, len(expected))
                if not {first, last} & self.findings.bad and actual != expected:
                    known = ()
                    break
            self.trusted_known[name] = known
        return self.trusted_known[name]

    def _is_good_when_corrected(self, piece: int, spans: list[_Span]) -> bool:
        """Whether a piece has its hash once its known bytes are corrected."""
        if self.tries >= _MOST_TRIES or any(self._is_missing(piece, span) for span in spans):
            return False
        self.tries += 1
        hasher = self.metainfo.hasher()
        for file, offset, length in self.metainfo.spans(piece):
            name = self.findings.places.get(file.index)
            known = self._known(name, file) if name is not None else ()
            for low in range(offset, offset + length, _CHUNK):
                count = min(_CHUNK, offset + length - low)
                data = bytearray(count)
                if name is not None:
                    data[:] = _bytes_at(self.findings.root / name, low, count).ljust(count, b"\0")
                for start, expected in known:
                    a, b = max(start, low), min(start + len(expected), low + count)
                    if a < b:
                        data[a - low : b - low] = expected[a - start : b - start]
                hasher.update(data)
        return hasher.digest() == self.metainfo.piece_hash(piece)


def merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join ranges that touch; they come in ascending order."""
    current: tuple[int, int] | None = None
    for low, high in ranges:
        if current is not None and low <= current[1]:
            current = (current[0], max(current[1], high))
            continue
        if current is not None:
            yield current
        current = (low, high)
    if current is not None:
        yield current


def _several(names: set[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _bytes_at(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a regular file; fewer, or none, if it does not have them."""
    try:
        handle = open_regular(path)
        try:
            return os.pread(handle, length, offset)
        finally:
            os.close(handle)
    except OSError as error:
        if not is_absence(error):
            raise located(error, path) from error
        return b""


def _possible_scales(spec: TensorSpec, scales: Hole | None, length: int) -> Iterator[Hole | None]:
    """Scales that fit a file of this size: their number of groups is the release's choice."""
    yield scales
    if scales is None:
        return
    weight, _ = released_payloads(spec)
    *lead, groups, outputs = scales.shape
    row = prod(lead) * outputs * scales.dtype.itemsize
    near = groups + round((length - pickle_writer.measure(weight, scales)) / row)
    for count in (near - 1, near, near + 1):
        if count > 0 and spec.shape[-2] % count == 0:
            yield Hole((*lead, count, outputs), scales.dtype)


def _outside(
    holes: list[tuple[int, int]], parts: Iterable[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes]]:
    """The bytes of the parts that are in no hole."""
    for offset, data in parts:
        start, end = offset, offset + len(data)
        for low, high in holes:
            if low < end and start < high:
                if start < low:
                    yield start, data[start - offset : low - offset]
                start = min(high, end)
        if start < end:
            yield start, data[start - offset :]
