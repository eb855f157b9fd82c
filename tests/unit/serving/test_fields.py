"""A field is of its type or named in an error; one that changes nothing may be there."""

import pytest

from grokctl.serving import fields
from grokctl.serving.wire_errors import WireError


@pytest.mark.parametrize("value", [1, 0, "true", [], None])
def test_only_true_and_false_are_a_switch(value):
    with pytest.raises(WireError, match="x: expected true or false"):
        fields.take({"x": value}, "x", fields.switch, False)


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_a_switch_is_no_integer(value):
    with pytest.raises(WireError, match="x: expected an integer"):
        fields.integer("x", value)


@pytest.mark.parametrize("value", [0, 0.0, False])
def test_zero_and_false_are_two_neutral_values(value):
    neutral = {"x": (0,), "y": (False,)}

    name, other = ("y", "x") if value is False else ("x", "y")
    fields.refuse({name: value}, neutral)
    with pytest.raises(WireError) as caught:
        fields.refuse({other: value}, neutral)
    assert (caught.value.param, caught.value.code) == (other, "unsupported_parameter")
