"""A conversation as a text, and where it stops."""

import pytest

from grokctl.serving.transcript import read_chat, transcript
from grokctl.serving.wire_errors import WireError

HELLO = [{"role": "user", "content": "hello"}]


def test_speakers_are_named_and_the_first_system_is_a_heading():
    messages = [
        {"role": "developer", "content": " Be brief. \n"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "name": "x"},
        {"role": "system", "content": "It is late."},
    ]

    written = "Be brief.\n\nUser: ab\n\nAssistant: c\n\nSystem: It is late.\n\nAssistant:"
    assert transcript(messages) == written


def test_an_answer_ends_where_the_client_says_and_where_another_speaks():
    request = read_chat({"messages": HELLO, "stop": ["x"], "max_completion_tokens": 5})

    assert request.settings.stop == ("x", "\n\nUser:", "\n\nSystem:", "\nUser:", "\nSystem:")
    assert request.settings.max_tokens == 5
    assert request.settings.logprobs is None
    assert not request.return_ids


@pytest.mark.parametrize("count", [None, 0, 7])
def test_log_probabilities_are_asked_for_as_this_interface_does(count):
    request = read_chat({"messages": HELLO, "logprobs": True, "top_logprobs": count})

    assert request.settings.logprobs == (count or 0)
    assert request.return_ids  # for the form with bytes


@pytest.mark.parametrize("part", ["x", {"type": "text"}, {"type": "text", "text": 3}, {}])
def test_parts_that_are_no_text_are_refused(part):
    with pytest.raises(WireError, match="messages: expected"):
        transcript([{"role": "user", "content": [part]}])
