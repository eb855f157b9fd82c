"""How ranks notice that no order can reach them any more, and when they wait on."""

import socket
import sys
import time
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event

import pytest

from grokctl.cluster import ending as module
from grokctl.cluster.channel import Channel, Keys
from grokctl.cluster.ending import Ending
from grokctl.cluster.exchange import Exchange
from grokctl.cluster.heartbeat import Heartbeat
from grokctl.cluster.launcher import Launch
from grokctl.errors import PeerError

KEYS = Keys(b"base")
SILENT_S = 0.6


class Quick(Exchange):
    silent_s = SILENT_S


@contextmanager
def ranks():
    """Rank 0 and rank 1 of a run, and what each has lost."""
    head, other = socket.socketpair()
    with head, other:
        made = []
        for rank, connection in enumerate((head, other)):
            launch = Launch(host="127.0.0.1", port=61500, count=2, rank=rank)
            exchange = Quick(launch, bound_s=60, note=print)
            sending, receiving = (KEYS.of_head, KEYS.of_other)[:: 1 - 2 * rank]
            exchange._orders = (
                Channel(connection, rank=1 - rank, sending=sending, receiving=receiving),
            )
            made.append((exchange, SimpleQueue()))
        yield made


def test_ranks_that_say_nothing_for_long_are_not_lost():
    with ranks() as ((head, lost_by_head), (other, lost_by_other)):
        head.keep_in_touch(lost_by_head.put)
        other.keep_in_touch(lost_by_other.put)

        time.sleep(3 * SILENT_S)
        head.tell(b"an order")
        head.tell(b"")  # as a heartbeat
        head.release()

        assert (other.hear(), other.hear()) == (b"an order", None)
        assert lost_by_head.empty()
        assert lost_by_other.empty()


@pytest.mark.parametrize("deaf", [0, 1])
def test_a_silent_rank_is_named_within_the_bound(deaf):
    with ranks() as both:
        exchange, lost = both[deaf]
        began = time.monotonic()

        exchange.keep_in_touch(lost.put)

        assert lost.get(timeout=10) == f"rank {1 - deaf} was lost: nothing came from it for 1 s"
        assert SILENT_S <= time.monotonic() - began < 2 * SILENT_S


def test_a_rank_that_waits_for_an_order_of_a_silent_one_ends(monkeypatch):
    monkeypatch.setattr("grokctl.cluster.exchange.PATIENCE_S", 0)
    with ranks() as (_, (other, lost)):
        other.keep_in_touch(lost.put)

        with pytest.raises(PeerError, match="rank 0 was lost: nothing came from it for 1 s"):
            other.hear()


def test_a_closed_connection_ends_the_wait_for_an_order_and_nothing_else(monkeypatch):
    monkeypatch.setattr("grokctl.cluster.exchange.PATIENCE_S", 0)
    with ranks() as ((head, lost_by_head), (other, lost_by_other)):
        head.keep_in_touch(lost_by_head.put)
        other.keep_in_touch(lost_by_other.put)
        head._orders[0].close()

        # a sign of life that nobody read makes the system reset the connection
        ends = "it closed the connection|Connection reset by peer"
        with pytest.raises(PeerError, match=f"rank 0 was lost: ({ends})"):
            other.hear()
        assert lost_by_head.empty()
        assert lost_by_other.empty()


def test_a_false_message_ends_the_run_on_both_ends():
    for rank in range(2):
        with ranks() as both:
            both[1 - rank][0]._orders[0].connection.sendall(b"\0\0\0\1x" + b"0" * 32)
            exchange, lost = both[rank]
            exchange.keep_in_touch(lost.put)

            if rank:
                with pytest.raises(PeerError, match="it was altered"):
                    exchange.hear()
            else:
                assert "it was altered" in lost.get(timeout=10)


def test_what_came_while_no_thread_could_run_counts():
    class Starved:
        rank = 0
        left = 2

        def send(self, _):
            raise BrokenPipeError

        def receive(self, within_s):
            if not self.left:
                raise ConnectionResetError
            if within_s:
                time.sleep(SILENT_S)
                raise TimeoutError
            self.left -= 1
            return b"an order"

    heard, lost = SimpleQueue(), Event()
    beat = Heartbeat(Starved(), silent_s=SILENT_S, take=heard.put, lose=lambda _: lost.set())
    beat.start()

    assert [heard.get(timeout=10) for _ in range(2)] == [b"an order"] * 2
    assert not lost.is_set()


def test_a_process_without_another_rank_reports_it_once_and_tells_the_rest(monkeypatch):
    class Store(dict):
        key_value_set = dict.__setitem__

    monkeypatch.setattr(sys, "stderr", None)  # which it would replace
    codes, reports = [], []
    monkeypatch.setattr(module.interrupts, "leave", codes.append)
    launch = Launch(host="127.0.0.1", port=61500, count=2, rank=1)
    ending = Ending(launch, report=lambda error: reports.append(str(error)))
    ending._store = Store()

    ending.lose("rank 0 was lost: it is silent")
    ending.lose("rank 0 was lost: it is silent")

    assert codes == [50]
    assert reports == ["rank 0 was lost: it is silent"]
    assert ending._store["grokctl/failed"] == "rank 1: rank 0 was lost: it is silent"
