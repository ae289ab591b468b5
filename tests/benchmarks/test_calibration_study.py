"""The study of calibrated bases, on one small case."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies.calibration import run as calibration
from benchmarks.studies.calibration.report import draw, table
from benchmarks.studies.calibration.variants import FEW, NAMES
from stem import load_pipeline


def test_a_case_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TIMESTEPS", (calibration.OF_UNET,))
    monkeypatch.setattr(calibration, "LENGTHS", (2,))
    out = tmp_path / "calibration.json"
    results = calibration.run(out, "embedded", 32, [], limit=1)
    (case,) = results["cases"].values()
    assert set(case["unet"]) == set(NAMES)
    for layer in case["layers"].values():
        assert set(layer["figures"]) == set(NAMES)
        # 512 tokens in the widest layers: nearer than attention without calibration there, too
        errors = {name: figures["error"] for name, figures in layer["figures"].items()}
        if layer["widest"]:
            assert errors["all tokens, joint"] < errors["all tokens"] < errors["paper"]
    assert {name[-1] for name in case["sharpened"]} == {"2", "4"}
    assert all(set(figures) == set(FEW) for figures in case["sharpened"].values())
    again = calibration.run(out, "embedded", 32, [], limit=0)
    assert again["cases"] == results["cases"]
    with pytest.raises(SystemExit, match="pixels"):
        calibration.run(out, "embedded", 64, [], limit=0)
    longer = next(calibration.long_cases(32))
    results["lengths"][longer.name] = calibration.measure_long(load_pipeline("embedded"), longer)
    assert "| 2 frames |" in table(results)
    assert all(f"| {variant} |" in table(results) for variant in NAMES)
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
