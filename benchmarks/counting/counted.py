"""Kernels counted from their machine code, for an H100: `python -m benchmarks.counting.counted`.

Compiles what the launchers launch (`launches`) for sm_90, which need not be here, counts the
instructions, and writes bounds and a model's time (`scoreboard`) beside the floor to
benchmarks/results/counted.{json,md}. With `--before` the figures are kept beside later runs'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer

from stem_kernels.info import provenance

from .. import records
from ..cases import operators
from ..cases.em import NUM_BASES
from ..cases.floors import Ceilings, Work
from . import counted_report, sass, scoreboard
from .forms import FEATURE_WIDTHS, em_feature, forms
from .launches import Launch, launches

OUT = records.RESULTS / "counted.json"
ARCH = 90
HERTZ = 1.755e9
"""A clock that an H100 keeps under load; issue-bound, pipe-bound and model count with it."""
MULTIPROCESSORS = 132
CEILINGS = Ceilings(flops=798e12, exponentials=MULTIPROCESSORS * 16 * 1.98e9, bytes=3.0e12)
"""Of an H100 80GB HBM3: a large product and a copy, measured; exponentials at its highest clock."""
BESIDE_PRODUCTS = ("directions", "update")
"""Kernels that multiply no matrices: what an EM pass does with K bases before and after."""
REGISTERS, SHARED_BYTES, RESERVED_BYTES, THREADS, MOST_BLOCKS = 65536, 233472, 1024, 2048, 32
"""What the blocks of a multiprocessor share, and what the system takes of each."""
LONGEST = 16  # passes of a loop that the model goes through; more are a multiple of the last half
CASES = (
    *(f"em key d={width}" for width in (40, 64, 80, 160)),
    *(f"em feature d={width}" for width in (320, 640, 1280)),
    *(f"basis attention d={width}" for width in (40, 64, 80, 160)),
)

SAMPLE_WIDTH, SAMPLE_TOKENS = 320, 22 * NUM_BASES
"""Channels of the layer whose EM on a sample is counted, and the tokens of the sample."""


@dataclasses.dataclass(frozen=True)
class Counted:
    """One launch.

    Args:
        kernel: Name of the kernel.
        programs: Number of blocks.
        warps: Number of warps of a block.
        resident: Blocks that share a multiprocessor.
        registers: Number of registers a thread.
        trips: Passes of a program through its inner loop.
        loop: Instructions of a pass by kind, of one warp, and "all".
        spills: Loads and stores of a thread's own memory in the loop.
        narrow: Loads and stores of global memory in the loop of less than 8 bytes a thread.
        issue_us: Least microseconds to issue all instructions, four a clock and multiprocessor.
        pipe_us: Least microseconds of the pipe that is held longest.
        pipe: Name of that pipe.
        model_us: Microseconds of the model.
    """

    kernel: str
    programs: int
    warps: int
    resident: int
    registers: int
    trips: int
    loop: dict[str, int]
    spills: int
    narrow: int
    issue_us: float
    pipe_us: float
    pipe: str
    model_us: float


def trips(launch: Launch) -> int:
    """How often a program goes through the loop that holds its matrix products."""
    sizes = launch.arguments
    if launch.name in ("fused", "fused_rows", "products"):
        return math.ceil(sizes["tokens_per_split"] / sizes["BLOCK_N"])
    if launch.name == "resident":
        return math.ceil(sizes["n"] / (launch.grid[1] * sizes["BLOCK_N"]))
    if launch.name == "basis_attention":
        return math.ceil(sizes["K"] / sizes["BLOCK_K"])
    if launch.name == "responsibilities":
        return math.ceil(sizes["D"] / sizes["BLOCK_D"])
    raise ValueError(f"it is not known how often {launch.name} goes through its loop: say it here")


def resident_blocks(registers: int, shared: int, warps: int) -> int:
    """How many blocks share a multiprocessor."""
    of_warp = math.ceil(registers * 32 / 256) * 256
    return min(
        REGISTERS // (of_warp * warps),
        SHARED_BYTES // (shared + RESERVED_BYTES),
        THREADS // (32 * warps),
        MOST_BLOCKS,
    )


def count(launch: Launch) -> Counted:
    """Compile and count one launch."""
    binary = launch.compiled()
    listing, usage = sass.disassemble(binary.asm["cubin"])
    (loop,) = (lines for lines in listing.loops() if any("MMA" in line.base for line in lines))
    body = listing.body()
    head = [scoreboard.step(line) for line in body if line.address < loop[0].address]
    tail = [scoreboard.step(line) for line in body if line.address > loop[-1].address]
    steps = [scoreboard.step(line) for line in loop]
    programs, passes = math.prod(launch.grid), trips(launch)
    warps = binary.metadata.num_warps
    resident = resident_blocks(usage.registers, binary.metadata.shared, warps)
    together = min(resident, math.ceil(programs / MULTIPROCESSORS))
    quarter = math.ceil(warps / scoreboard.QUARTERS)

    def clocks(count: int) -> float:
        return scoreboard.clocks(head + count * steps + tail, together, quarter)

    spent = clocks(min(passes, LONGEST))
    if passes > LONGEST:
        spent += (passes - LONGEST) * (spent - clocks(LONGEST // 2)) / (LONGEST - LONGEST // 2)
    rounds = math.ceil(programs / (together * MULTIPROCESSORS))
    held = {
        pipe: microseconds(clocks * programs * warps / scoreboard.QUARTERS / MULTIPROCESSORS)
        for pipe, clocks in _added(
            scoreboard.occupied(head + tail), scoreboard.occupied(steps), passes
        ).items()
    }
    issue = held.pop("issue")
    pipe = max(held, key=lambda name: held[name])
    return Counted(
        launch.name, programs, warps, resident, usage.registers, passes, kinds(loop),
        sass.spills(loop), sass.narrow(loop), issue, held[pipe], pipe,
        microseconds(rounds * spent),
    )  # fmt: skip


def microseconds(clocks: float) -> float:
    return round(1e6 * clocks / HERTZ, 1)


def _added(once: dict[str, float], often: dict[str, float], times: int) -> dict[str, float]:
    return {name: once.get(name, 0) + times * often.get(name, 0) for name in once | often}


def kinds(loop: Sequence[sass.Instruction]) -> dict[str, int]:
    """Instructions by pipe; the pipe "shared" apart by what goes to memory and what stays."""
    found: dict[str, int] = {}
    for line in loop:
        kind = scoreboard.step(line).pipe or "other"
        if line.base in ("LDG", "STG", "LDGSTS", "LDL", "STL"):
            kind = "memory"
        found[kind] = found.get(kind, 0) + 1
    return {"all": len(loop), **found}


def case(call: Callable[[], object], work: Work) -> dict[str, Any]:
    """The row of one case: its launches, their sums, and the floor."""
    counted = [
        count(launch) for launch in launches(ARCH, call) if launch.name not in BESIDE_PRODUCTS
    ]
    floor, limit = CEILINGS.floor(work)
    return {
        "floor_us": round(1e6 * floor, 1),
        "limit": limit,
        "memory_us": round(1e6 * work.bytes / CEILINGS.bytes, 1),
        **{
            name: round(sum(getattr(each, name) for each in counted), 1)
            for name in ("issue_us", "pipe_us", "model_us")
        },
        "launches": [dataclasses.asdict(each) for each in counted],
    }


def _of_sample(work: Work) -> Work:
    share = SAMPLE_TOKENS / FEATURE_WIDTHS[SAMPLE_WIDTH]
    return Work(share * work.flops, share * work.exponentials, share * work.bytes)


def main(
    before: Annotated[bool, typer.Option(help="Keep these figures beside later ones.")] = False,
) -> None:
    """Count every case, and write the tables."""
    suite = operators.cases(torch.device("cpu"), torch.float16, small=False)
    works = {each.name: each.work for each in suite if each.work is not None}
    calls = {form.name: form.call for form in forms(torch.float16)}
    rows = {name: case(calls[name], works[name]) for name in CASES}
    sample = partial(em_feature, SAMPLE_WIDTH, torch.float16, SAMPLE_TOKENS)
    rows[counted_report.SAMPLE] = case(sample, _of_sample(works[f"em feature d={SAMPLE_WIDTH}"]))
    results = records.read(OUT) if OUT.is_file() else {}
    results["before" if before else "now"] = {"provenance": provenance(), **rows}
    records.write(results, OUT)
    OUT.with_suffix(".md").write_text(counted_report.text(results))
    print(counted_report.text(results))


if __name__ == "__main__":
    typer.run(main)
