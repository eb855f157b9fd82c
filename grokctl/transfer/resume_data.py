"""libtorrent's resume data, read without trusting it."""

from collections.abc import Mapping

import libtorrent as lt

from grokctl.checkpoint.bencode import MalformedError, decode
from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.torrent_files import MOST_DEPTH, V2
from grokctl.transfer.swarm_types import Claims

_MOST_BITS = 4 * 2**20
"""Bytes in which the blocks of incomplete pieces are bits: those of all of Grok-1 need 2.4 million,
and each bit becomes an entry of a list."""


def read_claims(resume: bytes, metainfo: Metainfo, sizes: Mapping[int, int]) -> Claims:
    """The claims of resume data that can be true.

    A claim is dropped if it covers bytes beyond the end of a file. Then either the file was
    removed, or it was not wanted when the bytes arrived, so that they went into the part file,
    which cannot be read once other files are selected. libtorrent would read zeros.

    Args:
        resume: From an earlier session; anything that is not resume data claims nothing.
        metainfo: The torrent that it should belong to.
        sizes: File index -> bytes on disk; files that are left out count as complete.
    """
    if _has_many_bits(resume):
        return Claims()
    try:
        resumed = lt.read_resume_data(resume)
    except RuntimeError:
        return Claims()
    unfinished = resumed.unfinished_pieces  # made anew at each look
    if (
        infohash_of(resumed.info_hashes, metainfo) != metainfo.infohash
        or max(unfinished, default=0) >= metainfo.num_pieces
    ):
        return Claims()

    def is_on_disk(piece: int) -> bool:
        return all(
            offset + length <= sizes.get(file.index, file.length)
            for file, offset, length in metainfo.spans(piece)
        )

    claimed = enumerate(resumed.have_pieces[: metainfo.num_pieces])
    return Claims(
        have=frozenset(piece for piece, is_claimed in claimed if is_claimed and is_on_disk(piece)),
        unfinished={
            piece: list(blocks) for piece, blocks in unfinished.items() if is_on_disk(piece)
        },
        uploaded=resumed.total_uploaded,
    )


def _has_many_bits(resume: bytes) -> bool:
    """Whether it claims more blocks of incomplete pieces than any download has, or is none."""
    try:
        values, _ = decode(resume, most_depth=MOST_DEPTH, most_nested=len(resume))
    except MalformedError:
        return True
    found = values.get(b"unfinished")
    pieces = found if isinstance(found, list) else []
    masks = [entry.get(b"bitmask") for entry in pieces if isinstance(entry, dict)]
    return sum(len(mask) for mask in masks if isinstance(mask, bytes)) > _MOST_BITS


def infohash_of(hashes: lt.info_hash_t, metainfo: Metainfo) -> str:
    """The infohash of the same version as the torrent's."""
    return (hashes.v2 if metainfo.version == V2 else hashes.v1).to_bytes().hex()
