"""Each line of an untrusted file is a prompt, or an error with its line number."""

import io
import json
import sys
import types

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grokctl.errors import UsageError
from grokctl.inference.generation import Request
from grokctl.model.sampling import Sampling
from grokctl.session.prompts import read_prompts

DEFAULTS = Request(prompt=(), sampling=Sampling(temperature=1.0, seed=100), max_tokens=5)
GOOD = b'{"prompt": "good"}\n'


@pytest.fixture
def read(tmp_path):
    """Read bytes as a file of prompts."""
    path = tmp_path / "prompts.jsonl"

    def read_bytes(data):
        path.write_bytes(data)
        return read_prompts(str(path), DEFAULTS)

    return read_bytes


def test_a_line_overrides_what_the_command_line_says(read):
    line = {
        "prompt": "x",
        "id": "me",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 8,
        "stop": ["a", "b"],
        "ignore_eos": True,
        "frequency_penalty": 0.5,
        "presence_penalty": -1,
        "logit_bias": {"4": -100},
        "min_tokens": 2,
        "stop_token_ids": [9],
        "cache_prompt": False,
    }

    (prompt,) = read(json.dumps(line).encode())

    assert (prompt.content, prompt.id) == ("x", "me")
    assert prompt.settings == Request(
        prompt=(),
        sampling=Sampling(
            temperature=0.5,
            top_p=0.9,
            top_k=3,
            min_p=0.1,
            seed=8,
            frequency_penalty=0.5,
            presence_penalty=-1.0,
            logit_bias=((4, -100.0),),
        ),
        max_tokens=7,
        min_tokens=2,
        stop=("a", "b"),
        stop_token_ids=(9,),
        ignore_eos=True,
        cache_prompt=False,
    )


def test_what_a_line_does_not_say_is_the_command_lines_with_a_seed_of_its_own(read):
    prompts = read(b'{"prompt": "x"}\n{"token_ids": [1, 2], "seed": null, "id": 7}\n')

    assert [prompt.settings.sampling.seed for prompt in prompts] == [100, 101]
    assert [prompt.settings.sampling.temperature for prompt in prompts] == [1.0, 1.0]
    assert [prompt.settings.max_tokens for prompt in prompts] == [5, 5]
    assert [(prompt.content, prompt.id) for prompt in prompts] == [("x", None), ((1, 2), 7)]


def test_seeds_go_round(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD * 2)
    last = Request(prompt=(), sampling=Sampling(seed=2**64 - 1), max_tokens=5)

    prompts = read_prompts(str(path), last)

    assert [prompt.settings.sampling.seed for prompt in prompts] == [2**64 - 1, 0]


def test_blank_lines_line_ends_and_a_byte_order_mark_do_not_matter(read):
    prompts = read(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \t\r\n{"prompt": "b"}')

    assert [prompt.content for prompt in prompts] == ["a", "b"]
    assert [prompt.where.rpartition(" ")[2] for prompt in prompts] == ["1", "4"]


def test_a_line_separator_inside_a_text_separates_no_lines(read):
    (prompt,) = read('{"prompt": "a\u2028b\u0085c"}'.encode())

    assert prompt.content == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        pytest.param(b"{", "not JSON", id="half an object"),
        pytest.param(b"hello", "not JSON", id="text"),
        pytest.param(b"\0\0\0\0", "not JSON", id="zeros"),
        pytest.param(b'{"prompt": "a"} {"prompt": "b"}', "not JSON", id="two objects"),
        pytest.param(b'["prompt"]', "expected an object, found a list", id="list"),
        pytest.param(b"null", "expected an object, found null", id="null"),
        pytest.param(b'{"prompt": "caf\xe9"}', "UTF-8", id="Latin-1"),
        pytest.param(b'{"prompt": "\xed\xa0\x80"}', "UTF-8", id="half a character in UTF-8"),
        pytest.param(b'{"prompt": "\\ud800"}', "half a character", id="half a character"),
        pytest.param(b"{}", "found neither", id="no prompt"),
        pytest.param(b'{"prompt": "a", "token_ids": [1]}', "found both", id="two prompts"),
        pytest.param(b'{"prompt": 5}', "expected a text, found 5", id="a number as prompt"),
        pytest.param(b'{"prompt": ["a"]}', "expected a text, found a list", id="a list as prompt"),
        pytest.param(b'{"token_ids": "1,2"}', "expected a list", id="text as ids"),
        pytest.param(b'{"token_ids": [1, true]}', "integers, found true", id="true as id"),
        pytest.param(b'{"token_ids": [1.5]}', "integers, found 1.5", id="half an id"),
        pytest.param(b'{"token_ids": [[[]]]}', "integers, found a list", id="ids in ids"),
        pytest.param(b'{"prompt": "a", "max_token": 1}', "nearest is 'max_tokens'", id="typo"),
        pytest.param(b'{"prompt": "a", "prompt": "b"}', "twice", id="twice"),
        pytest.param(b'{"prompt": "a", "id": [1]}', "id: expected", id="a list as id"),
        pytest.param(b'{"prompt": "a", "temperature": NaN}', "NaN", id="NaN"),
        pytest.param(b'{"prompt": "a", "temperature": -Infinity}', "Infinity", id="infinity"),
        pytest.param(b'{"prompt": "a", "temperature": 1e999}', "temperature", id="too large"),
        pytest.param(b'{"prompt": "a", "temperature": -1}', "at least 0", id="negative"),
        pytest.param(b'{"prompt": "a", "top_p": 1e-999}', "top_p", id="too small"),
        pytest.param(b'{"prompt": "a", "seed": 1.5}', "integer", id="half a seed"),
        pytest.param(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "5000 digits", id="digits"),
        pytest.param(b'{"prompt": "a", "max_tokens": 1e3}', "integer", id="1e3 tokens"),
        pytest.param(b'{"prompt": "a", "ignore_eos": 1}', "true or false", id="1 for true"),
        pytest.param(b'{"prompt": "a", "stop": {"a": 1}}', "an object", id="an object to stop at"),
        pytest.param(b'{"prompt": "a", "stop": [null]}', "null", id="null to stop at"),
        pytest.param(b"[" * 500_000, "nested", id="deep lists"),
        pytest.param(b'{"prompt":' * 100_000, "nested", id="deep objects"),
        pytest.param(b'{"prompt": "' + b"a" * 2**20 + b'"}', "longer than", id="a megabyte"),
        pytest.param(
            b'{"' + b"k" * 2**19 + b'": 1, "prompt": "a"}', "unknown key", id="a long key"
        ),
    ],
)
def test_a_bad_line_is_named_and_what_is_wrong_with_it_said(read, line, why):
    with pytest.raises(UsageError, match=why) as caught:
        read(GOOD + b"\n" + line + b"\n" + GOOD)

    message = str(caught.value)
    assert "prompts.jsonl, line 3: " in message
    assert len(message.partition("line 3")[2]) < 150


@pytest.mark.parametrize("data", [b"", b"\n \r\n\t\n"], ids=["nothing", "blank lines"])
def test_a_file_without_prompts_is_an_error(read, data):
    with pytest.raises(UsageError, match="no prompts"):
        read(data)


def test_endless_prompts_are_not_read_to_the_end(monkeypatch):
    class Endless(io.RawIOBase):
        def readline(self, size=-1):
            return GOOD[:size]

    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=Endless()))

    with pytest.raises(UsageError, match="more than 100,000 prompts"):
        read_prompts("-", DEFAULTS)


def test_an_endless_line_is_not_read_to_the_end():
    with pytest.raises(UsageError, match="line 1: longer than 1,048,576 bytes"):
        read_prompts("/dev/zero", DEFAULTS)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_what_cannot_be_read_is_an_error(tmp_path, name):
    with pytest.raises(UsageError, match=r"No such file|Is a directory"):
        read_prompts(str(tmp_path / name), DEFAULTS)


@given(data=st.binary() | st.text().map(str.encode))
@example(b'{"prompt": "a"}\xff')
@example(b'{"prompt": "a", "a": {"a": NaN}}')
def test_any_bytes_are_prompts_or_a_usage_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)

    assert _refusal(path) or read_prompts(str(path), DEFAULTS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KEYS = st.sampled_from(["prompt", "token_ids", "id", "seed", "stop", "max_tokens", "top_p"])


@settings(max_examples=50)
@given(values=st.dictionaries(KEYS | st.text(), VALUES))
def test_any_object_is_a_prompt_or_a_usage_error(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(values))

    refusal = _refusal(path)
    assert not refusal or "any.jsonl, line 1: " in refusal
    if not refusal:
        (prompt,) = read_prompts(str(path), DEFAULTS)
        assert prompt.content in (values.get("prompt"), tuple(values.get("token_ids") or ()))


def _refusal(path):
    """The error of a file, if there is one."""
    try:
        read_prompts(str(path), DEFAULTS)
    except UsageError as error:
        return str(error)
    return None
