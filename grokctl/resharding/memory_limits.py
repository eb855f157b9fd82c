"""How many threads and arrays a run has, and how large they are, within its memory."""

from collections.abc import Callable
from typing import Final

from grokctl.checkpoint.frames import FRAME
from grokctl.machine.memory import memory
from grokctl.system import usable_cores

_LARGEST_ARRAY: Final = 2**24
_SMALLEST_ARRAY: Final = 2**20
_MOST_WAITING: Final = 8
_FEWEST_WAITING: Final = 2
"""Finished arrays that wait for their writers, in addition to those that workers fill: with eight,
a reshard is a tenth faster than with two, if there is memory for them."""
_SCRATCH: Final = 16 * 2**20
"""Bytes per worker in addition to its array: rows as read, floats, integers."""


def allowed_nbytes(max_memory: int | None) -> int:
    """Bytes of memory that a run may use: what was allowed, or a quarter of what is free."""
    return memory().usable // 4 if max_memory is None else max_memory


def memory_limits(
    largest: Callable[[int], int],
    *,
    is_compressed: bool,
    jobs: int | None,
    max_memory: int | None,
    most_nbytes: int = _LARGEST_ARRAY,
    most_waiting: int = _MOST_WAITING,
) -> tuple[int, int, int]:
    """Threads, arrays and bytes per array that fit the memory.

    Args:
        largest: Bytes of the largest array of a plan under a limit; more than that if one row is.
        is_compressed: Whether the files are.
        jobs: Threads at most; one per core by default.
        max_memory: Bytes for arrays; a quarter of free memory by default.
        most_nbytes: Bytes of an array, however much memory there is.
        most_waiting: Finished arrays that wait for their writers.
    """
    budget = allowed_nbytes(max_memory)
    copies = 2 if is_compressed else 1
    smallest = FRAME if is_compressed else _SMALLEST_ARRAY
    least = copies * largest(smallest)
    room = (budget - _FEWEST_WAITING * least) // (_SCRATCH + least)
    threads = max(1, min(jobs or usable_cores(), room))
    rest = budget - threads * _SCRATCH
    waiting = max(_FEWEST_WAITING, min(most_waiting, rest // (2 * least) - threads))
    share = rest // (copies * (threads + waiting))
    nbytes = largest(max(smallest, min(share, most_nbytes)))
    return threads, threads + waiting, nbytes


def peak_nbytes(jobs: int, arrays: int, array_nbytes: int, *, is_compressed: bool) -> int:
    """Bytes of memory for reading, converting and writing, at most."""
    copies = 2 if is_compressed else 1
    return arrays * array_nbytes * copies + jobs * _SCRATCH
