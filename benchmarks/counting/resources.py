"""What every Triton kernel takes of GPUs that are not here.

`python -m benchmarks.counting.resources` compiles them (`compiled_table`), and writes registers,
spills, narrow loads, shared memory and matrix instructions to
benchmarks/results/triton-resources.{json,md}. Fails where a kernel is not within its means.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from triton import knobs

from .. import records
from . import sass
from .compiled_table import WITHOUT_PRODUCTS, CompiledTable
from .forms import DTYPES
from .launches import Launch

OUT = records.RESULTS / "triton-resources.json"
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""What one block may ask for, by compute capability."""
MATRIX_INSTRUCTIONS = {90: "wgmma.mma_async", 100: "tcgen05.mma", 103: "tcgen05.mma"}
"""What a product is in PTX, of half precision; "mma.sync" on the others."""

SCATTERED = ("update",)
"""Kernels whose loads are single numbers far apart, the parts of one base's mass."""


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Args:
        kernel: Name of the kernel.
        form: Name of the first form of the suite that launches it.
        dtype: Type of the features, queries and keys, such as "float16".
        arch: Compute capability, such as 90.
        registers: Number of registers a thread.
        local: Loads and stores of a thread's own memory: registers that were spilled; of kernels
            WITHOUT_PRODUCTS those in loops.
        narrow: Loads and stores of global memory in inner loops of less than 8 bytes a thread.
        shared_bytes: Shared memory of a block.
        matrix: Matrix instructions of half precision in PTX.
    """

    kernel: str
    form: str
    dtype: str
    arch: int
    registers: int
    local: int
    narrow: int
    shared_bytes: int
    matrix: int

    def faults(self) -> list[str]:
        """What is wrong with it; none where it is within its means."""
        found = []
        if self.local:
            found.append(f"spills: {self.local} loads and stores of a thread's own memory")
        if self.narrow and self.kernel not in SCATTERED:
            found.append(
                f"{self.narrow} loads and stores of less than {sass.NARROWEST} bytes in a loop"
            )
        if self.shared_bytes > SHARED_KIB[self.arch] * 1024:
            limit = SHARED_KIB[self.arch]
            found.append(f"{self.shared_bytes} bytes of shared memory; a block has {limit} KiB")
        # None at all would mean that the compiler threw the kernel away, which it has done.
        if not self.matrix and self.dtype != "float32" and self.kernel not in WITHOUT_PRODUCTS:
            found.append("no matrix instruction")
        return found


def measure(launch: Launch, form: str, dtype: str) -> Resources:
    """Compile a launch of a form, and look at what came out."""
    assert isinstance(launch.arch, int)
    binary = launch.compiled()
    listing, usage = sass.disassemble(binary.asm["cubin"])
    small = launch.name in WITHOUT_PRODUCTS
    product = MATRIX_INSTRUCTIONS.get(launch.arch, "mma.sync")
    return Resources(
        launch.name,
        form,
        dtype,
        launch.arch,
        usage.registers,
        sum(sass.spills(lines) for lines in (listing.loops() if small else [listing.instructions])),
        sum(sass.narrow(loop) for loop in listing.loops()),
        binary.metadata.shared,
        binary.asm["ptx"].count(product),
    )


def version() -> str:
    """Of Triton and of the compilers of machine code, as the file says it."""
    before, since = knobs.nvidia.ptxas.version, knobs.nvidia.ptxas_blackwell.version
    own = importlib.metadata.version("triton")
    return f"{own}, ptxas {before}" + (f", from sm_100 on {since}" if since != before else "")


def text(triton: str, found: Mapping[str, Resources]) -> str:
    """The table in Markdown: registers and KiB of shared memory on every GPU."""
    rows: dict[tuple[str, str, str], dict[int, Resources]] = {}
    for each in found.values():
        rows.setdefault((each.form, each.kernel, each.dtype), {}).setdefault(each.arch, each)
    columns = " | ".join(f"sm_{arch}" for arch in SHARED_KIB)
    lines = [
        f"Triton {triton}; K = 256, for 132 multiprocessors. Written by "
        "`python -m benchmarks.counting.resources`. "
        "Registers a thread / KiB of shared memory a block, each form as its launcher "
        "specialises it; a kernel that",
        "several forms launch stands where it comes first. None spills, and none moves less than",
        "8 bytes at once in a loop.",
        "",
        f"| form | kernel | dtype | {columns} |",
        "|---" * (3 + len(SHARED_KIB)) + "|",
    ]
    for (form, kernel, dtype), archs in rows.items():
        cells = [cell(archs.get(arch)) for arch in SHARED_KIB]
        lines.append(f"| {form} | {kernel} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(found: Resources | None) -> str:
    if found is None:
        return "as above"
    numbers = f"{found.registers} / {found.shared_bytes / 1024:.0f}"
    return f"**{numbers}: {'; '.join(found.faults())}**" if found.faults() else numbers


TABLE = CompiledTable(
    out=OUT,
    row=Resources,
    measure=measure,
    version=version,
    text=lambda found: text(version(), found),
    archs=tuple(SHARED_KIB),
    dtypes=DTYPES,
)
committed, wanted = TABLE.committed, TABLE.wanted


if __name__ == "__main__":
    TABLE.update()
