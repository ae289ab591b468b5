"""Every kernel compiles for GPUs that are not here, within their means, with the tiles it gets."""

from __future__ import annotations

import importlib.metadata

import pytest
from conftest import INTERPRETED

pytest.importorskip("triton", "3.3", reason="compiling for a GPU that is not here takes triton 3.3")
if INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from benchmarks.resources import OUT, SHARED_KIB, measure, text


@pytest.fixture(scope="module")
def half_precision():  # type: ignore[no-untyped-def]
    return {arch: measure(arch) for arch in SHARED_KIB}


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_half_precision(arch: int, half_precision) -> None:  # type: ignore[no-untyped-def]
    assert len(half_precision[arch]) > 10
    for row in half_precision[arch]:
        assert row.spilled_bytes == 0, row
        assert row.shared_bytes <= SHARED_KIB[arch] * 1024, row
        # None at all would mean that the compiler threw the kernel away, which it has done.
        assert row.matrix_instructions > 0, row


def test_the_committed_table_is_what_the_kernels_take(half_precision) -> None:  # type: ignore[no-untyped-def]
    if f"Triton {importlib.metadata.version('triton')}," not in OUT.read_text():
        pytest.skip(f"{OUT.name} was written with another version of triton")
    assert OUT.read_text() == text([row for rows in half_precision.values() for row in rows])


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_single_precision_fits(arch: int) -> None:
    for row in measure(arch, "fp32"):
        assert row.shared_bytes <= SHARED_KIB[arch] * 1024, row
