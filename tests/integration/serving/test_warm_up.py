"""After the warm-up no request waits for a compilation, whatever it asks for."""

import threading

import httpx
import pytest
from serving import serving, small_engine

from grokctl.inference.warm_up import warm_up

BODY = {"prompt": "the sea", "max_tokens": 12, "ignore_eos": True, "seed": 3}
REQUESTS = (
    *[BODY | {"n": count} for count in (1, 2, 3)],
    BODY | {"frequency_penalty": 1, "logit_bias": {"3": -100}},
    BODY | {"prompt": "the sea " * 12},
    BODY | {"prompt": [[300], [300, 301]], "echo": True, "logprobs": 5},
    BODY | {"prompt": [[301] * 100] * 3, "echo": True, "logprobs": 5, "max_tokens": 0},
)


@pytest.mark.parametrize("draws_on_device", [False, True])
def test_nothing_is_compiled_for_a_request(release, draws_on_device):
    engine = small_engine(release, draws_on_device=draws_on_device)
    warm_up(engine.runner)
    compiled, begun = engine.runner.compile_s, set(engine.runner._programs._compiled)

    with serving(release, lambda _: engine) as running:
        statuses = []

        def ask(body):
            url = f"{running.url}/v1/completions"
            statuses.append(httpx.post(url, json=body, timeout=60).status_code)

        for body in REQUESTS:
            ask(body)
        together = [threading.Thread(target=ask, args=(body,)) for body in REQUESTS]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()

    assert set(statuses) == {200}
    assert set(engine.runner._programs._compiled) == begun
    assert engine.runner.compile_s == compiled
