"""The model's time of a kernel with several loops, one after the other or one in another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from . import sass, scoreboard
from .counted import HERTZ, MULTIPROCESSORS, resident_blocks
from .launches import Launch

FEW, FEWER = 6, 3
"""Passes of a loop that the model goes through; what a pass takes follows from both."""

Span = tuple[int, int]


def spans(listing: sass.Listing) -> list[Span]:
    """First and last address of every loop, in the order in which they begin."""
    found: dict[int, int] = {}
    for line in listing.instructions:
        target = sass.TARGET.search(line.operands)
        if line.base == "BRA" and target is not None:
            begin = listing.labels[target[1]]
            if begin < line.address:
                found[begin] = max(found.get(begin, 0), line.address)
    return sorted(found.items())


def model_microseconds(launch: Launch, trips: Sequence[int]) -> tuple[float, int]:
    """Microseconds of a launch in the model, and how many registers it spills.

    Args:
        launch: Launch.
        trips: Passes through each loop, in the order in which they begin.

    Raises:
        ValueError: the machine code has another number of loops.
    """
    binary = launch.compiled()
    listing, usage = sass.disassemble(binary.asm["cubin"])
    loops = spans(listing)
    if len(loops) != len(trips):
        raise ValueError(f"{launch.name} has {len(loops)} loops, and passes are given of {trips}")
    body = _straight(listing, loops)
    programs, warps = math.prod(launch.grid), binary.metadata.num_warps
    resident = resident_blocks(usage.registers, binary.metadata.shared, warps)
    together = min(resident, math.ceil(programs / MULTIPROCESSORS))
    quarter = math.ceil(warps / scoreboard.QUARTERS)

    def clocks(passes: Mapping[Span, int]) -> float:
        steps = [scoreboard.step(line) for line in _unrolled(body, loops, passes)]
        return scoreboard.clocks(steps, together, quarter)

    few = {loop: min(count, FEW) for loop, count in zip(loops, trips, strict=True)}
    base = clocks(few)
    spent = base
    for loop, count in zip(loops, trips, strict=True):
        if count > FEW:
            a_pass = (base - clocks({**few, loop: FEWER})) / (FEW - FEWER)
            spent += (count - FEW) * a_pass
    rounds = math.ceil(programs / (together * MULTIPROCESSORS))
    return round(1e6 * rounds * spent / HERTZ, 1), sass.spills(listing.instructions)


def _straight(listing: sass.Listing, loops: Sequence[Span]) -> list[sass.Instruction]:
    """All instructions up to the exit after the last loop."""
    last = max((end for _, end in loops), default=-1)
    found = []
    for line in listing.instructions:
        found.append(line)
        if line.base == "EXIT" and not line.predicate and line.address > last:
            break
    return found


def _unrolled(
    body: Sequence[sass.Instruction], loops: Sequence[Span], passes: Mapping[Span, int]
) -> list[sass.Instruction]:
    """Instructions in the order in which they run."""
    found: list[sass.Instruction] = []
    outer = [one for one in loops if not any(_within(one, other) for other in loops)]
    place = -1
    for begin, end in outer:
        found += [line for line in body if place < line.address < begin]
        inside = [line for line in body if begin <= line.address <= end]
        inner = [loop for loop in loops if _within(loop, (begin, end))]
        found += passes[begin, end] * _unrolled(inside, inner, passes)
        place = end
    return found + [line for line in body if line.address > place]


def _within(one: Span, other: Span) -> bool:
    return one != other and other[0] <= one[0] and one[1] <= other[1]
