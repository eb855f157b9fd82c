"""TLS: requests as without it, and handshakes that never end keep nobody out."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import time

import httpx
import pytest
from serving import events_of, serving

from grokctl.serving.connections import GuardedProtocol
from grokctl.serving.server import ServerOptions

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "key.pem", "-out", "cert.pem"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@contextlib.contextmanager
def encrypted(release, engine, files):
    certificate, private_key = files
    options = ServerOptions(certificate=certificate, private_key=private_key)
    with serving(release, lambda _: engine, server_options=options) as running:
        running.trust = ssl.create_default_context(cafile=str(certificate))
        running.connections = running.server._uvicorn.server_state.connections
        yield running


def client(running):
    url = running.url.replace("http:", "https:")
    return httpx.Client(base_url=url, verify=running.trust, timeout=60, trust_env=False)


def connect(running):
    connection = socket.create_connection(("127.0.0.1", running.port))
    connection.settimeout(10)
    return connection


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_requests_are_answered_as_without_it(release, engine, files):
    body = {"prompt": "the sea", "max_tokens": 6, "temperature": 0, "seed": 4}
    with serving(release, lambda _: engine) as running, running.client() as plain:
        expected = plain.post("/v1/completions", json=body).json()["choices"]
    with encrypted(release, engine, files) as running, client(running) as secret:
        whole = secret.post("/v1/completions", json=body)
        stream = secret.post("/v1/completions", json={**body, "stream": True})
        long = secret.post("/tokenize", json={"prompt": "the sea " * 20_000})

    assert whole.json()["choices"] == expected
    text = "".join(event["choices"][0]["text"] for event in events_of(stream.text)[:-1])
    assert text == expected[0]["text"]
    assert long.json()["count"] > 20_000


def test_a_request_may_come_with_the_end_of_the_handshake(release, engine, files):
    with encrypted(release, engine, files) as running, connect(running) as connection:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        mine = running.trust.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        while True:
            try:
                mine.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65536))
        mine.write(HEALTH)

        connection.sendall(outgoing.read())  # both at once

        answer = b""
        while not answer.endswith(b"}"):
            incoming.write(connection.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                while part := mine.read(65536):
                    answer += part
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_handshakes_that_never_end_keep_nobody_out(release, engine, files, monkeypatch):
    monkeypatch.setattr(GuardedProtocol, "most", 3)
    with encrypted(release, engine, files) as running:
        held = []
        for _ in range(3):
            held.append(connect(running))
            wait_for(lambda: len(running.connections) == len(held))
        with client(running) as secret:
            assert secret.get("/health").status_code == 200
        assert held[0].recv(100) == b""  # it waited longest
        assert len(running.connections) <= 3
        for each in held:
            each.close()
        wait_for(lambda: not running.connections)


def test_a_handshake_has_its_time(release, engine, files, monkeypatch):
    monkeypatch.setattr(GuardedProtocol, "receive_s", 0.3)
    with encrypted(release, engine, files) as running, connect(running) as silent:
        assert silent.recv(100) == b""
        wait_for(lambda: not running.connections)
        with connect(running) as plain:
            plain.sendall(HEALTH)
            assert b"HTTP/1.1" not in plain.recv(1000)
        wait_for(lambda: not running.connections)
        assert running.thread.is_alive()
