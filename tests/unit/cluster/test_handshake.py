"""The proof of a rank and of rank 0, and the messages after it, without a network."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.cluster.channel import LARGEST, FrameReader, frame
from grokctl.cluster.handshake import LONGEST, Purpose, Stranger, hello, keys_of, proof_line
from grokctl.cluster.launcher import Launch
from grokctl.errors import PeerError

SECRET, OTHER = b"s" * 32, b"o" * 32
PROCESS = "0123456789abcdef"
KEY = b"k" * 32


def greet(secret=SECRET, rank=1, count=4, theirs=SECRET):
    """A rank's hello, and rank 0's answer."""
    launch = Launch(host="here", port=1, count=count, rank=rank)
    line = hello(Purpose.ORDERS, launch, theirs, PROCESS)
    stranger = Stranger(secret)
    stranger.hear(line)
    return line, stranger


def answer(secret, line):
    other = Stranger(secret)
    other.hear(line)
    return other.reply


@pytest.mark.parametrize("secret", [SECRET, None], ids=["secret", "none"])
def test_who_has_the_secret_is_known_on_both_ends_with_the_same_keys(secret):
    line, stranger = greet(secret, theirs=secret)

    keys = keys_of(secret, line, stranger.reply)
    stranger.hear(proof_line(keys))

    assert stranger.is_proven
    assert not stranger.is_refused
    assert (stranger.rank, stranger.count, stranger.purpose) == (1, 4, Purpose.ORDERS)
    assert keys == stranger.keys
    assert keys.of_head != keys.of_other


def test_a_rank_joins_no_rank_0_with_another_secret():
    line, stranger = greet(OTHER)

    assert keys_of(SECRET, line, stranger.reply) is None


def test_rank_0_takes_nobody_with_another_secret():
    line, stranger = greet(SECRET, theirs=OTHER)
    guessed = keys_of(OTHER, line, answer(OTHER, line))

    stranger.hear(proof_line(guessed))

    assert (stranger.is_proven, stranger.is_refused, stranger.has_no_proof) == (False, True, True)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        pytest.param(SECRET, None, "rank 0 has one, rank 1 has none", id="rank"),
        pytest.param(None, SECRET, "rank 0 has none, rank 1 has one", id="rank-0"),
    ],
)
def test_a_secret_on_one_end_only_is_a_sentence_there_and_no_seat(ours, theirs, said):
    line, stranger = greet(ours, theirs=theirs)

    assert stranger.is_refused
    assert stranger.has_no_proof
    with pytest.raises(PeerError, match=said):
        keys_of(theirs, line, stranger.reply)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(b" 1 of 4 ", b" 2 of 4 ", id="rank"),
        pytest.param(b" 1 of 4 ", b" 1 of 8 ", id="count"),
        pytest.param(b" orders ", b" service ", id="purpose"),
        pytest.param(PROCESS.encode(), b"f" * 16, id="process"),
    ],
)
def test_a_hello_that_was_altered_on_the_way_proves_nothing(old, new):
    line, _ = greet()
    stranger = Stranger(SECRET)

    stranger.hear(line.replace(old, new))

    assert keys_of(SECRET, line, stranger.reply) is None


def test_a_proof_of_before_proves_nothing_again():
    line, before = greet()
    proof = proof_line(keys_of(SECRET, line, before.reply))
    later = Stranger(SECRET)

    later.hear(line)
    later.hear(proof)

    assert not later.is_proven


def test_what_rank_0_said_is_no_proof_of_another_rank():
    _, stranger = greet()

    stranger.hear(b"grokctl proof " + stranger.reply.split()[-1] + b"\n")

    assert not stranger.is_proven


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="closed"),
        pytest.param(b"GET / HTTP/1.1\r\n", id="web"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="grpc"),
        pytest.param(b"grokctl hello orders 4 of 4 %s %s 1\n", id="rank-too-large"),
        pytest.param(b"grokctl hello orders 0 of 4 %s %s 1\n", id="rank-0"),
        pytest.param(b"grokctl hello orders 1 of 0 %s %s 1\n", id="none"),
        pytest.param(b"grokctl hello orders 1 of 4 %s %s 1 \n", id="more"),
        pytest.param(b"grokctl hello other 1 of 4 %s %s 1\n", id="purpose"),
        pytest.param(b"grokctl hello orders \xd9\xa1 of 4 %s %s 1\n", id="digits"),
        pytest.param(b"grokctl hello orders 1" + b"1" * LONGEST, id="long"),
    ],
)
def test_what_is_no_hello_is_refused(said):
    stranger = Stranger(SECRET)

    stranger.hear(said % (b"0" * 16, b"0" * 32) if b"%s" in said else said)

    assert stranger.is_refused
    assert stranger.keys is None


def test_an_older_grokctl_is_told_so_in_its_own_words():
    stranger = Stranger(SECRET)

    stranger.hear(b"grokctl 1 of 2\n")

    assert stranger.is_refused
    assert stranger.reply == b"grokctl rank 0: has a newer grokctl\n"


@given(parts=st.lists(st.binary(min_size=1, max_size=90), max_size=5))
def test_a_stranger_costs_no_more_than_a_line_and_never_gets_a_seat(parts):
    stranger = Stranger(SECRET)
    for part in parts:
        if not stranger.is_refused:
            stranger.hear(part)

    assert not stranger.is_proven
    assert stranger.is_refused or len(stranger.came) <= LONGEST


# --- messages


@given(
    messages=st.lists(st.binary(max_size=40), max_size=5),
    cuts=st.lists(st.integers(0, 400), max_size=5),
)
def test_messages_come_whole_and_in_order_however_the_stream_is_cut(messages, cuts):
    stream = b"".join(frame(KEY, number, each) for number, each in enumerate(messages))
    bounds = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    reader = FrameReader(KEY)

    came = [each for a, b in pairwise(bounds) for each in reader.feed(stream[a:b])]

    assert came == messages


FIRST, SECOND, THIRD = (frame(KEY, number, b"order %d" % number) for number in range(3))


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(FIRST + FIRST, id="repeated"),
        pytest.param(FIRST + THIRD, id="left-out"),
        pytest.param(SECOND + FIRST, id="moved"),
        pytest.param(FIRST + frame(b"x" * 32, 1, b"order 1"), id="another-key"),
        pytest.param(FIRST + SECOND[:5] + b"\0" + SECOND[6:], id="altered"),
        pytest.param(FIRST + SECOND[:-1] + bytes([SECOND[-1] ^ 1]), id="altered-mac"),
        pytest.param(FIRST + SECOND[:3] + b"\3" + SECOND[4:] + THIRD, id="another-length"),
        pytest.param(FIRST + (LARGEST + 1).to_bytes(4), id="too-long"),
    ],
)
def test_messages_that_are_not_the_senders_own_are_refused_without_their_bytes(stream):
    reader = FrameReader(KEY)

    with pytest.raises(PeerError, match="a message from another process is false") as raised:
        reader.feed(stream)

    assert "order" not in str(raised.value)


@given(
    place=st.integers(0, len(FIRST + SECOND) - 1),
    flip=st.integers(1, 255),
)
def test_no_flipped_byte_gives_another_message(place, flip):
    stream = bytearray(FIRST + SECOND)
    stream[place] ^= flip
    came = []
    reader = FrameReader(KEY)
    for byte in stream:
        try:
            came += reader.feed(bytes([byte]))
        except PeerError:
            break

    assert came == [b"order 0", b"order 1"][: len(came)]
    assert len(came) < 2
