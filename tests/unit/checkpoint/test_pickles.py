import builtins
import io
import mmap
import os
import pickle
import pickletools
import random
import struct
import sys
import time
import tracemalloc
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing._private import utils as numpy_utils
from places import TWO_LAYERS

from grokctl.checkpoint import pickles
from grokctl.checkpoint.pickle_names import foreign_name
from grokctl.checkpoint.pickle_writer import Hole, measure, write
from grokctl.checkpoint.pickles import BFLOAT16, PickledTensor, scan
from grokctl.errors import CorruptCheckpointError, GrokctlError, Reason, UnsafePickleError

CKPT = TWO_LAYERS / "ckpt-0"
NORM = (CKPT / "tensor00009_000").read_bytes()
KEY = (CKPT / "tensor00005_000").read_bytes()
GENUINE = sorted(path.name for path in CKPT.iterdir())

I1, F4 = np.dtype("i1"), np.dtype("<f4")

# --- an assembler for the protocol-4 opcodes that a tensor takes, and for those it does not


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def number(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def tuple_of(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def binbytes(payload: bytes) -> bytes:
    return pickle.BINBYTES + struct.pack("<I", len(payload)) + payload


def state_of(*items: tuple[str, bytes]) -> bytes:
    pairs = b"".join(text(key) + value for key, value in items)
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


RECONSTRUCT = named("numpy.core.multiarray", "_reconstruct")
NDARRAY = named("numpy", "ndarray")
DTYPE = named("numpy", "dtype")
SCALAR = named("ml_dtypes", "bfloat16")
CLASS = named("__main__", "QuantizedWeight8bit")
BARE = RECONSTRUCT + tuple_of(NDARRAY, tuple_of(number(0)), b"C\x01b") + pickle.REDUCE
INSTANCE = CLASS + pickle.EMPTY_TUPLE + pickle.NEWOBJ
NO, YES, NONE = pickle.NEWFALSE, pickle.NEWTRUE, pickle.NONE


def dtype(code: bytes = text("f4"), order: str = "<", tail: tuple[int, ...] = (-1, -1, 0)) -> bytes:
    state = tuple_of(number(3), text(order), NONE, NONE, NONE, *map(number, tail))
    return DTYPE + tuple_of(code, NO, YES) + pickle.REDUCE + state + pickle.BUILD


def array(
    shape: bytes = tuple_of(number(2)),
    kind: bytes = dtype(),
    payload: bytes = binbytes(bytes(8)),
    *,
    fortran: bytes = NO,
    bare: bytes = BARE,
) -> bytes:
    return bare + tuple_of(number(1), shape, kind, fortran, payload) + pickle.BUILD


WEIGHT = array(tuple_of(number(4), number(2)), dtype(text("i1"), "|"))
SCALES = array(tuple_of(number(2), number(2)), dtype(SCALAR, tail=(2, 2, 64)))
PAIR = (("weight", WEIGHT), ("scales", SCALES))


def quantized(state: bytes, *, instance: bytes = INSTANCE) -> bytes:
    return instance + state + pickle.BUILD


def pickled(body: bytes) -> bytes:
    return b"\x80\x04" + body + pickle.STOP


class _Trap:
    """Pickles as a call of any function."""

    def __init__(self, *reduction: object) -> None:
        self.reduction = reduction

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduction


class QuantizedWeight8bit:
    """Stands for the reference code's class of that name."""


QuantizedWeight8bit.__module__ = "__main__"


class _Restricted(pickle.Unpickler):
    """The real unpickler, for files that are known to be harmless."""

    def find_class(self, module: str, name: str) -> object:
        return {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            # not the real one: BUILD would change its dtype for the whole process
            ("ml_dtypes", "bfloat16"): np.uint16,
            ("__main__", "QuantizedWeight8bit"): QuantizedWeight8bit,
        }[module, name]


def read(data: bytes, ref) -> np.ndarray:
    return np.frombuffer(data, ref.dtype, ref.nbytes // ref.dtype.itemsize, ref.offset).reshape(
        ref.shape
    )


@contextmanager
def mapped_view(path: Path) -> Iterator[memoryview]:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as buffer,
    ):
        yield buffer


def verdict(data: bytes) -> PickledTensor | GrokctlError:
    """Scan untrusted bytes: a tensor or the one kind of error, and nothing loaded by it."""
    modules = set(sys.modules)
    try:
        return scan(memoryview(data), file="tensor00000_000")
    except GrokctlError as error:
        return error
    finally:
        assert set(sys.modules) == modules


def assert_harmless(found: PickledTensor | GrokctlError, data: bytes) -> None:
    """A tensor that lies within its file, or an error that a person can read."""
    if isinstance(found, GrokctlError):
        assert isinstance(found, CorruptCheckpointError)
        assert len(str(found)) < 1000
        return
    for ref in (found.weight, found.scales):
        assert ref is None or 0 < ref.offset <= len(data) - ref.nbytes


@pytest.fixture
def without_search(monkeypatch):
    """Do not search for a flipped bit, which takes a tenth of a second."""
    monkeypatch.setattr(pickles, "_flip", lambda _machine: None)


# --- what is accepted


@pytest.mark.parametrize("name", GENUINE)
def test_a_genuine_file_is_read_as_the_real_unpickler_reads_it(name):
    data = (CKPT / name).read_bytes()
    real = _Restricted(io.BytesIO(data)).load()

    found = scan(data, file=name)

    weight, scales = (real, None) if found.scales is None else (real.weight, real.scales)
    np.testing.assert_array_equal(read(data, found.weight), weight)
    if found.scales is not None:
        np.testing.assert_array_equal(read(data, found.scales).view(np.uint16), scales)


@pytest.mark.parametrize("name", GENUINE)
def test_a_genuine_file_is_written_again_byte_for_byte(name):
    data = (CKPT / name).read_bytes()
    found = scan(data, file=name)
    scales = None if found.scales is None else read(data, found.scales)
    again = io.BytesIO()

    refs = write(again, read(data, found.weight), scales)

    assert again.getvalue() == data
    assert refs == found


def test_a_file_assembled_by_hand_is_accepted_with_and_without_scales():
    plain, both = pickled(array()), pickled(quantized(state_of(*PAIR)))

    found_plain, found_both = verdict(plain), verdict(both)

    assert isinstance(found_plain, PickledTensor)
    assert (found_plain.weight.shape, found_plain.weight.dtype) == ((2,), F4)
    assert isinstance(found_both, PickledTensor)
    assert (found_both.weight.shape, found_both.weight.dtype) == ((4, 2), I1)
    assert (found_both.scales.shape, found_both.scales.dtype) == ((2, 2), BFLOAT16)


def test_a_memoryview_of_a_mapped_file_is_read_like_bytes(tmp_path):
    path = tmp_path / "tensor"
    path.write_bytes(KEY)

    with mapped_view(path) as buffer:
        found = scan(buffer, file="tensor")

    assert found == scan(KEY, file="tensor")


# --- the numbers of Grok-1 itself


@pytest.mark.parametrize(
    ("holes", "size", "offsets"),
    [
        pytest.param([Hole((131072, 6144), F4), None], 3_221_225_637, [151, None], id="embedding"),
        pytest.param(
            [Hole((8, 6144, 32768), I1), Hole((8, 1, 32768), BFLOAT16)],
            1_611_137_347,
            [201, 1_610_613_043],
            id="moe-linear",
        ),
        pytest.param(
            [Hole((8, 32768, 6144), I1), Hole((8, 8, 6144), BFLOAT16)],
            1_611_399_491,
            [201, 1_610_613_043],
            id="moe-linear_1",
        ),
        pytest.param(
            [Hole((6144, 6144), I1), Hole((8, 6144), BFLOAT16)],
            37_847_359,
            [199, 37_749_039],
            id="output",
        ),
        pytest.param(
            [Hole((6144, 6144), I1), Hole((1, 6144), BFLOAT16)],
            37_761_334,
            [199, 37_749_039],
            id="query",
        ),
        pytest.param(
            [Hole((6144, 1024), I1), Hole((1, 1024), BFLOAT16)],
            6_293_814,
            [199, 6_291_759],
            id="key",
        ),
        pytest.param([Hole((6144, 8), F4), None], 196_770, [148, None], id="router"),
        pytest.param([Hole((6144,), F4), None], 24_727, [146, None], id="norm"),
    ],
)
def test_sizes_and_offsets_are_those_of_the_released_files(tmp_path, holes, size, offsets):
    path = tmp_path / "tensor"

    with path.open("wb") as file:
        written = write(file, *holes)
    with mapped_view(path) as buffer:
        tracemalloc.start()
        found = scan(buffer, file="tensor")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert path.stat().st_size == measure(*holes) == size
    assert found == written
    refs = [found.weight, found.scales]
    assert [ref and ref.offset for ref in refs] == offsets
    assert [ref and Hole(ref.shape, ref.dtype) for ref in refs] == holes
    assert peak < 200_000


class _OldNumpyPickler(pickle.Pickler):
    """The C pickler, naming numpy's reconstructor as numpy 1 did."""

    def reducer_override(self, value: object) -> object:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        _, arguments, state = value.__reduce__()
        return sys.modules["numpy.core.multiarray"]._reconstruct, arguments, state


@pytest.fixture
def c_pickled(monkeypatch):
    """What the C pickler writes where numpy is older than 2."""

    def reconstruct() -> None: ...

    reconstruct.__module__ = "numpy.core.multiarray"
    reconstruct.__qualname__ = reconstruct.__name__ = "_reconstruct"
    old = types.ModuleType("numpy.core.multiarray")
    old._reconstruct = reconstruct
    monkeypatch.setitem(sys.modules, "numpy.core", types.ModuleType("numpy.core"))
    monkeypatch.setitem(sys.modules, "numpy.core.multiarray", old)
    monkeypatch.setattr(
        sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False
    )

    def dump(weight: np.ndarray, scales: np.ndarray | None = None) -> bytes:
        value: object = weight
        if scales is not None:
            value = QuantizedWeight8bit()
            value.weight, value.scales = weight, scales
        file = io.BytesIO()
        _OldNumpyPickler(file, protocol=4).dump(value)
        return file.getvalue()

    return dump


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1,), id="one"),
        pytest.param((63,), id="below-short-bytes"),
        pytest.param((64,), id="at-256-bytes"),
        pytest.param((255, 3), id="dimension-of-one-byte"),
        pytest.param((256, 3), id="dimension-of-two-bytes"),
        pytest.param((65535, 1), id="dimension-below-65536"),
        pytest.param((65536, 1), id="dimension-of-four-bytes"),
        pytest.param((16383,), id="payload-below-a-frame"),
        pytest.param((16384,), id="payload-of-a-frame"),
        pytest.param((16385,), id="payload-above-a-frame"),
        pytest.param((4, 40, 50), id="rank-three"),
    ],
)
def test_float32_is_written_exactly_as_the_c_pickler_does(c_pickled, shape):
    weight = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    file = io.BytesIO()

    write(file, weight)

    assert file.getvalue() == c_pickled(weight)


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        pytest.param((4, 4), (1, 4), id="small"),
        pytest.param((8, 127), (1, 127), id="scales-below-256-bytes"),
        pytest.param((8, 128), (1, 128), id="scales-of-256-bytes"),
        pytest.param((127, 512), (1, 512), id="one-frame-ends-at-64-KiB"),
        pytest.param((128, 512), (8, 512), id="weight-outside-of-frames"),
        pytest.param((8, 40_000), (4, 40_000), id="both-outside-of-frames"),
        pytest.param((1, 60_000), (1, 30_000), id="both-inside-of-frames"),
        pytest.param((2, 8, 100), (2, 8, 100), id="rank-three"),
    ],
)
def test_quantized_is_written_as_the_c_pickler_does_but_for_the_flags(c_pickled, shape, scales):
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, shape, dtype=np.int8)
    scale = rng.standard_normal(scales).astype(BFLOAT16)
    file = io.BytesIO()

    write(file, weight, scale)

    ours, theirs = file.getvalue(), c_pickled(weight, scale)
    flags = np.dtype(BFLOAT16).__reduce__()[2][-1]
    place = theirs.index(b"K\x02K\x02K" + bytes([flags])) + 5
    assert ours == theirs[:place] + b"\x50" + theirs[place + 1 :]


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=3).filter(lambda s: np.prod(s) < 200_000),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_found_again(shape, groups, with_scales):
    shape = tuple(shape)
    weight = np.resize(np.arange(97), shape).astype(np.int8 if with_scales else np.float32)
    scales = None
    if with_scales:
        scales = np.resize(np.arange(31), (*shape[:-2], groups, shape[-1])).astype(BFLOAT16)
    file = io.BytesIO()

    refs = write(file, weight, scales)

    data = file.getvalue()
    assert scan(data, file="x") == refs
    assert len(data) == measure(weight, scales)
    np.testing.assert_array_equal(read(data, refs.weight), weight)
    if scales is not None:
        np.testing.assert_array_equal(read(data, refs.scales), scales)


# --- attacks that the real unpickler falls for

TRAPS = [
    pytest.param(lambda canary: (os.system, (f"touch {canary}",)), id="os.system"),
    pytest.param(lambda canary: (builtins.eval, (f"open({canary!r}, 'w')",)), id="builtins.eval"),
    pytest.param(lambda canary: (builtins.exec, (f"open({canary!r}, 'w')",)), id="builtins.exec"),
    pytest.param(lambda canary: (Path.touch, (Path(canary),)), id="pathlib.Path.touch"),
    pytest.param(
        lambda canary: (numpy_utils.runstring, (f"open({canary!r}, 'w')", {})),
        id="numpy.testing._private.utils.runstring",
    ),
    pytest.param(
        lambda canary: (np.savetxt, (canary, np.zeros(1))),
        id="numpy.savetxt",
    ),
]
PLACES = [
    pytest.param(lambda trap: trap, id="alone"),
    pytest.param(lambda trap: {"weight": trap, "scales": trap}, id="in-a-dictionary"),
    pytest.param(lambda trap: [np.zeros(2, np.float32), trap], id="after-an-array"),
    pytest.param(lambda trap: np.array([trap, None], object), id="in-an-object-array"),
]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("trap", TRAPS)
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(tmp_path, trap, place, protocol):
    canary = tmp_path / "canary"
    data = pickle.dumps(place(_Trap(*trap(str(canary)))), protocol=protocol)
    pickle.loads(data)
    assert canary.exists(), "the attack is no attack"
    canary.unlink()

    found = verdict(data)

    assert isinstance(found, UnsafePickleError)
    assert found.exit_code == 21
    assert found.damage[0].reason is Reason.UNSAFE
    assert not canary.exists()


def test_a_module_that_a_file_names_is_not_imported():
    sys.modules.pop("this", None)

    found = verdict(pickled(named("this", "s")))

    assert isinstance(found, UnsafePickleError)
    assert "this" not in sys.modules


CALL = tuple_of(text("true"))
SYSTEM = named("posix", "system") + CALL + pickle.REDUCE
FOREIGN = [
    pytest.param(SYSTEM, id="posix.system"),
    pytest.param(b"cposix\nsystem\n" + CALL + pickle.REDUCE, id="the-GLOBAL-opcode"),
    pytest.param(b"(S'true'\niposix\nsystem\n", id="the-INST-opcode"),
    pytest.param(b"(cposix\nsystem\nS'true'\no", id="the-OBJ-opcode"),
    pytest.param(named("numpy._core.multiarray", "_reconstruct"), id="a-newer-numpy"),
    pytest.param(named("numpy.core.multiarray", "scalar"), id="another-name-of-the-module"),
    pytest.param(named("numpy", "ndarray.tofile"), id="a-dotted-name"),
    pytest.param(named("numpy", "dtype.__class__"), id="a-dunder-of-an-allowed-class"),
    pytest.param(named("__main__", "__builtins__"), id="another-name-of-main"),
    pytest.param(text("posix") + text("system") + pickle.STACK_GLOBAL + b"0", id="popped"),
    pytest.param(
        named("posix", "system") + pickle.MEMOIZE + pickle.POP + array(), id="memoized-and-popped"
    ),
    pytest.param(
        array() + pickle.MARK + named("posix", "system") + pickle.POP_MARK, id="popped-to-mark"
    ),
    pytest.param(
        text("system") + pickle.MEMOIZE + text("posix") + pickle.MEMOIZE + b"h\x01h\x00\x93",
        id="assembled-from-the-memo",
    ),
    pytest.param(array(shape=tuple_of(SYSTEM)), id="in-the-shape"),
    pytest.param(array(shape=SYSTEM), id="as-the-shape"),
    pytest.param(array(payload=SYSTEM), id="as-the-payload"),
    pytest.param(array(fortran=SYSTEM), id="as-the-order"),
    pytest.param(array(kind=dtype(SYSTEM)), id="in-the-dtype"),
    pytest.param(array(bare=SYSTEM), id="as-the-array"),
    pytest.param(quantized(state_of(("weight", SYSTEM), ("scales", SCALES))), id="as-the-weight"),
    pytest.param(quantized(state_of(*PAIR), instance=SYSTEM), id="as-the-instance"),
    pytest.param(quantized(SYSTEM), id="as-the-state"),
    pytest.param(array() + b"0" + SYSTEM, id="after-the-array"),
    pytest.param(array() + SYSTEM, id="beside-the-array"),
    pytest.param(b"\x82\x01", id="EXT1"),
    pytest.param(b"\x83\x01\x00", id="EXT2"),
    pytest.param(b"\x84\x01\x00\x00\x00", id="EXT4"),
    pytest.param(b"]" + array() + SYSTEM + b"a", id="in-a-list"),
    pytest.param(
        b"X\x05\x00\x00\x00posix" + b"X\x06\x00\x00\x00system" + b"\x93", id="BINUNICODE-names"
    ),
    pytest.param(b"Vposix\nVsystem\n\x93", id="UNICODE-names"),
    pytest.param(b"S'posix'\nS'system'\n\x93", id="STRING-names"),
    pytest.param(text("posix") + b"q\x07" + text("system") + b"2\x93", id="a-duplicated-name"),
    pytest.param(
        b"h\x00"[:0]
        + text("system")
        + b"r\xff\x00\x00\x00"
        + text("posix")
        + b"j\xff\x00\x00\x00\x93",
        id="from-a-far-memo",
    ),
    pytest.param(b"\x95" + b"\xff" * 8 + SYSTEM, id="behind-a-frame-that-is-too-long"),
    pytest.param(SYSTEM + b"B\xff\xff\xff\xff", id="before-a-cut"),
    pytest.param(b"\x8e" + struct.pack("<Q", 3) + b"abc" + SYSTEM, id="behind-long-bytes"),
    pytest.param(pickle.NONE * 300 + SYSTEM, id="behind-300-opcodes"),
]
OTHER = [
    pytest.param(b"c__main__\nQuantizedWeight8bit\n)\x81", id="GLOBAL-of-an-allowed-name"),
    pytest.param(array() + array(), id="two-arrays"),
    pytest.param(b"Pid\n", id="PERSID"),
    pytest.param(text("id") + b"Q", id="BINPERSID"),
    pytest.param(array(payload=b"\x8e" + struct.pack("<Q", 8) + bytes(8)), id="BINBYTES8"),
    pytest.param(b"\x8e" + b"\xff" * 8, id="BINBYTES8-of-everything"),
    pytest.param(array(payload=b"\x96" + struct.pack("<Q", 8) + bytes(8)), id="BYTEARRAY8"),
    pytest.param(b"\x97", id="NEXT_BUFFER"),
    pytest.param(b"\x80\x04" + array(), id="PROTO-twice"),
    pytest.param(array() + b"2", id="DUP"),
    pytest.param(array() + b"q\x00", id="BINPUT"),
    pytest.param(b"X\x04\x00\x00\x00true" + array(), id="BINUNICODE"),
    pytest.param(b"]" + array() + b"a", id="a-list"),
    pytest.param(b"", id="nothing"),
    pytest.param(NONE, id="None"),
    pytest.param(pickle.EMPTY_DICT, id="a-dictionary"),
    pytest.param(BARE, id="an-array-without-state"),
    pytest.param(INSTANCE, id="an-instance-without-state"),
    pytest.param(CLASS, id="a-class"),
    pytest.param(WEIGHT, id="integers-without-scales"),
    pytest.param(SCALES, id="bfloat16-alone"),
    pytest.param(tuple_of(array()), id="a-tuple-of-an-array"),
    pytest.param(array() + pickle.MARK, id="an-open-mark"),
    pytest.param(pickle.MARK + array(), id="a-mark-below"),
    pytest.param(pickle.TUPLE, id="a-tuple-never-opened"),
    pytest.param(pickle.TUPLE3, id="a-tuple-of-an-empty-stack"),
    pytest.param(pickle.MEMOIZE, id="memoizes-nothing"),
    pytest.param(pickle.BUILD, id="builds-nothing"),
    pytest.param(pickle.REDUCE, id="calls-nothing"),
    pytest.param(pickle.SETITEMS, id="sets-nothing"),
    pytest.param(b"h\x00", id="recalls-what-was-never-kept"),
    pytest.param(b"j\xff\xff\xff\xff", id="recalls-memo-4294967295"),
    pytest.param(text("numpy") + NONE + pickle.STACK_GLOBAL, id="a-name-that-is-no-text"),
    pytest.param(b"\x8c\x02\xff\xfe", id="a-name-that-is-no-UTF-8"),
    pytest.param(text("nump\u0443") + text("ndarray") + b"\x93", id="a-cyrillic-letter"),
]


@pytest.mark.parametrize("body", FOREIGN)
def test_a_name_outside_the_five_is_unsafe(body):
    found = verdict(pickled(body))

    assert isinstance(found, UnsafePickleError), found
    assert found.hint == "nothing in the file was executed"


@pytest.mark.parametrize("body", OTHER)
def test_another_pickle_that_names_nothing_outside_the_five_is_refused_as_damage(body):
    found = verdict(pickled(body))

    assert type(found) is CorruptCheckpointError, found


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(DTYPE + tuple_of(text("O"), NO, YES) + pickle.REDUCE, id="dtype-object"),
        pytest.param(DTYPE + tuple_of(text("f8"), NO, YES) + pickle.REDUCE, id="dtype-float64"),
        pytest.param(DTYPE + tuple_of(text("f4"), YES, YES) + pickle.REDUCE, id="dtype-aligned"),
        pytest.param(DTYPE + tuple_of(text("f4"), NO) + pickle.REDUCE, id="dtype-two-arguments"),
        pytest.param(DTYPE + pickle.EMPTY_TUPLE + pickle.REDUCE, id="dtype-no-argument"),
        pytest.param(DTYPE + tuple_of(NDARRAY, NO, YES) + pickle.REDUCE, id="dtype-of-a-class"),
        pytest.param(DTYPE + tuple_of(text("f4"), NO, YES) + pickle.NEWOBJ, id="dtype-constructed"),
        pytest.param(array(kind=dtype(text("O"), "|", (-1, -1, 63))), id="object-array"),
        pytest.param(array(kind=dtype(order=">")), id="big-endian"),
        pytest.param(array(kind=dtype(order="=")), id="native-order"),
        pytest.param(array(kind=dtype() + dtype()[len(DTYPE) :]), id="dtype-called"),
        pytest.param(
            array(kind=dtype() + tuple_of(number(3), text(">")) + pickle.BUILD), id="dtype-twice"
        ),
        pytest.param(
            array(kind=DTYPE + tuple_of(text("f4"), NO, YES) + pickle.REDUCE), id="dtype-stateless"
        ),
        pytest.param(array(kind=text("f4")), id="dtype-a-text"),
        pytest.param(array(kind=DTYPE), id="dtype-the-class"),
        pytest.param(RECONSTRUCT + pickle.EMPTY_TUPLE + pickle.REDUCE, id="reconstruct-nothing"),
        pytest.param(
            array(bare=RECONSTRUCT + tuple_of(DTYPE, tuple_of(number(0)), b"C\x01b") + b"R"),
            id="reconstruct-a-dtype",
        ),
        pytest.param(
            array(bare=RECONSTRUCT + tuple_of(NDARRAY, tuple_of(number(9)), b"C\x01b") + b"R"),
            id="reconstruct-a-shape",
        ),
        pytest.param(
            array(bare=RECONSTRUCT + tuple_of(CLASS, tuple_of(number(0)), b"C\x01b") + b"R"),
            id="reconstruct-our-class",
        ),
        pytest.param(array(bare=NDARRAY + tuple_of(number(2)) + b"R"), id="ndarray-called"),
        pytest.param(array(bare=NDARRAY + tuple_of(number(2)) + b"\x81"), id="ndarray-constructed"),
        pytest.param(array(bare=SCALAR + pickle.EMPTY_TUPLE + b"R"), id="bfloat16-called"),
        pytest.param(CLASS + pickle.EMPTY_TUPLE + pickle.REDUCE, id="our-class-called"),
        pytest.param(array(fortran=YES), id="fortran-order"),
        pytest.param(array(fortran=number(0)), id="order-a-number"),
        pytest.param(array(payload=text("12345678")), id="payload-a-text"),
        pytest.param(array(shape=number(2)), id="shape-a-number"),
        pytest.param(array() + tuple_of(number(1)) + pickle.BUILD, id="array-built-twice"),
    ],
)
def test_an_allowed_global_with_other_arguments_is_refused(body):
    assert type(verdict(pickled(body))) is CorruptCheckpointError


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(quantized(state_of(("weight", WEIGHT))), id="no-scales"),
        pytest.param(quantized(state_of(("scales", SCALES))), id="no-weight"),
        pytest.param(quantized(pickle.EMPTY_DICT), id="empty"),
        pytest.param(quantized(state_of(*reversed(PAIR))), id="swapped"),
        pytest.param(quantized(state_of(*PAIR, ("weight", WEIGHT))), id="weight-twice"),
        pytest.param(quantized(state_of(*PAIR, ("__class__", NDARRAY))), id="class-changed"),
        pytest.param(quantized(state_of(*PAIR, ("__setstate__", DTYPE))), id="setstate-planted"),
        pytest.param(quantized(state_of(*PAIR, ("zeros", array()))), id="one-more"),
        pytest.param(quantized(state_of(*PAIR)) + state_of(*PAIR) + pickle.BUILD, id="built-twice"),
        pytest.param(
            quantized(state_of(*PAIR, ("", NONE)), instance=INSTANCE), id="a-key-without-name"
        ),
        pytest.param(quantized(tuple_of(NONE, state_of(*PAIR))), id="slots-state"),
        pytest.param(quantized(tuple_of(WEIGHT, SCALES)), id="state-a-tuple"),
        pytest.param(
            quantized(state_of(*PAIR), instance=CLASS + tuple_of(NONE) + pickle.NEWOBJ),
            id="constructed-with-arguments",
        ),
        pytest.param(
            quantized(
                state_of(*PAIR), instance=CLASS + b")" + pickle.EMPTY_DICT + pickle.NEWOBJ_EX
            ),
            id="constructed-with-keywords",
        ),
        pytest.param(
            quantized(pickle.EMPTY_DICT + pickle.MARK + text("weight") + pickle.SETITEMS),
            id="an-odd-number-of-items",
        ),
        pytest.param(
            quantized(pickle.EMPTY_DICT + pickle.MARK + number(0) + WEIGHT + pickle.SETITEMS),
            id="a-key-that-is-a-number",
        ),
        pytest.param(
            quantized(pickle.EMPTY_DICT + text("weight") + WEIGHT + b"s"), id="the-SETITEM-opcode"
        ),
        pytest.param(quantized(state_of(("weight", BARE), ("scales", SCALES))), id="weight-bare"),
        pytest.param(quantized(state_of(("weight", WEIGHT), ("scales", BARE))), id="scales-bare"),
        pytest.param(
            quantized(state_of(("weight", quantized(state_of(*PAIR))), ("scales", SCALES))),
            id="nested",
        ),
        pytest.param(
            INSTANCE + pickle.MEMOIZE + state_of(("weight", b"h\x00"), ("scales", b"h\x00")) + b"b",
            id="contains-itself",
        ),
        pytest.param(
            pickle.EMPTY_DICT + pickle.MEMOIZE + pickle.MARK + text("x") + b"h\x00" + b"u",
            id="a-dictionary-that-contains-itself",
        ),
    ],
)
def test_a_quantized_weight_with_any_other_state_is_refused(body):
    assert type(verdict(pickled(body))) is CorruptCheckpointError


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(WEIGHT, WEIGHT, id="integer-scales"),
        pytest.param(array(), SCALES, id="float-weight"),
        pytest.param(SCALES, WEIGHT, id="exchanged"),
    ],
)
def test_a_quantized_weight_of_other_types_is_malformed(first, second):
    found = verdict(pickled(quantized(state_of(("weight", first), ("scales", second)))))

    assert type(found) is CorruptCheckpointError
    assert "int8" in str(found)


RELEASED = {
    *("FRAME", "SHORT_BINUNICODE", "MEMOIZE", "BINGET", "LONG_BINGET", "STACK_GLOBAL", "NONE"),
    *("NEWTRUE", "NEWFALSE", "BININT1", "BININT2", "BININT", "SHORT_BINBYTES", "BINBYTES", "MARK"),
    *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_DICT", "SETITEMS", "REDUCE"),
    *("NEWOBJ", "BUILD", "STOP"),
}


@pytest.mark.parametrize(
    "opcode",
    [
        pytest.param(opcode.code.encode("latin-1"), id=opcode.name)
        for opcode in pickletools.opcodes
        if opcode.name not in RELEASED
    ],
)
def test_an_opcode_that_no_release_has_is_refused_wherever_it_stands(opcode):
    behind, before = verdict(pickled(array() + opcode)), verdict(pickled(opcode + array()))

    assert isinstance(behind, CorruptCheckpointError)
    assert isinstance(before, CorruptCheckpointError)
    assert isinstance(behind, UnsafePickleError) or f"0x{opcode.hex()}" in str(behind)


@pytest.mark.parametrize("code", range(256))
def test_a_byte_as_opcode_never_breaks_the_scanner(code):
    for tail in (b"", b"\xff" * 8, array()):
        data = pickled(bytes([code]) + tail)

        assert_harmless(verdict(data), data)


@pytest.mark.parametrize(
    "protocol", [b"\x80\x00", b"\x80\x02", b"\x80\x03", b"\x80\x05", b"\x80\xff"]
)
def test_another_protocol_is_refused_and_is_unsafe_if_it_names_another_global(protocol):
    found = verdict(protocol + pickled(array())[2:])
    attack = verdict(protocol + pickled(SYSTEM)[2:])

    assert type(found) is CorruptCheckpointError
    assert "protocol-4" in str(found)
    assert isinstance(attack, UnsafePickleError)


# --- damage that is no attack


@pytest.mark.parametrize("whole", [pytest.param(NORM, id="float32"), pytest.param(KEY, id="int8")])
def test_a_file_cut_anywhere_is_short_and_not_unsafe(whole):
    for length in range(len(whole)):
        found = verdict(whole[:length])

        assert type(found) is CorruptCheckpointError, length
        assert found.damage[0].reason is Reason.SHORT, length


@pytest.mark.parametrize("whole", [pytest.param(NORM, id="float32"), pytest.param(KEY, id="int8")])
@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b"\0", id="a-zero"),
        pytest.param(pickle.STOP, id="a-second-STOP"),
        pytest.param(pickled(SYSTEM), id="a-second-pickle"),
        pytest.param(b"PK\x03\x04", id="a-zip"),
    ],
)
def test_a_file_with_more_behind_its_end_is_long_and_not_unsafe(whole, tail):
    found = verdict(whole + tail)

    assert type(found) is CorruptCheckpointError
    assert found.damage[0].reason is Reason.LONG
    assert str(len(tail)) in found.damage[0].detail


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"B\xff\xff\xff\xff", id="4-GB-of-bytes"),
        pytest.param(b"C\xffx", id="255-bytes"),
        pytest.param(b"\x8c\xffx", id="255-characters"),
        pytest.param(b"\x95" + b"\xff" * 8, id="a-frame-of-2-to-the-64"),
        pytest.param(b"\x95" + struct.pack("<Q", 3) + b"N", id="a-frame-one-byte-too-long"),
    ],
)
def test_a_length_beyond_the_end_is_short(body):
    found = verdict(pickled(body))

    assert type(found) is CorruptCheckpointError
    assert found.damage[0].reason is Reason.SHORT


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param([2**30, 2**30], id="2-to-the-60"),
        pytest.param([2**31 - 1] * 60, id="2-to-the-1860"),
        pytest.param([-2], id="negative"),
        pytest.param([-1, -2], id="negative-with-the-right-product"),
        pytest.param([0], id="zero"),
        pytest.param([2, 0], id="zero-columns"),
        pytest.param([3], id="one-more"),
        pytest.param([1], id="one-less"),
        pytest.param([], id="a-scalar"),
    ],
)
def test_a_shape_that_the_payload_cannot_hold_is_malformed(shape):
    found = verdict(pickled(array(shape=tuple_of(*map(number, shape)))))

    assert type(found) is CorruptCheckpointError
    assert found.damage[0].reason is Reason.MALFORMED
    assert len(str(found)) < 1000


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(YES, id="true"),
        pytest.param(NONE, id="none"),
        pytest.param(text("2"), id="a-text"),
        pytest.param(tuple_of(number(2)), id="a-tuple"),
        pytest.param(NDARRAY, id="a-class"),
        pytest.param(BARE, id="an-array"),
    ],
)
def test_a_length_that_is_no_number_is_refused(length):
    assert isinstance(verdict(pickled(array(shape=tuple_of(length)))), CorruptCheckpointError)


def test_the_error_names_the_file_and_both_sides():
    data = pickled(array(shape=tuple_of(number(5))))

    found = verdict(data)

    assert str(found) == ("tensor00000_000: malformed, expected 20 bytes for float32 (5,), found 8")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(dtype(tail=(-1, -1, 63)), id="a-float-of-objects"),
        pytest.param(dtype(tail=(-1, -1, 64)), id="a-float-with-flags"),
        pytest.param(dtype(tail=(4, 4, 0)), id="a-float-with-a-size"),
        pytest.param(dtype(tail=(-1, 16, 0)), id="a-float-with-an-alignment"),
        pytest.param(dtype(SCALAR, tail=(2, 2, 1)), id="a-bfloat16-of-objects"),
        pytest.param(dtype(SCALAR, tail=(2, 2, 128)), id="a-bfloat16-of-fields"),
        pytest.param(dtype(SCALAR, tail=(2, 2, -1)), id="a-bfloat16-with-all-flags"),
        pytest.param(dtype(SCALAR, tail=(4, 2, 64)), id="a-bfloat16-of-4-bytes"),
        pytest.param(dtype(SCALAR, tail=(-1, -1, 0)), id="a-bfloat16-without-a-size"),
    ],
)
def test_a_dtype_that_numpy_would_read_otherwise_is_refused(kind):
    assert type(verdict(pickled(array(kind=kind)))) is CorruptCheckpointError


@pytest.mark.parametrize("flags", [64, 80, 112])
def test_the_scales_of_every_version_of_ml_dtypes_are_read(flags):
    scales = array(tuple_of(number(2), number(2)), dtype(SCALAR, tail=(2, 2, flags)))

    found = verdict(pickled(quantized(state_of(("weight", WEIGHT), ("scales", scales)))))

    assert isinstance(found, PickledTensor)


def frame(length: int) -> bytes:
    return pickle.FRAME + struct.pack("<Q", length)


@pytest.mark.parametrize("code", [b"\xe2", b"O", b"B", b"\0"])
def test_an_array_that_begins_as_another_type_than_numpy_writes_is_refused(code):
    bare = RECONSTRUCT + tuple_of(NDARRAY, tuple_of(number(0)), b"C\x01" + code) + pickle.REDUCE

    assert type(verdict(pickled(array(bare=bare)))) is CorruptCheckpointError


class _ByFrames(pickle._Unpickler):
    """The unpickler in Python, which reads a frame before what is in it."""

    find_class = _Restricted.find_class


def loads(data: bytes) -> bool:
    try:
        _ByFrames(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError):
        return False
    return True


@pytest.mark.parametrize("body", [array(), quantized(state_of(*PAIR))], ids=["float", "quantized"])
@pytest.mark.usefixtures("without_search")
def test_a_value_that_reaches_past_its_frame_is_refused_as_unpicklers_refuse_it(body):
    framed = [b"\x80\x04" + frame(length) + body + pickle.STOP for length in range(len(body) + 2)]

    accepted = [isinstance(verdict(data), PickledTensor) for data in framed]

    assert accepted == list(map(loads, framed))
    assert accepted.count(True) < len(body) / 2


def test_a_frame_within_a_frame_is_refused():
    body = array() + pickle.STOP

    found = verdict(b"\x80\x04" + frame(9 + len(body)) + frame(len(body)) + body)
    behind = verdict(b"\x80\x04" + frame(0) + frame(len(body)) + body)

    assert type(found) is CorruptCheckpointError
    assert isinstance(behind, PickledTensor)


def test_two_arrays_of_the_same_bytes_are_refused():
    payload = binbytes(bytes(8))
    weight = array(tuple_of(number(4), number(2)), dtype(text("i1"), "|"), payload + pickle.MEMOIZE)
    kind = dtype(SCALAR, tail=(2, 2, 64))
    own, shared = (
        array(tuple_of(number(2), number(2)), kind, part) for part in (payload, b"h\x00")
    )

    apart = verdict(pickled(quantized(state_of(("weight", weight), ("scales", own)))))
    found = verdict(pickled(quantized(state_of(("weight", weight), ("scales", shared)))))

    assert isinstance(apart, PickledTensor)
    assert type(found) is CorruptCheckpointError
    assert "same bytes" in str(found)


# --- hostile sizes: memory, time and the length of the message stay small


def test_tuples_that_double_in_the_memo_do_not_reach_the_message():
    doubling = b"".join(b"h" + bytes([level]) + b"\x86\x94" for level in range(21))
    shape = pickle.EMPTY_TUPLE + pickle.MEMOIZE + doubling
    data = pickled(array(shape=shape))
    before = time.thread_time()

    found = verdict(data)

    assert isinstance(found, CorruptCheckpointError)
    assert len(str(found)) < 1000
    assert time.thread_time() - before < 3


@pytest.mark.parametrize("opcode", [b"(", b"N", b")", b"}", b"\x94", b"K\x00", b"C\x00"])
def test_ten_million_opcodes_are_refused_at_once(opcode):
    data = b"\x80\x04N" + opcode * 10_000_000
    before = time.thread_time()

    found = verdict(data)

    assert type(found) is CorruptCheckpointError
    assert time.thread_time() - before < 3


def test_nested_tuples_are_refused_without_recursion():
    data = pickled(pickle.EMPTY_TUPLE + pickle.TUPLE1 * 100_000)

    assert type(verdict(data)) is CorruptCheckpointError


@pytest.mark.parametrize(
    "hidden", ["\x1b]0;owned\x07", "a\nerror: all is well", "\r" + " " * 60, "\x9b31m"]
)
def test_a_name_in_the_message_cannot_drive_the_terminal(hidden):
    name = hidden.encode("latin-1")
    body = pickle.SHORT_BINUNICODE + bytes([len(name)]) + name + text("system") + b"\x93"

    found = verdict(pickled(body))

    # an unpickler refuses a name that is not UTF-8 before it looks it up
    is_text = hidden.isascii()
    assert type(found) is (UnsafePickleError if is_text else CorruptCheckpointError)
    assert str(found).isprintable()


# --- bit rot and fuzz: a tensor or an error, never anything else


def opcode_bytes(data: bytes) -> list[int]:
    """Places outside of the payloads."""
    found = scan(data, file="x")
    payloads = [
        range(ref.offset, ref.offset + ref.nbytes) for ref in (found.weight, found.scales) if ref
    ]
    return [place for place in range(len(data)) if not any(place in range_ for range_ in payloads)]


@pytest.mark.parametrize("whole", [pytest.param(NORM, id="float32"), pytest.param(KEY, id="int8")])
def test_a_flipped_bit_outside_of_the_payload_is_damage_and_its_place_is_said(whole):
    places = opcode_bytes(whole)
    for place in [*places[::7], places[-1]]:
        mask = 1 << place % 8
        data = bytearray(whole)
        data[place] ^= mask

        found = verdict(bytes(data))

        assert_harmless(found, whole)
        if isinstance(found, PickledTensor) or found.damage[0].reason in {
            Reason.SHORT,
            Reason.LONG,
        }:
            continue  # other scales or flags, or a length beyond the end
        assert type(found) is CorruptCheckpointError, (place, mask)
        assert "has a flipped bit" in str(found)


@pytest.mark.parametrize("whole", [pytest.param(NORM, id="float32"), pytest.param(KEY, id="int8")])
@pytest.mark.usefixtures("without_search")
def test_a_changed_byte_outside_of_the_payload_gives_a_tensor_or_an_error(whole):
    for place in opcode_bytes(whole):
        data = bytearray(whole)
        data[place] ^= 255

        assert_harmless(verdict(bytes(data)), whole)


@pytest.mark.parametrize(
    "opcodes",
    [
        pytest.param(b")" + b"\x85" * 240, id="tuples-in-tuples"),
        pytest.param(b")" + b"".join(b"\x94h%c\x86" % n for n in range(60)), id="doubled-tuples"),
        pytest.param(b"}\x94(\x8c\x01ah\0u" + b"\x85" * 100, id="a-dictionary-in-itself"),
    ],
)
def test_objects_in_objects_do_not_lengthen_the_search_for_a_flip(opcodes):
    began = time.process_time()

    found = verdict(b"\x80\x04" + opcodes + b".")

    assert "is neither a float32 array" in str(found)
    assert time.process_time() - began < 20


def test_a_flip_in_the_last_byte_is_damage():
    data = KEY[:-1] + bytes([KEY[-1] ^ 1])

    found = verdict(data)

    assert type(found) is CorruptCheckpointError
    assert f"byte {len(KEY) - 1:,} has a flipped bit" in str(found)
    assert found.damage[0].ranges == ((len(KEY) - 1, len(KEY)),)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "is a Git LFS pointer",
            id="lfs",
        ),
        pytest.param(b"<!DOCTYPE html>\n<html><title>Sign in</title>", "HTML page", id="html"),
        pytest.param(b"\xef\xbb\xbf\n<HTML>", "HTML page", id="html-with-a-mark"),
        pytest.param(b"PK\x03\x04" + bytes(50), "ZIP archive", id="zip"),
        pytest.param(b"GGUF\x03\0\0\0", "GGUF", id="gguf"),
        pytest.param(b"\x1f\x8b\x08\0\0", "gzip", id="gzip"),
        pytest.param(b'{"error": "rate limit"}', "is text, it begins with", id="json"),
        pytest.param(b"Not Found", "is text, it begins with 'Not Found'", id="text"),
        pytest.param(bytes(5000), "begins with zeros", id="zeros"),
        pytest.param(KEY[:3000] + bytes(len(KEY) - 3000), "not written to its end", id="zero-tail"),
        pytest.param(KEY[:-1] + b"\0", "not written to its end", id="the-last-byte-zero"),
        pytest.param(KEY[:100] + bytes(len(KEY) - 100), "not written to its end", id="zero-head"),
        pytest.param(KEY[:-20] + bytes(20), "not written to its end", id="zero-end"),
    ],
)
def test_bytes_that_are_no_pickle_are_damage_with_the_reason_in_words(data, words):
    found = verdict(data)

    assert type(found) is CorruptCheckpointError
    assert words in str(found)


def test_a_zero_tail_is_counted_from_where_it_begins():
    found = verdict(KEY[:3000] + bytes(len(KEY) - 3000))

    ((low, high),) = found.damage[0].ranges
    assert high == len(KEY)
    assert KEY[low:3000].strip(b"\0") == b""


def test_a_flipped_bit_in_the_payload_is_not_for_the_scanner_to_find():
    expected = scan(NORM, file="x")
    for place in range(expected.weight.offset, expected.weight.offset + expected.weight.nbytes):
        data = bytearray(NORM)
        data[place] ^= 0xFF

        assert verdict(bytes(data)) == expected


@given(
    st.sampled_from([NORM, KEY, pickled(array()), pickled(quantized(state_of(*PAIR)))]),
    st.randoms(use_true_random=False),
    st.integers(1, 6),
)
@settings(max_examples=100, deadline=None)
def test_a_mutated_file_gives_a_tensor_or_an_error(whole, rng: random.Random, edits):
    places = opcode_bytes(whole)
    data = bytearray(whole)
    for _ in range(edits):
        place = min(rng.choice(places), len(data) - 1)
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                data[place:place] = rng.choice(pickletools.opcodes).code.encode("latin-1")
            case 2:
                del data[place : place + rng.randrange(1, 12)]
            case _:
                source = rng.choice(places)
                data[place:place] = data[source : source + rng.randrange(1, 60)]
        if not data:
            data += b"\x80"

    assert_harmless(verdict(bytes(data)), bytes(data))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_give_an_error(tail):
    assert isinstance(verdict(tail), CorruptCheckpointError)
    assert isinstance(verdict(b"\x80\x04" + tail), CorruptCheckpointError)


# --- 21 wherever an unpickler would look up another name


class _Inert:
    """Stands for every allowed global, and takes anything."""

    def __init__(self, *_arguments: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


class _Asks(pickle.Unpickler):
    """The real unpickler, which stops at the first name that is not allowed."""

    asked: str | None = None

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in pickles._ALLOWED:
            return _Inert
        self.asked = f"{module}.{name}"
        raise pickle.UnpicklingError(self.asked)


def asked_of(data: bytes) -> str | None:
    unpickler = _Asks(io.BytesIO(data))
    with suppress(Exception):
        unpickler.load()
    return unpickler.asked


@given(
    st.sampled_from(
        [NORM, KEY, pickled(SYSTEM + array()), pickled(b"]" + array() + SYSTEM + b"a")]
    ),
    st.randoms(use_true_random=False),
    st.integers(0, 5),
)
@settings(max_examples=400, deadline=None)
def test_every_name_that_an_unpickler_would_look_up_is_found(whole, rng: random.Random, edits):
    data = bytearray(whole)
    for _ in range(edits):
        place = rng.randrange(min(len(data), 250))
        match rng.randrange(3):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                data[place:place] = rng.choice(pickletools.opcodes).code.encode("latin-1")
            case _:
                data[place:place] = rng.choice(
                    [SYSTEM, b"cos\nsystem\n", text("os"), b"h\x00h\x01"]
                )

    asked = asked_of(bytes(data))

    assert asked is None or foreign_name(bytes(data), pickles._ALLOWED) is not None
