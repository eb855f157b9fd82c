"""Bytes, rates, numbers and times as people read them."""

import pytest

from grokctl.text import format_number


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 peers"), (1, "1 peer"), (2, "2 peers"), (1000, "1000 peers")]
)
def test_one_is_one_and_all_others_are_many(count, text):
    assert format_number(count, "peer") == text
