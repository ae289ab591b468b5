"""Progress: a bar on a terminal, lines with the time left elsewhere, nothing unless asked for."""

from __future__ import annotations

import logging
import sys
import time

import pytest

from stem.progress import steps


def lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seconds: float, **how: int
) -> list[str]:
    """What the log says of steps that take `seconds` each."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO, "stem")
    caplog.clear()
    with steps(name="invert stem", **how) as progress:
        for _ in range(how["total"] - how.get("initial", 0)):
            now += seconds
            progress.update()
    return [record.getMessage() for record in caplog.records]


def test_the_log_says_how_long_the_rest_takes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = lines(caplog, monkeypatch, 2.0, total=50)
    assert said[0] == "invert stem: 5 of 50 steps, 0:01:30 left"
    assert [line.split()[2] for line in said] == [
        "5",
        "10",
        "15",
        "20",
        "25",
        "30",
        "35",
        "40",
        "45",
    ]
    said = lines(caplog, monkeypatch, 40.0, total=50, initial=45)
    assert said[0] == "invert stem: 46 of 50 steps, 0:02:40 left"
    assert len(said) == 4
    assert lines(caplog, monkeypatch, 0.01, total=50) == []
    assert lines(caplog, monkeypatch, 40.0, total=50, show=False) == []


def test_a_terminal_shows_a_bar(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with steps(total=4, initial=1, name="invert stem") as progress:
        progress.update()
    shown = capfd.readouterr().err
    assert "invert stem" in shown
    assert "2/4" in shown
    with steps(total=4, name="invert stem", show=False) as progress:
        progress.update()
    assert capfd.readouterr().err == ""
