"""Settings by name: a value from JSON or a typed text changes a request, or is an error."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from grokctl.errors import UsageError
from grokctl.inference.generation import Request
from grokctl.model.sampling import Sampling
from grokctl.session import settings

REQUEST = Request(prompt=(1,), sampling=Sampling(seed=3), max_tokens=5)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("temperature", 1, 1.0),
        ("temperature", 0.5, 0.5),
        ("top_p", 0.25, 0.25),
        ("top_k", 40, 40),
        ("min_p", 0, 0.0),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("max_tokens", 0, 0),
        ("stop", "x", ("x",)),
        ("stop", ["x", "", "y"], ("x", "y")),
        ("ignore_eos", True, True),
    ],
)
def test_a_value_of_the_right_type_is_taken_and_nothing_else_changes(name, value, found):
    changed = settings.change(REQUEST, name, value)

    assert settings.get(changed, name) == found
    assert changed.prompt == REQUEST.prompt
    assert all(
        settings.get(changed, other) == settings.get(REQUEST, other)
        for other in settings.SETTINGS
        if other != name
    )


@pytest.mark.parametrize("name", settings.SETTINGS)
@limits(max_examples=40)
@given(value=ANYTHING)
def test_any_value_is_taken_or_a_usage_error_of_one_short_line(name, value):
    changed, refusal = REQUEST, ""
    try:
        changed = settings.change(REQUEST, name, value)
    except UsageError as error:
        refusal = str(error)

    assert type(settings.get(changed, name)) is type(settings.get(REQUEST, name))
    assert len(refusal) < 120
    assert "\n" not in refusal


@pytest.mark.parametrize("name", settings.SETTINGS)
@limits(max_examples=40)
@given(text=st.text(min_size=1))
def test_anything_typed_is_taken_or_a_usage_error(name, text):
    changed, refusal = REQUEST, ""
    try:
        changed = settings.change(REQUEST, name, settings.parse(name, text))
    except UsageError as error:
        refusal = str(error)

    assert type(settings.get(changed, name)) is type(settings.get(REQUEST, name))
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", ".5", 0.5),
        ("top_k", "40", 40),
        ("stop", "two words", "two words"),
        ("stop", json.dumps("\n\n"), "\n\n"),
        ("stop", '["a", "b"]', ["a", "b"]),
        ("ignore_eos", "ON", True),
        ("ignore_eos", "no", False),
    ],
)
def test_what_people_type_is_what_they_mean(name, text, value):
    assert settings.parse(name, text) == value


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("temperature", float("nan"), "temperature"),
        ("temperature", True, "true: expected a number"),
        ("top_k", 1.0, "1.0: expected an integer"),
        ("seed", 10**30, "below 2"),
        ("max_tokens", -1, "at least 0"),
        ("stop", [["x"]], "a list"),
        ("stop", ["x"] * 65, "at most 64"),
        ("stop", "x" * 1001, "at most 1,000"),
        ("stop", "\ud800", "half a character"),
        ("ignore_eos", "yes", "true or false"),
        ("ignore_eos", {}, "an object"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(name, value, why):
    with pytest.raises(UsageError, match=why):
        settings.change(REQUEST, name, value)
