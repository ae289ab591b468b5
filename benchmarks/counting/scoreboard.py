"""A model of one quarter of a multiprocessor of an H100 (sm_90) that runs a kernel's machine code.

It issues one instruction a clock, of any warp whose operands are there and whose pipe is free. A
warp's instructions go in order. The four quarters of a multiprocessor do the same with a quarter
of every block's warps each. Throughputs are those of the CUDA C++ Programming Guide for compute
capability 9.0; latencies are approximate, and caches, banks and the traffic of other
multiprocessors are left out. So it says what a schedule allows, not what a GPU does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .sass import Instruction

QUARTERS = 4
MEMORY_LATENCY = 600
TENSOR_LATENCY = 30
BARRIER_LATENCY = 18
FENCE_LATENCY = 25
STAGGER = 300
"""Clocks between the starts of blocks that share a multiprocessor."""

PIPES = {
    "tensor": "matrix products",
    "fp32": "fp32",
    "integer": "integers, comparisons, packing",
    "exp2": "exp2, reciprocals",
    "shared": "shuffles, shared memory, loads and stores",
    "uniform": "uniform registers",
    "": "none",
}
REGISTER = re.compile(r"(?<![A-Za-z])(UR|UP|R|P)(\d+)")
FLOAT = ("FFMA", "FADD", "FMUL", "FFMA2")
MOVES = {"LDG": MEMORY_LATENCY, "LDS": 26, "LDSM": 30, "LDL": 33, "SHFL": 24, "LDC": 25, "S2R": 20}
"""Latencies of the instructions of the pipe "shared" that write registers."""
STORES = ("STG", "STS", "STSM", "STL", "LDGSTS", "ATOMG", "RED")
TWO_RESULTS = ("ISETP", "FSETP", "PLOP3", "UISETP", "UPLOP3")
WITHOUT_RESULT = (
    "BAR", "BRA", "BSSY", "BSYNC", "CCTL", "DEPBAR", "ERRBAR", "EXIT", "FENCE", "LDGDEPBAR",
    "MEMBAR", "NOP", "WARPGROUP", "WARPSYNC",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One instruction as the model sees it.

    Args:
        kind: Name without modifiers, or "TENSORWAIT" and "COPYWAIT" for waits.
        pipe: One of PIPES.
        clocks: How long it holds its pipe in a quarter of a multiprocessor.
        latency: Clocks until its results can be read.
        reads: Registers that must be there.
        writes: Registers that it gives.
        pending: How many groups of products or copies a wait leaves unfinished.
        ends_group: Whether it is the last of a group of products.
    """

    kind: str
    pipe: str
    clocks: float
    latency: float
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    pending: int = 0
    ends_group: bool = False


def step(line: Instruction) -> Step:
    """What one instruction takes."""
    base, operands = line.base, [part.strip() for part in line.operands.split(",")]
    condition = [line.predicate.removeprefix("!")] if line.predicate else []
    everything = tuple(condition + [m[0] for m in REGISTER.finditer(line.operands)])
    if base == "HGMMA":
        return _product(line, condition, operands)
    if base == "WARPGROUP" and "DEPBAR" in line.op:
        return Step("TENSORWAIT", "", 0, 0, (), (), pending=int(operands[-1], 16))
    if base == "DEPBAR":
        return Step("COPYWAIT", "", 0, 0, (), (), pending=int(operands[-1], 16))
    if base in STORES:
        width = 1 if base == "STSM" else max(1, line.bytes // 4)
        wide = _registers(operands[-1], width) if base != "LDGSTS" else ()
        held = 16 if base == "STSM" else max(4, line.bytes)
        return Step(base, "shared", held, 0, everything + wide, ())
    if base in WITHOUT_RESULT:
        return Step(base, "", 0, 0, everything, ())
    count = 2 if base in TWO_RESULTS or base == "SHFL" else 1
    writes = tuple(name for part in operands[:count] for name in _registers(part, _width(line)))
    reads = tuple(condition + [m[0] for part in operands[count:] for m in REGISTER.finditer(part)])
    pipe, clocks, latency = _cost(line)
    return Step(base, pipe, clocks, latency, reads, writes)


def _product(line: Instruction, condition: list[str], operands: list[str]) -> Step:
    """A product [64, 16] x [16, N] of four warps: N / 2 clocks, or what shared memory takes to
    give the right side and, where it is not in registers, the left one."""
    found = re.search(r"64x(\d+)x16", line.op)
    assert found is not None, line
    columns = int(found[1])
    in_registers = operands[1].startswith("R") and operands[1] != "RZ"
    clocks = max(columns / 2, 13 if in_registers else 16 + columns / 4)
    reads = condition + (list(_registers(operands[1], 4)) if in_registers else [])
    reads += [m[0] for m in REGISTER.finditer(line.operands) if m[1] in ("UR", "UP")]
    return Step("HGMMA", "tensor", clocks, 0, tuple(reads), (), ends_group="gsb0" in line.operands)


def _cost(line: Instruction) -> tuple[str, float, float]:
    """Pipe, clocks and latency of an instruction that writes registers."""
    base = line.base
    if base in FLOAT:
        return "fp32", 1, 4
    if base == "IMAD":
        return "fp32", 2, 5
    if base == "HMMA":
        return "tensor", 8, 33
    if base == "MUFU":
        return "exp2", 8, 22
    if base in MOVES:
        clocks = {"LDSM": 16, "LDC": 1, "S2R": 1}.get(base, max(4, line.bytes))
        return "shared", clocks, MOVES[base]
    if base in ("R2UR", "S2UR"):
        return "uniform", 2, 12
    if base == "ULDC":
        return "uniform", 1, 25
    if base.startswith("U"):
        return "uniform", 2, 6
    return "integer", 2, 5


def _width(line: Instruction) -> int:
    """How many registers follow one another in a result."""
    if line.base in ("LDS", "LDG", "LDL", "LDC", "ULDC"):
        return max(1, line.bytes // 4)
    if line.base in ("LDSM", "HMMA"):
        return 4
    return 2 if line.base == "CS2R" or "WIDE" in line.op else 1


def _registers(operand: str, count: int) -> tuple[str, ...]:
    found = re.match(r"[-|!~]*(UR|UP|R|P)(\d+)", operand)
    if found is None:
        return ()
    return tuple(f"{found[1]}{int(found[2]) + place}" for place in range(count))


def occupied(steps: Sequence[Step]) -> dict[str, float]:
    """Clocks that one warp's pass over `steps` holds each pipe, and "issue", one an instruction."""
    clocks: dict[str, float] = {"issue": len(steps)}
    for each in steps:
        if each.pipe:
            clocks[each.pipe] = clocks.get(each.pipe, 0) + each.clocks
    return clocks


class _Warp:
    """A warp of one block, somewhere in its program."""

    def __init__(self, block: int, start: float) -> None:
        self.block = block
        self.place = 0
        self.free_at = start
        self.waiting = False
        self.ready: dict[str, float] = {}
        self.products: list[float] = []
        self.copies: list[float] = []
        self.last_product = 0.0
        self.last_copy = 0.0

    def earliest(self, step: Step, pipes: dict[str, float]) -> float:
        """The clock before which `step` cannot be issued."""
        at = self.free_at
        for name in step.reads + step.writes:
            at = max(at, self.ready.get(name, 0.0))
        if step.kind == "TENSORWAIT":
            at = max([at, *self.products[: len(self.products) - step.pending]])
        elif step.kind == "COPYWAIT":
            at = max([at, *self.copies[: len(self.copies) - step.pending]])
        elif step.pipe and step.pipe != "tensor":
            at = max(at, pipes.get(step.pipe, 0.0))
        return at


def clocks(program: Sequence[Step], blocks: int, warps: int) -> float:
    """How long a quarter of a multiprocessor takes for `blocks` blocks at once, to the last's end.

    Args:
        program: Everything that a warp does, loops written out.
        blocks: Number of blocks on the multiprocessor.
        warps: Number of warps of a block in this quarter.
    """
    every = [_Warp(block, block * STAGGER) for block in range(blocks) for _ in range(warps)]
    pipes: dict[str, float] = {}
    arrived: dict[int, list[_Warp]] = {block: [] for block in range(blocks)}
    running, now = list(every), 0.0
    while running:
        chosen, nearest = None, float("inf")
        for warp in running:
            if warp.waiting:
                continue
            at = warp.earliest(program[warp.place], pipes)
            if at <= now:
                chosen = warp
                break
            nearest = min(nearest, at)
        if chosen is None:
            if nearest == float("inf"):
                raise RuntimeError("every warp waits at a barrier")
            now = nearest
            continue
        _issue(chosen, program[chosen.place], now, pipes, arrived, warps)
        # The one that was issued last goes on as long as it can: greedy, then oldest.
        running.remove(chosen)
        chosen.place += 1
        if chosen.place < len(program):
            running.insert(0, chosen)
        now += 1
    return now


def _issue(
    warp: _Warp,
    step: Step,
    now: float,
    pipes: dict[str, float],
    arrived: dict[int, list[_Warp]],
    warps: int,
) -> None:
    if step.kind == "HGMMA":
        end = max(now, pipes.get("tensor", 0.0)) + step.clocks
        pipes["tensor"] = end
        warp.last_product = end + TENSOR_LATENCY
        if step.ends_group:
            warp.products = [*warp.products[-7:], warp.last_product]
    elif step.pipe:
        pipes[step.pipe] = max(now, pipes.get(step.pipe, 0.0)) + step.clocks
    for name in step.writes:
        warp.ready[name] = now + step.latency
    if step.kind == "LDGSTS":
        warp.last_copy = now + MEMORY_LATENCY
    elif step.kind == "LDGDEPBAR":
        warp.copies = [*warp.copies[-7:], warp.last_copy]
    elif step.kind in ("MEMBAR", "FENCE"):
        warp.free_at = now + FENCE_LATENCY
    elif step.kind == "BAR":
        arrived[warp.block].append(warp)
        warp.waiting = True
        if len(arrived[warp.block]) == warps:
            for other in arrived[warp.block]:
                other.waiting, other.free_at = False, now + BARRIER_LATENCY
            arrived[warp.block] = []
