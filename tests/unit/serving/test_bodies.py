"""Long bodies are checked in a thread, and have a limit together."""

import asyncio
import threading

import pytest

from grokctl.serving.bodies import Bodies, ClientGoneError
from grokctl.serving.completion_request import read_completion
from grokctl.serving.wire_errors import WireError

JSON = {"headers": [(b"content-type", b"application/json")]}


def receiving(*parts):
    """Gives parts of a body; the last one is its end."""
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    left[-1]["more_body"] = False

    async def receive():
        return left.pop(0)

    return receive


def read(body, check=dict, most=2**25):
    return asyncio.run(Bodies(most=most).read(JSON, receiving(body), check))


@pytest.mark.parametrize(("count", "is_elsewhere"), [(10, False), (20_000, True)])
def test_a_long_body_is_parsed_and_checked_in_a_thread(count, is_elsewhere):
    threads = []

    def check(values):
        threads.append(threading.current_thread())
        return len(values["prompt"])

    assert read(b'{"prompt": [%b1]}' % (b"1," * (count - 1)), check) == count
    assert (threads != [threading.main_thread()]) == is_elsewhere


def test_a_body_has_so_many_values_at_most():
    with pytest.raises(WireError, match="expected at most 1,048,576 values") as caught:
        read(b'{"prompt": [%b1]}' % (b"1," * 2**20))

    assert caught.value.status == 400
    assert len(read(b'{"prompt": [%b1]}' % (b"1," * (2**20 - 1)))["prompt"]) == 2**20


@pytest.mark.parametrize("value", [b"1.5", b"true", b'"a"', b"[]"])
def test_one_among_many_ids_is_found(value):
    body = b'{"prompt": [%b%b]}' % (b"1," * 5000, value)

    with pytest.raises(WireError, match="prompt: expected token ids, found") as caught:
        read(body, read_completion)

    assert caught.value.param == "prompt"


@pytest.mark.parametrize("value", [b'"a"', b"[5]"])
def test_so_many_prompts_are_refused_before_they_are_looked_at(value):
    with pytest.raises(WireError, match="prompt: expected at most 1,024 prompts, found '1,026'"):
        read(b'{"prompt": [%b7]}' % ((value + b",") * 1025), read_completion)


def test_bodies_have_a_limit_together():
    async def run():
        bodies, go_on = Bodies(most=10), asyncio.Event()

        async def slow():
            await go_on.wait()
            return {"type": "http.disconnect"}

        def stalled():
            return asyncio.ensure_future(
                bodies.read(JSON, after(receiving(b"0123456789", b"0123456789"), slow), dict)
            )

        def after(first, then):
            given = []

            async def receive():
                if given:
                    return await then()
                given.append(1)
                return await first()

            return receive

        waiting = [stalled() for _ in range(8)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(WireError, match="bodies: expected fewer") as caught:
            await bodies.read(JSON, receiving(b"{}"), dict)
        assert (caught.value.status, caught.value.code) == (503, "too_many")
        go_on.set()
        for each in waiting:
            with pytest.raises(ClientGoneError):
                await each
        assert await bodies.read(JSON, receiving(b"{}"), dict) == {}

    asyncio.run(run())
