"""`grokctl serve`: one line when it is ready, answers like `run`, and an end by a signal."""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from types import SimpleNamespace

import httpx
import psutil
import pytest
from places import PROJECT
from served import MODEL, server

from grokctl.errors import UsageError
from grokctl.serve import read_key

EMPTY = PROJECT / "grokctl" / "cluster" / "__init__.py"
BODY = {"prompt": "the sea", "max_tokens": 6, "temperature": 0.8, "seed": 4}


@pytest.fixture(scope="module")
def answered(process, home, tmp_path_factory):
    """One server with a key, a certificate and a warm-up: what it answered, and how it ended."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "key").write_text("sk-1234\n")
    options = ["--api-key-file", folder / "key", "--slots", 1, "--context", 16]
    verify = True
    if shutil.which("openssl") is not None:
        certify(folder)
        options += ["--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem"]
        verify = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    given = {"authorization": "Bearer sk-1234"}
    env = {"GROKCTL_API_KEY": "another"}
    found = SimpleNamespace(is_encrypted=verify is not True)
    with server(process, home, *options, env=env, warms_up=True) as started:
        found.ready = started.ready
        with httpx.Client(base_url=started.ready["url"], verify=verify, timeout=60) as client:
            found.health = client.get("/health").json()
            found.without_key = client.get("/v1/models").status_code
            found.with_key = client.get("/v1/models", headers=given).status_code
            found.answer = client.post("/v1/completions", json=BODY, headers=given).json()
            if found.is_encrypted:
                with pytest.raises(httpx.HTTPError):
                    httpx.get(started.ready["url"].replace("https:", "http:") + "/health")
        started.send_signal(signal.SIGTERM)
        found.exit_code = started.wait(30)
        found.rest = started.stdout.read()
    found.errors = started.errors
    return found


def certify(folder):
    """Write `cert.pem` and `key.pem` for 127.0.0.1."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem"]
    names = ["-out", "cert.pem", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names], cwd=folder, check=True, capture_output=True)


def test_a_server_answers_as_run_does_and_drains(answered, grokctl, home):
    flags = ("--compute", "float32", "--temperature", 0.8, "--top-p", 1, "--seed", 4, "-n", 6)
    flags += ("--context", 16)
    expected = grokctl("run", "words", "--home", home, "-p", "the sea", *flags, "--json").result

    values = answered.ready
    assert answered.answer["choices"][0]["text"] == expected["text"]
    assert answered.exit_code == 0
    assert answered.rest == ""  # one object only
    assert {"url", "model", "slots", "context"} <= values.keys()
    assert (values["model"], values["slots"], values["context"]) == ("words", 1, 16)
    assert values["is_local"] is True
    assert values["compile_s"] > 0  # before anybody has asked for anything


def test_a_log_has_answers_and_no_texts(answered):
    events = [json.loads(line) for line in answered.errors]
    found = [event for event in events if event["event"] == "answered"]
    (line,) = [event for event in found if event["route"] == "/v1/completions"]
    assert (line["status"], line["tokens"]) == (200, 6)
    assert {event["stage"] for event in events if event["event"] == "started"} >= {"load", "serve"}
    assert "the sea" not in "".join(answered.errors)
    assert "sk-1234" not in "".join(answered.errors)


def test_a_key_of_a_file_is_needed(answered):
    assert answered.ready["has_key"] is True
    assert (answered.without_key, answered.with_key) == (401, 200)


def test_a_certificate_encrypts(answered):
    if not answered.is_encrypted:
        pytest.skip("no openssl here")
    assert answered.ready["url"].startswith("https://")
    assert answered.health == {"status": "ok"}


@pytest.mark.parametrize(("value", "key"), [("sk-1234", "sk-1234"), (" a\n", "a"), (None, None)])
def test_a_key_may_be_in_a_variable(value, key):
    assert read_key(None, value) == key


@pytest.mark.parametrize("value", ["", "  ", "two words", "é", "a\0b"])
def test_a_variable_without_a_key_is_refused(value):
    with pytest.raises(UsageError, match="GROKCTL_API_KEY: expected a key"):
        read_key(None, value)


def test_streams_are_cut_off_by_a_second_signal(process, home):
    slow = 'patch("inference.scheduler:Scheduler.turn", delayed(0.5))'
    size = ("--slots", 1, "--context", 16)  # whose programs are there
    with server(process, home, *size, code=slow) as started:
        assert started.ready["compile_s"] == 0  # --no-warm-up
        assert started.ready["has_key"] is False
        assert started.ready["slots"] == 1
        url = f"{started.ready['url']}/v1/completions"
        body = {"prompt": "a", "max_tokens": 15, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            while not next(lines).startswith("data: "):
                pass
            started.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            started.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert started.wait(30) == 130

    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert rest[-1] == "data: [DONE]"


def test_a_signal_while_loading_ends_it(process, home):
    slow = 'patch("infer:start", delayed(30))\npatch("session.job:start", delayed(30))'
    arguments = ("serve", *MODEL, "--home", home, "--port", 0)
    with process.start(*arguments, code=slow) as started:
        process.await_that(lambda: is_loading(started.pid))
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0
        assert time.monotonic() - began < 15


def is_loading(pid):
    """Whether a server answers that it loads."""
    for each in psutil.Process(pid).net_connections():
        if each.status == psutil.CONN_LISTEN:
            with contextlib.suppress(httpx.HTTPError):
                response = httpx.get(f"http://127.0.0.1:{each.laddr.port}/health", timeout=30)
                return response.json()["error"]["code"] == "loading"
    return False


def test_a_checkpoint_that_is_damaged_ends_it_with_its_code(grokctl, home, tmp_path):
    root = shutil.copytree(home / "releases" / "words", tmp_path / "words")
    (root / "ckpt-0" / "tensor00003_000").write_bytes(b"")
    outcome = grokctl("serve", root, "--home", tmp_path, "--port", 0)

    assert outcome.exit_code == 20
    assert "tensor00003_000" in outcome.error


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: other machines reach it", "--api-key-file FILE"),
        (("--host", "192.0.2.7"), "--host '192.0.2.7': expected an address of this", "127.0.0.1"),
        (("--port", 70000), "--port: expected", ""),
        (("--tls-cert", "a.pem"), "--tls-cert, --tls-key: expected both or neither", ""),
        (("--tls-cert", "a.pem", "--tls-key", "b.pem"), "--tls-cert a.pem: No such file", ""),
        (("--no-auth", "--api-key-file", "x"), "expected only one of them", ""),
        (("--api-key-file", "/nonexistent"), "/nonexistent: No such file", ""),
        (("--api-key-file", EMPTY), "__init__.py: expected a key", "openssl rand"),
        (("--slots", 0), "--slots: expected at least 1", ""),
        (("--context", 9999), "--context 9999: expected 1 to 64", ""),
    ],
)
def test_options_that_cannot_be_are_refused(grokctl, home, options, words, hint):
    outcome = grokctl("serve", "words", "--home", home, "--port", 0, *options)

    assert outcome.exit_code == 2
    assert words in outcome.error
    assert hint in (outcome.hint or "")


def test_a_taken_port_is_named_before_anything_is_loaded(grokctl, home):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = grokctl("serve", "words", "--home", home, "--port", port)

    assert outcome.exit_code == 2
    assert outcome.error.startswith(f"port {port} of 127.0.0.1 is taken by ")
    assert outcome.error.endswith(f" ({os.getpid()})")
    assert outcome.hint == f"grokctl serve words --home {home} --port {port + 1}"
    assert "load" not in outcome.stderr
