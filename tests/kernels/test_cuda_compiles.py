"""Every CUDA kernel compiles for GPUs that are not here, within their means."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.counting.cuda_resources import (
    IN_TESTS,
    MATRIX_KERNELS,
    OUT,
    SHARED_KIB,
    Resources,
    heading,
    measure,
    missing,
    version,
)
from benchmarks.counting.resource_table import line

REASON = missing()
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)


@pytest.fixture(scope="module")
def found() -> list[Resources]:
    return measure(IN_TESTS)


@pytest.fixture(scope="module")
def table() -> Sequence[str]:
    """The lines of the committed table."""
    lines = OUT.read_text().splitlines()
    if not lines[0].startswith(f"{version()};"):
        pytest.skip(f"{OUT.name} was written with another version of nvcc")
    return lines


def test_resources(found: list[Resources]) -> None:
    assert {row.arch for row in found} == set(IN_TESTS)
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
    ours = [each for each in table if any(f"| {arch} |" in each for arch in IN_TESTS)]
    assert ours == [line(row) for row in found]


def test_no_gpu_of_the_committed_table_is_asked_for_too_much(table: Sequence[str]) -> None:
    rows = [[cell.strip() for cell in each.strip("|").split(" | ")] for each in table[4:]]
    assert {row[1] for row in rows} == set(SHARED_KIB)
    assert len(rows) == len(SHARED_KIB) * len({row[0] for row in rows})
    for _, arch, registers, spilled, shared, _ in rows:
        assert int(registers) <= 255
        assert int(spilled) == 0
        assert int(shared) <= SHARED_KIB[arch]
