"""What the tests of `reshard` share: cutting, looking at what was cut, stopping on the way."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.ready import ReadyCheckpoint, read_manifest
from grokctl.checkpoint.ready_receipt import receipt_now
from grokctl.checkpoint.receipt import Receipt
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.trust import TYPED, write_source
from grokctl.events import Advanced, Event, Noted, Observer, Stage, ignore
from grokctl.model.placement import MeshShape
from grokctl.paths import PRIVATE
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.verify import verify

SMALL = replace(MINIATURE, num_layers=1, vocab_size=512, emb_size=64, num_q_heads=4, num_kv_heads=2)


def proven_release(root: Path) -> Receipt:
    """Write a small release with the torrent of a magnet that was typed; return its proof."""
    files = write_miniature(root, SMALL)
    torrent = build_metainfo(root, files, name="small", piece_length=16384)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="small").infohash, trust=TYPED)
    verified = verify(root).verified
    assert verified is not None
    return verified.receipt


def cut(
    source: Release | ReadyCheckpoint,
    mesh: MeshShape,
    out: Path,
    *,
    proof: Receipt | None = None,
    force: bool = False,
    observe: Observer = ignore,
    **options: Any,
) -> ReadyCheckpoint:
    """Plan and execute; `options` are the plan's."""
    planned = plan_reshard(source, ReshardOptions(mesh=mesh, out=out, **options))
    return reshard(planned, proof=proof, force=force, observe=observe)


def made_here(root: Path) -> Path:
    """Let a copy pass for one that was resharded there; its files are still to be hashed."""
    receipt_now(root, read_manifest(root).manifest_sha256, (), root_of_trust=TYPED).write(root)
    return root


def contents(root: Path) -> dict[str, str]:
    """Every file below a folder, and the sum of its bytes; not the receipt, which has times."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path.parent.name != PRIVATE
    }


def device_files(root: Path) -> dict[str, str]:
    """The same of the device files alone."""
    return {name: digest for name, digest in contents(root).items() if name.startswith("device-")}


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's data begin, and what its header says."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


# --- runs that stop on the way


def interrupt_at(count: int, events: list[Event] | None = None) -> Callable[[Event], None]:
    """An observer that raises at some moment of the cutting."""
    seen = 0

    def observe(event: Event) -> None:
        nonlocal seen
        if events is not None:
            events.append(event)
        if isinstance(event, Advanced) and event.stage is Stage.RESHARD:
            seen += 1
            if seen == count:
                raise KeyboardInterrupt

    return observe


def partial_of(out: Path) -> Path:
    """The folder that grows."""
    (partial,) = out.parent.glob(f".{out.name}.*.partial")
    return partial


def journal_of(out: Path) -> list[Any]:
    """The lines of its journal that are whole; none before it begins."""
    paths = out.parent.glob(f".{out.name}.*.partial/journal")
    lines = [line for path in paths for line in path.read_bytes().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def kept_by(events: list[Event]) -> int:
    """How many tensors a run said that it kept of an earlier one."""
    notes = [event.message for event in events if isinstance(event, Noted)]
    found = [int(note.split()[2]) for note in notes if note.startswith("continuing after ")]
    return sum(found)
