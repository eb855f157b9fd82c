"""What ptxas and nvdisasm say of a kernel: registers, spills, and loads in flight."""

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a kernel takes of a multiprocessor."""

    registers: int
    spilled: int
    """Bytes that a thread stores in memory for want of registers."""


def resources(ptxas: str) -> Resources:
    """What `ptxas -v` says of the one kernel that it compiled."""
    registers = re.search(r"Used (\d+) registers", ptxas)
    spilled = re.search(r"(\d+) bytes spill stores", ptxas)
    assert registers, ptxas
    assert spilled, ptxas
    return Resources(registers=int(registers[1]), spilled=int(spilled[1]))


_SASS: Final = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)\s*([^;]*);")
_WORDS: Final = {"32": 1, "64": 2, "128": 4}


def loads_in_flight(sass: str) -> int:
    """Most wide loads of global memory that a thread has begun before it needs the first.

    Wide are those of as many bytes as the widest of the kernel. A load is awaited where an
    instruction reads, or writes again, a register that it fills; a copy to shared memory at the
    next barrier for such copies, which leaves as many groups under way as it names.
    """
    code = [(found[1], found[2]) for found in map(_SASS.match, sass.splitlines()) if found]
    widths = [_width(opcode) for opcode, _ in code if opcode.startswith("LDG.")]
    widest, under_way, most = max(widths, default=0), [set[int]()][:0], 0
    groups: list[int] = [0]
    for opcode, operands in code:
        used = {int(number) for number in re.findall(r"\bR(\d+)", operands)}
        under_way = [filled for filled in under_way if not filled & used]
        if opcode.startswith("LDG.") and _width(opcode) == widest:
            first = re.match(r"\s*R(\d+)", operands)
            if first:
                under_way.append(set(range(int(first[1]), int(first[1]) + widest)))
        elif opcode.startswith("LDGSTS"):
            groups[-1] += 1
        elif opcode.startswith("LDGDEPBAR"):
            groups.append(0)
        elif opcode.startswith("DEPBAR") and (left := re.search(r"0x([0-9a-f]+)", operands)):
            groups = groups[-1 - int(left[1], 16) :]
        most = max(most, len(under_way), sum(groups))
    return most


def _width(opcode: str) -> int:
    """Registers that a load fills."""
    return next((words for bits, words in _WORDS.items() if f".{bits}" in opcode), 1)


def operations(sass: str, *opcodes: str) -> dict[str, int]:
    """How often a kernel's code has each of some operations."""
    found = [match[1].split(".")[0] for match in map(_SASS.match, sass.splitlines()) if match]
    return {opcode: found.count(opcode) for opcode in opcodes}
