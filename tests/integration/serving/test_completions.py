"""Completions over HTTP: what comes out is what the engine itself gives, whole and in streams."""

import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import CONFIG, events_of

from grokctl.inference.generation import Ended, PromptLogits, PromptOutput, Request
from grokctl.inference.step_logits import log_probabilities
from grokctl.model.sampling import Sampling

TEXTS = st.text(st.sampled_from("aehlnost dé😀日\n\\\"'<"), min_size=1, max_size=12)
PROMPTS = st.text(st.sampled_from("aehlnost dé😀日\n\\\"'<"), min_size=1, max_size=4)  # one chunk


def post(client, **body):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client, **body):
    response = client.post("/v1/completions", json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, last = events_of(response.text)
    assert last == "[DONE]"
    return events


def finished(engine, request):
    """The events of a request; the server's thread takes the turns."""
    events, is_over = [], threading.Event()

    def take(event):
        events.append(event)
        if isinstance(event, Ended):
            is_over.set()

    engine.scheduler.submit(request, take)
    assert is_over.wait(60)
    return events


def logits_of(engine, ids):
    request = Request(
        prompt=tuple(ids), sampling=Sampling(), max_tokens=0, of_prompt=PromptOutput.LOGITS
    )
    parts = [each.logits for each in finished(engine, request) if isinstance(each, PromptLogits)]
    return np.concatenate(parts)


def own(engine, prompt, index=0, **options):
    """What the engine gives without HTTP."""
    sampling = Sampling(
        temperature=options.pop("temperature", 1.0), seed=options.pop("seed", 0) + index
    )
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    request = Request(prompt=tuple(ids), sampling=sampling, **{"max_tokens": 16, **options})
    return finished(engine, request)[-1].generation


def joined(events, count):
    """The choices of a stream's events as a whole answer has them."""
    choices = [
        {"index": index, "text": "", "logprobs": None, "finish_reason": None}
        for index in range(count)
    ]
    for event in events:
        for choice in event["choices"]:
            assert len(event["choices"]) == 1
            whole = choices[choice["index"]]
            assert whole["finish_reason"] is None  # nothing follows the end
            whole["text"] += choice["text"]
            for key in choice.keys() - {"index", "text", "logprobs"}:
                if key == "token_ids":
                    whole[key] = whole.get(key, []) + choice[key]
                else:
                    whole[key] = choice[key]
            if choice["logprobs"] is not None:
                columns = whole["logprobs"] = whole["logprobs"] or {}
                for name, values in choice["logprobs"].items():
                    columns[name] = columns.get(name, []) + values
    for whole in choices:
        if whole["logprobs"] is not None:
            end = len(whole["text"])
            offsets = whole["logprobs"]["text_offset"]
            whole["logprobs"]["text_offset"] = [min(offset, end) for offset in offsets]
    return choices


def rounded(value):
    """The same without the last digits: neighbours in a step change sums there."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def test_a_completion_is_what_the_engine_gives(client, engine):
    answer = post(client, prompt="the sea", max_tokens=7, temperature=0.9, seed=5)
    expected = own(engine, "the sea", max_tokens=7, temperature=0.9, seed=5)

    (choice,) = answer["choices"]
    assert choice["text"] == expected.text
    assert choice["seed"] == 5
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["object"] == "text_completion"
    assert re.fullmatch("cmpl-[0-9a-f]{32}", answer["id"])
    assert answer["model"] == "miniature"
    assert re.fullmatch(r"grokctl-\S+-int8-model=1-[0-9a-f]{8}", answer["system_fingerprint"])
    tokens = len(engine.tokenizer.encode("the sea"))
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 7,
        "total_tokens": tokens + 7,
        "prompt_tokens_details": {"cached_tokens": expected.stats.cached_tokens},
    }


def test_without_max_tokens_there_are_sixteen(client):
    answer = post(client, prompt="a", ignore_eos=True, max_tokens=None)

    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("the", 1), (["the", "sea"], 2), ([300, 301, 302], 1), ([[300, 301], [302]], 2)],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_all_forms_of_prompts(client, engine, prompt, count):
    answer = post(client, prompt=prompt, n=2, max_tokens=3, seed=40)

    prompts = prompt if count == 2 else [prompt]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
    for index, choice in enumerate(answer["choices"]):
        expected = own(engine, prompts[index // 2], index, max_tokens=3, seed=40)
        assert choice["text"] == expected.text
        assert choice["seed"] == 40 + index
    lengths = [
        len(engine.tokenizer.encode(each)) if isinstance(each, str) else len(each)
        for each in prompts
    ]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    assert answer["usage"]["completion_tokens"] == 6 * count


@settings(max_examples=15)
@given(
    prompt=PROMPTS,
    stop=st.lists(TEXTS, max_size=3),
    n=st.integers(1, 2),
    echo=st.booleans(),
    logprobs=st.none() | st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0, 0.8, 1.5]),
    max_tokens=st.integers(0, 8),
    return_token_ids=st.booleans(),
)
def test_a_stream_joined_is_the_whole_answer(client, engine, **body):
    whole = post(client, **body)
    events = streamed(client, **body, stream_options={"include_usage": True})
    *pieces, usage = events

    assert rounded(joined(pieces, body["n"])) == rounded(whole["choices"])
    assert all(event["usage"] is None for event in pieces)
    assert usage["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][name] == whole["usage"][name]
    for choice in whole["choices"]:
        text = choice["text"].removeprefix(body["prompt"]) if body["echo"] else choice["text"]
        assert not body["echo"] or choice["text"].startswith(body["prompt"])
        settings = {name: body[name] for name in ("temperature", "max_tokens")}
        expected = own(
            engine,
            body["prompt"],
            choice["index"],
            seed=body["seed"],
            stop=tuple(body["stop"]),
            **settings,
        )
        assert text == expected.text
        columns = choice["logprobs"]
        if columns is not None:
            tokens = engine.tokenizer.encode(body["prompt"]) if body["echo"] else []
            length = len(tokens) + len(expected.ids)
            assert {len(values) for values in columns.values()} <= {length, 0}
            assert columns["text_offset"] == sorted(columns["text_offset"])
            assert all(0 <= offset <= len(choice["text"]) for offset in columns["text_offset"])
    made = [event for event in pieces if event["choices"]]
    sampled = whole["usage"]["completion_tokens"]
    assert len(made) == sampled or body["max_tokens"] == 0  # one event for each token


def test_log_probabilities_are_those_of_a_score(client, engine):
    prompt = "the dog is on"
    answer = post(
        client,
        prompt=prompt,
        max_tokens=5,
        seed=3,
        echo=True,
        logprobs=4,
        return_token_ids=True,
        ignore_eos=True,
    )
    (choice,) = answer["choices"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    rows = logits_of(engine, ids)

    columns = choice["logprobs"]
    assert len(columns["tokens"]) == len(ids)
    assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
    expected = log_probabilities(rows[:-1], np.array(ids[1:]))
    assert columns["token_logprobs"][1:] == pytest.approx(expected.tolist(), abs=1e-5)
    for row, token, logprob, top in zip(
        rows, ids[1:], columns["token_logprobs"][1:], columns["top_logprobs"][1:], strict=False
    ):
        likeliest = set(np.argsort(-row, kind="stable")[:4].tolist())
        assert len(top) == 4 + (token not in likeliest)
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert (logprob == max(top.values())) == (token == int(np.argmax(row)))
        assert logprob in top.values()  # the very same number
    assert [each["id"] for each in columns["content"]] == ids
    assert bytes(
        byte for each in columns["content"] for byte in each["bytes"]
    ).decode().strip() == (choice["text"].strip())


def scored(client, ids, max_tokens):
    answer = post(
        client, prompt=[ids], temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True
    )
    return answer["choices"][0]["logprobs"], answer["usage"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_evaluation_harness_reads_scores(client, engine, max_tokens):
    """What lm-evaluation-harness sends, and the slice that it takes."""
    context, choices = [300, 310, 320, *range(400, 410)], [[330, 340], [341], [350, 351, 352]]
    found = []
    for choice in choices:
        ids = context + choice
        columns, _ = scored(client, ids, max_tokens)
        last = len(columns["token_logprobs"]) - max_tokens
        assert last == len(ids)
        values = columns["token_logprobs"][len(context) : last]
        is_greedy = all(
            value == max(top.values())
            for value, top in zip(values, columns["top_logprobs"][len(context) : last], strict=True)
        )
        found.append((sum(values), is_greedy))
        logits = logits_of(engine, ids)
        rows = logits[len(context) - 1 : -1]
        expected = log_probabilities(rows, np.array(choice)).sum()
        assert found[-1][0] == pytest.approx(expected, abs=1e-5)
        assert is_greedy == (rows.argmax(axis=1).tolist() == choice)


def test_scores_of_one_context_are_read_once(client):
    context = list(range(430, 445))
    scored(client, [*context, 300], 1)

    _, usage = scored(client, [*context, 301], 1)

    assert usage["prompt_tokens_details"]["cached_tokens"] >= len(context) - 1


def test_a_prompt_that_was_asked_before_is_not_read_again(client):
    prompt = list(range(300, 316))
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0}
    first, again = post(client, **body), post(client, **body)
    fresh = post(client, **body, cache_prompt=False)

    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 15
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    assert first["choices"][0]["text"] == fresh["choices"][0]["text"]
    page = client.get("/metrics").text
    hits = re.search(r"vllm:prefix_cache_hits_total\{[^}]*\} (\S+)", page)
    assert float(hits[1]) >= 15


def test_the_end_token_counts_and_has_no_text(client, engine):
    bias = {str(CONFIG.eos_token): 100}
    answer = post(client, prompt="the", max_tokens=5, logit_bias=bias, logprobs=1, echo=True)
    (choice,) = answer["choices"]

    assert choice["text"] == "the"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert answer["usage"]["completion_tokens"] == 1
    columns = choice["logprobs"]
    assert columns["tokens"][-1] == "</s>"
    assert columns["text_offset"][-1] == 3
    assert len(columns["token_logprobs"]) == len(engine.tokenizer.encode("the")) + 1
    assert columns["token_logprobs"][-1] < -1  # before the bias


def test_a_stop_string_says_that_it_was_one(client):
    body = {"prompt": "the sea", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    plain = post(client, **body)["choices"][0]["text"]
    stop = plain[2:5]
    stopped = post(client, **body, stop=stop)

    (choice,) = stopped["choices"]
    assert choice["text"] == plain[: plain.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    offsets = choice["logprobs"]["text_offset"]
    assert len(offsets) == stopped["usage"]["completion_tokens"] > len(choice["text"])
    assert offsets[-1] == len(choice["text"])  # the tokens of the stop string have no text


def test_the_context_ends_a_completion_as_its_length_does(client):
    answer = post(client, prompt=[300] * 12, max_tokens=500, ignore_eos=True)

    assert answer["usage"]["completion_tokens"] == CONFIG.sequence_len - 12 + 1
    assert answer["choices"][0]["finish_reason"] == "length"


def test_usage_so_far_is_in_every_event(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = streamed(client, prompt="a", max_tokens=3, ignore_eos=True, stream_options=options)

    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


def test_names_of_tokens_are_unique(client):
    answer = post(client, prompt="the é sea", max_tokens=4, logprobs=20, echo=True)
    by_id = post(client, prompt="the", max_tokens=2, logprobs=1, return_tokens_as_token_ids=True)

    columns = answer["choices"][0]["logprobs"]
    for top in columns["top_logprobs"][1:]:
        assert len(top) in {20, 21}
    assert "bytes:\\xc3" in columns["tokens"]
    assert all(
        re.fullmatch("token_id:[0-9]+", token)
        for token in by_id["choices"][0]["logprobs"]["tokens"]
    )


def test_unknown_fields_are_ignored_and_named(client):
    body = {"prompt": "a", "max_tokens": 1, "zzz": 3, "mirostat_tau": 5, "é\n": 1}
    response = client.post("/v1/completions", json=body)

    assert response.status_code == 200
    assert response.headers["x-grokctl-ignored"] == "mirostat_tau, zzz, ??"


def test_an_answer_has_the_caller_s_id(client):
    given = client.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine-7"}
    )
    odd = client.get("/health", headers={"x-request-id": "two words"})

    assert given.headers["x-request-id"] == "mine-7"
    assert given.json()["id"] != "mine-7"
    assert odd.headers["x-request-id"].startswith("cmpl-")
