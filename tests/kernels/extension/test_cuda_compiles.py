"""Every CUDA kernel stays within the means of GPUs that are not here.

Of the architectures that the installed extension was built for, its kernels are looked at; of the
others the committed table is read, which is of the same sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.counting.cuda_resources import (
    MATRIX_KERNELS,
    OUT,
    SHARED_KIB,
    Resources,
    architectures,
    heading,
    measure_library,
    missing,
    version,
)
from benchmarks.counting.resource_table import line
from stem_kernels import cuda

LIBRARY = cuda.FOLDER / "_ext_cuda.so"
REASON = missing()
if REASON is None and not LIBRARY.exists():
    REASON = f"{LIBRARY.name} is not built"
ARCHS = () if REASON else architectures(LIBRARY)
if not ARCHS:
    REASON = REASON or f"{LIBRARY.name} has code for none of {', '.join(SHARED_KIB)}"
    pytest.skip(REASON, allow_module_level=True)


@pytest.fixture(scope="module")
def found() -> list[Resources]:
    return measure_library(LIBRARY, ARCHS)


@pytest.fixture(scope="module")
def table() -> Sequence[str]:
    """The lines of the committed table."""
    lines = OUT.read_text().splitlines()
    if not lines[0].startswith(f"{version()};"):
        pytest.skip(f"{OUT.name} was written with another version of nvcc")
    return lines


def test_resources(found: list[Resources]) -> None:
    assert {row.arch for row in found} == set(ARCHS)
    for row in found:
        assert row.spilled_bytes == 0, row
        assert row.shared_bytes <= SHARED_KIB[row.arch] * 1024, row
        half = "half" in row.kernel or "bfloat16" in row.kernel
        if half and row.kernel.startswith(MATRIX_KERNELS):
            assert row.matrix_instructions > 0, row


def test_the_committed_table_is_what_the_kernels_take(
    found: list[Resources], table: Sequence[str]
) -> None:
    assert table[0] == heading()
    ours = [each for each in table if any(f"| {arch} |" in each for arch in ARCHS)]
    assert ours == [line(row) for row in found]


def test_no_gpu_of_the_committed_table_is_asked_for_too_much(table: Sequence[str]) -> None:
    rows = [[cell.strip() for cell in each.strip("|").split(" | ")] for each in table[4:]]
    assert {row[1] for row in rows} == set(SHARED_KIB)
    assert len(rows) == len(SHARED_KIB) * len({row[0] for row in rows})
    for _, arch, registers, spilled, shared, _ in rows:
        assert int(registers) <= 255
        assert int(spilled) == 0
        assert int(shared) <= SHARED_KIB[arch]
