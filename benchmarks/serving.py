"""What HTTP costs: the same requests to the scheduler itself, and to a server by its clients.

`ratio` is the rate of tokens over HTTP divided by that without; `first_ms` is how much later the
first token of an idle server comes; `overhead_us` is the time that HTTP adds to a token of the
miniature, whose steps take next to nothing. Clients are a process of their own, and read streams.
The full-width layer is one of 64, so a token costs HTTP 64 times as much of its time as in Grok-1.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import ReleaseSource, TensorSource
from grokctl.infer import infer
from grokctl.inference.engine import Engine
from grokctl.inference.generation import Ended, Request, RequestEvent, Token
from grokctl.inference.plan import EngineOptions
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.sampling import Sampling
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.serving.app import application
from grokctl.serving.guard import GuardOptions
from grokctl.serving.served_model import describe
from grokctl.serving.server import Server, ServerOptions, bound
from grokctl.serving.service import Phase, Service, ServiceOptions

ONE = MeshShape(1, 1)
LAYER = replace(GROK_1, num_layers=1, vocab_size=1024)
STREAMS = (1, 4, 16)
PROMPT = 8
"""Tokens."""
Measured = tuple[float, float]
"""Seconds of everything, and until the first token."""


def prompt(number: int) -> list[int]:
    """Ids that begin like no other prompt's."""
    return [(number * 7919 + 31 * place) % 500 + 3 for place in range(PROMPT)]


# --- without HTTP


def alone(engine: Engine, numbers: range, tokens: int) -> Measured:
    scheduler, firsts, ended = engine.scheduler, [], []
    began = time.perf_counter()

    def deliver(event: RequestEvent) -> None:
        if isinstance(event, Token) and not firsts:
            firsts.append(time.perf_counter() - began)
        if isinstance(event, Ended):
            ended.append(event)

    for number in numbers:
        request = Request(
            prompt=tuple(prompt(number)),
            sampling=Sampling(temperature=0),
            max_tokens=tokens,
            ignore_eos=True,
            cache_prompt=False,
        )
        scheduler.submit(request, deliver)
    while len(ended) < len(numbers):
        scheduler.turn()
    return time.perf_counter() - began, firsts[0]


# --- over HTTP


@contextmanager
def served(engine: Engine, source: TensorSource) -> Iterator[str]:
    """A server of an engine that is loaded; its URL."""
    ready = threading.Event()
    service = Service(
        lambda _: engine,
        lambda engine: describe(source, engine.plan, name="model", tokenizer=None),
        options=ServiceOptions(),
        on_change=lambda phase: ready.set() if phase is Phase.READY else None,
    )
    app = application(service, GuardOptions(), log=lambda _: None)
    options = ServerOptions(port=0)
    server, listener = Server(service, app, options), bound(options)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(listener)))
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        assert server._loop is not None  # noqa: SLF001
        server._loop.call_soon_threadsafe(server.stop)  # noqa: SLF001
        thread.join()


def over_http(url: str, numbers: range, tokens: int) -> Measured:
    """The same by clients in a process of their own."""
    arguments = ["--client", url, str(numbers.start), str(numbers.stop), str(tokens)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    seconds, first = json.loads(done.stdout)
    return seconds, first


async def ask(url: str, numbers: range, tokens: int) -> Measured:
    """Ask for streams at once; their events are counted, and not parsed: clients have no cost."""
    address = urlsplit(url)
    connections = [await asyncio.open_connection(address.hostname, address.port) for _ in numbers]
    firsts: list[float] = []
    began = time.perf_counter()

    async def one(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        body = {
            "prompt": prompt(number),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        content = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(content), content)
        )
        events = 0
        while part := await reader.read(2**16):
            if found := part.count(b"data: {"):
                firsts.append(time.perf_counter() - began)
                events += found
        writer.close()
        return events

    pairs = zip(numbers, connections, strict=True)
    events = await asyncio.gather(*(one(number, *each) for number, each in pairs))
    assert set(events) == {tokens}
    return time.perf_counter() - began, min(firsts)


# --- the table


def compared(
    engine: Engine, source: TensorSource, *, tokens: int, rounds: int
) -> dict[str, dict[int, Measured]]:
    """The best of some rounds that take turns, by way and by the number of streams."""
    best: dict[str, dict[int, Measured]] = {"alone": {}, "http": {}}
    numbers = iter(range(0, 10**9, 16))

    def keep(way: str, streams: int, found: Measured) -> None:
        before = best[way].get(streams, (float("inf"), float("inf")))
        best[way][streams] = (min(before[0], found[0]), min(before[1], found[1]))

    for streams in STREAMS:
        first = next(numbers)
        alone(engine, range(first, first + streams), 2)  # compiles
    for _ in range(rounds):
        for streams in STREAMS:
            first = next(numbers)
            keep("alone", streams, alone(engine, range(first, first + streams), tokens))
        with served(engine, source) as url:
            for streams in STREAMS:
                first = next(numbers)
                keep("http", streams, over_http(url, range(first, first + streams), tokens))
    return best


def table(name: str, best: dict[str, dict[int, Measured]], tokens: int) -> list[dict[str, Any]]:
    rows = []
    for streams in STREAMS:
        (seconds, first), (seconds_http, first_http) = (
            best["alone"][streams],
            best["http"][streams],
        )
        rows.append(
            {
                "model": name,
                "streams": streams,
                "alone_tokens_per_s": streams * tokens / seconds,
                "http_tokens_per_s": streams * tokens / seconds_http,
                "ratio": seconds / seconds_http,
                "first_ms": 1000 * (first_http - first),
                "overhead_us": 1e6 * (seconds_http - seconds) / (streams * tokens),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['model']:10}{row['streams']:8}{row['alone_tokens_per_s']:10.1f}"
            f"{row['http_tokens_per_s']:10.1f}{row['ratio']:10.3f}"
            f"{row['first_ms']:+8.1f}ms{row['overhead_us']:+8.0f}us",
            flush=True,
        )


def miniature(folder: Path) -> tuple[Engine, TensorSource]:
    write_miniature(folder / "miniature", MINIATURE)
    release = open_release(folder / "miniature")
    return started(ReleaseSource(release))


def layer(folder: Path) -> tuple[Engine, TensorSource]:
    if not (folder / "ready").exists():
        write_miniature(folder / "release", LAYER, tokenizer=False)
        options = ReshardOptions(mesh=ONE, out=folder / "ready", precision=Precision.INT8)
        reshard(plan_reshard(open_release(folder / "release"), options))
    return started(open_ready(folder / "ready"))


def started(source: TensorSource) -> tuple[Engine, TensorSource]:
    return infer(source, EngineOptions(mesh=ONE, slots=max(STREAMS), context=128)), source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", nargs=4, metavar=("URL", "FROM", "TO", "TOKENS"))
    parser.add_argument("--only", choices=("miniature", "layer"))
    parser.add_argument("--layer", type=Path, help="a folder with a layer that an earlier run made")
    parser.add_argument("--tokens", type=int, default=8, help="of a stream of the layer")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    if given.client is not None:
        url, *numbers = given.client
        first, end, tokens = map(int, numbers)
        print(json.dumps(asyncio.run(ask(url, range(first, end), tokens))))
        return
    rows: list[dict[str, Any]] = []
    names = ("alone/s", "HTTP/s", "ratio", "first", "a token")
    print(f"{'':10}{'streams':>8}" + "".join(f"{name:>10}" for name in names), flush=True)
    with tempfile.TemporaryDirectory() as name:
        for what, make, tokens in (
            ("miniature", miniature, 64),
            ("layer", layer, given.tokens),
        ):
            if given.only not in {None, what}:
                continue
            folder = given.layer if given.layer and what == "layer" else Path(name)
            engine, source = make(folder)
            best = compared(engine, source, tokens=tokens, rounds=given.rounds)
            found = table(what, best, tokens)
            show(found)
            rows += found
    wide = [row for row in rows if row["model"] == "layer"]
    for row in wide:
        assert row["ratio"] >= 0.97, "HTTP takes too much of the throughput"
        assert row["streams"] > 1 or row["first_ms"] <= 10, "the first token comes too late"


if __name__ == "__main__":
    main()
