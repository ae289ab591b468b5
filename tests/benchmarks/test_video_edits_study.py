"""The study of FlowEdit's edits: what it measures and writes, and that it goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records
from benchmarks.studies.video_transformers import edits


def test_it_measures_goes_on_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = {"guidance": 4.0, "options": {"n_max": 1, "source_guidance": 1.5}}
    values: dict[str, Any] = {"STEPS": 2, "SETTINGS": {"one": setting}, "KINDS": ("colour",)}
    for name, value in values.items():
        monkeypatch.setattr(edits, name, value)
    out = tmp_path / "edits.json"
    edits.main(out, scenes=1)
    first = records.read(out)["rows"]
    assert list(first) == ["colour, one, exact attention", "colour, one, defaults"]
    exact, ours = (row[str(edits.FIRST_SEED)] for row in first.values())
    assert exact["outside"] > exact["inside"] > 0
    assert exact["all"] != ours["all"]
    assert exact["all"] == pytest.approx(ours["all"], abs=1)
    edits.main(out, scenes=2)
    second = records.read(out)["rows"]
    for name, row in first.items():
        assert len(second[name]) == 2
        assert second[name].items() >= row.items()
    assert re.search(r"\| colour \| one \| defaults \| [+-]", out.with_suffix(".md").read_text())
