"""Read libtorrent's resume data with mistrust."""

from collections.abc import Mapping

import libtorrent as lt

from grokctl.checkpoint.torrent import V2, Metainfo
from grokctl.transfer.swarm_types import Claims


def read_claims(resume: bytes, metainfo: Metainfo, sizes: Mapping[int, int]) -> Claims:
    """What resume data claims, as far as that can be.

    A claim to bytes that their file is too short to hold is dropped: the file was removed, or was
    not wanted when they came, so that they went to the part file, which other choices of files
    make unreadable. libtorrent would read zeros for them.

    Args:
        resume: What an earlier session left; anything that is not resume data claims nothing.
        metainfo: The torrent that it should be about.
        sizes: File index -> bytes of it on disk; files that are not named hold everything.
    """
    try:
        resumed = lt.read_resume_data(resume)
    except RuntimeError:
        return Claims()
    if (
        infohash_of(resumed.info_hashes, metainfo) != metainfo.infohash
        or max(resumed.unfinished_pieces, default=0) >= metainfo.num_pieces
    ):
        return Claims()

    def is_here(piece: int) -> bool:
        return all(
            offset + length <= sizes.get(file.index, file.length)
            for file, offset, length in metainfo.spans(piece)
        )

    claimed = enumerate(resumed.have_pieces[: metainfo.num_pieces])
    return Claims(
        have=frozenset(piece for piece, is_claimed in claimed if is_claimed and is_here(piece)),
        unfinished={
            piece: list(blocks)
            for piece, blocks in resumed.unfinished_pieces.items()
            if is_here(piece)
        },
        uploaded=resumed.total_uploaded,
    )


def infohash_of(hashes: lt.info_hash_t, metainfo: Metainfo) -> str:
    """The infohash of the kind that a torrent is known by."""
    return (hashes.v2 if metainfo.version == V2 else hashes.v1).to_bytes().hex()
