"""Structured damage: to JSON, to bencoding and to pickles, so that most of an input stays whole."""

import json
import pickletools
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from random import Random

from grokctl.checkpoint.bencode import MalformedError, decode

Mutator = Callable[[bytes, Random], bytes]

NUMBERS = (
    *(0, 1, -1, 2, 7, 8, 16, 255, 256, 4096, 4097, 16384, 65536),
    *(2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63), 10**18),
)
TEXTS = (
    *("", "a", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "a\nb", "\u202ex"),
    *("\ud800", "x" * 300, "9" * 5000, "layers.0.moe.gate.weight", "int8", "None", "0" * 64),
)


def edit_bytes(data: bytes, rng: Random, tokens: Sequence[bytes] = ()) -> bytes:
    """A few bytes flipped, cut, repeated, or replaced by something that means something."""
    edited = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(edited) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 64)), len(edited) - place)
        match rng.randrange(6):
            case 0 if place < len(edited):
                edited[place] ^= 1 << rng.randrange(8)
            case 1:
                del edited[place : place + length]
            case 2:
                edited[place:place] = edited[place : place + length]
            case 3 if tokens:
                edited[place:place] = rng.choice(tokens)
            case 4:
                number = rng.choice(NUMBERS) % 2**64
                size = rng.choice((1, 2, 4, 8))
                edited[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
            case _:
                edited[place : place + length] = rng.randbytes(length)
    return bytes(edited)


def json_mutator(data: bytes, rng: Random) -> bytes:
    """Damage to the values of a JSON document."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return edit_bytes(data, rng, JSON_TOKENS)
    numbers = (*NUMBERS, 1e308, -0.5, float("nan"), float("inf"))
    value = _edit_tree(value, rng, [*numbers, *TEXTS, None, True, False, [], {}], TEXTS)
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


JSON_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"NaN", b"Infinity", b"1e999"),
    *(b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b'"\\ud800"', b"-0", b"\xff"),
)


def bencode_mutator(data: bytes, rng: Random) -> bytes:
    """Damage to the values of something bencoded."""
    try:
        value, _ = decode(data, most_depth=16)
    except MalformedError:
        return edit_bytes(data, rng, BENCODE_TOKENS)
    texts = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
    pool = [*NUMBERS, *texts, bytes(20), bytes(32), [], {}]
    keys = [b"length", b"path", b"attr", b"files", b"pieces", b"", b"piece length", b"file tree"]
    edited = _edit_tree(value, rng, pool, [*keys, *texts])
    return b"".join(_bencoded(edited, rng, is_sorted=rng.random() < 0.9))


BENCODE_TOKENS = (
    *(b"d", b"l", b"e", b"i0e", b"i-1e", b"i9223372036854775808e", b"0:", b"1:a", b"4:info"),
    *(b"6:length", b"4:path", b"4:attr1:l", b"4:attr1:x", b"4:attr1:p", b"12:piece layers"),
    *(b"9:file tree", b"12:meta versioni2e", b"12:piece lengthi16384e", b"l" * 200, b"9999999999:"),
)


def pickle_mutator(data: bytes, rng: Random) -> bytes:
    """Damage to the opcodes of a pickle."""
    try:
        starts = [place for _, _, place in pickletools.genops(data)]
    except (ValueError, KeyError, UnicodeDecodeError, MemoryError, OverflowError):
        return edit_bytes(data, rng, PICKLE_TOKENS)
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(ops))
        match rng.randrange(6):
            case 0:
                del ops[place]
            case 1:
                ops.insert(place, rng.choice(ops))
            case 2:
                other = rng.randrange(len(ops))
                ops[place], ops[other] = ops[other], ops[place]
            case 3:
                ops.insert(place, rng.choice(PICKLE_TOKENS))
            case 4:
                ops[place] = ops[place][:1] + edit_bytes(ops[place][1:], rng)
            case _:
                ops[place] = bytes([rng.randrange(256)]) + ops[place][1:]
        if not ops:
            return b""
    return b"".join(ops)


PICKLE_TOKENS = (
    *(b"\x8c\x02os", b"\x8c\x06system", b"\x93", b"R", b"b", b"\x81", b"\x92", b"N", b"(", b"0"),
    *(b"cos\nsystem\n", b"\x8c\x05numpy\x8c\x05dtype\x93", b"I" + b"9" * 5000 + b"\n", b"t", b")"),
    *(
        b"\x8e" + b"\xff" * 8,
        b"B" + b"\xff" * 4,
        b"X" + b"\xff" * 4,
        b"\x95" + b"\xff" * 8,
        b"\x94",
    ),
    *(
        b"j" + b"\xff" * 4,
        b"h\xff",
        b"J\xff\xff\xff\xff",
        b"\x8a\xff" + bytes(255),
        b"Pxyz\n",
        b".",
    ),
    *(b"\x82\x01", b"i__main__\nQuantizedWeight8bit\n", b"\x8d" + b"\xff" * 8, b"\x87", b"\x86"),
)


def text_mutator(tokens: Iterable[str]) -> Mutator:
    """Damage to a line of text, with words that mean something there."""
    encoded = [token.encode("utf-8", "surrogatepass") for token in (*tokens, *TEXTS)]
    return lambda data, rng: edit_bytes(data, rng, encoded)


def _edit_tree(root: object, rng: Random, pool: Sequence[object], keys: Sequence[object]) -> object:
    """Replace, remove, add, move or wrap a few of a tree's values."""
    root = deepcopy(root)
    for _ in range(rng.randrange(1, 4)):
        slots = list(_slots(root))
        if not slots:
            return rng.choice(pool)
        container, key = rng.choice(slots)
        other, place = rng.choice(slots)
        match rng.randrange(7):
            case 0:
                container[key] = deepcopy(rng.choice(pool))
            case 1:
                container[key] = deepcopy(other[place])
            case 2:
                del container[key]
            case 3 if isinstance(container, dict):
                container[rng.choice(keys)] = deepcopy(other[place])
            case 3:
                container.insert(key, deepcopy(rng.choice((other[place], rng.choice(pool)))))
            case 4:
                for _ in range(rng.choice((1, 3, 20))):
                    container[key] = [container[key]]
            case _:
                container[key] = _nudged(container[key], rng)
    return root


def _nudged(value: object, rng: Random) -> object:
    match value:
        case bool():
            return not value
        case int() | float():
            return rng.choice((value + 1, value - 1, value * 2, -value, str(value)))
        case str():
            place = rng.randrange(len(value) + 1)
            return value[:place] + rng.choice(TEXTS) + value[place + rng.randrange(3) :]
        case bytes():
            return edit_bytes(value, rng)
        case _:
            return value


def _slots(value: object) -> Iterable[tuple[dict | list, object]]:
    if isinstance(value, dict | list):
        places = list(value) if isinstance(value, dict) else range(len(value))
        for key in places:
            yield value, key
            yield from _slots(value[key])


def _bencoded(value: object, rng: Random, *, is_sorted: bool) -> Iterable[bytes]:
    match value:
        case bytes():
            yield b"%d:%b" % (len(value), value)
        case int():
            yield b"i%de" % value
        case list():
            yield b"l"
            for item in value:
                yield from _bencoded(item, rng, is_sorted=is_sorted)
            yield b"e"
        case dict():
            yield b"d"
            for key in sorted(value) if is_sorted else value:
                yield from _bencoded(key, rng, is_sorted=is_sorted)
                yield from _bencoded(value[key], rng, is_sorted=is_sorted)
            yield b"e"
        case _:
            yield b"0:"
