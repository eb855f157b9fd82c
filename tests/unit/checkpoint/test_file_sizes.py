from hypothesis import given
from hypothesis import strategies as st

from grokctl.checkpoint.file_sizes import file_damage, size_damage
from grokctl.errors import Damage, Reason
from grokctl.text import format_exact

SIZES = st.integers(0, 2**40)


@given(SIZES, st.one_of(st.integers(-2, 2), st.integers(-(2**40), 2**40)))
def test_only_the_expected_size_is_no_damage_and_the_difference_is_what_is_damaged(
    expected, difference
):
    size = max(0, expected + difference)

    damage = size_damage("a", expected=expected, size=size)

    if expected == size:
        assert damage is None
    else:
        ((low, high),) = damage.ranges
        assert damage.reason is (Reason.SHORT if size < expected else Reason.LONG)
        assert {low, high} == {expected, size}
        assert low < high
        found = f"expected {format_exact(expected)}, found {size:,}"
        assert damage.detail == (found if size else f"is empty, expected {format_exact(expected)}")


@given(SIZES)
def test_a_missing_file_is_damaged_as_a_whole(expected):
    ranges = ((0, expected),) if expected else ()

    assert size_damage("a", expected=expected, size=None) == Damage(
        "a", Reason.MISSING, f"expected {format_exact(expected)}", ranges
    )


def test_what_is_no_regular_file_is_not_missing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")

    found = {
        name: file_damage(tmp_path, name, expected=7, size=None).reason
        for name in ("folder", "link", "nothing")
    }

    assert found == {
        "folder": Reason.UNREADABLE,
        "link": Reason.UNREADABLE,
        "nothing": Reason.MISSING,
    }
    assert file_damage(tmp_path, "folder", expected=7, size=7) is None
