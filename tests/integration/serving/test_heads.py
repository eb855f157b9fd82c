"""Heads that are too long, or that a proxy may read in another way, are refused and closed."""

import socket

import pytest

from grokctl.serving.heads import MOST_NBYTES

SECOND = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""Bytes behind a body that may be a body themselves, for somebody else."""
POST = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
LENGTH, CHUNKED = b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"


def received(running, sent):
    """Everything that is answered, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(10)
        connection.sendall(sent)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    "head",
    [
        POST + LENGTH + CHUNKED,
        POST + CHUNKED + LENGTH,
        POST + b"transfer-ENCODING: Chunked\r\n" + b"content-LENGTH: 0\r\n",
        POST.replace(b"1.1", b"1.0") + CHUNKED,
        POST + LENGTH + b"Content-Length: 6\r\n",
        POST + b"Content-Length: +5\r\n",
        POST + b"Content-Length: 0x5\r\n",
        POST + CHUNKED + CHUNKED,
        POST + b"Transfer-Encoding: gzip, chunked\r\n",
        POST + b"Transfer-Encoding : chunked\r\n",
        POST + b"Host: evil.example\r\n",
        POST + b"A: \0\r\n",
        POST.replace(b"HTTP/1.1", b"HTTP/2.0"),
    ],
)
def test_a_head_with_two_readings_is_refused_and_ends_its_connection(running, head):
    answer = received(running, head + b"\r\n0\r\n\r\n" + SECOND)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1  # nothing of its body is a request
    assert b'{"error":{"message":' in answer


@pytest.mark.parametrize("body", [LENGTH + b"\r\n{}   ", CHUNKED + b"\r\n2\r\n{}\r\n0\r\n\r\n"])
def test_a_clear_end_of_a_body_is_the_beginning_of_the_next_request(running, body):
    last = SECOND.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    answer = received(running, POST + b"Content-Type: application/json\r\n" + body + last)

    assert answer.startswith(b"HTTP/1.1 400 ")  # there is no text in it
    assert answer.count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET /version HTTP/1.1\r\nHost: localhost\r\nA: %b\r\n",
        b"GET /version?%b HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /%b HTTP/1.1\r\nHost: localhost\r\n",
    ],
)
def test_a_long_head_is_refused_also_if_it_comes_at_once(running, head):
    assert received(running, head % (b"a" * MOST_NBYTES) + b"\r\n").startswith(b"HTTP/1.1 431 ")
    most = MOST_NBYTES - 200

    answer = received(running, head % (b"a" * most) + b"Connection: close\r\n\r\n")

    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 404 "))


@pytest.mark.parametrize(
    "extra",
    [b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"Upgrade: h2c\r\nConnection: upgrade\r\n"],
)
def test_another_protocol_is_not_offered(running, extra):
    closing = SECOND.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    answer = received(running, SECOND[:-2] + extra + b"\r\n" + closing)

    assert answer.count(b"HTTP/1.1 200 ") == 2


def test_a_body_in_the_smallest_of_chunks_is_refused_and_ends_its_connection(running):
    head = POST + b"Content-Type: application/json\r\n" + CHUNKED + b"\r\n"
    few = b"1\r\n \r\n" * 1000 + b"2\r\n{}\r\n0\r\n\r\n"
    large = b"200\r\n%b\r\n" % (b" " * 512) * 2000 + b"2\r\n{}\r\n0\r\n\r\n"
    last = SECOND.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    for body in (few, large):
        assert received(running, head + body + last).count(b"HTTP/1.1 200 ") == 1
    refused = received(running, head + b"1\r\n \r\n" * 1100)
    assert refused.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("request_line", [b"CONNECT localhost:80", b"TRACE /version", b"GET *"])
def test_methods_for_proxies_are_answered(running, request_line):
    head = b"%b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % request_line

    assert received(running, head).startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 405 "))
