"""Every CUDA kernel compiles for GPUs that are not here, within their means."""

from __future__ import annotations

import pytest

from benchmarks.counting.cuda_resources import (
    MATRIX_KERNELS,
    OUT,
    SHARED_KIB,
    Resources,
    measure,
    missing,
    text,
    version,
)

REASON = missing()
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)


@pytest.fixture(scope="module")
def found() -> list[Resources]:
    return measure()


def test_resources(found: list[Resources]) -> None:
    assert {row.arch for row in found} == set(SHARED_KIB)
    for row in found:
        assert row.spilled_bytes == 0, row
        assert row.shared_bytes <= SHARED_KIB[row.arch] * 1024, row
        half = "half" in row.kernel or "bfloat16" in row.kernel
        if half and row.kernel.startswith(MATRIX_KERNELS):
            assert row.matrix_instructions > 0, row


def test_the_committed_table_is_what_the_kernels_take(found: list[Resources]) -> None:
    if f"{version()};" not in OUT.read_text():
        pytest.skip(f"{OUT.name} was written with another version of nvcc")
    assert OUT.read_text() == text(found)
