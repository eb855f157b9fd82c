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
        ("frequency_penalty", 1, 1.0),
        ("presence_penalty", -2, -2.0),
        ("logit_bias", {"42": -100, "7": 0.5}, ((7, 0.5), (42, -100.0))),
        ("min_tokens", 3, 3),
        ("stop_token_ids", [5, 2], (5, 2)),
        ("cache_prompt", False, False),
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
        ("stop_token_ids", "1, 2", [1, 2]),
        ("stop_token_ids", "[3]", [3]),
        ("logit_bias", '{"42": -1}', {"42": -1}),
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
        ("frequency_penalty", 2.5, "expected -2 to 2"),
        ("logit_bias", [], "an object such as"),
        ("logit_bias", {"x": 1}, "token ids as keys"),
        ("logit_bias", {"٣": 1}, "token ids as keys"),
        ("logit_bias", {"1": 101}, "a bias of -100 to 100"),
        ("logit_bias", {"1": 1, "01": 2}, "each id once"),
        ("logit_bias", {str(token): 0 for token in range(1025)}, "at most 1,024"),
        ("min_tokens", -1, "at least 0"),
        ("stop_token_ids", [-1], "at least 0"),
        ("stop_token_ids", 5, "a list of token ids"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(name, value, why):
    with pytest.raises(UsageError, match=why):
        settings.change(REQUEST, name, value)
