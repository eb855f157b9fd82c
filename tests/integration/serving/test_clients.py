"""The clients that people have, unchanged: the openai package, and what probes ask."""

import json

import openai
import pytest

PROMPT = {"model": "miniature", "prompt": "the sea", "max_tokens": 4, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def openai_client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_completes(openai_client, client):
    answer = openai_client.completions.create(**PROMPT, logprobs=2, echo=True)

    raw = client.post("/v1/completions", json={**PROMPT, "logprobs": 2, "echo": True}).json()
    (choice,) = answer.choices
    assert choice.text == raw["choices"][0]["text"]
    assert choice.finish_reason == "length"
    assert choice.logprobs.tokens == raw["choices"][0]["logprobs"]["tokens"]
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.text_offset) == answer.usage.total_tokens
    assert answer.usage.completion_tokens == 4


def test_openai_streams(openai_client):
    whole = openai_client.completions.create(**PROMPT, n=2)
    options = {"include_usage": True}
    events = list(
        openai_client.completions.create(**PROMPT, n=2, stream=True, stream_options=options)
    )

    texts = ["", ""]
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert events[-1].usage.completion_tokens == 8
    assert len({event.id for event in events}) == 1


def test_openai_lists_models(openai_client):
    assert [model.id for model in openai_client.models.list()] == ["miniature", "alias/one"]
    assert openai_client.models.retrieve("alias/one").owned_by == "grokctl"


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        ({"max_tokens": -1}, openai.BadRequestError, None),
        ({"prompt": [300] * 500}, openai.BadRequestError, "context_length_exceeded"),
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"suffix": "x"}, openai.BadRequestError, "unsupported_parameter"),
    ],
)
def test_openai_reads_errors(openai_client, body, kind, code):
    with pytest.raises(kind) as caught:
        openai_client.completions.create(**PROMPT | body)

    assert caught.value.code == code
    assert caught.value.param in body


def test_openai_is_told_that_there_is_no_chat(openai_client):
    with pytest.raises(openai.BadRequestError, match="base model"):
        openai_client.chat.completions.create(
            model="miniature", messages=[{"role": "user", "content": "hello"}]
        )


def test_a_harness_finds_its_tokenizer(client, engine):
    info = client.get("/tokenizer_info").json()
    ids = client.post("/tokenize", json={"prompt": "the sea", "add_special_tokens": False}).json()
    eos = client.post("/v1/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"]
    back = client.post("/detokenize", json={"tokens": ids["tokens"]}).json()

    assert info["eos_token"] == "</s>"
    assert info["model_max_length"] == 128
    assert ids["tokens"] == engine.tokenizer.encode("the sea")
    assert ids["count"] == len(ids["tokens"])
    assert eos == [engine.config.eos_token]
    assert back == {"prompt": "the sea", "content": "the sea"}


def test_llama_cpp_s_form_of_tokens(client):
    plain = client.post("/tokenize", json={"content": "é a"}).json()["tokens"]
    pieces = client.post("/tokenize", json={"content": "é a", "with_pieces": True}).json()["tokens"]

    assert [each["id"] for each in pieces] == plain
    found = b"".join(
        each["piece"].encode() if isinstance(each["piece"], str) else bytes(each["piece"])
        for each in pieces
    )
    assert found.decode().strip() == "é a"
    assert [0xC3] in [each["piece"] for each in pieces]


def test_names_of_metrics_are_those_of_dashboards(client):
    client.post("/v1/completions", json=PROMPT)
    response = client.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {line.split()[2] for line in response.text.splitlines() if line.startswith("# TYPE")}
    assert {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds",
        "vllm:iteration_tokens_total",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "llamacpp:requests_processing",
        "llamacpp:tokens_predicted_total",
        "llamacpp:n_decode_total",
        "llamacpp:n_tokens_max",
        "grokctl_http_requests_total",
        "grokctl_bandwidth_fraction",
        "grokctl_build_info",
    } <= names
    assert not any(name.endswith("_created") for name in names)
    assert 'grokctl_http_requests_total{route="/v1/completions",status="200"}' in response.text


def test_the_log_has_no_texts(running, client):
    body = json.dumps({**PROMPT, "prompt": "a very private sentence", "user": "someone"})
    client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    exchange = [each for each in running.log if each.route == "/v1/completions"][-1]
    assert (exchange.status, exchange.tokens) == (200, 4)
    assert exchange.prompt_tokens > 4
    assert "private" not in repr(running.log)
    assert "someone" not in repr(running.log)
