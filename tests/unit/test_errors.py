import ast
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import grokctl
from grokctl import errors
from grokctl.checkpoint.pickles import scan
from grokctl.errors import (
    CorruptCheckpointError,
    Damage,
    DiskFullError,
    ExitCode,
    FetchError,
    GrokctlError,
    HardwareError,
    InvalidValueError,
    PeerError,
    PlacementError,
    Reason,
    StalledError,
    UnsafePickleError,
    UsageError,
    bounds_of,
    corrupt,
    count_of,
    invalid,
    worst,
)


def subclasses(cls: type) -> list[type]:
    return [cls, *(found for child in cls.__subclasses__() for found in subclasses(child))]


KINDS = [kind for kind in subclasses(GrokctlError) if kind.__module__ == errors.__name__]
DAMAGE = Damage(
    "ckpt-0/tensor00005_000", Reason.SHORT, "expected 4519 bytes, found 4000", ((0, 9),)
)
TRANSLATED = {
    ("arriving_source.py", "OtherScalesError"),
    ("bencode.py", "MalformedError"),
    ("binary.py", "NoKernelError"),
    ("bodies.py", "ClientGoneError"),
    ("compiler.py", "BuildError"),
    ("context.py", "ReportedError"),
    ("direct.py", "PrivateAddressError"),
    ("metadata.py", "NoMetadataError"),
    ("trailing_check.py", "ArrivalEndedError"),
    ("web.py", "WebError"),
    ("wire_errors.py", "WireError"),
}
"""Raised by one module for another, which always turns it into an error for users."""


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        pytest.param(GrokctlError, 1, id="bug"),
        pytest.param(UsageError, 2, id="usage"),
        pytest.param(FetchError, 10, id="fetch"),
        pytest.param(StalledError, 11, id="stalled"),
        pytest.param(DiskFullError, 12, id="disk"),
        pytest.param(CorruptCheckpointError, 20, id="corrupt"),
        pytest.param(UnsafePickleError, 21, id="unsafe"),
        pytest.param(PlacementError, 30, id="placement"),
        pytest.param(HardwareError, 40, id="hardware"),
        pytest.param(PeerError, 50, id="peer"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(kind, code):
    assert kind("x").exit_code == code


def test_the_exit_codes_are_those_of_the_contract():
    assert {code.value for code in ExitCode} == {0, 1, 2, 10, 11, 12, 20, 21, 30, 40, 50, 130}


def test_every_kind_has_a_code_of_its_own_but_for_the_two_of_usage():
    codes = [kind.exit_code for kind in KINDS if kind is not InvalidValueError]

    assert len(codes) == len(set(codes)) == 10
    assert InvalidValueError.exit_code == UsageError.exit_code


def test_a_stall_is_a_failed_fetch_and_an_unsafe_pickle_a_corrupt_checkpoint():
    assert issubclass(StalledError, FetchError)
    assert issubclass(UnsafePickleError, CorruptCheckpointError)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind, protocol):
    facts = ((DAMAGE,),) if issubclass(kind, CorruptCheckpointError) else ()
    facts = ("top_p", "7") if kind is InvalidValueError else facts
    error = kind("tensor00005_000: short", "grokctl fetch", *facts)

    again = pickle.loads(pickle.dumps(error, protocol))

    assert type(again) is kind
    assert str(again) == "top_p 7: " * (kind is InvalidValueError) + "tensor00005_000: short"
    assert vars(again) == vars(error)
    assert again.exit_code == error.exit_code


def test_an_error_comes_out_of_a_worker_process_as_it_went_in():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        error = pool.submit(scan, b"cposix\nsystem\n.", file="tensor00005_000").exception()

    assert type(error) is UnsafePickleError
    assert error.hint == "nothing in the file was executed"
    assert error.damage[0].file == "tensor00005_000"


@pytest.mark.parametrize("reason", list(Reason))
def test_one_damaged_file_becomes_an_error_of_the_class_that_its_reason_calls_for(reason):
    error = corrupt("a", reason, "b", "c")

    assert type(error) is (UnsafePickleError if reason is Reason.UNSAFE else CorruptCheckpointError)
    assert str(error) == f"a: {reason.value}, b"
    assert error.hint == "c"
    assert error.damage == (Damage("a", reason, "b"),)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (float("nan"), "nan"),
        (2**64, "18446744073709551616"),
        ("a\nb", r"'a\nb'"),
        ("", "''"),
        ("x" * 99, "'" + "x" * 60 + "…'"),
        (Path("/" + "x" * 99), "/" + "x" * 99),
    ],
)
def test_an_invalid_value_is_shown_in_a_line_and_called_as_its_user_calls_it(value, shown):
    error = invalid("stall_timeout_s", value, "expected more than 0", "a hint")

    typed = error.renamed("--stall-timeout")

    assert str(error) == f"stall_timeout_s {shown}: expected more than 0"
    assert str(typed) == f"--stall-timeout {shown}: expected more than 0"
    assert (typed.exit_code, typed.hint) == (2, "a hint")


def test_damage_is_one_line_with_the_noun_first():
    assert str(DAMAGE) == "ckpt-0/tensor00005_000: short, expected 4519 bytes, found 4000"
    assert str(Damage("a", Reason.MISSING)) == "a: missing"


def test_a_hint_is_not_part_of_the_sentence():
    error = UsageError("x: no such checkpoint", "ls")

    assert (str(error), error.hint) == ("x: no such checkpoint", "ls")
    assert UsageError("x").hint is None


def test_errors_can_be_raised_caught_and_hashed():
    with pytest.raises(FetchError, match="nobody") as caught:
        raise StalledError("nobody sends anything")

    assert len({caught.value, StalledError("nobody sends anything")}) == 2


def test_no_other_module_invents_a_failure_for_users():
    own = set()
    for path in Path(grokctl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                if bases & {"Exception", *(kind.__name__ for kind in KINDS)}:
                    own.add((path.name, node.name))

    assert own - TRANSLATED == {("errors.py", kind.__name__) for kind in KINDS}


def damaged(count, sharing):
    bad = [Damage(f"a{index}", Reason.SHORT) for index in range(count)]
    return bad + [
        Damage(f"b{index}", Reason.UNPROVEN, pieces=((0, 1),), is_certain=False)
        for index in range(sharing)
    ]


@pytest.mark.parametrize(
    ("count", "sharing", "words"),
    [
        (3, 9, "3 of 40 files are damaged, 9 more share their pieces"),
        (1, 1, "1 of 40 files is damaged, 1 more shares their pieces"),
        (2, 0, "2 of 40 files are damaged"),
        (0, 2, "2 of 40 files are damaged"),
    ],
)
def test_files_that_only_share_a_piece_are_counted_apart(count, sharing, words):
    assert count_of(damaged(count, sharing), 40) == words


def test_a_file_that_the_torrent_does_not_contain_counts():
    stray = Damage("c", Reason.UNPROVEN, "is not in the torrent")

    assert count_of([*damaged(1, 1), stray], 40).startswith("2 of 40 files are damaged, 1 more")
    assert count_of(damaged(1200, 0), 2) == "1,200 of 1,200 files are damaged"


def shared(*pieces):
    """Files that may be damaged: `a` and `b` share a piece, `b` and `c` the next, and so on."""
    return [
        Damage(name, Reason.ALTERED, pieces=(each,), is_certain=False)
        for name, each in zip("abcdefgh", pieces, strict=False)
    ]


@pytest.mark.parametrize(
    ("damage", "bounds"),
    [
        pytest.param(shared((7, 8), (7, 8)), (1, 2), id="two-of-one-piece"),
        pytest.param(shared((7, 8), (7, 9), (8, 9)), (1, 3), id="a-chain-of-three"),
        pytest.param(shared((1, 2), (1, 2), (5, 6), (5, 6)), (2, 4), id="two-pieces-apart"),
        pytest.param(
            [Damage("z", Reason.SHORT, pieces=((1, 3),)), *shared((2, 3), (2, 3))],
            (1, 3),
            id="explained-by-a-certain-one",
        ),
        pytest.param(
            [Damage("z", Reason.SHORT, pieces=((0, 1),)), *shared((2, 3), (2, 3))],
            (2, 3),
            id="beside-a-certain-one",
        ),
    ],
)
def test_where_nothing_tells_files_apart_the_count_has_two_ends(damage, bounds):
    least, most = bounds

    assert bounds_of(damage) == bounds
    assert count_of(damage, 40) == f"{least} to {most} of 40 files are damaged"


def test_a_file_that_is_certainly_damaged_is_named_first():
    certain = Damage("z", Reason.SHORT)

    assert worst([*shared((7, 8), (7, 8)), certain]) is certain
