"""The study of a small card's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.cases.unets import sd15_unet
from benchmarks.studies.small_cards import run as study
from benchmarks.studies.small_cards.run import WAYS, measure_point, run, table

MEASURED = [name for name, way in WAYS.items() if way.measured]


def test_a_way_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def point(module: str, name: str, model: str) -> dict[str, int]:
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"loading": 2**30, "running": 5 * 2**28}

    monkeypatch.setattr(study, "measured_apart", point)
    monkeypatch.setattr(study, "write_pipeline", lambda folder: (folder / "written").touch())
    model, out = tmp_path / "model", tmp_path / "small.json"
    model.mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(out, model)
    results = run(out, model)
    assert asked == [*MEASURED[:3], *MEASURED[2:]]
    text = table(results)
    assert "| nothing | 1,024 | 1,280 |" in text
    assert "| `--offload model` | needs an accelerator | needs an accelerator |" in text
    assert text.count("| 1,024 |") == len(MEASURED)


@pytest.mark.parametrize("name", [MEASURED[3], MEASURED[-1]])
def test_a_process_tells_its_peaks(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "PIXELS", 32)
    found = measure_point(WAYS[name], Path(model), tmp_path)
    assert set(found) == {"loading", "running"}
    assert all(peak > 2**26 for peak in found.values())


def test_the_unet_has_the_true_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda self, device: self)
    unet = sd15_unet()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
