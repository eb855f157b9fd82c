"""A prompt of 8,000 tokens beside ten completions: these go on, a token for each chunk of it."""

import threading
import time
from dataclasses import replace

import pytest
from serving import CONFIG, serving, small_engine, small_release

CHUNK = 128
"""Most tokens of prompts in a turn of a CPU while others decode."""
PROMPT = 8000
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_long_prompt_holds_nobody_up(tmp_path):
    config = replace(CONFIG, sequence_len=8192, num_layers=1)
    release = small_release(tmp_path / "long", config)
    engine = small_engine(release, slots=11)
    times = [[] for _ in range(10)]

    with serving(release, lambda _: engine) as running, running.client() as client:

        def decode(number):
            body = {"prompt": [3 + number], "max_tokens": 1500, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data: {"):
                        times[number].append(time.monotonic())

        threads = [threading.Thread(target=decode, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        while min(map(len, times)) < 20:  # all decode, and nothing compiles any more
            time.sleep(0.01)
        began = time.monotonic()
        ids = [3 + place * 31 % 400 for place in range(PROMPT)]
        response = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 1})
        ended = time.monotonic()
        for thread in threads:
            thread.join()

    assert response.json()["usage"]["prompt_tokens"] == PROMPT
    meanwhile = [sum(began < each < ended for each in column) for column in times]
    assert min(meanwhile) >= PROMPT // CHUNK - 5
