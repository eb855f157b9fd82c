"""A server over two processes: rank 0 answers, a signal for both drains, a lost rank ends both."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
from slurm import free_ports

from grokctl.checkpoint.miniature import MINIATURE, write_miniature

WORDS = replace(MINIATURE, num_layers=1, vocab_size=512, emb_size=64, key_size=8, sequence_len=64)
BODY = {"prompt": "the sea", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("serving") / "home"
    write_miniature(root / "releases" / "words", WORDS)
    return root


@contextlib.contextmanager
def pair(home):
    """Two processes that serve, once rank 0 is ready: with its URL, and what each has said."""
    (port,) = free_ports(1)
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    environment |= {"JAX_NUM_CPU_DEVICES": "1", "GROKCTL_JOB_SECRET": secrets.token_hex(16)}
    command = [sys.executable, "-m", "grokctl", "serve", "words", "--home", str(home)]
    command += [
        "--port",
        "0",
        "--compute",
        "float32",
        "--slots",
        "1",
        "--context",
        "16",
        "--json",
        "--no-warm-up",
    ]
    command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    command += ["--cluster-timeout", "60", "--mesh", "expert=2,model=1"]
    ranks = [
        subprocess.Popen(
            [*command, "--process-id", str(rank)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [[], []]
    readers = [
        threading.Thread(target=lines.extend, args=(process.stderr,))
        for lines, process in zip(said, ranks, strict=True)
    ]
    for reader in readers:
        reader.start()
    try:
        line = ranks[0].stdout.readline()
        assert line, said
        yield json.loads(line)["url"], ranks, said
    finally:
        for process, reader in zip(ranks, readers, strict=True):
            process.kill()
            process.wait(30)
            reader.join(30)
            process.stdout.close()
            process.stderr.close()


def test_a_signal_for_all_ranks_lets_rank_0_finish(home):
    with pair(home) as (url, ranks, said):
        answer = httpx.post(f"{url}/v1/completions", json=BODY | {"max_tokens": 1}, timeout=120)
        for process in reversed(ranks):
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(90) for process in ranks]

    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 1
    assert codes == [0, 0], said
    assert ranks[1].stdout.closed


def test_a_lost_rank_ends_streams_with_an_error_and_the_server_with_50(home):
    with pair(home) as (url, ranks, said):
        body = {**BODY, "max_tokens": 10, "n": 128, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as stream:
            lines = stream.iter_lines()
            while not next(lines).startswith("data: "):
                pass
            ranks[1].kill()
            rest = [line for line in lines if line.startswith("data: ")]
        code = ranks[0].wait(90)

    assert code == 50, said
    assert len(rest) > 1, (rest, said)
    assert "error" in json.loads(rest[-2].removeprefix("data: "))
    assert rest[-1] == "data: [DONE]"
    assert any("rank 1 was lost" in line for line in said[0])


@pytest.mark.slow
def test_a_lost_rank_ends_an_idle_server_with_50(home):
    with pair(home) as (url, ranks, said):
        assert httpx.get(f"{url}/health").status_code == 200
        ranks[1].kill()
        began = time.monotonic()
        code = ranks[0].wait(90)

    assert code == 50, said
    assert time.monotonic() - began < 60
    assert any("rank 1 was lost" in line for line in said[0])
