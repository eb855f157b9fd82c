"""A server under load for a while: 64 clients of which half leave, and strangers who send anything.

`make soak` runs it for SECONDS.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from served import server
from serving import events_of

SECONDS = float(os.environ.get("GROKCTL_SOAK_SECONDS", "60"))
CLIENTS = 64
PROMPTS = ("the sea", "a", "the sea is", "wind and", "one two", "é", "sun", "the")
BODY = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
RAW = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b"
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 400)]


class Load:
    """What clients do until a deadline, and what they have seen."""

    def __init__(self, url, texts, seconds):
        self.url, self.texts = url, texts
        self.until = time.monotonic() + seconds
        self.whole = self.left = self.refused = 0
        self.slowest = 0.0
        self.statuses = {}

    @property
    def goes_on(self):
        return time.monotonic() < self.until

    async def run(self):
        limits = httpx.Limits(max_connections=None)
        options = {"base_url": self.url, "limits": limits, "timeout": 120, "trust_env": False}
        async with httpx.AsyncClient(**options) as client:
            each = [self._ask(client, number) for number in range(CLIENTS)]
            await asyncio.gather(*each, self._probe(client))

    async def _ask(self, client, number):
        chance = random.Random(number)
        while self.goes_on:
            prompt = chance.choice(PROMPTS)
            body = {**BODY, "prompt": prompt, "stream": chance.random() < 0.5}
            if number % 2:
                await self._leave(client, body, chance.uniform(0, 2))
            else:
                await self._stay(client, body)

    async def _stay(self, client, body):
        response = await client.post("/v1/completions", json=body)
        if response.status_code in {429, 503}:
            self.refused += 1
            await asyncio.sleep(0.2)
            return
        assert response.status_code == 200, response.text
        if body["stream"]:
            *events, done = events_of(response.text)
            assert done == "[DONE]"
            text = "".join(event["choices"][0]["text"] for event in events)
        else:
            text = response.json()["choices"][0]["text"]
        assert text == self.texts[body["prompt"]]
        self.whole += 1

    async def _leave(self, client, body, seconds):
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(seconds):
                await client.post("/v1/completions", json=body)
        self.left += 1

    async def _probe(self, client):
        while self.goes_on:
            begun = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            self.slowest = max(self.slowest, time.monotonic() - begun)
            await asyncio.sleep(0.25)

    def fuzz(self, seed):
        """Send what is nearly a request, and keep the status of the answer."""
        chance, address = random.Random(seed), httpx.URL(self.url)
        while self.goes_on:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((address.host, address.port), timeout=10) as connection,
            ):
                connection.sendall(strange(chance))
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while part := connection.recv(65536):
                    answer += part
                if answer:
                    status = int(answer.split(b" ", 2)[1])
                    self.statuses[status] = self.statuses.get(status, 0) + 1
                    assert b"Traceback" not in answer


def strange(chance):
    """A request with something wrong with it, mostly."""
    values = [None, True, -1, 0, 10**30, 1e308, "", "x" * 999, [], [[]], [1], {}, "\ud800"]
    names = ["prompt", "max_tokens", "n", "stop", "logprobs", "seed", "temperature", "stream", "x"]
    body = {"prompt": "a", "max_tokens": 2, chance.choice(names): chance.choice(values)}
    content = bytearray(json.dumps(body).encode("utf-8", "surrogatepass"))
    request = bytearray(RAW % (len(content), content))
    for _ in range(chance.choice((0, 0, 1, 3, 30))):
        place = chance.randrange(len(request))
        match chance.randrange(3):
            case 0:
                request[place] = chance.randrange(256)
            case 1:
                del request[place : place + chance.randrange(40)]
            case _:
                request[place:place] = chance.randbytes(chance.randrange(40))
        if not request:
            break
    return bytes(request)


def anonymous_nbytes(process):
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def settled(client):
    """Whether nothing runs or waits any more."""
    return client.get("/load").json() == {"server_load": 0}


def test_nothing_is_left_behind_by_many_clients(process, home, capsys):
    with server(process, home, "--slots", 4, warms_up=True) as started:
        url = started.ready["url"]
        observed = psutil.Process(started.pid)
        with httpx.Client(base_url=url, timeout=120) as client:
            texts = {
                prompt: client.post("/v1/completions", json={**BODY, "prompt": prompt}).json()[
                    "choices"
                ][0]["text"]
                for prompt in PROMPTS
            }
            first = Load(url, texts, SECONDS / 6)
            asyncio.run(first.run())
            wait_for(lambda: settled(client))
            before = (observed.num_threads(), anonymous_nbytes(observed))
            load = Load(url, texts, SECONDS * 5 / 6)
            fuzzers = [threading.Thread(target=load.fuzz, args=(seed,)) for seed in range(2)]
            for fuzzer in fuzzers:
                fuzzer.start()
            asyncio.run(load.run())
            for fuzzer in fuzzers:
                fuzzer.join()
            wait_for(lambda: settled(client))
            slots = client.get("/slots").json()
            after = (observed.num_threads(), anonymous_nbytes(observed))
            page = client.get("/metrics").text
        wait_for(lambda: len(observed.net_connections("tcp")) <= 2)
    grown = (after[1] - before[1]) / 2**20
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{load.whole} whole, {load.left} left, {load.refused} refused; strangers: "
            f"{dict(sorted(load.statuses.items()))}; health {1000 * load.slowest:.0f} ms at most; "
            f"memory {grown:+.1f} MiB, threads {before[0]} -> {after[0]}"
        )
    assert load.whole > CLIENTS
    assert not any(slot["is_processing"] for slot in slots)
    assert "vllm:num_requests_waiting{" in page
    assert 500 not in load.statuses
    assert after[0] <= before[0] + 1
    assert grown < 32
    assert not [line for line in started.errors if "bug" in line or "Traceback" in line]


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_ten_thousand_connections_keep_nobody_out(process, home, capsys):
    import resource  # noqa: PLC0415 (not on every system)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 10_500:
        pytest.skip(f"{hard} open files at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = []
    try:
        with server(process, home) as started:
            url = httpx.URL(started.ready["url"])
            slowest = 0.0
            for number in range(10_000):
                held.append(socket.create_connection((url.host, url.port), timeout=30))
                if number % 1000 == 999:
                    begun = time.monotonic()
                    assert httpx.get(url.join("/health"), timeout=30).status_code == 200
                    slowest = max(slowest, time.monotonic() - begun)
            kept = len(psutil.Process(started.pid).net_connections("tcp"))
            body = {"prompt": "the sea", "max_tokens": 2}
            answer = httpx.post(url.join("/v1/completions"), json=body, timeout=60)
            with capsys.disabled():
                print(f"\n{kept} kept, health {1000 * slowest:.0f} ms at most")  # noqa: T201
            assert answer.status_code == 200
            assert kept < 700
            assert slowest < 10
    finally:
        for each in held:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
