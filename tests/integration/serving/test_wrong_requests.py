"""Every wrong request has its status, its code and the name of the field, and no traceback."""

import json
import random
import socket

import pytest
from serving import CONFIG

PROMPT = {"prompt": "a", "max_tokens": 1}
LONG = [300] * (CONFIG.sequence_len + 1)
UNSUPPORTED = "unsupported_parameter"
TOO_LONG = "context_length_exceeded"

WRONG = [
    # prompt
    ({"prompt": None}, None, "prompt"),
    ({"prompt": ""}, None, "prompt"),
    ({"prompt": []}, None, "prompt"),
    ({"prompt": [[]]}, None, "prompt"),
    ({"prompt": [""]}, None, "prompt"),
    ({"prompt": ["a", ""]}, None, "prompt"),
    ({"prompt": [[1], []]}, None, "prompt"),
    ({"prompt": 7}, None, "prompt"),
    ({"prompt": True}, None, "prompt"),
    ({"prompt": {"text": "a"}}, None, "prompt"),
    ({"prompt": ["a", 1]}, None, "prompt"),
    ({"prompt": [1, "a"]}, None, "prompt"),
    ({"prompt": [[1], 1]}, None, "prompt"),
    ({"prompt": [[1], "a"]}, None, "prompt"),
    ({"prompt": [1.5]}, None, "prompt"),
    ({"prompt": [True]}, None, "prompt"),
    ({"prompt": [[True]]}, None, "prompt"),
    ({"prompt": [None]}, None, "prompt"),
    ({"prompt": [1, -1]}, None, "prompt"),
    ({"prompt": [CONFIG.vocab_size]}, None, "prompt"),
    ({"prompt": [10**19]}, None, "prompt"),
    ({"prompt": "half \ud83d"}, None, "prompt"),
    ({"prompt": LONG}, TOO_LONG, "prompt"),
    ({"prompt": [[300], LONG]}, TOO_LONG, "prompt"),
    ({"prompt": "the sea " * 200}, TOO_LONG, "prompt"),
    ({"prompt": "a" * 10_000_000}, TOO_LONG, "prompt"),
    # numbers
    ({"max_tokens": -1}, None, "max_tokens"),
    ({"max_tokens": 1.5}, None, "max_tokens"),
    ({"max_tokens": "8"}, None, "max_tokens"),
    ({"max_tokens": True}, None, "max_tokens"),
    ({"max_tokens": [1]}, None, "max_tokens"),
    ({"min_tokens": -1}, None, "min_tokens"),
    ({"temperature": -0.1}, None, "temperature"),
    ({"temperature": "hot"}, None, "temperature"),
    ({"temperature": False}, None, "temperature"),
    ({"top_p": -0.1}, None, "top_p"),
    ({"top_p": 1.1}, None, "top_p"),
    ({"top_p": "1"}, None, "top_p"),
    ({"top_p": False}, None, "top_p"),
    ({"top_k": -2}, None, "top_k"),
    ({"top_k": 1.5}, None, "top_k"),
    ({"min_p": 2}, None, "min_p"),
    ({"frequency_penalty": 2.5}, None, "frequency_penalty"),
    ({"presence_penalty": -3}, None, "presence_penalty"),
    ({"presence_penalty": "none"}, None, "presence_penalty"),
    ({"n": 0}, None, "n"),
    ({"n": 129}, None, "n"),
    ({"n": "2"}, None, "n"),
    ({"n": True}, None, "n"),
    ({"prompt": ["a"] * 9, "n": 128}, None, "n"),
    ({"best_of": 3}, UNSUPPORTED, "best_of"),
    ({"best_of": "x"}, None, "best_of"),
    ({"n": 2, "best_of": 3}, UNSUPPORTED, "best_of"),
    ({"logprobs": 21}, None, "logprobs"),
    ({"logprobs": -1}, None, "logprobs"),
    ({"logprobs": "5"}, None, "logprobs"),
    ({"logprobs": 1.0}, None, "logprobs"),
    ({"seed": 2**64}, None, "seed"),
    ({"seed": -(2**63) - 1}, None, "seed"),
    ({"seed": 1.5}, None, "seed"),
    ({"seed": "x"}, None, "seed"),
    # lists and objects
    ({"stop": 5}, None, "stop"),
    ({"stop": ["a", 1]}, None, "stop"),
    ({"stop": ["a"] * 65}, None, "stop"),
    ({"stop": "a" * 1001}, None, "stop"),
    ({"stop": ["\ud83d"]}, None, "stop"),
    ({"stop_token_ids": 5}, None, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, None, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, None, "stop_token_ids"),
    ({"stop_token_ids": [CONFIG.vocab_size]}, None, "stop_token_ids"),
    ({"logit_bias": []}, None, "logit_bias"),
    ({"logit_bias": {"x": 1}}, None, "logit_bias"),
    ({"logit_bias": {"5": 101}}, None, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, None, "logit_bias"),
    ({"logit_bias": {str(CONFIG.vocab_size): 1}}, None, "logit_bias"),
    ({"logit_bias": {"05": 1, "5": 2}}, None, "logit_bias"),
    # switches
    ({"echo": 1}, None, "echo"),
    ({"echo": "true"}, None, "echo"),
    ({"stream": "yes"}, None, "stream"),
    ({"ignore_eos": 1}, None, "ignore_eos"),
    ({"cache_prompt": "no"}, None, "cache_prompt"),
    ({"return_token_ids": 1}, None, "return_token_ids"),
    ({"return_tokens_as_token_ids": 1}, None, "return_tokens_as_token_ids"),
    ({"stream_options": {"include_usage": True}}, None, "stream_options"),
    ({"stream": True, "stream_options": True}, None, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, None, "include_usage"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": "x"}}, None,
     "continuous_usage_stats"),
    ({"model": 5}, None, "model"),
    # what is not here
    ({"suffix": "end"}, UNSUPPORTED, "suffix"),
    ({"repetition_penalty": 1.1}, UNSUPPORTED, "repetition_penalty"),
    ({"repeat_penalty": 1.2}, UNSUPPORTED, "repeat_penalty"),
    ({"typical_p": 0.5}, UNSUPPORTED, "typical_p"),
    ({"mirostat": 2}, UNSUPPORTED, "mirostat"),
    ({"mirostat": False}, UNSUPPORTED, "mirostat"),
    ({"use_beam_search": True}, UNSUPPORTED, "use_beam_search"),
    ({"length_penalty": 2}, UNSUPPORTED, "length_penalty"),
    ({"response_format": {"type": "json_object"}}, UNSUPPORTED, "response_format"),
    ({"grammar": "root ::= 'a'"}, UNSUPPORTED, "grammar"),
    ({"guided_json": {}}, UNSUPPORTED, "guided_json"),
    ({"include_stop_str_in_output": True}, UNSUPPORTED, "include_stop_str_in_output"),
    ({"logits_processors": ["x"]}, UNSUPPORTED, "logits_processors"),
    ({"dry_multiplier": 0.8}, UNSUPPORTED, "dry_multiplier"),
    ({"xtc_probability": 0.5}, UNSUPPORTED, "xtc_probability"),
]  # fmt: skip


def is_error(response, status, code, param=None):
    assert response.status_code == status, response.text
    assert "Traceback" not in response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert len(error["message"]) < 300
    return error


def test_the_table_is_long_enough():
    assert len(WRONG) >= 80


@pytest.mark.parametrize(("body", "code", "param"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_field_is_named(client, body, code, param):
    response = client.post(
        "/v1/completions",
        content=json.dumps({**PROMPT, **body}),
        headers={"content-type": "application/json"},
    )

    error = is_error(response, 400, code, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "expected an object, found a list"),
        (b'"a"', "expected an object"),
        (b"{", "not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "appears twice"),
        (b'{"prompt": NaN}', "not JSON (NaN)"),
        (b'{"seed": 1%s}' % (b"0" * 5000), "a number of 5001 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "expected UTF-8"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_what_is_no_object_is_refused(client, content, words):
    response = client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )

    assert words in is_error(response, 400, None)["message"]


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "", None]
)
def test_another_type_of_body_is_refused(client, media_type):
    headers = {} if media_type is None else {"content-type": media_type}

    response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)

    is_error(response, 415, None)


def test_a_type_may_have_parameters(client):
    headers = {"content-type": "Application/JSON; charset=utf-8"}

    assert client.post("/version", content=b"", headers=headers).status_code == 405
    body = json.dumps(PROMPT)
    assert client.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_another_model_is_not_there(client):
    error = is_error(
        client.post("/v1/completions", json={**PROMPT, "model": "gpt-4"}),
        404,
        "model_not_found",
        "model",
    )

    assert "miniature or alias/one" in error["message"]
    is_error(client.get("/v1/models/gpt-4"), 404, "model_not_found", "model")


@pytest.mark.parametrize("name", ["miniature", "alias/one", "", None])
def test_a_model_has_all_its_names(client, name):
    answer = client.post("/v1/completions", json={**PROMPT, "model": name})

    assert answer.json()["model"] == (name or "miniature")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("PUT", "/v1/models/a", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("POST", "/v1/responses", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/completions/", 404, "unknown_url"),
        ("GET", "/%2e%2e/etc/passwd", 404, "unknown_url"),
    ],
)
def test_routes_that_are_not_there(client, method, path, status, code):
    response = client.request(method, path)

    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    if status == 405:
        assert response.headers["allow"]


def test_a_base_model_does_not_chat(client):
    messages = [{"role": "user", "content": "hello"}]
    response = client.post("/v1/chat/completions", json={"model": "x", "messages": messages})

    error = is_error(response, 400, "base_model")
    assert "/v1/completions" in error["message"]


def test_a_body_that_is_too_long_is_refused_before_it_has_come(client, running):
    def endless():
        yield b'{"prompt": "'
        for _ in range(64):
            yield b"a" * 2**20

    most = running.service.options.body_nbytes
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        request = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {most + 1}\r\n\r\n{{"
        )
        connection.sendall(request.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    headers = {"content-type": "application/json"}
    is_error(client.post("/v1/completions", content=endless(), headers=headers), 413, None)


def test_neutral_fields_of_other_servers_pass(client):
    body = {
        "logit_bias": {},
        "best_of": 1,
        "suffix": "",
        "repetition_penalty": 1.0,
        "typical_p": 1,
        "mirostat": 0,
        "use_beam_search": False,
        "response_format": {"type": "text"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "stop": [],
        "stream_options": {},
        "user": 5,
        "top_k": -1,
        "top_p": 0,
        "logprobs": False,
        "seed": -1,
    }

    response = client.post("/v1/completions", json={**PROMPT, **body})

    assert response.status_code == 200
    assert "x-grokctl-ignored" not in response.headers
    assert response.json()["choices"][0]["logprobs"] is None


def test_hostile_bodies_are_refused_and_nothing_worse(client, running):
    """Fields with each other's values, and bytes that are torn."""
    choose = random.Random(7)
    values = [value for body, _, _ in WRONG for value in body.values() if len(str(value)) < 1000]
    names = sorted({name for body, _, _ in WRONG for name in body} | {"user", "zzz"})
    for _ in range(150):
        body = {name: choose.choice(values) for name in choose.sample(names, 3)}
        content = json.dumps({**PROMPT, **body}).encode()
        if choose.random() < 0.3:
            content = content[: choose.randrange(len(content))]
        response = client.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code in {200, 400, 404}, content
    assert running.bugs == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"content": ["a"]}, "content"),
        ("/tokenize", {"content": "a" * (2**20 + 1)}, "content"),
        ("/tokenize", {"prompt": "é" * 2**20}, "prompt"),  # two tokens each
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [CONFIG.vocab_size]}, "tokens"),
    ],
)
def test_wrong_texts_and_tokens(client, path, body, param):
    is_error(client.post(path, json=body), 400, None, param)
