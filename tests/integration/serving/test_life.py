"""Loading, full, draining, failing: a server says which, and clients that leave cost nothing."""

import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest
from serving import events_of, serving

from grokctl.errors import PeerError, Reason, corrupt
from grokctl.serving.connections import GuardedProtocol
from grokctl.serving.server import ServerOptions, bound
from grokctl.serving.service import Phase

LONG = {"prompt": [300] * 12, "max_tokens": 100, "ignore_eos": True, "cache_prompt": False}
SHORT = {"prompt": [300], "max_tokens": 1, "ignore_eos": True}

OF_OPENAI = {"prompt": "the sea", "max_tokens": 4}


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.01)


def is_empty(running):
    gauges = running.service.gauges()
    return gauges.running == gauges.waiting == 0 and not running.service.served


@contextlib.contextmanager
def slowed(engine, seconds=0.02):
    """Let every turn take a while."""
    turn = engine.scheduler.turn

    def slow():
        time.sleep(seconds)
        turn()

    engine.scheduler.turn = slow
    try:
        yield
    finally:
        engine.scheduler.turn = turn


def test_a_server_answers_while_it_loads(release, engine):
    loaded = threading.Event()

    def start(_):
        assert loaded.wait(60)
        return engine

    with serving(release, start, is_awaited=False) as running, running.client() as client:
        wait_for(lambda: running.server._uvicorn.started)
        responses = {
            path: client.get(path) for path in ("/health", "/v1/models", "/props", "/slots")
        }
        responses["post"] = client.post("/v1/completions", json=SHORT)
        for response in responses.values():
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "loading"
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/version").status_code == client.get("/metrics").status_code == 200

        loaded.set()

        wait_for(lambda: client.get("/health").status_code == 200)
        assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_openai_tries_again_while_the_model_loads(release, engine):
    loaded = threading.Event()

    def start(_):
        assert loaded.wait(60)
        return engine

    with serving(release, start, is_awaited=False) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            threading.Timer(0.5, loaded.set).start()
            with pytest.raises(openai.APIError):
                client.completions.create(model="miniature", **OF_OPENAI)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=9) as client:
            answer = client.completions.create(model="miniature", **OF_OPENAI)

    assert answer.usage.completion_tokens == 4


def test_what_cannot_be_loaded_ends_the_server(release):
    def start(_):
        raise corrupt("a", Reason.MISSING, "gone")

    with serving(release, start, is_awaited=False) as running:
        running.thread.join(20)

    (end,) = running.ends
    assert end.failure.exit_code == 20
    assert running.service.phase is Phase.FAILED


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_frees_its_slot(release, engine, is_streamed):
    with serving(release, lambda _: engine) as running, slowed(engine):
        ahead = [
            threading.Thread(
                target=lambda: httpx.post(
                    f"{running.url}/v1/completions", json={**LONG, "max_tokens": 30}, timeout=60
                )
            )
            for _ in range(2)
        ]
        for thread in ahead:
            thread.start()
        leavers = [connect(running, {**LONG, "n": 3, "stream": is_streamed}) for _ in range(2)]
        wait_for(lambda: running.service.gauges().waiting >= 2)  # some run, some wait

        for leaver in leavers:
            leaver.close()

        wait_for(lambda: running.service.gauges().waiting == 0)
        wait_for(lambda: running.service.gauges().running <= 2, seconds=5)
        for thread in ahead:
            thread.join(60)
        wait_for(lambda: is_empty(running))
        with running.client() as client:
            page = client.get("/metrics").text
        assert 'finished_reason="length",model_name="miniature"} 2.0' in page
        assert [each.status for each in running.log].count(499 if not is_streamed else 200) >= 2


def connect(running, body):
    """Send a request, and read nothing."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", running.port))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    )
    return connection


def test_a_full_queue_refuses_at_once(release, engine):
    with serving(release, lambda _: engine, queue=2) as running, slowed(engine, 0.05):
        waiting = [connect(running, LONG) for _ in range(5)]
        wait_for(lambda: running.service.gauges().running == 3 and running.service.served == 5)
        with running.client() as client:
            began = time.monotonic()
            response = client.post("/v1/completions", json=SHORT)
            assert time.monotonic() - began < 2
            page = client.get("/metrics").text
            assert client.get("/slots?fail_on_no_slot=1").status_code == 503
            assert client.get("/slots").status_code == 200
            assert client.get("/load").json() == {"server_load": 5}
            assert client.get("/health").status_code == 200
        for each in waiting:
            each.close()

        assert response.status_code == 429
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert 'vllm:admission_rejections_total{engine="0",model_name="miniature",' in page
        wait_for(lambda: is_empty(running))


def test_requests_take_turns_whatever_they_ask_for(release, engine):
    with serving(release, lambda _: engine) as running, slowed(engine):
        many = connect(running, {**LONG, "n": 60, "max_tokens": 3})
        wait_for(lambda: running.service.gauges().waiting >= 50)
        with running.client() as client:
            response = client.post("/v1/completions", json=SHORT)
        still = running.service.gauges().waiting
        many.close()

        assert response.status_code == 200
        assert still > 30


def test_a_long_silence_is_broken_by_comments(release, engine):
    with (
        serving(release, lambda _: engine, ping_s=0.1) as running,
        slowed(engine, 0.3),
        running.client() as client,
    ):
        others = [connect(running, LONG) for _ in range(3)]
        wait_for(lambda: running.service.gauges().running == 3)
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            seen = [line for _, line in zip(range(8), lines, strict=False) if line]
        for each in others:
            each.close()

    assert seen[0] == ": queued"
    assert ": queued 3" not in seen  # the others have slots
    assert ": queued 0" in seen


def test_a_request_that_takes_too_long_ends_with_an_error(release, engine):
    with (
        serving(release, lambda _: engine, request_s=0.3) as running,
        slowed(engine, 0.1),
        running.client() as client,
    ):
        whole = client.post("/v1/completions", json=LONG)
        stream = client.post("/v1/completions", json={**LONG, "stream": True})
        wait_for(lambda: is_empty(running))

    assert whole.status_code == 503
    assert whole.json()["error"]["code"] == "timeout"
    assert whole.headers["x-should-retry"] == "false"
    *_, error, done = events_of(stream.text)
    assert error["error"]["code"] == "timeout"
    assert done == "[DONE]"


def test_a_server_that_drains_finishes_what_runs(release, engine):
    answers = []
    with serving(release, lambda _: engine) as running, slowed(engine):
        body = {**LONG, "max_tokens": 20}

        def ask():
            answers.append(httpx.post(f"{running.url}/v1/completions", json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_for(lambda: running.service.gauges().running == 3 and running.service.served == 5)

        running.on_loop(running.server.stop)

        for thread in threads:
            thread.join(60)
        running.thread.join(30)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", running.port))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200, 200, 200, 503, 503]
    refused = [answer.json()["error"]["code"] for answer in answers if answer.status_code == 503]
    assert refused == ["shutting_down"] * 2
    (end,) = running.ends
    assert (end.cut_off, end.failure, end.is_engine_idle) == (0, None, True)


@pytest.mark.parametrize("how", ["patience", "second"])
def test_what_does_not_end_is_cut_off(release, engine, how):
    patience = ServerOptions(drain_s=0.2 if how == "patience" else 60)
    with serving(release, lambda _: engine, server_options=patience) as running, slowed(engine):
        with running.client() as client:
            body = {**LONG, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as stream:
                wait_for(lambda: running.service.gauges().running == 1)
                running.on_loop(running.server.stop)
                if how == "second":
                    running.on_loop(running.server.stop)
                text = "".join(stream.iter_text())
        running.thread.join(30)

    *_, error, done = events_of(text)
    assert error["error"]["code"] == "shutting_down"
    assert done == "[DONE]"
    (end,) = running.ends
    assert end.cut_off == 1


def test_a_step_that_fails_ends_its_requests_and_not_the_server(release, engine, monkeypatch):
    with serving(release, lambda _: engine) as running, running.client() as client:
        real = engine.runner.decode

        def fail(*_):
            raise corrupt("logits", Reason.MALFORMED, "not finite")

        monkeypatch.setattr(engine.runner, "decode", fail)
        first = client.post("/v1/completions", json=LONG)
        health = client.get("/health").status_code
        second = client.post("/v1/completions", json={**LONG, "stream": True})
        unhealthy = client.get("/health")
        monkeypatch.setattr(engine.runner, "decode", real)
        after = client.post("/v1/completions", json=SHORT | {"max_tokens": 3})

        assert first.status_code == 500
        assert first.headers["x-should-retry"] == "false"
        assert "logits" not in first.text
        assert [str(error) for _, error in running.bugs] == ["logits: malformed, not finite"] * 2
        assert running.bugs[0][0] in first.text  # so that it is found in the log
        assert health == 200
        *_, error, _ = events_of(second.text)
        assert error["error"]["type"] == "server_error"
        assert unhealthy.status_code == 503
        assert after.status_code == 200
        assert client.get("/health").status_code == 200


def test_a_lost_rank_ends_everything(release, engine, monkeypatch):
    with serving(release, lambda _: engine) as running, running.client() as client:

        def fail(*_):
            raise PeerError("rank 1 was lost")

        monkeypatch.setattr(engine.runner, "decode", fail)
        response = client.post("/v1/completions", json={**LONG, "stream": True})
        running.thread.join(20)

    *_, error, done = events_of(response.text)
    assert error["error"]["type"] in {"server_error", "unavailable_error"}
    assert done == "[DONE]"
    (end,) = running.ends
    assert end.failure.exit_code == 50


def test_a_turn_that_does_not_end_is_no_health(release, engine):
    with (
        serving(release, lambda _: engine, stall_s=0.05) as running,
        slowed(engine, 0.5),
        running.client() as client,
    ):
        busy = connect(running, SHORT)
        wait_for(lambda: client.get("/health").status_code == 503)
        wait_for(lambda: client.get("/health").status_code == 200)
        busy.close()


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(Exception, match=f"port {port} of 127.0.0.1 is taken by .*") as caught:
            bound(ServerOptions(port=port))

    assert caught.value.hint == f"--port {port + 1}"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a" * 300])
def test_an_address_of_another_machine_is_refused(host):
    with pytest.raises(Exception, match=r"host .*: expected an address of this machine"):
        bound(ServerOptions(host=host, port=0))


def test_a_request_has_its_time_to_come(release, engine, monkeypatch):
    monkeypatch.setattr(GuardedProtocol, "receive_s", 0.3)
    with serving(release, lambda _: engine) as running:
        place = ("127.0.0.1", running.port)
        with socket.create_connection(place) as silent, socket.create_connection(place) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            slow.sendall(b"Content-Length: 99\r\nContent-Type: application/json\r\n\r\n{")
            for each in (silent, slow):
                each.settimeout(10)
            assert silent.recv(100) == b""  # closed
            rest = slow.recv(1000)
            assert rest == b"" or rest.startswith(b"HTTP/1.1 408")
        with socket.create_connection(place) as again:  # the second request, too
            again.settimeout(4)  # uvicorn alone would wait for ever
            again.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):
                received += again.recv(1000)
            assert received.startswith(b"HTTP/1.1 200")
            again.sendall(b"GET /version HTTP/1.1\r\n")
            assert again.recv(1000) == b""

        with running.client() as client:  # a request that has come may take longer
            for _ in range(2):
                assert client.get("/health").status_code == 200


def test_idle_connections_keep_nobody_out(release, engine, monkeypatch):
    monkeypatch.setattr(GuardedProtocol, "most", 3)
    with serving(release, lambda _: engine) as running:
        held = []
        for _ in range(3):
            held.append(socket.create_connection(("127.0.0.1", running.port)))
            wait_for(lambda: len(running.server._uvicorn.server_state.connections) == len(held))
        with running.client() as client:
            assert client.get("/health").status_code == 200
        held[0].settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert held[0].recv(100) == b""  # the one that was idle longest
        held[2].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert held[2].recv(100).startswith(b"HTTP/1.1 200 ")
        for each in held:
            each.close()


def test_requests_under_way_have_a_limit_and_probes_none(release, engine, monkeypatch):
    monkeypatch.setattr(GuardedProtocol, "most", 4)
    with serving(release, lambda _: engine, requests=2) as running, slowed(engine):
        held = [connect(running, LONG) for _ in range(2)]
        wait_for(lambda: running.service.served == 2)
        with running.client() as client:
            refused = client.post("/v1/completions", json=SHORT)
            assert client.get("/health").status_code == 200
        held += [connect(running, SHORT) for _ in range(2)]  # these wait for an answer, idle then
        with socket.create_connection(("127.0.0.1", running.port)) as another:
            another.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            another.settimeout(10)
            assert another.recv(100).startswith(b"HTTP/1.1 200 ")
        for each in held:
            each.close()

    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "too_many"


def test_a_client_that_reads_nothing_is_left(release, engine, monkeypatch):
    monkeypatch.setattr(GuardedProtocol, "take_s", 0.5)
    body = {"prompt": [[300] * 16] * 40, "max_tokens": 0, "echo": True, "logprobs": 20}
    with serving(release, lambda _: engine) as running:
        (listener,) = running.server._uvicorn.servers[0].sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of what it accepts, too
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", running.port))
        content = json.dumps(body).encode()
        deaf.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
        )
        connections = running.server._uvicorn.server_state.connections
        wait_for(lambda: running.log)  # it was answered, as far as the server knows
        wait_for(lambda: not connections)
        deaf.close()


@pytest.mark.parametrize(
    "sent",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000],
)
def test_what_is_no_http_gets_json(running, sent):
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(10)
        with contextlib.suppress(OSError):
            connection.sendall(sent)
        received = connection.recv(5000)

    assert received.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    assert b'{"error":{"message":' in received
