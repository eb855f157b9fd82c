"""Write a trained miniature in the released format, with its torrent: what ships with grokctl."""

import argparse
import hashlib
import shutil
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from training.recipe import CONFIG
from training.releases import floats_of
from training.state import trained

from grokctl.checkpoint.miniature import Stored, quantised, write_release
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.model.config import GrokConfig
from grokctl.model.tensors import TensorSpec

PIECE: Final = 2**16


def digest(root: Path) -> str:
    """sha256 of the names and bytes of all files of a folder, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        own = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{own}  {path.relative_to(root).as_posix()}\n".encode())
    return total.hexdigest()


def publish(
    floats: dict[str, NDArray[np.float32]], config: GrokConfig, tokenizer: bytes, out: Path
) -> list[str]:
    """Write `out/miniature` and `out/miniature.torrent`, replacing what is there."""

    def stored(spec: TensorSpec) -> Stored:
        return quantised(spec, floats[spec.name])

    root = out / "miniature"
    shutil.rmtree(root, ignore_errors=True)
    files = write_release(root, config, stored, tokenizer)
    torrent = build_metainfo(root, files, name="miniature", piece_length=PIECE)
    (out / "miniature.torrent").write_bytes(torrent)
    magnet = parse_metainfo(torrent, source="torrent").infohash
    print(f"{root}: {len(files)} files, sha256 {digest(root)}, infohash {magnet}")
    return files


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/miniature"))
    parser.add_argument("--out", type=Path, default=Path("build/miniature"))
    arguments = parser.parse_args()
    parameters, state = trained(arguments.work / "state.npz")
    tokenizer = (arguments.work / "tokenizer.model").read_bytes()
    publish(floats_of(parameters), CONFIG, tokenizer, arguments.out)
    print(f"{state.step} steps, {state.cpu_seconds:.0f} CPU s")


if __name__ == "__main__":
    main()
