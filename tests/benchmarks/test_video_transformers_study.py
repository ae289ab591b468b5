"""The study of attention by a window and bases: what it counts, measures and writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.studies.video_transformers import run as study


def test_flops_are_counted_at_the_edges_too(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = study.flops_share(4, per_base=10**9, window=2 * study.SIDE, moments=False)
    one_base = (1 + 2 * 8 / 1024 + 0.5) / 1024
    assert everything == pytest.approx(1 + one_base)
    narrow = study.flops_share(4, per_base=10**9, window=1, moments=False) - one_base
    assert narrow == pytest.approx(((3 * 16 - 2) / 16**2) ** 2)
    more = study.flops_share(4, per_base=10**9, window=1, moments=True) - narrow - one_base
    assert more == pytest.approx(2 * study.DIM / 1024)


def test_both_take_as_long_between_two_that_were_measured() -> None:
    rows = {"100": {"sdpa": 1.0, "video": 2.0}, "400": {"sdpa": 2.0, "video": 1.0}}
    assert study.crossover(rows) == pytest.approx(200)
    assert study.crossover({"100": rows["400"]}) is None


def test_it_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SIDE": 8, "FRAMES": 2, "TIMED_FRAMES": (1, 2), "ROUNDS": 1}.items():
        monkeypatch.setattr(study, name, value)
    layers = {"moving": lambda: study.moving(1.0, frames=2), "unlike": study.unlike}
    monkeypatch.setattr(study, "KINDS", layers)
    results = study.measure()
    assert results["errors"]["moving"]["16 a base"] < results["errors"]["moving"]["128 a base"]
    assert results["errors"]["moving"]["defaults"] < results["errors"]["unlike"]["defaults"]
    text = study.table(results)
    assert text.count("\n| moving |") == 1
    assert "| 128 | " in text
    study.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_committed_figures_are_what_was_asked_for() -> None:
    results = records.read(study.OUT)
    longest = results["seconds"]["8192"]
    assert longest["video"] <= 0.35 * longest["sdpa"]
    assert study.crossover(results["seconds"]) is not None
    moved = results["errors"]["half a place a frame"]
    assert moved["defaults"] < min(moved[form] for form in ("no moments", "no EM", "whole values"))
    for kind in ("a still map", "half a place a frame"):
        row = results["errors"][kind]
        assert row["defaults"] < 0.6 * min(row["bases alone"], row["own place only"])
