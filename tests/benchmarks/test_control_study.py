"""The study of edits under control: what edits are shown, and that it goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import records
from benchmarks.studies.editing import control as study
from benchmarks.studies.editing import measure as editing_measure
from benchmarks.studies.editing.variants import series_of
from stem.control import canny
from stem.world import world_edit

SEED = 42_000_000


def test_only_edits_of_shapes_are_shown_the_exact_edges() -> None:
    colour, shape = (world_edit(SEED, kind, 2) for kind in ("colour", "shape"))
    assert torch.equal(study.shown(colour), canny(colour.source.frames))
    assert torch.equal(study.shown(shape), canny(shape.exact.frames))
    assert not torch.equal(study.shown(shape), canny(shape.source.frames))


def test_edits_without_and_with_control_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing_measure, "STEPS", 1)
    monkeypatch.setattr(study, "EDIT_KINDS", ("shape",))
    out = tmp_path / "control.json"
    results = study.run(out, 2, 1, ["pnp"])
    names = [study.name_of(series_of(2, "shape", "pnp"), way) for way in study.WAYS]
    assert list(results["rows"]) == names
    without, under = (results["rows"][name][str(SEED)] for name in names)
    assert without["all"] != under["all"]

    def none(*given: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(study, "measure", none)
    assert study.run(out, 2, 1, ["pnp"])["rows"] == results["rows"]
    before = {"all": 20.0, "warp": 2.0, "colour": 1.0, "shape": 0.5}
    after = {"all": 21.5, "warp": 1.0, "colour": 1.0, "shape": 0.75}
    rows = {name: {"1": row, "2": row} for name, row in zip(names, (before, after), strict=True)}
    changed = results | {"rows": rows}
    assert study.table(changed).splitlines()[-1] == (
        "| pnp, shape: the exact answer | 2 | 20.00 ± 0.00 | 21.50 ± 0.00 | +1.50 ± 0.00 "
        "| 2.00 ± 0.00 | 1.00 ± 0.00 | -1.00 ± 0.00 | 100 | 100 | 50 | 75 |"
    )
    with pytest.raises(SystemExit, match="is of another frames: 2, now 3"):
        study.run(out, 3, 1, ["pnp"])
    assert records.read(out)["frames"] == 2
