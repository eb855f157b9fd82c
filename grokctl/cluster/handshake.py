"""How two processes of a run prove to each other that they have the job's secret.

A line each: the rank's hello with its number and a random one, rank 0's challenge with another and
an HMAC of both lines, and the rank's own HMAC. Neither HMAC serves as the other, or again.
"""

import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from grokctl.cluster.channel import Keys, mac_of
from grokctl.cluster.launcher import Launch
from grokctl.cluster.secret import SAME
from grokctl.errors import PeerError

OURS: Final = b"grokctl "
"""Beginning of our lines, which tells them from a web server's or JAX's."""
LONGEST: Final = 200
"""Bytes of a line: the longest of ours, with room."""
_HELLO: Final = re.compile(
    rb"grokctl hello (service|orders) ([0-9]{1,9}) of ([0-9]{1,9})"
    rb" ([0-9a-f]{16}) ([0-9a-f]{32}) ([01])\n"
)
_CHALLENGE: Final = re.compile(rb"grokctl challenge ([0-9a-f]{32}) ([01]) ([0-9a-f]{64})\n")
_OLDER: Final = re.compile(rb"grokctl [0-9]{1,9} of [0-9]{1,9}\n")
_ANSWER_TO_OLDER: Final = b"grokctl rank 0: has a newer grokctl\n"
_PUBLIC: Final = b"grokctl: no job secret"
"""In place of the secret where hosts share none: proves nothing, and finds what was damaged."""


class Purpose(StrEnum):
    """What a connection to rank 0 is for."""

    SERVICE = "service"
    """The bytes of JAX's coordination service."""
    ORDERS = "orders"
    """Opened last: from then on, the rank waits for rank 0's word."""


def hello(purpose: Purpose, launch: Launch, secret: bytes | None, process: str) -> bytes:
    """The first line of a rank, with a number that is used once.

    Args:
        purpose: Of the connection.
        launch: This process.
        secret: Of this job.
        process: 16 hexadecimal digits, the same on both connections of a process.
    """
    words = (purpose, launch.rank, "of", launch.count, process, secrets.token_hex(16))
    return f"grokctl hello {' '.join(map(str, words))} {int(secret is not None)}\n".encode()


def challenge(secret: bytes | None, line: bytes) -> tuple[bytes, Keys]:
    """Rank 0's answer to a hello, which proves that it has the secret.

    Args:
        secret: Of this job.
        line: The hello.
    """
    nonce, flag = secrets.token_hex(16).encode(), b"%d" % (secret is not None)
    keys = Keys(mac_of(secret or _PUBLIC, line, nonce, flag))
    proof = mac_of(keys.base, b"rank 0").hex().encode()
    return b"grokctl challenge %s %s %s\n" % (nonce, flag, proof), keys


def keys_of(secret: bytes | None, line: bytes, answer: bytes) -> Keys | None:
    """The keys of a connection, on the rank that sent a hello; None if the answer is false.

    Raises:
        PeerError: Only one of the two has a secret.
    """
    match = _CHALLENGE.fullmatch(answer)
    if match is None:
        return None
    nonce, flag, proof = match.groups()
    if (flag == b"1") != (secret is not None):
        here, there = ("one", "none") if secret is not None else ("none", "one")
        rank = line.split()[3].decode()
        raise PeerError(f"job secret: rank 0 has {there}, rank {rank} has {here}", SAME)
    keys = Keys(mac_of(secret or _PUBLIC, line, nonce, flag))
    expected = mac_of(keys.base, b"rank 0").hex().encode()
    return keys if secrets.compare_digest(expected, proof) else None


def is_challenge(answer: bytes) -> bool:
    """Whether it is rank 0 of a run that answers, be it of this one or not."""
    return _CHALLENGE.fullmatch(answer) is not None


def proof_line(keys: Keys) -> bytes:
    """The second line of a rank, which proves that it has the secret, too."""
    return b"grokctl proof %s\n" % mac_of(keys.base, b"another rank").hex().encode()


@dataclass(slots=True)
class Stranger:
    """A connection to rank 0 that has not proven a rank: what it sent, and how far it is."""

    secret: bytes | None
    came: bytes = b""
    said: re.Match[bytes] | None = None
    """Its hello."""
    keys: Keys | None = None
    reply: bytes = b""
    """What to send it next."""
    is_refused: bool = False
    is_proven: bool = False
    has_no_proof: bool = False
    """Whether it said the right words without the secret."""

    @property
    def purpose(self) -> Purpose:
        """What it is for, once it is proven."""
        assert self.said is not None
        return Purpose(self.said[1].decode())

    @property
    def rank(self) -> int:
        """Its rank, once it is proven."""
        assert self.said is not None
        return int(self.said[2])

    @property
    def count(self) -> int:
        """The processes of its run, once it is proven."""
        assert self.said is not None
        return int(self.said[3])

    @property
    def process(self) -> bytes:
        """The same on both connections of a process."""
        assert self.said is not None
        return self.said[4]

    def hear(self, came: bytes) -> None:
        """Take its next bytes; no bytes mean that it has closed the connection."""
        self.came += came
        self.is_refused = not came or len(self.came) > LONGEST
        if self.is_refused or not self.came.endswith(b"\n"):
            self.is_refused |= not OURS.startswith(self.came[: len(OURS)])
            # with another secret, it is the rank that leaves: rank 0's proof is not one to it
            self.has_no_proof = not came and None not in (self.keys, self.secret)
        elif self.said is None:
            self._greet()
        else:
            assert self.keys is not None
            match = secrets.compare_digest(proof_line(self.keys), self.came)
            self.is_proven, self.is_refused, self.has_no_proof = match, not match, not match

    def _greet(self) -> None:
        line, self.came = self.came, b""
        self.said = _HELLO.fullmatch(line)
        if _OLDER.fullmatch(line):
            self.reply = _ANSWER_TO_OLDER
        if self.said is None or not 0 < self.rank < max(self.count, 1):
            self.is_refused = True
            return
        self.reply, self.keys = challenge(self.secret, line)
        if (self.said[6] == b"1") != (self.secret is not None):
            self.is_refused = self.has_no_proof = True
