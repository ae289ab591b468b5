"""Reconstruction and editing with calibrated bases, on one small video."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies.calibration import round_trips as calibration_runs
from benchmarks.studies.editing import measure as editing_measure


@pytest.mark.long
def test_a_video_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration_runs, "FRAMES", 2)
    monkeypatch.setattr(calibration_runs, "STEPS", 2)
    monkeypatch.setattr(editing_measure, "STEPS", 2)
    monkeypatch.setattr(calibration_runs, "EDIT_KINDS", ("colour",))
    out = tmp_path / "runs.json"
    calibration_runs.main(out, 1)
    text = out.with_suffix(".md").read_text()
    first = calibration_runs.run(out, 0)["rows"]
    (row,) = first.values()
    for name in calibration_runs.STEM_OPTIONS:
        assert set(row[name]) == {"reconstruction, dB", "colour, dB", "colour, Warp-Err"}
        assert f"| {name} |" in text
    # 32 and 2 tokens a base: nearer to attention over all frames with more bases
    exact = row["all-frame"]["reconstruction, dB"]
    gaps = {name: abs(figures["reconstruction, dB"] - exact) for name, figures in row.items()}
    assert gaps["K=256, 22 a base, moments"] < gaps["K=16, 22 a base, moments"]
    assert gaps["K=256, 22 a base, moments"] < gaps["per-frame"]
    capsys.readouterr()
    assert calibration_runs.run(out, 1)["rows"] == first
    assert "video 0" not in capsys.readouterr().out
