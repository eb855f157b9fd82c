"""What XLA's thunks say: what a program starts on a GPU, one after the other, and asks the host.

The texts are those of `--xla_dump_to` with JAX 0.10 to 0.12: `thunk_sequence.txt`,
`thunk_sequence_after_thunk_passes.txt` and `thunk_metadata.txt`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

CONTAINERS: Final = {"kCommandBuffer", "kSequential", "kAsyncStart", "kCall"}
NOTHING: Final = {"kAsyncDone", "kWaitForStreams", "kEventRecord", "kEventWait"}
SUMS: Final = re.compile(r"k(AllReduce|AllGather|ReduceScatter|\w*AllToAll|Collective\w*)")
ON_HOST: Final = re.compile(r"k(Host|Infeed|Outfeed|Send|Recv|DynamicSlice)")
"""A dynamic slice that is a thunk of its own reads its offsets on the host."""
_THUNK: Final = re.compile(r"( *)(\d+): (k\w+) *\[[^]]*\] *(\S*)")
_MARK: Final = re.compile(r"( *)(\w[\w ]*):\s*")


@dataclass(frozen=True, kw_only=True)
class Thunk:
    """One entry of a listing."""

    number: int
    kind: str
    name: str
    inner: dict[str, list["Thunk"]] = field(default_factory=dict)
    """What it contains: under `condition` and `body`, by branch, or under an empty name."""

    def walk(self) -> Iterator["Thunk"]:
        """It, and all that it contains."""
        yield self
        for part in self.inner.values():
            for each in part:
                yield from each.walk()


@dataclass
class _Open:
    depth: int
    thunk: Thunk
    part: str = ""


def thunks(listing: str) -> list[Thunk]:
    """The tree of a listing: what lies deeper belongs to the entry above it.

    Raises:
        ValueError: A line has another form than those of JAX 0.10 to 0.12.
    """
    top: list[Thunk] = []
    path: list[_Open] = []
    for line in map(_without_nothing, listing.splitlines()):
        if found := _THUNK.match(line):
            depth = len(found[1])
            while path and path[-1].depth >= depth:
                path.pop()
            thunk = Thunk(number=int(found[2]), kind=found[3], name=found[4])
            siblings = path[-1].thunk.inner.setdefault(path[-1].part, []) if path else top
            siblings.append(thunk)
            path.append(_Open(depth, thunk))
        elif mark := _MARK.fullmatch(line):
            if mark[2] != "condition":  # which follows its loop at once, and is not indented
                while path and path[-1].depth >= len(mark[1]):
                    path.pop()
            path[-1].part = mark[2]
        elif line.strip():
            raise ValueError(f"listing: expected a thunk or a part of one, found {line!r}")
    return top


def _without_nothing(line: str) -> str:
    """An empty branch says so, and does not end its line."""
    return re.sub(r"^ *No thunks\.", "", line)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What a program does while loops of unknown length turn `turns` times each."""

    launches: int = 0
    sums: int = 0
    waits: int = 0
    """Times that the host reads a number of the device before it goes on."""
    graphs: int = 0
    """CUDA graphs that are started."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            launches=self.launches + other.launches,
            sums=self.sums + other.sums,
            waits=self.waits + other.waits,
            graphs=self.graphs + other.graphs,
        )

    def __mul__(self, times: int) -> "Tally":
        return Tally(
            launches=self.launches * times,
            sums=self.sums * times,
            waits=self.waits * times,
            graphs=self.graphs * times,
        )

    def __sub__(self, other: "Tally") -> "Tally":
        return self + other * -1


def tally(
    sequence: Sequence[Thunk], trips: Mapping[int, int], *, turns: int, is_graph: bool = False
) -> Tally:
    """Count what a sequence of thunks does.

    A loop of known length runs without the host. For any other, the host reads the condition before
    each turn, and once more at its end; of a conditional it reads the branch, and the longest is
    counted. Within a CUDA graph, the device does both by itself.

    Args:
        sequence: The thunks.
        trips: Turns of loops of known length, by the number of their thunk.
        turns: Turns of every other loop.
        is_graph: Whether they lie in a CUDA graph.
    """
    total = Tally()
    for thunk in sequence:
        asks = 0 if is_graph else 1
        inside = is_graph or thunk.kind == "kCommandBuffer"
        parts = {
            name: tally(part, trips, turns=turns, is_graph=inside)
            for name, part in thunk.inner.items()
        }
        if thunk.kind == "kWhile":
            body, condition = parts.get("body", Tally()), parts.get("condition", Tally())
            if thunk.number in trips:
                total += body * trips[thunk.number]
            else:
                total += body * turns + (condition + Tally(waits=asks)) * (turns + 1)
        elif thunk.kind in {"kConditional", "kCase"}:
            longest = max(parts.values(), key=lambda part: part.launches, default=Tally())
            total += longest + Tally(waits=asks)
        elif thunk.kind in CONTAINERS or parts:
            total += sum(parts.values(), Tally())
            total += Tally(graphs=int(thunk.kind == "kCommandBuffer"))
        elif SUMS.match(thunk.kind):
            total += Tally(sums=int(not thunk.kind.endswith("Done")))
        elif thunk.kind not in NOTHING:
            total += Tally(launches=1, waits=asks if ON_HOST.match(thunk.kind) else 0)
    return total


def annotations(metadata: str) -> dict[int, str]:
    """The HLO instruction that each numbered thunk comes from."""
    found = {}
    for part in metadata.split("thunk_info {")[1:]:
        number = re.search(r"thunk_id: (\d+)", part)
        name = re.search(r'profile_annotation: "([^"]*)"', part)
        if number and name:
            found[int(number[1])] = name[1]
    return found
