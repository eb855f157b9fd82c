"""The roll call among strangers, where rank 0 listens, and the tunnel of JAX's service."""

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from slurm import free_ports

from grokctl.cluster.channel import Channel, Keys
from grokctl.cluster.handshake import Purpose, hello, keys_of, proof_line
from grokctl.cluster.launcher import Launch
from grokctl.cluster.rendezvous import listen, meet
from grokctl.cluster.tunnel import Tunnel
from grokctl.errors import PeerError

SECRET, OTHER = b"s" * 32, b"o" * 32
SLACK_S = 15


def launch(rank, port, *, count=2, host="127.0.0.1"):
    return Launch(host=host, port=port, count=count, rank=rank)


def come(rank, port, secret, notes, *, count=2, within_s=SLACK_S):
    """The error of a process that meets others; nothing if it may go on."""
    try:
        met = meet(launch(rank, port, count=count), secret, within_s=within_s, note=notes.append)
    except PeerError as error:
        return str(error)
    for channel in met.services + met.orders:
        channel.close()
    return ""


def connect(port) -> socket.socket:
    until = time.monotonic() + SLACK_S
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=SLACK_S)
        assert time.monotonic() < until
        time.sleep(0.01)


def try_to_sit(port, secret, *, rank=1, count=2) -> bytes:
    """What rank 0 says to somebody who says all the right words, with a secret of his own."""
    with connect(port) as connection:
        line = hello(Purpose.SERVICE, launch(rank, port, count=count), secret, "0" * 16)
        connection.sendall(line)
        answer = connection.recv(1000)
        keys = keys_of(secret, line, answer) or Keys(b"guessed")
        connection.sendall(proof_line(keys))
        with suppress(ConnectionResetError):
            return connection.recv(1000)
    return b""


def test_strangers_take_no_seat_and_end_no_run_and_are_named_by_their_address_alone():
    port, notes = free_ports(1)[0], []

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(come, 0, port, SECRET, notes)
        assert try_to_sit(port, OTHER) == b""
        assert try_to_sit(port, OTHER, count=3) == b""
        for _ in range(9):
            assert try_to_sit(port, OTHER) == b""
        second = pool.submit(come, 1, port, SECRET, [])

        assert (first.result(), second.result()) == ("", "")

    assert notes == ["refused 127.0.0.1: it has not proven that it has the secret of this job"] * 3


def test_both_ends_say_that_their_secrets_differ():
    port, notes = free_ports(1)[0], []

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(come, 0, port, SECRET, notes, within_s=1)
        said = come(1, port, OTHER, [])

    assert said.endswith("(it has another job secret)")
    assert first.result() == f"rank 1: has not come to 127.0.0.1:{port} within 1 s"
    assert notes == ["refused 127.0.0.1: it has not proven that it has the secret of this job"]


def test_no_rank_joins_an_impostor_and_none_of_his_words_are_printed():
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        asking = pool.submit(come, 1, port, SECRET, [])
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"grokctl challenge %s 1 %s\n" % (b"0" * 32, b"0" * 64))
            said = asking.result()

    unreachable = f"rank 1: rank 0 cannot be reached at 127.0.0.1:{port}"
    assert said == f"{unreachable} (it has another job secret)"


def test_as_many_strangers_as_there_are_places_keep_no_rank_away():
    port = free_ports(1)[0]

    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        first = pool.submit(come, 0, port, SECRET, [])
        for _ in range(60):
            stack.enter_context(closing(connect(port)))
        second = pool.submit(come, 1, port, SECRET, [])

        assert (first.result(), second.result()) == ("", "")


def test_after_all_have_come_nothing_listens():
    port = free_ports(1)[0]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(come, 0, port, None, [])
        assert come(1, port, None, []) == ""
        assert first.result() == ""

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


# --- where rank 0 listens


@pytest.mark.parametrize(
    ("host", "found", "at", "said"),
    [
        pytest.param("127.0.0.1", ["127.0.0.1"], {"127.0.0.1"}, None, id="address"),
        pytest.param("localhost", ["127.0.0.1"], {"127.0.0.1"}, None, id="localhost"),
        pytest.param("node1", ["127.0.1.1"], {"::", "0.0.0.0"}, "only a loopback", id="loopback"),
        pytest.param("node1", ["192.0.2.1"], {"::", "0.0.0.0"}, "no address", id="router"),
        pytest.param("node1", [], {"::", "0.0.0.0"}, "no address", id="unknown"),
        pytest.param("192.0.2.1", ["192.0.2.1"], {"::", "0.0.0.0"}, "no address", id="foreign"),
    ],
)
def test_rank_0_listens_at_its_own_address_or_says_why_at_all(monkeypatch, host, found, at, said):
    port, notes = free_ports(1)[0], []

    def resolve(*_arguments, **_options):
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    listeners = listen(launch(0, port, host=host), notes.append)

    assert {listener.getsockname()[0] for listener in listeners} <= at
    for listener in listeners:
        listener.close()
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


# --- the tunnel


def pair() -> tuple[Channel, Channel]:
    """Two ends of a connection that has been proven."""
    keys = Keys(b"k" * 32)
    left, right = socket.socketpair()
    return (
        Channel(left, rank=1, sending=keys.of_head, receiving=keys.of_other),
        Channel(right, rank=0, sending=keys.of_other, receiving=keys.of_head),
    )


def test_a_service_in_a_folder_of_its_own_is_reached_from_another_process_and_by_no_network():
    near, far = pair()
    head, other = Tunnel(0, (near,), within_s=SLACK_S), Tunnel(1, (far,), within_s=SLACK_S)
    path, door = (each.address.removeprefix("unix:") for each in (head, other))
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    data = os.urandom(3 * 2**20)

    with socket.socket(socket.AF_UNIX) as service, socket.socket(socket.AF_UNIX) as client:
        client.connect(door)  # before the service is there
        service.bind(path)
        service.listen()
        served, _ = service.accept()
        for each in (head, other):
            each.close_door()
        with served, ThreadPoolExecutor(1) as pool:
            sending = pool.submit(client.sendall, data)
            came = b""
            while len(came) < len(data):
                came += served.recv(2**16)
            sending.result()
            assert came == data
            served.sendall(b"answer")
            assert client.recv(100) == b"answer"
        assert client.recv(100) == b""
    assert not Path(path).parent.exists()
    assert not Path(door).parent.exists()


def test_bytes_that_were_altered_on_the_way_reach_no_service():
    near, far = pair()
    head = Tunnel(0, (near,), within_s=SLACK_S)
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(head.address.removeprefix("unix:"))
        service.listen()
        served, _ = service.accept()
        head.close_door()
        with served:
            far.send(b"right")
            assert served.recv(100) == b"right"
            far.connection.sendall(b"\0\0\0\5wrong" + bytes(32))
            assert served.recv(100) == b""
    far.close()


def test_a_temporary_folder_with_a_long_path_is_no_obstacle(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    tunnel = Tunnel(0, (), within_s=0)

    assert not list(long.iterdir())
    tunnel.close_door()


def test_a_socket_lies_where_others_cannot_rename_its_folder(monkeypatch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    tunnel = Tunnel(0, (), within_s=0)

    assert not list(tmp_path.iterdir())
    assert not Path(tunnel.address.removeprefix("unix:")).is_relative_to(tmp_path)
    tunnel.close_door()


def test_a_disk_without_sockets_is_no_obstacle_and_named_if_there_is_no_other(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bind = socket.socket.bind

    def refuse(self, address):
        if str(address).startswith(str(refused)):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", refuse)
    refused = tmp_path
    tunnel = Tunnel(0, (), within_s=0)
    assert not tunnel.address.startswith(f"unix:{tmp_path}")
    tunnel.close_door()

    refused = "/"
    message = f"{tmp_path}/grokctl-.*: no place for a socket .Operation not permitted.$"
    with pytest.raises(PeerError, match=message):
        Tunnel(1, (), within_s=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_the_one_that_was_made_is_no_way(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tunnel = Tunnel(0, (), within_s=0)
    tunnel.require_own()
    folder = Path(tunnel.address.removeprefix("unix:")).parent
    folder.rename(tmp_path / "away")
    folder.mkdir()

    with pytest.raises(PeerError, match="was replaced by somebody"):
        tunnel.require_own()

    tunnel.close_door()
    assert folder.is_dir()


# --- three hosts


PROCESS = """
import json, sys
from grokctl.cluster.launcher import Launch
from grokctl.cluster.rendezvous import meet
from grokctl.errors import PeerError
rank, port, secret = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
notes, error = [], ""
try:
    met = meet(Launch(host="10.78.1.1", port=port, count=2, rank=rank), secret, within_s=20,
               note=notes.append)
    if rank == 0:
        met.orders[0].send(b"order")
    else:
        assert met.orders[0].receive() == b"order"
except PeerError as failure:
    error = str(failure)
print(json.dumps([notes, error]))
"""
STRANGER = """
import socket, sys
port = int(sys.argv[1])
for host, count in (("10.78.2.1", 2), ("10.78.1.1", 2), ("10.78.1.1", 3)):
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            line = f"grokctl hello service 1 of {count} {'0' * 16} {'0' * 32} 1\\n"
            connection.sendall(line.encode())
            connection.recv(1000)
            connection.sendall(b"grokctl proof " + b"0" * 64 + b"\\n")
            print(connection.recv(1000))
    except OSError as error:
        print(error.strerror)
"""


@pytest.fixture
def hosts():
    """Names of three network namespaces: two hosts, and one whose only way is to the first."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    names = [f"grokctl-{os.getpid()}-{number}" for number in range(3)]

    def ip(*words):
        done = subprocess.run(["ip", *map(str, words)], check=False, capture_output=True)
        if done.returncode:
            pytest.skip(f"no namespaces here: {done.stderr.decode(errors='replace')}")

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for number in (1, 2):
            ends = [f"grokctl{os.getpid() % 10**5}{end}" for end in (2 * number, 2 * number + 1)]
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for end, name, last in zip(ends, (names[0], names[number]), (1, 2), strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "address", "add", f"10.78.{number}.{last}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
        ip("-n", names[2], "route", "add", "10.78.1.0/24", "via", "10.78.2.1")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_hosts_meet_while_a_stranger_on_a_third_can_do_nothing(hosts):
    port = 61500

    def start(host, code, *arguments):
        command = ["ip", "netns", "exec", host, sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first = start(hosts[0], PROCESS, 0, port, "s" * 32)
    until = time.monotonic() + SLACK_S
    listening = ["ip", "netns", "exec", hosts[0], "cat", "/proc/net/tcp"]
    # in state 10, at 10.78.1.1 and nowhere else
    while "01014E0A:F03C 00000000:0000 0A" not in (
        table := subprocess.run(listening, check=True, capture_output=True, text=True).stdout
    ):
        assert time.monotonic() < until, table
        time.sleep(0.05)
    stranger, _ = start(hosts[2], STRANGER, port).communicate(timeout=SLACK_S)
    second = start(hosts[1], PROCESS, 1, port, "s" * 32)

    notes, error = json.loads(first.communicate(timeout=SLACK_S)[0])
    assert json.loads(second.communicate(timeout=SLACK_S)[0]) == [[], ""]
    assert error == ""
    assert stranger.splitlines() == ["Connection refused", "b''", "b''"]
    assert notes == ["refused 10.78.2.2: it has not proven that it has the secret of this job"] * 2
