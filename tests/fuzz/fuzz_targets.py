"""What strangers' bytes are fed to, and what must be true of it whatever they are."""

import atexit
import io
import json
import math
import os
import pickle
import pickletools
import re
import shlex
import shutil
import struct
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import libtorrent as lt
import numpy as np
from fuzz_mutators import (
    Mutator,
    bencode_mutator,
    edit_bytes,
    json_mutator,
    pickle_mutator,
    text_mutator,
)
from places import TWO_LAYERS

from grokctl.checkpoint import pickle_writer, pickles
from grokctl.checkpoint.bencode import decode, encode
from grokctl.checkpoint.export_manifest import (
    ExportManifest,
    export_manifest_bytes,
    parse_export_manifest,
)
from grokctl.checkpoint.frames import LARGEST_FRAME, Compression, Frames, compress
from grokctl.checkpoint.gguf import (
    ALIGNMENT,
    Gguf,
    GgufTensor,
    TensorType,
    gguf_header,
    read_gguf,
)
from grokctl.checkpoint.layout import device_layouts
from grokctl.checkpoint.manifest import (
    FileRecord,
    Manifest,
    Source,
    file_name,
    manifest_bytes,
    parse_manifest,
)
from grokctl.checkpoint.mapped_files import catch_bus_errors
from grokctl.checkpoint.pickle_objects import ArrayRef
from grokctl.checkpoint.pickles import PickledTensor
from grokctl.checkpoint.pieces import Pieces, parse_pieces
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.receipt import (
    Receipt,
    Stamp,
    now,
    proof_of,
    read_receipt,
)
from grokctl.checkpoint.refusal import read_refusal, write_refusal
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.release_files import EXTRA, release_paths
from grokctl.checkpoint.safetensors_header import HeaderTensor, read_safetensors
from grokctl.checkpoint.tensor_source import ReleaseSource, Storage
from grokctl.checkpoint.torrent import (
    GROK_1_MAGNET,
    Magnet,
    Metainfo,
    build_metainfo,
    parse_magnet,
    parse_metainfo,
    raw_values,
    trackers_of,
)
from grokctl.checkpoint.trust import TYPED, read_source, write_source
from grokctl.checkpoint.unfinished import Unfinished, incomplete, read_unfinished
from grokctl.cluster.channel import FrameReader, Keys, frame
from grokctl.cluster.handshake import (
    LONGEST,
    Purpose,
    Stranger,
    challenge,
    hello,
    keys_of,
    proof_line,
)
from grokctl.cluster.launcher import Launch
from grokctl.errors import Damage, GrokctlError, Reason
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.own_key import MAC, sealed
from grokctl.paths import CONFIG, MANIFEST, PRIVATE, TORRENT
from grokctl.transfer.web import parse_content_range

LONGEST_MESSAGE = 2000
SECONDS = 10.0
"""Of a processor, that one input may take: two hundred times what the slowest does, because on a
busy virtual machine the wait for a page of memory counts too, and lasts for seconds."""


@dataclass(frozen=True)
class Target:
    """One reader of untrusted bytes."""

    name: str
    seeds: Callable[[], Sequence[bytes]]
    """Inputs that it accepts, and a few that it does not."""
    read: Callable[[bytes], Any]
    """Returns a value, or None, or raises a `GrokctlError`; anything else is a finding."""
    check: Callable[[bytes, Any], None]
    """What must be true of an accepted value."""
    mutate: Mutator
    prepare: Callable[[], object] = lambda: None
    """Makes what it works on; costs nothing when it is there."""

    def run(self, data: bytes) -> bool:
        """Read one input, and say whether it was accepted.

        Raises:
            AssertionError: Something is not as it must be.
        """
        self.prepare()
        value = error = None
        began = time.thread_time()
        try:
            with _nothing_else_happens():
                value = self.read(data)
        except GrokctlError as caught:
            error = caught
        spent = time.thread_time() - began
        assert spent < SECONDS, f"took {spent:.1f} s"
        if error is not None:
            _assert_presentable(error)
            return False
        if value is not None:
            self.check(data, value)
        return value is not None


# --- what must be true of everything

_FORBIDDEN = re.compile(
    r"import|pickle\.|exec|compile|marshal\.|os\.(system|exec|fork|remove)|socket|subprocess|ctypes"
)
_is_watching = False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _is_watching and _FORBIDDEN.match(event):
        raise AssertionError(f"an input led to {event} {arguments!r}")


@cache
def _install_watch() -> None:
    catch_bus_errors()  # by calling the C library, and not because of any input
    sys.addaudithook(_watch)


@contextmanager
def _nothing_else_happens() -> Iterator[None]:
    """No import, no global looked up by pickle, no process, no network."""
    global _is_watching  # noqa: PLW0603 (audit hooks cannot be removed)
    _install_watch()
    _is_watching = True
    try:
        yield
    finally:
        _is_watching = False


def _assert_presentable(error: GrokctlError) -> None:
    """A person can read it on a terminal, and nothing in it speaks to the terminal."""
    for text in (str(error), error.hint or ""):
        assert len(text) < LONGEST_MESSAGE, f"a message of {len(text)} characters"
        _assert_clean(text)


def _assert_clean(text: str) -> None:
    kinds = {unicodedata.category(character) for character in text}
    assert not any(kind[0] == "C" or kind in {"Zl", "Zp"} for kind in kinds), ascii(text)


# --- pickles


def _pickle_seeds() -> list[bytes]:
    paths = sorted((TWO_LAYERS / "ckpt-0").iterdir(), key=lambda path: path.stat().st_size)
    small = [path.read_bytes() for path in (*paths[:2], *paths[12:14])]
    two, four = np.ones((2, 3), np.int8), np.ones((2, 4, 3), np.int8)
    return [
        *small,
        _pickled(np.ones(3, np.float32)),
        _pickled(np.ones((300, 2), np.float32)),
        _pickled(two, np.ones((1, 3), pickles.BFLOAT16)),
        _pickled(four, np.ones((2, 2, 3), pickles.BFLOAT16)),
    ]


def _pickled(weight: np.ndarray, scales: np.ndarray | None = None) -> bytes:
    with tempfile.TemporaryFile() as file:
        pickle_writer.write(file, weight, scales)
        file.seek(0)
        return file.read()


def _check_pickle(data: bytes, found: PickledTensor) -> None:
    refs = [found.weight] if found.scales is None else [found.weight, found.scales]
    for ref in refs:
        _check_payload(data, ref)
    if found.scales is not None:
        first, second = sorted(refs, key=lambda ref: ref.offset)
        assert first.offset + first.nbytes <= second.offset
        assert (found.weight.dtype, found.scales.dtype) == (np.int8, pickles.BFLOAT16)
    else:
        assert found.weight.dtype == np.float32
    names = {argument for opcode, argument, _ in pickletools.genops(data) if type(argument) is str}
    assert names <= _NAMES
    _check_against_pickle(data, found)


def _check_against_pickle(data: bytes, found: PickledTensor) -> None:
    """What is accepted holds the arrays that the real unpickler finds there."""
    real = _Unpickler(io.BytesIO(data)).load()
    weight, scales = (real, None) if found.scales is None else (real.weight, real.scales)
    assert weight.tobytes() == _payload(data, found.weight)
    assert weight.shape == found.weight.shape
    if found.scales is not None:
        assert scales.tobytes() == _payload(data, found.scales)
        assert scales.shape == found.scales.shape


class _Quantized:
    """Stands for the reference code's class."""


class _Unpickler(pickle.Unpickler):
    """The real one, with the five names and no others."""

    def find_class(self, module: str, name: str) -> Any:
        return {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            # not the real one: BUILD would change its dtype for the whole process
            ("ml_dtypes", "bfloat16"): np.uint16,
            ("__main__", "QuantizedWeight8bit"): _Quantized,
        }[module, name]


def _payload(data: bytes, ref: ArrayRef) -> bytes:
    return data[ref.offset : ref.offset + ref.nbytes]


_NAMES = {
    *("numpy.core.multiarray", "_reconstruct", "numpy", "ndarray", "dtype", "f4", "i1", "<", "|"),
    *("__main__", "QuantizedWeight8bit", "ml_dtypes", "bfloat16", "weight", "scales"),
}


def _check_payload(data: bytes, ref: ArrayRef) -> None:
    assert 0 < ref.offset <= len(data) - ref.nbytes
    assert all(type(length) is int and length > 0 for length in ref.shape)
    view = np.frombuffer(data, ref.dtype, ref.nbytes // ref.dtype.itemsize, ref.offset)
    assert view.reshape(ref.shape).nbytes == ref.nbytes


# --- torrents


@cache
def _torrent_seeds() -> tuple[bytes, ...]:
    names = ["config.json", "ckpt-0/tensor00001_000", "ckpt-0/tensor00005_000"]
    found = [
        build_metainfo(TWO_LAYERS, names, name="two-layers", piece_length=16384),
        build_metainfo(
            TWO_LAYERS,
            names[:1],
            name="x",
            piece_length=2**20,
            trackers=["http://t.example/announce"],
        ),
    ]
    kinds = [[], [lt.create_torrent.v2_only], [lt.create_torrent.v1_only]]
    for flags, folder in ((flags, folder) for flags in kinds for folder in (True, False)):
        with tempfile.TemporaryDirectory() as home:
            root = Path(home) / "grok-1"
            (root / "ckpt-0").mkdir(parents=True)
            for name, size in (("tensor00000_000", 40_000), ("tensor00001_000", 5), ("e", 0)):
                (root / "ckpt-0" / name).write_bytes(Random(size).randbytes(size))
            source = root if folder else root / "ckpt-0" / "tensor00000_000"
            torrent = lt.create_torrent(lt.list_files(str(source)), 16384, *flags)
            torrent.add_tracker("udp://tracker.example:6969")
            lt.set_piece_hashes(torrent, str(source.parent))
            values = torrent.generate() | {b"creation date": 1_700_000_000}
            found.append(lt.bencode(values))
    return tuple(found)


def _check_metainfo(data: bytes, found: Metainfo) -> None:
    kept = [file for file in found.files if not file.is_pad]
    for file in kept:
        assert file.path
        for part in file.path:
            assert part not in {"", ".", ".."}
            assert not set(part) & set("/\\\0")
            _assert_clean(part)
    assert len({file.path for file in kept}) == len(kept)
    assert [file.index for file in found.files] == list(range(len(found.files)))
    ends = [file.offset + file.length for file in found.files]
    assert [file.offset for file in found.files] == [0, *ends[:-1]]
    assert len(found.infohash) == (40 if found.version == 1 else 64)
    assert found.num_pieces == -(-found.total // found.piece_length)
    _check_places(found)
    if found.num_pieces <= 2000:
        _check_pieces(found)
    _check_against_libtorrent(data, found)


def _check_places(found: Metainfo) -> None:
    try:
        places = release_paths(found)
    except GrokctlError as error:
        _assert_presentable(error)
        return
    assert set(places) == {file.index for file in found.files if not file.is_pad}
    assert len(set(places.values())) == len(places)
    for index, place in places.items():
        assert not Path(place).is_absolute()
        if place != f"{EXTRA}/{index}":
            assert Path(place).parts[0].casefold() not in {"..", PRIVATE, TORRENT, MANIFEST}


def _check_pieces(found: Metainfo) -> None:
    position = dict.fromkeys(range(len(found.files)), 0)
    touched: dict[int, list[int]] = {file.index: [] for file in found.files}
    for piece in range(found.num_pieces):
        spans = found.spans(piece)
        assert found.piece_size(piece) == sum(length for _, _, length in spans) > 0
        assert len(found.piece_hash(piece)) == (20 if found.version == 1 else 32)
        assert found.version == 1 or len(spans) == 1
        for file, start, length in spans:
            assert start == position[file.index]
            position[file.index] += length
            touched[file.index].append(piece)
    for file in found.files:
        whole = 0 if file.is_pad and found.version == 2 else file.length
        assert position[file.index] == whole
        assert list(found.pieces_of(file)) == touched[file.index]


def _check_against_libtorrent(data: bytes, found: Metainfo) -> None:
    """What both accept, both see alike: nothing can be smuggled past the one by the other."""
    try:
        theirs = lt.load_torrent_buffer(data)
    except RuntimeError:
        return
    hashes, layout = theirs.info_hashes, theirs.ti.layout()
    assert found.infohash == str(hashes.v1 if hashes.has_v1() else hashes.v2)
    assert found.piece_length == theirs.ti.piece_length()
    flags = layout.flag_pad_file | layout.flag_symlink | layout.flag_executable
    assert [(file.length, file.offset, file.is_pad) for file in found.files] == [
        (
            layout.file_size(index),
            layout.file_offset(index),
            {0: False, int(layout.flag_pad_file): True}[int(layout.file_flags(index) & flags)],
        )
        for index in range(layout.num_files())
    ]


def _check_trackers(data: bytes, found: tuple[str, ...]) -> None:
    for url in found:
        assert urlsplit(url).scheme in {"http", "https", "udp"}
        _assert_clean(url)
    top, spans = decode(data, most_depth=16)
    again = encode(top)
    assert sorted(again) == sorted(data)
    assert raw_values(data) == {key: data[start:end] for key, (start, end) in spans.items()}
    for key, (start, end) in spans.items():
        assert len(encode(top[key])) == end - start


# --- magnets


def _magnet_seeds() -> list[bytes]:
    v2 = "magnet:?xt=urn:btmh:1220" + "ab" * 32
    return [
        GROK_1_MAGNET.encode(),
        f"{v2}&dn=x".encode(),
        f"{v2}&xt=urn:btih:{'cd' * 20}&tr=udp://t.example:1".encode(),
        b"magnet:?xt=urn:btih:" + b"A2" * 16 + b"&x.pe=10.0.0.1:1&ws=http://a/&dn=%1b[2J",
    ]


_MAGNET_WORDS = (
    *("magnet:?", "&xt=urn:btih:", "&xt=urn:btmh:1220", "&dn=", "&tr=", "%1b", "%00", "%ff", "%"),
    *("0" * 40, "a" * 64, "A" * 32, "http://[::1]:1/", "http://[", "udp://", "&", ";", "#", "?"),
)


def _check_magnet(_: bytes, found: Magnet) -> None:
    assert re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", found.infohash)
    _assert_clean(found.name)
    for url in found.trackers:
        assert urlsplit(url).scheme in {"http", "https", "udp"}
        assert re.fullmatch("[!-~]+", url)
    assert parse_magnet(str(found)) == found


# --- ready checkpoints


def _release() -> Release:
    return open_release(TWO_LAYERS)


@cache
def _scratch() -> Path:
    """A folder for targets that read files, for as long as this process lives."""
    path = Path(tempfile.mkdtemp(prefix="grokctl-fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def _ready(mesh: MeshShape) -> Path:
    """A ready checkpoint of the golden release, its tensors all zeros."""
    root = _scratch() / f"ready-{mesh.slug}"
    root.mkdir()
    manifest = _manifest(ReleaseSource(_release()).storage, mesh)
    for layout in manifest.layouts:
        with (root / layout.name).open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.nbytes)
    (root / MANIFEST).write_bytes(manifest_bytes(manifest))
    return root


def _manifest(
    storage: Storage,
    mesh: MeshShape,
    *,
    devices: tuple[int, ...] | None = None,
    compression: Compression | None = None,
) -> Manifest:
    """What a manifest says of files that need not be there."""
    layouts = device_layouts(storage, mesh)
    chosen = tuple(range(mesh.size)) if devices is None else devices
    records = []
    for device in chosen:
        layout, frames = layouts[device], None
        if compression is not None:
            sizes = [len(layout.header), *(held.nbytes for held in layout.tensors)]
            frames = Frames(tuple((size, size // 2 + 20) for size in sizes))
        records.append(
            FileRecord(
                name=file_name(layout, compression),
                nbytes=frames.packed_starts[-1] if frames else layout.nbytes,
                sha256="0" * 64,
                frames=frames,
            )
        )
    return Manifest(
        storage=storage,
        mesh=mesh,
        source=Source(name="x", infohash="0" * 40, proven=True, verified_at=now()),
        devices=chosen,
        compression=compression,
        errors={storage.tensors[2].key: 0.0817},
        files=tuple(records),
    )


_MESHES = (MeshShape(1, 1), MeshShape(2, 1))


@cache
def _manifest_seeds() -> tuple[bytes, ...]:
    return tuple((_ready(mesh) / MANIFEST).read_bytes() for mesh in _MESHES)


@cache
def _other_seeds() -> tuple[bytes, ...]:
    """Manifests of compressed int4, of which one device is here, and of bfloat16."""
    config = _release().config
    packed = Storage(
        config=config,
        precision=Precision.INT4,
        groups={
            spec.name: spec.shape[-2] // 2 if spec.is_quantized else 0
            for spec in tensor_specs(config)
        },
    )
    rounded = replace(packed, precision=Precision.BFLOAT16, groups=dict.fromkeys(packed.groups, 0))
    manifests = (
        _manifest(packed, MeshShape(1, 2), devices=(1,), compression=Compression(3)),
        _manifest(rounded, MeshShape(2, 1)),
    )
    return tuple(map(manifest_bytes, manifests))


def _check_other(_: bytes, found: Manifest) -> None:
    _check_config(b"", found.storage.config)
    assert parse_manifest(manifest_bytes(found)) == found
    assert set(found.devices) <= set(range(found.mesh.size))
    for device in found.devices:
        frames = found.record_of(device).frames
        assert (frames is None) == (found.compression is None)
        if frames is not None:
            assert frames.plain_starts[-1] == found.layouts[device].nbytes
            assert all(0 < plain <= LARGEST_FRAME for plain, _ in frames.sizes)


def _read_manifest(data: bytes) -> ReadyCheckpoint:
    root = _ready(_MESHES[0])
    _put(root / MANIFEST, data)
    return open_ready(root)


def _check_ready(_: bytes, found: ReadyCheckpoint) -> None:
    _check_config(b"", found.config)
    assert len(found.layouts) == found.mesh.size
    for layout in found.layouts:
        assert (found.root / layout.name).stat().st_size == layout.nbytes
        end = len(layout.header)
        for held in layout.tensors:
            assert held.offset == end
            assert held.nbytes > 0
            end = held.end
        assert end == layout.nbytes
    for record in found.files:
        assert record.name == Path(record.name).name
        assert re.fullmatch("[0-9a-f]{64}", record.sha256)
    for text in (found.source.name, found.source.infohash, found.source.verified_at):
        assert text is None or type(text) is str
        _assert_clean(text or "")


@cache
def _device_seeds() -> tuple[bytes, ...]:
    root = _ready(_MESHES[1])
    name = open_ready(root).layouts[0].name
    with (root / name).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        file.seek(0)
        return (file.read(8 + size),)


def _read_device(data: bytes) -> Any:
    """Read all tensors of a checkpoint whose first device's file begins with these bytes."""
    root = _ready(_MESHES[1])
    checkpoint = open_ready(root)
    layout = checkpoint.layouts[0]
    with (root / layout.name).open("r+b") as file:
        file.write(data[: layout.nbytes])
        if len(data) < len(layout.header):
            file.write(bytes(len(layout.header) - len(data)))
    return [
        checkpoint.read(held.tensor, held.slices)
        for one in checkpoint.layouts
        for held in one.tensors
    ]


def _check_device(data: bytes, arrays: list[np.ndarray]) -> None:
    (header,) = _device_seeds()
    assert data.ljust(len(header), b"\0")[: len(header)] == header
    assert arrays


@cache
def _packed() -> Path:
    """A compressed checkpoint of the golden release, its tensors all zeros."""
    root = _scratch() / "packed"
    root.mkdir()
    manifest = _manifest(
        ReleaseSource(_release()).storage, MeshShape(1, 1), compression=Compression(1)
    )
    (layout,), (record,) = manifest.layouts, manifest.files
    parts = [layout.header, *(bytes(held.nbytes) for held in layout.tensors)]
    frames = [compress(part, Compression(1)) for part in parts]
    (root / record.name).write_bytes(b"".join(frames))
    sizes = tuple((len(part), len(frame)) for part, frame in zip(parts, frames, strict=True))
    record = replace(record, nbytes=sum(map(len, frames)), frames=Frames(sizes))
    (root / MANIFEST).write_bytes(manifest_bytes(replace(manifest, files=(record,))))
    return root


@cache
def _packed_seeds() -> tuple[bytes, ...]:
    root = _packed()
    return ((root / open_ready(root).files[0].name).read_bytes(),)


def _read_packed(data: bytes) -> Any:
    """Read all tensors of a checkpoint whose compressed file holds these bytes."""
    root = _packed()
    (seed,) = _packed_seeds()
    checkpoint = open_ready(root)
    _put(root / checkpoint.files[0].name, data.ljust(len(seed), b"\0")[: len(seed)])
    try:
        return [checkpoint.read(held.tensor, held.slices) for held in checkpoint.layouts[0].tensors]
    finally:
        _put(root / checkpoint.files[0].name, seed)


def _check_packed(_: bytes, arrays: list[np.ndarray]) -> None:
    assert not any(array.any() for array in arrays)


# --- configurations, receipts, headers


def _config_seeds() -> list[bytes]:
    return [(TWO_LAYERS / CONFIG).read_bytes()]


def _read_config(data: bytes) -> GrokConfig:
    path = _scratch() / CONFIG
    _put(path, data)
    return GrokConfig.read(path)


def _check_config(_: bytes, found: GrokConfig) -> None:
    assert GrokConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert len({found, found}) == 1
    assert found.num_q_heads % found.num_kv_heads == 0
    assert max(found.pad_token, found.eos_token) < found.vocab_size
    if found.num_layers <= 64:
        for spec in tensor_specs(found):
            assert all(0 < length <= 2**24 for length in spec.shape)


@cache
def _proven() -> Path:
    """A release with a receipt of its own."""
    root = _scratch() / "release"
    shutil.copytree(TWO_LAYERS / "ckpt-0", root / "ckpt-0")
    shutil.copy(TWO_LAYERS / CONFIG, root)
    names = [CONFIG, *sorted(f"ckpt-0/{path.name}" for path in (root / "ckpt-0").iterdir())]
    stamps = {name: stamp for name in names if (stamp := Stamp.of(root / name)) is not None}
    Receipt(infohash="0" * 40, verified_at=now(), stamps=stamps, is_complete=True).write(root)
    write_source(root, infohash="0" * 40, trust=TYPED)
    return root


@cache
def _proven_release() -> Release:
    return open_release(_proven())


@cache
def _receipt_seeds() -> tuple[bytes, ...]:
    paths = sorted((_proven() / PRIVATE).glob("*.json"))
    return tuple(path.read_bytes() for path in paths)


def _signed(kind: str, data: bytes) -> bytes:
    """The same with the MAC of this user, without which nothing is believed."""
    with suppress(ValueError, RecursionError):
        values = json.loads(data.decode())
        if isinstance(values, dict):
            values.pop(MAC, None)
            return json.dumps(sealed(kind, values)).encode()
    return data


def _read_receipt(data: bytes) -> tuple[Receipt | None, str | None, Receipt | None] | None:
    root = _proven()
    for name, kind in (("receipt.json", "receipt"), ("source.json", "source")):
        _put(root / PRIVATE / name, _signed(kind, data))
    found = read_receipt(root), read_source(root), proof_of(_proven_release()).receipt
    return found if any(found) else None


def _check_receipt(_: bytes, found: tuple[Receipt | None, str | None, Receipt | None]) -> None:
    receipt, source, proof = found
    assert source is None or re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", source)
    if receipt is None:
        assert proof is None
        return
    assert proof is None or replace(proof, root_of_trust=receipt.root_of_trust) == receipt
    assert re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", receipt.infohash)
    for time_of_proof in (receipt.verified_at, receipt.since, *receipt.earlier.values()):
        _assert_clean(time_of_proof)
    for name, stamp in receipt.stamps.items():
        assert type(name) is str
        assert all(type(value) is int for value in (*stamp.lasting, stamp.device))
    assert receipt.untouched(_proven()) <= receipt.stamps.keys()
    receipt.write(_scratch())
    assert read_receipt(_scratch()) == receipt


@cache
def _record_seeds() -> tuple[bytes, ...]:
    root = _scratch() / "unfinished"
    Unfinished(source="grok-1", options=("--peer", "127.0.0.1:7"), have=5, nbytes=10).write(root)
    write_refusal(root, [Damage("a", Reason.ALTERED, "3 of 7 pieces")])
    return tuple(path.read_bytes() for path in sorted((root / PRIVATE).glob("*.json")))


def _read_records(data: bytes) -> list[str] | None:
    """What is said about a download that is not complete, and about damage that was found."""
    root = _scratch() / "unfinished"
    _put(root / PRIVATE / "unfinished.json", _signed("unfinished", data))
    _put(root / PRIVATE / "refusal.json", data)
    unfinished, refusal = read_unfinished(root), read_refusal(root)
    texts = [] if refusal is None else [refusal.describe(root)]
    if unfinished is not None:
        error = incomplete(root, unfinished)
        assert shlex.split(str(error.hint))[:2] == ["grokctl", "fetch"]
        texts.append(str(error))
    return texts or None


def _check_records(_: bytes, texts: list[str]) -> None:
    for text in texts:
        assert len(text) < LONGEST_MESSAGE
        _assert_clean(text)


def _check_range(_: bytes, found: tuple[int, int, int]) -> None:
    first, last, total = found
    assert 0 <= first <= last < total < 10**18


# --- the roll call of several hosts

_SECRET = b"s" * 32
_RANK = Launch(host="here", port=1, count=4, rank=1)
_ORDERS = tuple(f"order {number}".encode() * number for number in range(4))


@cache
def _hello() -> bytes:
    return hello(Purpose.ORDERS, _RANK, _SECRET, "0" * 16)


@cache
def _roll_seeds() -> tuple[bytes, ...]:
    proof = proof_line(Keys(b"another"))
    return _hello(), _hello() + proof, b"grokctl 1 of 2\n", b"GET / HTTP/1.1\r\n"


def _read_roll(data: bytes) -> Stranger | None:
    """What a stranger sends to rank 0, line by line."""
    stranger = Stranger(_SECRET)
    for line in data.splitlines(keepends=True):
        if not stranger.is_refused:
            stranger.hear(line)
    assert not stranger.is_proven
    return None if stranger.is_refused or stranger.said is None else stranger


def _check_roll(_: bytes, found: Stranger) -> None:
    assert 0 < found.rank < found.count < 10**9
    assert len(found.came) <= LONGEST
    assert keys_of(_SECRET, found.said[0], found.reply) == found.keys


@cache
def _answer_seeds() -> tuple[bytes, ...]:
    return challenge(_SECRET, _hello())[0], challenge(b"another", _hello())[0]


def _check_answer(data: bytes, _: Keys) -> None:
    assert data == _answer_seeds()[0]


def _orders_seeds() -> list[bytes]:
    return [b"".join(frame(_SECRET, number, order) for number, order in enumerate(_ORDERS))]


def _check_orders(_: bytes, found: list[bytes]) -> None:
    assert tuple(found) == _ORDERS[: len(found)]


_ROLL_WORDS = ("grokctl ", "hello", "service", "orders", " of ", "\n", " 1\n", "0" * 64, "\u0661")


# --- exports


def _gguf_seeds() -> tuple[bytes, ...]:
    tensors = (
        GgufTensor("token_embd.weight", TensorType.F32, (3, 32)),
        GgufTensor("blk.0.attn_q.weight", TensorType.Q8_0, (2, 64)),
    )
    metadata = {
        "general.architecture": "grok",
        "grok.block_count": np.uint32(1),
        "tokenizer.ggml.tokens": ("a", "▁b", "é"),
        "tokenizer.ggml.scores": np.array([0, -1, -2], "<f4"),
        "tokenizer.ggml.add_bos_token": np.bool_(False),
    }
    data = bytes(sum(tensor.padded_nbytes for tensor in tensors))
    return (gguf_header(metadata, tensors) + data, gguf_header({}, ()))


def _read_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of files as one of bytes."""

    def read_bytes(data: bytes) -> Any:
        path = _scratch() / name
        _put(path, data)
        return read(path)

    return read_bytes


def _check_gguf(data: bytes, found: Gguf) -> None:
    ends = [
        at + tensor.padded_nbytes for tensor, at in zip(found.tensors, found.offsets, strict=True)
    ]
    assert list(found.offsets[1:]) == ends[:-1]
    assert found.nbytes == len(data) >= max(ends, default=0)
    header = gguf_header(found.metadata, found.tensors)
    assert data.startswith(header[: len(header) - ALIGNMENT + 1].rstrip(b"\0"))


def _pieces_seeds() -> tuple[bytes, ...]:
    """A vocabulary, and its ids and prefix."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    texts = (
        ("<pad>", 3),
        ("<s>", 3),
        ("</s>", 3),
        ("<unk>", 2),
        ("\n", 4),
        ("<0x00>", 6),
        ("▁a", 1),
    )
    pieces = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -1.0) + bytes([0x18, kind]))
        for text, kind in texts
    )
    trainer = field(2, b"\x18\x02" + b"\xc0\x02\x03" + b"\xd8\x02" + b"\xff" * 9 + b"\x01")
    return (pieces + trainer + field(3, b"\x18\x00"), pieces)


def _check_vocabulary(_: bytes, found: Pieces) -> None:
    assert found.unknown_id >= 0
    for number in (found.begin_id, found.end_id, found.pad_id):
        assert number is None or 0 <= number < len(found.pieces)


def _safetensors_seeds() -> tuple[bytes, ...]:
    return (_safetensors(((2, 3), "F32"), ((5,), "BF16")), _safetensors())


def _safetensors(*tensors: tuple[tuple[int, ...], str]) -> bytes:
    """A file with tensors of zeros."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for number, (shape, dtype) in enumerate(tensors):
        end = place + math.prod(shape) * {"F32": 4, "BF16": 2}[dtype]
        entries[f"{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(place)


def _check_safetensors(data: bytes, found: tuple[HeaderTensor, ...]) -> None:
    length = int.from_bytes(data[:8], "little")
    assert 8 + length + sum(tensor.nbytes for tensor in found) == len(data)
    for tensor in found:
        _assert_clean(tensor.name)


def _export_seeds() -> tuple[bytes, ...]:
    manifest = ExportManifest(
        format="gguf",
        type="q8_0",
        embedding="f32",
        config=_release().config,
        source=Source(name="two", infohash=None, proven=False, verified_at=None),
        errors={"token_embd.weight": 0.001},
        folded=("layers.0.moe.up",),
        float32=("layers.0.moe.gate",),
        files=(FileRecord(name="x.gguf", nbytes=7, sha256="0" * 64),),
    )
    return (export_manifest_bytes(manifest),)


def _check_export(_: bytes, found: ExportManifest) -> None:
    assert parse_export_manifest(export_manifest_bytes(found)) == found
    for name in found.records:
        assert Path(name).name == name != ".."
        assert not name.startswith((".", "-"))
    for text in (found.format, found.type, found.embedding, found.source.name):
        _assert_clean(text)
    for text in (*found.errors, *found.folded, *found.float32):
        _assert_clean(text)


def _put(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "pickle",
            _pickle_seeds,
            lambda data: pickles.scan(memoryview(data), file="tensor00000_000"),
            _check_pickle,
            pickle_mutator,
        ),
        Target(
            "torrent",
            _torrent_seeds,
            lambda data: parse_metainfo(data, source="x.torrent"),
            _check_metainfo,
            bencode_mutator,
        ),
        Target("bencode", _torrent_seeds, trackers_of, _check_trackers, bencode_mutator),
        Target(
            "magnet",
            _magnet_seeds,
            lambda data: parse_magnet(os.fsdecode(data)),
            _check_magnet,
            text_mutator(_MAGNET_WORDS),
        ),
        Target(
            "manifest",
            _manifest_seeds,
            _read_manifest,
            _check_ready,
            json_mutator,
            lambda: _ready(_MESHES[0]),
        ),
        Target(
            "device",
            _device_seeds,
            _read_device,
            _check_device,
            edit_bytes,
            lambda: _ready(_MESHES[1]),
        ),
        Target("other-manifest", _other_seeds, parse_manifest, _check_other, json_mutator),
        Target("packed-device", _packed_seeds, _read_packed, _check_packed, edit_bytes, _packed),
        Target("config", _config_seeds, _read_config, _check_config, json_mutator, _scratch),
        Target(
            "receipt", _receipt_seeds, _read_receipt, _check_receipt, json_mutator, _proven_release
        ),
        Target("record", _record_seeds, _read_records, _check_records, json_mutator, _record_seeds),
        Target("roll", _roll_seeds, _read_roll, _check_roll, text_mutator(_ROLL_WORDS)),
        Target(
            "answer",
            _answer_seeds,
            lambda data: keys_of(_SECRET, _hello(), data),
            _check_answer,
            text_mutator(("grokctl ", "challenge", " 0 ", " 1 ", "\n", "0" * 32)),
        ),
        Target(
            "orders",
            _orders_seeds,
            lambda data: FrameReader(_SECRET).feed(data) or None,
            _check_orders,
            edit_bytes,
        ),
        Target(
            "range",
            lambda: [b"bytes 0-16383/99999", b"bytes 5-5/6"],
            lambda data: parse_content_range(data.decode("latin-1")),
            _check_range,
            text_mutator(("bytes ", "-", "/", "*", " ", "0" * 20, "9" * 30, "\u0665")),
        ),
        Target(
            "gguf", _gguf_seeds, _read_file("x.gguf", read_gguf), _check_gguf, edit_bytes, _scratch
        ),
        Target(
            "pieces",
            _pieces_seeds,
            parse_pieces,
            _check_vocabulary,
            edit_bytes,
        ),
        Target(
            "safetensors",
            _safetensors_seeds,
            _read_file("x.safetensors", read_safetensors),
            _check_safetensors,
            edit_bytes,
            _scratch,
        ),
        Target("export", _export_seeds, parse_export_manifest, _check_export, json_mutator),
    )
}
