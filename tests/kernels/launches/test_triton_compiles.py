"""Every kernel compiles for GPUs that are not here, as launches specialise it, within its means."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from conftest import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from benchmarks.counting import resources
from benchmarks.counting.launches import Launch
from benchmarks.counting.resources import (
    OUT,
    SHARED_KIB,
    Resources,
    committed,
    measure,
    text,
    wanted,
)

SAMPLE = (
    (90, "float16", "em key d=40"),
    (90, "float16", "basis attention d=80"),
    (90, "float16", "em feature d=320"),
    (80, "float16", "em feature d=640"),
    (100, "float16", "partial attention d=64"),
    (86, "float32", "em key d=40"),
    (120, "float32", "em key d=64"),
    (89, "float16", "nearest token n=32768"),
)
"""Architecture, dtype and form of what is compiled in each run of the tests."""
Wanted = Mapping[str, tuple[Launch, str, str]]


@pytest.fixture(scope="module")
def launched() -> Wanted:
    """All that launchers ask for: launch, form and dtype by digest."""
    return {digest: (launch, form, dtype) for digest, launch, form, dtype in wanted()}


@pytest.fixture(scope="module")
def table() -> Mapping[str, Resources]:
    found = committed()
    if not found:
        pytest.skip(f"{OUT.name} was written with another triton than {resources.version()}")
    return found


def test_the_committed_table_is_of_these_sources(
    launched: Wanted, table: Mapping[str, Resources]
) -> None:
    missing = {launched[digest][1:] for digest in launched.keys() - table.keys()}
    again = f"run `python -m benchmarks.counting.resources`: {OUT.name} has"
    assert not missing, f"{again} nothing of {len(missing)} launches: {sorted(missing)[:5]}"
    assert not table.keys() - launched.keys(), f"{again} launches that are no more"
    assert OUT.with_suffix(".md").read_text() == text(resources.version(), table)


def test_no_kernel_is_beyond_its_means(table: Mapping[str, Resources]) -> None:
    assert {row.arch for row in table.values()} == set(SHARED_KIB)
    faults = {row: row.faults() for row in table.values() if row.faults()}
    assert not faults


@pytest.mark.parametrize(("arch", "dtype", "form"), SAMPLE)
def test_kernels_compile_to_what_is_committed(
    arch: int, dtype: str, form: str, launched: Wanted, table: Mapping[str, Resources]
) -> None:
    chosen = {
        digest: launch
        for digest, (launch, name, of) in launched.items()
        if (launch.arch, of, name) == (arch, dtype, form)
    }
    assert chosen
    for digest, launch in chosen.items():
        if launch.name not in resources.WITHOUT_PRODUCTS:
            assert measure(launch, form, dtype) == table[digest]


def resources_with(**changes: object) -> Resources:
    fitting = {
        "kernel": "fused", "form": "em key d=40", "dtype": "float16", "arch": 86, "registers": 255,
        "local": 0, "narrow": 0, "shared_bytes": 99 * 1024, "matrix": 1,
    }  # fmt: skip
    return Resources(**{**fitting, **changes})  # type: ignore[arg-type]


def test_faults_are_found() -> None:
    assert resources_with().faults() == []
    for change in (
        {"local": 1}, {"narrow": 1}, {"shared_bytes": 99 * 1024 + 1}, {"matrix": 0}
    ):  # fmt: skip
        assert len(resources_with(**change).faults()) == 1
    assert resources_with(matrix=0, dtype="float32").faults() == []
    assert resources_with(matrix=0, kernel="update").faults() == []
