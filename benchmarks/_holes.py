"""Write a release of true sizes without the data: real headers, sound scales, int8 of holes."""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from grokctl.checkpoint.bencode import encode
from grokctl.checkpoint.pickle_writer import Hole, Payload, write
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.release_files import released_payloads
from grokctl.checkpoint.torrent import parse_metainfo
from grokctl.checkpoint.trust import TYPED, write_source
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.tensors import TensorSpec, tensor_specs

PIECE = 4 * 2**20
SMALL = replace(GROK_1, num_layers=2, emb_size=512, vocab_size=1024, num_q_heads=8, key_size=64)
"""Twenty-six files of up to 5.6 MB."""
_ZEROS = bytes(PIECE)
_ZERO_PIECE = hashlib.sha1(_ZEROS, usedforsecurity=False).digest()


def write_release(root: Path, config: GrokConfig) -> list[str]:
    """Write the tensor files; only headers, scales, norms and routers take room on disk."""
    (root / "ckpt-0").mkdir(parents=True)
    names = []
    rng = np.random.default_rng(0)
    for spec in tensor_specs(config):
        names.append(f"ckpt-0/{spec.file}")
        with (root / names[-1]).open("xb") as file:
            write(file, *_payloads(spec, rng))
    return names


def _payloads(spec: TensorSpec, rng: np.random.Generator) -> tuple[Payload, Payload | None]:
    weight, scales = released_payloads(spec)
    if scales is not None:
        return weight, rng.uniform(1e-4, 1e-2, scales.shape).astype(BFLOAT16)
    if spec.name == "embedding":
        return Hole(weight.shape, weight.dtype), None
    return rng.uniform(0.5, 1.5, weight.shape).astype(np.float32), None


def make_torrent(root: Path, names: list[str], name: str) -> bytes:
    """Hash the pieces; one that lies in holes altogether has the hash of zeros."""
    hashes = bytearray()
    hasher, room = hashlib.sha1(usedforsecurity=False), PIECE
    for length, data in _runs(root, names):
        done = 0
        while done < length:
            count = min(room, length - done)
            if data is None and count == PIECE:
                hashes += _ZERO_PIECE
            else:
                part = memoryview(_ZEROS)[:count] if data is None else data[done : done + count]
                hasher.update(part)
                room -= count
            done += count
            if room == 0:
                hashes += hasher.digest()
                hasher, room = hashlib.sha1(usedforsecurity=False), PIECE
    if room < PIECE:
        hashes += hasher.digest()
    files = [
        {
            b"length": (root / file).stat().st_size,
            b"path": [part.encode() for part in file.split("/")],
        }
        for file in names
    ]
    info = {
        b"files": files,
        b"name": name.encode(),
        b"piece length": PIECE,
        b"pieces": bytes(hashes),
    }
    return encode({b"info": info})


def _runs(root: Path, names: list[str]) -> Iterator[tuple[int, memoryview | None]]:
    """Holes and data of all files, one after the other: `(length, data)`, None for a hole."""
    for name in names:
        with (root / name).open("rb", buffering=0) as file:
            number, end, position = file.fileno(), (root / name).stat().st_size, 0
            while position < end:
                data = _seek(number, position, os.SEEK_DATA, end)
                if data > position:
                    yield data - position, None
                position = _seek(number, data, os.SEEK_HOLE, end) if data < end else end
                for low in range(data, position, PIECE):
                    part = os.pread(number, min(PIECE, position - low), low)
                    yield len(part), memoryview(part)


def _seek(number: int, position: int, whence: int, end: int) -> int:
    try:
        return os.lseek(number, position, whence)
    except OSError:  # ENXIO: nothing but a hole up to the end
        return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    config = SMALL if arguments.small else GROK_1
    root: Path = arguments.root
    names = write_release(root, config)
    if arguments.small:
        (root / "config.json").write_text(json.dumps(config.to_dict()))
        names.append("config.json")
    torrent = make_torrent(root, names, root.name)
    (root / "release.torrent").write_bytes(torrent)
    # as a fetch by its magnet does: only a torrent that was named is a root of trust
    write_source(root, infohash=parse_metainfo(torrent, source="torrent").infohash, trust=TYPED)


if __name__ == "__main__":
    main()
