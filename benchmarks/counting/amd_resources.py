"""What every Triton kernel takes of AMD's GPUs, which are not here.

`python -m benchmarks.counting.amd_resources` compiles them (`compiled_table`), and writes
registers, spills, shared memory and matrix instructions to
benchmarks/results/amd-resources.{json,md}. Fails where a kernel is not within its means.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stem_kernels.triton import AMD_ARCHITECTURES

from .. import records
from .compiled_table import WITHOUT_PRODUCTS, CompiledTable
from .launches import Launch

OUT = records.RESULTS / "amd-resources.json"
DTYPES = (torch.float16, torch.float32)
"""bfloat16's kernels are float16's with other matrix instructions."""
SHARED_BYTES = 65536
"""What one block may ask for."""
SPILLED = {("moments", "gfx1100"): 96, ("fused", "gfx1100"): 18}
"""Registers that kernels may spill: gfx11 has operands of matrix instructions twice in a wave, and
no tile is smaller than those of 256 bases' weights, or of 160 channels."""
SPILLED_IN_FLOAT32 = 300
"""The same where float32 is multiplied without matrix instructions, as by all RDNA: the compiler
holds whole rows of a head for it."""


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Args:
        kernel: Name of the kernel.
        form: Name of the first form of the suite that launches it.
        dtype: Type of the features, queries and keys, such as "float16".
        arch: Architecture, such as "gfx942".
        registers: Number of vector registers a thread.
        spilled: Registers that are kept in a thread's own memory.
        shared_bytes: Shared memory of a block.
        matrix: Matrix instructions.
    """

    kernel: str
    form: str
    dtype: str
    arch: str
    registers: int
    spilled: int
    shared_bytes: int
    matrix: int

    def faults(self) -> list[str]:
        """What is wrong with it; none where it is within its means."""
        found = []
        without = self.dtype == "float32" and not self.arch.startswith("gfx9")
        most = SPILLED_IN_FLOAT32 if without else SPILLED.get((self.kernel, self.arch), 0)
        if self.spilled > most:
            found.append(f"{self.spilled} registers are spilled; {most} are explained")
        if self.shared_bytes > SHARED_BYTES:
            found.append(f"{self.shared_bytes} bytes of shared memory; a block has {SHARED_BYTES}")
        if not (self.matrix or without or self.kernel in WITHOUT_PRODUCTS):
            found.append("no matrix instruction")
        return found


def measure(launch: Launch, form: str, dtype: str) -> Resources:
    """Compile a launch of a form, and look at what came out."""
    binary = launch.compiled()
    assembly = binary.asm["amdgcn"]

    def said(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)))

    return Resources(
        launch.name,
        form,
        dtype,
        str(launch.arch),
        said("vgpr_count"),
        said("vgpr_spill_count") + said("sgpr_spill_count"),
        binary.metadata.shared,
        len(re.findall(r"\bv_s?w?mfmac?\w*|\bv_s?wmmac?\w*", assembly)),
    )


def version() -> str:
    """Of Triton, whose wheel has the compiler."""
    return importlib.metadata.version("triton")


def text(found: Mapping[str, Resources]) -> str:
    """The table in Markdown."""
    lines = [
        f"Triton {version()}; K = 256, for 132 multiprocessors. Written by "
        "`python -m benchmarks.counting.amd_resources`. A kernel that several forms launch stands "
        "where it comes first. Spills are those that `SPILLED` and `SPILLED_IN_FLOAT32` explain.",
        "",
        "| form | kernel | dtype | architecture | registers | spilled | shared KiB | matrix |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {row.form} | {row.kernel} | {row.dtype} | {row.arch} | {row.registers} | {row.spilled} "
        f"| {row.shared_bytes / 1024:.0f} | {row.matrix} |"
        for row in found.values()
    ]
    return "\n".join(lines) + "\n"


TABLE = CompiledTable(
    out=OUT,
    row=Resources,
    measure=measure,
    version=version,
    text=text,
    archs=AMD_ARCHITECTURES,
    dtypes=DTYPES,
)
committed, wanted = TABLE.committed, TABLE.wanted


if __name__ == "__main__":
    TABLE.update()
