"""The tables of tiles: every row has a case and a form, and what tuning writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.cases.case import Trial
from benchmarks.counting.forms import forms
from benchmarks.counting.launches import launches
from benchmarks.suite import tune
from stem_kernels.triton import tuning
from stem_kernels.triton.tuning import table

CPU = torch.device("cpu")


def test_every_row_of_the_tables_has_a_case_and_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "TOKENS", 64)
    # All rows stand in one table, each with a number of stages of its own.
    marks = {op: 100 + place for place, op in enumerate(tune.known())}
    rows = {**table("default"), **table("sm80"), **table("sm90")}
    marked = {op: {**rows[op], "num_stages": mark} for op, mark in marks.items()}
    monkeypatch.setattr(tuning, "table", lambda name: marked)

    def taken(call: Callable[[], object]) -> set[int]:
        return {launch.options.get("num_stages") for launch in launches(90, call)}

    for op, mark in marks.items():
        assert mark in taken(Trial(tune.case_for(op, CPU)).start("triton")), op
    dtypes = (torch.float16, torch.float32)
    found = set().union(*(taken(form.call) for dtype in dtypes for form in forms(dtype)))
    assert found >= set(marks.values())


def test_tuning_drops_what_spills_and_writes_tables_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(tune, "WARPS", (8,))
    monkeypatch.setattr(tune, "STAGES", (2,))
    monkeypatch.setitem(tune.TILES, "em_fused", {"block_n": (32, 128)})
    found = list(tune.candidates("em_fused 160", 90))
    assert {row["block_n"] for row in found} == {32}
    assert [row["programs"] for row in found] == [1, 2, 3, 4]
    committed = (tune.CONFIGS / "sm90.json").read_text()
    assert tune.text(table("sm90")) == committed
