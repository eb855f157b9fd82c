"""After the warm-up no request waits for a compilation, whatever it asks for."""

import threading
from dataclasses import replace

import httpx
from serving import CONFIG, serving, small_engine, small_release

from grokctl.inference.warm_up import warm_up

SMALLER = replace(CONFIG, num_layers=1, sequence_len=16)
BODY = {"prompt": [300, 301], "max_tokens": 6, "ignore_eos": True, "seed": 3}
REQUESTS = (
    *[BODY | {"n": count} for count in (1, 2)],
    BODY | {"frequency_penalty": 1, "logit_bias": {"3": -100}},
    BODY | {"prompt": [301] * 10},
    BODY | {"prompt": [[300], [300, 301]], "echo": True, "logprobs": 5},
    BODY | {"prompt": [[302] * 15] * 2, "echo": True, "logprobs": 5, "max_tokens": 0},
)


def test_nothing_is_compiled_for_a_request(tmp_path):
    release = small_release(tmp_path / "smaller", SMALLER)
    engine = small_engine(release, draws_on_device=True, slots=2)
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
