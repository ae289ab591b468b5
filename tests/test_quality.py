"""The quality study, small: it goes on where it stopped, and its table is that of its rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import quality
from stem import InflatedConfig, load_pipeline
from stem.attention.handle import self_attentions
from stem.diffusion.pipeline import encode_frames
from stem.inversion import round_trip
from stem.toy import render, sample_scene

ROWS = ("inflated", "stem", "16 frames: global bases", "16 frames: bases of 8")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "WORLD_VIDEOS", 2)
    monkeypatch.setattr(quality, "STEPS", 2)
    monkeypatch.setattr(quality, "NATURAL", {"bikes.mp4": "0:16"})


@pytest.mark.usefixtures("small")
def test_an_interrupted_study_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quality.json"
    quality.run(out, ROWS[:2], 1)
    first = json.loads(out.read_text())["rows"]
    assert list(first) == [quality.CEILING, *ROWS[:2]]
    for row in first["stem"].values():
        assert 0 < row["psnr"] <= 100
        assert len(row["similarity"]) in (0, 2)
        assert 0 < row["attention_error"] < 0.1
    capsys.readouterr()
    quality.main(out, ",".join(ROWS), 1)
    assert "stem:" not in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["rows"]["stem"] == first["stem"]
    text = out.with_suffix(".md").read_text()
    for name in (quality.CEILING, *ROWS):
        assert f"| {name} |" in text
    # Attention over all frames differs from itself by rounding only.
    assert max(quality.values(results, "inflated", "attention_error", world=True)) < 1e-5
    one, two = quality.values(results, "inflated", "psnr", world=True)
    assert re.search(rf"\| inflated \| {(one + two) / 2:.2f} ± ", text)
    assert Image.open(out.with_suffix(".png")).size[0] > 1000
    results["measured"]["stem"]["variant"] = "what it was"
    results["rows"]["gone"] = results["rows"]["stem"]
    results["measured"]["gone"] = results["measured"]["stem"]
    out.write_text(json.dumps(results))
    kept = quality.run(out, ROWS[:1], 1)["rows"]
    assert set(kept) == {quality.CEILING, *ROWS} - {"stem"}
    assert "stem has changed: what it was" in capsys.readouterr().out
    results["model"] = {}
    out.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="of another model"):
        quality.run(out, ROWS, 1)


def test_the_probe_looks_at_the_inversion_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "PROBED_STEPS", 2)
    pipeline = load_pipeline("embedded")
    clip = render(sample_scene(1), 2, quality.SIZE)
    latents = encode_frames(pipeline, clip.frames)
    probe = quality.Probe(
        pipeline.unet, quality.Source(clip.frames, ""), latents.shape[2:], num_steps=4
    )
    round_trip(pipeline, latents, "", 4, InflatedConfig(), on_inverted=probe.on_inverted)
    probe.remove()
    assert len(probe.errors) == 2 * len(self_attentions(pipeline.unet))
    assert max(probe.errors) < 1e-5
    round_trip(pipeline, latents, "", 4)
    assert len(probe.errors) == 2 * len(self_attentions(pipeline.unet))
