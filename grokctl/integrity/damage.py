"""Which files are damaged, and where: bad pieces, sizes and structure put together."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Final

from grokctl.checkpoint import pickles
from grokctl.checkpoint.file_sizes import file_damage
from grokctl.checkpoint.pickles import Hole
from grokctl.checkpoint.receipt import Stamp
from grokctl.checkpoint.release import released_payloads
from grokctl.checkpoint.torrent import Metainfo, TorrentFile
from grokctl.errors import Damage, Reason
from grokctl.integrity.pieces import open_regular
from grokctl.model.tensors import TensorSpec

Ranges = tuple[tuple[int, int], ...]
"""Half open, ascending."""
Known = tuple[tuple[int, bytes], ...]
"""Bytes that a file must have, and where."""

_MOST_TRIES: Final = 64
"""Pieces that are hashed again with their structure put right."""
_CHUNK: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that a look at a release found."""

    root: Path
    metainfo: Metainfo
    places: Mapping[int, str]
    bad: frozenset[int]
    """Pieces that are not what was promised."""
    stamps: Mapping[str, Stamp | None]
    """How the files were before they were hashed."""
    refused: Mapping[int, Mapping[str, str]]
    """Piece -> file -> why it could not be read."""
    trusted: frozenset[str]
    """Files that an earlier proof covers, untouched since."""
    structure: Mapping[str, Damage]
    """What the look at the structure found, by file."""
    known: Mapping[str, Known]
    """What the structure says about the bytes of a file."""


def known_bytes(spec: TensorSpec, length: int) -> Known:
    """The bytes of a tensor's file that are no payload: they follow from its shape and size.

    Returns:
        Nothing, if no file of this tensor has this size, however many scale groups it has.
    """
    weight, scales = released_payloads(spec)
    for candidate in _scales(spec, scales, length):
        outline = pickles.outline(weight, candidate)
        if outline.nbytes == length:
            refs = [ref for ref in (outline.tensor.weight, outline.tensor.scales) if ref]
            holes = [(ref.offset, ref.offset + ref.nbytes) for ref in refs]
            return tuple(_without(outline.parts, holes))
    return ()


def find_damage(findings: Findings) -> dict[str, Damage]:
    """Everything that is wrong with the files of a torrent, by file.

    A bad piece of several files is blamed on those that give themselves away: bytes that are not
    there, structure that is wrong. If putting the structure right makes the piece good, nothing
    else is wrong with it. Where nothing tells them apart, each file names the others.
    """
    blame = _Blame(findings)
    found: dict[str, Damage] = {}
    for file in findings.metainfo.files:
        name = findings.places.get(file.index)
        if name is not None and (damage := blame.of(file, name)) is not None:
            found[name] = damage
    return found


@dataclass(slots=True)
class _Share:
    """What the bad pieces of one file come to."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)
    sure: int = 0
    """Pieces that are this file's fault for sure."""
    exact: int = 0
    """Pieces of which the structure tells every damaged byte."""
    suspects: set[str] = field(default_factory=set)
    """Whose fault it may be as well."""
    culprits: set[str] = field(default_factory=set)
    """Whose fault it is instead, as far as anyone can tell."""


@dataclass(frozen=True, slots=True)
class _Span:
    """The part of a bad piece that lies in one file."""

    name: str
    file: TorrentFile
    low: int
    high: int


class _Blame:
    def __init__(self, findings: Findings) -> None:
        self.found = findings
        self.shares: dict[str, _Share] = {}
        self.trusted_structure: dict[str, Known] = {}
        self.tries = 0
        for piece in sorted(findings.bad):
            self._judge(piece)

    def of(self, file: TorrentFile, name: str) -> Damage | None:
        """What is wrong with a file."""
        share = self.shares.get(name, _Share())
        stamp = self.found.stamps[name]
        pieces = tuple(merged((piece, piece + 1) for piece in share.pieces))
        ranges = tuple(merged(share.ranges))
        cost = sum(map(self.found.metainfo.piece_size, share.pieces))
        size = file_damage(
            self.found.root, name, expected=file.length, size=stamp.size if stamp else None
        )
        if size is not None:
            # what is too much is damage too, and no piece covers it
            tail = size.ranges if size.reason is Reason.LONG or not ranges else ()
            return replace(size, ranges=ranges + tail, pieces=pieces, mend_nbytes=cost)
        why = [refused[name] for refused in self.found.refused.values() if name in refused]
        if why:
            return Damage(name, Reason.UNREADABLE, why[0], ranges, pieces, cost)
        if not share.pieces:
            return None
        if not share.sure and not share.suspects:
            detail = f"shares a piece with {_several(share.culprits)}"
            return Damage(name, Reason.UNPROVEN, detail, ranges, pieces, cost)
        detail = f"{len(share.pieces)} of {len(self.found.metainfo.pieces_of(file))} pieces"
        if share.exact == len(share.pieces):
            detail += ", in bytes that its structure tells"
        if not share.sure:
            detail += f", or the piece's other file {_several(share.suspects)}"
        return Damage(name, Reason.ALTERED, detail, ranges, pieces, cost)

    def _judge(self, piece: int) -> None:
        """Find out whose fault a bad piece is."""
        spans = self._spans(piece)
        wrong = {span.name: list(self._wrong_bytes(span)) for span in spans}
        wrong = {name: ranges for name, ranges in wrong.items() if ranges}
        if wrong and self._is_good_with_structure(piece, spans):
            for span in spans:
                if span.name in wrong:
                    share = self._share(span, piece, wrong[span.name])
                    share.sure += 1
                    share.exact += 1
            return
        names = {span.name for span in spans}
        sure = {span.name for span in spans if span.name in wrong or self._is_broken(piece, span)}
        suspects = names - self.found.trusted or names
        if not sure and len(suspects) > 1:
            sure = {span.name for span in spans if span.name in suspects and self._is_ill(span)}
        if not sure and len(suspects) == 1:
            sure = suspects
        for span in spans:
            share = self._share(span, piece, [(span.low, span.high)])
            if span.name in sure:
                share.sure += 1
            elif sure:
                share.culprits |= sure
            elif span.name in suspects:
                share.suspects |= suspects - {span.name}
            else:
                share.culprits |= suspects

    def _share(self, span: _Span, piece: int, ranges: Iterable[tuple[int, int]]) -> _Share:
        share = self.shares.setdefault(span.name, _Share())
        share.pieces.append(piece)
        share.ranges.extend(ranges)
        return share

    def _spans(self, piece: int) -> list[_Span]:
        return [
            _Span(self.found.places[file.index], file, offset, offset + length)
            for file, offset, length in self.found.metainfo.spans(piece)
            if file.index in self.found.places
        ]

    def _is_broken(self, piece: int, span: _Span) -> bool:
        """Whether some of these very bytes are not there, or cannot be what they should be."""
        stamp = self.found.stamps[span.name]
        refused = self.found.refused.get(piece, {})
        structure = self.found.structure.get(span.name)
        return (
            stamp is None
            or stamp.size < span.high
            or span.name in refused
            or (
                structure is not None
                and any(low < span.high and span.low < high for low, high in structure.ranges)
            )
        )

    def _is_ill(self, span: _Span) -> bool:
        """Whether the file is damaged elsewhere: in its size or structure, or right beside."""
        stamp = self.found.stamps[span.name]
        first = (span.file.offset + span.low) // self.found.metainfo.piece_length
        return (
            stamp is None
            or stamp.size != span.file.length
            or span.name in self.found.structure
            or any(
                piece in self.found.bad and [s.name for s in self._spans(piece)] == [span.name]
                for piece in (first - 1, first + 1)
            )
        )

    def _wrong_bytes(self, span: _Span) -> Iterator[tuple[int, int]]:
        """Where the structure of a file is not what it must be."""
        for offset, expected in self._structure(span.name, span.file):
            low, high = max(offset, span.low), min(offset + len(expected), span.high)
            if low >= high:
                continue
            found = _bytes_at(self.found.root / span.name, low, high - low)
            if len(found) < high - low:
                yield low, high
                continue
            wanted = expected[low - offset : high - offset]
            yield from merged(
                (low + place, low + place + 1)
                for place, (a, b) in enumerate(zip(found, wanted, strict=True))
                if a != b
            )

    def _structure(self, name: str, file: TorrentFile) -> Known:
        """What is known about a file, unless its good pieces tell that its release is another."""
        if name not in self.trusted_structure:
            known = self.found.known.get(name, ())
            for offset, expected in known:
                first = (file.offset + offset) // self.found.metainfo.piece_length
                last = (
                    file.offset + offset + len(expected) - 1
                ) // self.found.metainfo.piece_length
                found = _bytes_at(self.found.root / name, offset, len(expected))
                if not {first, last} & self.found.bad and found != expected:
                    known = ()
                    break
            self.trusted_structure[name] = known
        return self.trusted_structure[name]

    def _is_good_with_structure(self, piece: int, spans: list[_Span]) -> bool:
        """Whether a piece is good but for structure that is known."""
        if self.tries >= _MOST_TRIES or any(self._is_missing(piece, span) for span in spans):
            return False
        self.tries += 1
        hasher = self.found.metainfo.hasher()
        for file, offset, length in self.found.metainfo.spans(piece):
            name = self.found.places.get(file.index)
            known = self._structure(name, file) if name is not None else ()
            for low in range(offset, offset + length, _CHUNK):
                count = min(_CHUNK, offset + length - low)
                data = bytearray(count)
                if name is not None:
                    data[:] = _bytes_at(self.found.root / name, low, count).ljust(count, b"\0")
                for start, expected in known:
                    a, b = max(start, low), min(start + len(expected), low + count)
                    if a < b:
                        data[a - low : b - low] = expected[a - start : b - start]
                hasher.update(data)
        return hasher.digest() == self.found.metainfo.piece_hash(piece)

    def _is_missing(self, piece: int, span: _Span) -> bool:
        stamp = self.found.stamps[span.name]
        refused = self.found.refused.get(piece, {})
        return stamp is None or stamp.size < span.high or span.name in refused


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
    """Some bytes of a regular file; fewer, or none, if they cannot be had."""
    try:
        handle = open_regular(path)
        try:
            return os.pread(handle, length, offset)
        finally:
            os.close(handle)
    except OSError:
        return b""


def _scales(spec: TensorSpec, scales: Hole | None, length: int) -> Iterator[Hole | None]:
    """The scales that a file of this size can have: the number of groups is the release's."""
    yield scales
    if scales is None:
        return
    weight, _ = released_payloads(spec)
    *lead, groups, outputs = scales.shape
    row = prod(lead) * outputs * scales.dtype.itemsize
    near = groups + round((length - pickles.measure(weight, scales)) / row)
    for number in (near - 1, near, near + 1):
        if number > 0 and spec.shape[-2] % number == 0:
            yield Hole((*lead, number, outputs), scales.dtype)


def _without(
    parts: Iterable[tuple[int, bytes]], holes: list[tuple[int, int]]
) -> Iterator[tuple[int, bytes]]:
    """Cut out what lies in the holes."""
    for offset, data in parts:
        start, end = offset, offset + len(data)
        for low, high in holes:
            if low < end and start < high:
                if start < low:
                    yield start, data[start - offset : low - offset]
                start = min(high, end)
        if start < end:
            yield start, data[start - offset :]
