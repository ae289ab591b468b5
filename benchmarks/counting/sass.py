"""The machine code of a kernel for NVIDIA's GPUs: its instructions, and its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*?)\s*;"
)
LABEL = re.compile(r"\s*(\.L\w+):")
TARGET = re.compile(r"`\((\.L\w+)\)")
NARROWEST = 8
"""Bytes that a thread should move at once, at least."""
FEW = 4


@dataclass(frozen=True)
class Instruction:
    """One line, such as `@!P1 LDG.E.U16 R4, desc[UR4][R2.64]`.

    Args:
        address: Place in the kernel.
        predicate: Register of one bit, "P1" or "!P1"; "" where it always runs.
        op: Name with its modifiers.
        operands: All that follows.
    """

    address: int
    predicate: str
    op: str
    operands: str

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.op.split(".")[0]

    @property
    def bytes(self) -> int:
        """What each thread moves, of a load or a store."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        found = [sizes[part] for part in self.op.split(".")[1:] if part in sizes]
        return found[0] if found else 4


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in order, and the addresses of its labels."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[list[Instruction]]:
        """The loops that hold no other, in order."""
        spans = []
        for instruction in self.instructions:
            target = TARGET.search(instruction.operands)
            if instruction.base == "BRA" and target is not None:
                begin = self.labels[target[1]]
                if begin < instruction.address:
                    spans.append((begin, instruction.address))
        inner = {
            (begin, end)
            for begin, end in spans
            if not any((a, b) != (begin, end) and begin <= a and b <= end for a, b in spans)
        }
        return [
            [line for line in self.instructions if begin <= line.address <= end]
            for begin, end in sorted(inner)
        ]

    def body(self) -> list[Instruction]:
        """All up to the exit that ends the straight way through the kernel."""
        loops = self.loops()
        end = loops[-1][-1].address if loops else -1
        for place, line in enumerate(self.instructions):
            if line.base == "EXIT" and not line.predicate and line.address > end:
                return list(self.instructions[: place + 1])
        raise ValueError("the kernel has no EXIT")


def parse(text: str) -> Listing:
    """What `nvdisasm -c` wrote."""
    instructions, labels, waiting = [], {}, []
    for line in text.splitlines():
        label, found = LABEL.match(line), INSTRUCTION.search(line)
        if label is not None:
            waiting.append(label[1])
        elif found is not None:
            address = int(found[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            instructions.append(Instruction(address, found[2] or "", found[3], found[4]))
    return Listing(instructions, labels)


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a GPU: registers a thread, bytes of stack a thread."""

    registers: int
    stack: int


def disassemble(cubin: bytes) -> tuple[Listing, Usage]:
    """The machine code of a kernel that Triton compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return parse(code), Usage(int(found[1]), int(found[2]))


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spills(lines: Sequence[Instruction]) -> int:
    """How many instructions move registers to a thread's own memory or back."""
    return sum(line.base in ("LDL", "STL") for line in lines)


def narrow(lines: Sequence[Instruction]) -> int:
    """How many loads from, and stores to, global memory move less than NARROWEST bytes a thread.

    Up to FEW do not count: they are of a number a row, such as a bias, or of a tile of which a
    thread has no more than that.
    """
    moves = ("LDG", "STG", "LDGSTS")
    small = sum(line.base in moves and line.bytes < NARROWEST for line in lines)
    return small if small > FEW else 0
