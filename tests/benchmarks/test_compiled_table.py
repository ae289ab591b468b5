"""The table of compiled kernels: nothing twice, nothing lost, faults told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import records
from benchmarks.counting import amd_resources, resources
from benchmarks.counting.compiled_table import CompiledTable


@dataclass(frozen=True)
class Row:
    kernel: str
    form: str
    dtype: str

    def faults(self) -> list[str]:
        return ["it is bad"] if self.kernel == "bad" else []


def text(found: Mapping[str, Row]) -> str:
    return "".join(f"{row.kernel}\n" for row in found.values())


@pytest.fixture
def compiled() -> list[str]:
    return []


@pytest.fixture
def table(tmp_path: Path, compiled: list[str]) -> CompiledTable[Row]:
    def measure(launch: Any, form: str, dtype: str) -> Row:
        if launch == "interrupted":
            raise KeyboardInterrupt
        compiled.append(launch)
        return Row(launch, form, dtype)

    return CompiledTable(tmp_path / "table.json", Row, measure, lambda: "1", text, (), ())


def wanted(*names: str) -> list[Any]:
    return [(name, name, "form", "float16") for name in names]


def test_what_is_known_is_not_compiled_again(
    table: CompiledTable[Row], compiled: list[str]
) -> None:
    table.update(wanted("a", "b"))
    table.update(wanted("b", "c"))
    assert compiled == ["a", "b", "c"]
    assert table.committed().keys() == {"b", "c"}
    assert table.out.with_suffix(".md").read_text() == "b\nc\n"
    assert records.read(table.out)["triton"] == "1"
    replace(table, version=lambda: "2").update(wanted("b"))
    assert compiled == ["a", "b", "c", "b"]


def test_an_interruption_loses_nothing(table: CompiledTable[Row]) -> None:
    table.update(wanted("a"))
    with pytest.raises(KeyboardInterrupt):
        table.update(wanted("b", "interrupted"))
    assert table.committed().keys() == {"a", "b"}


def test_a_fault_is_told_once_all_is_written(table: CompiledTable[Row]) -> None:
    with pytest.raises(SystemExit, match=r"1 kernels are not within their means:\n.*it is bad"):
        table.update(wanted("bad", "a"))
    assert table.committed().keys() == {"bad", "a"}


def test_both_tables_are_made_alike() -> None:
    assert {type(module.TABLE) for module in (resources, amd_resources)} == {CompiledTable}
