"""What XLA's optimised HLO says: how often loops turn, and which weights a program writes again."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Final

_TYPE: Final = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION: Final = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{")
_INSTRUCTION: Final = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_CALLED: Final = re.compile(r"(body|calls|to_apply|\w+_computation)=%?([\w.-]+)")
_BRANCHES: Final = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS: Final = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BITS: Final = {"s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "u16": 16, "f16": 16, "f32": 32}


@dataclass(frozen=True, order=True)
class Array:
    """The type of an array in HLO."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * _BITS.get(self.dtype, 32) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction of HLO."""

    name: str
    types: tuple[Array, ...]
    """Of its result; several of a tuple."""
    opcode: str
    operands: tuple[tuple[str, int | None], ...]
    """Names, with the number of an element if a tuple's is meant."""
    text: str


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _TYPE.findall(text)
    )


def _bracketed(text: str) -> tuple[str, str]:
    """The content of the bracket that a text begins with, and the rest."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return text[1:index], text[index + 1 :]
    return text[1:], ""


def _instruction(line: str) -> Instruction | None:
    if not (found := _INSTRUCTION.match(line)):
        return None
    name, rest = found[1], found[2]
    if rest.startswith("("):
        types, rest = _bracketed(rest)
    else:
        types, _, rest = rest.partition(" ")
    if not (called := re.match(r"\s*([\w-]+)(?=\()", rest)):
        return None
    inside, rest = _bracketed(rest[called.end() :])
    operands = tuple(
        (operand, int(number) if number else None)
        for operand, number in re.findall(r"%([\w.-]+)(?:#(\d+))?", inside)
    )
    if called[1] == "parameter":
        rest = f" parameter={inside}{rest}"
    return Instruction(
        name=name, types=_arrays(types), opcode=called[1], operands=operands, text=rest
    )


def computations(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation, and the name of the first that runs."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if begins := _COMPUTATION.match(line):
            current = begins[2]
            found[current] = []
            entry = current if begins[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current and (instruction := _instruction(line)):
            found[current].append(instruction)
    return found, entry


def trip_counts(hlo: str) -> dict[str, int]:
    """Turns of loops of known length, by the name of the instruction."""
    return {
        each.name: int(known[1])
        for instructions in computations(hlo)[0].values()
        for each in instructions
        if each.opcode == "while" and (known := _TRIPS.search(each.text))
    }


def kernels(hlo: str) -> set[str]:
    """Names of the instructions that are kernels of Pallas."""
    return {
        each.name
        for instructions in computations(hlo)[0].values()
        for each in instructions
        if each.opcode == "custom-call" and re.search(r'target="[^"]*(triton|mosaic)', each.text)
    }


# --- copies of weights

_SAME: Final = {"tuple", "bitcast", "opt-barrier"}
"""Opcodes whose result is their operands."""
_NOTABLE: Final = 2**16
"""Bytes of a weight's part from which on a copy of it counts."""

_Held = Array | None
_Value = tuple[_Held, ...]
"""For each array of a result, the weight that it is."""


@dataclass(frozen=True, order=True)
class Copy:
    """An instruction that writes a weight again, or a part of one."""

    name: str
    written: Array
    weight: Array


class _Copies:
    """Follows weights through a program: they go into loops and branches."""

    def __init__(self, hlo: str, weights: frozenset[Array]) -> None:
        self.computations, entry = computations(hlo)
        self.found: set[Copy] = set()
        given = {
            each.name: tuple(kind if kind in weights else None for kind in each.types)
            for each in self.computations[entry]
            if each.opcode == "parameter"
        }
        self._run(entry, given)

    def _run(self, name: str, values: dict[str, _Value]) -> _Value:
        """Follow one computation; what it returns."""
        last: _Value = ()
        for each in self.computations.get(name, ()):
            if each.name not in values:
                operands = [self._operand(values, *operand) for operand in each.operands]
                values[each.name] = self._result(each, operands)
            last = values[each.name]
        return last

    @staticmethod
    def _operand(values: dict[str, _Value], name: str, number: int | None) -> _Value:
        value = values.get(name, (None,))
        if number is None:
            return value
        return (value[number] if number < len(value) else None,)

    def _result(self, each: Instruction, operands: list[_Value]) -> _Value:
        """Which weights an instruction's result is, or contains."""
        joined = tuple(held for operand in operands for held in operand)
        if each.opcode in _SAME:
            return joined
        if each.opcode == "get-tuple-element":
            number = re.search(r"index=(\d+)", each.text)
            return (joined[int(number[1])],) if number else (None,)
        if each.opcode == "while":
            self._called(each, [joined])
            return joined
        if each.opcode in {"call", "async-start", "conditional"}:
            self._called(each, operands[1:] if each.opcode == "conditional" else operands)
            return (None,) * len(each.types)
        return self._written(each, {held for held in joined if held is not None})

    def _written(self, each: Instruction, weights: set[Array]) -> _Value:
        """The weights among what an instruction writes, which it copies from others."""
        value: list[_Held] = []
        for written in each.types:
            copied = [weight for weight in weights if _is_copy(each, written, weight)]
            self.found.update(Copy(each.name, written, weight) for weight in copied[:1])
            value.append(copied[0] if copied else None)
        return tuple(value)

    def _called(self, each: Instruction, given: list[_Value]) -> None:
        """Follow the computations that an instruction calls."""
        names = [name for key, name in _CALLED.findall(each.text) if key != "condition"]
        for listed in _BRANCHES.findall(each.text):
            names += re.findall(r"[\w.-]+", listed)
        is_branch = each.opcode == "conditional"
        for index, name in enumerate(names):
            own = [given[index]] if is_branch and index < len(given) else given
            parameters = {}
            for inner in self.computations.get(name, ()):
                if number := re.match(r" parameter=(\d+)", inner.text):
                    parameters[inner.name] = (
                        own[int(number[1])] if int(number[1]) < len(own) else ()
                    )
            self._run(name, parameters)


def _is_copy(each: Instruction, written: Array, weight: Array) -> bool:
    """Whether an array is a weight again: in its type, or all of one matrix or more.

    A product has the type of activations, and never the size of a matrix by accident: for that, it
    would need as many tokens as the matrix has inputs.
    """
    if written.dtype == weight.dtype and written.dtype in {"s8", "u8", "s4", "u4"}:
        return written.nbytes >= _NOTABLE
    matrix = prod(weight.shape[-2:])
    is_whole = written.size >= matrix and written.size % matrix == 0
    return is_whole and each.opcode != "custom-call"


def copies(hlo: str, weights: Iterable[Array]) -> list[Copy]:
    """Instructions of a program that write a weight again, or a part of one.

    Args:
        hlo: The optimised program.
        weights: Types of the weights among its parameters, on one device.
    """
    return sorted(_Copies(hlo, frozenset(weights)).found)
