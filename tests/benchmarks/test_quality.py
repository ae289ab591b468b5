"""The quality study, small: it goes on where it stopped, and its table is that of its rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import records
from benchmarks.studies.quality import measure as quality_measure
from benchmarks.studies.quality import run as quality
from benchmarks.studies.quality import variants as quality_variants
from benchmarks.studies.quality.report import draw, table, values
from stem import InflatedConfig, StemConfig, load_pipeline
from stem.attention.families import self_attentions
from stem.diffusion.pipeline import encode_frames
from stem.inversion import round_trip
from stem.world import render, sample_scene

ROWS = ("inflated", "stem", "16 frames: global bases", "16 frames: bases of 8")
FRAMES, LONG_FRAMES = 2, 4


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quality_measure, "WORLD_VIDEOS", 2)
    monkeypatch.setattr(quality_measure, "NATURAL", {"bikes.mp4": f"0:{LONG_FRAMES}"})
    monkeypatch.setattr(quality, "FRAMES", FRAMES)
    for module in (quality, quality_variants):
        monkeypatch.setattr(module, "LONG_FRAMES", LONG_FRAMES)
    for name, frames in zip(ROWS, (FRAMES, FRAMES, LONG_FRAMES, LONG_FRAMES), strict=True):
        shorter = replace(quality_variants.VARIANTS[name], frames=frames)
        monkeypatch.setitem(quality_variants.VARIANTS, name, shorter)
    chunks = quality_variants.Variant(StemConfig(num_frames=FRAMES), LONG_FRAMES)
    monkeypatch.setitem(quality_variants.VARIANTS, ROWS[3], chunks)
    monkeypatch.setattr(quality, "STEPS", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.long
@pytest.mark.usefixtures("small")
def test_an_interrupted_study_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "quality.json"
    quality.main(out, ROWS[0], 1)
    first = records.read(out)["rows"]
    assert list(first) == [quality.CEILING, ROWS[0]]
    assert re.search(rf"\| {ROWS[0]} \| [\d.]+ ± [\d.]+ \|  \|", out.with_suffix(".md").read_text())
    capsys.readouterr()
    # One start of a process is enough to see that it works.
    monkeypatch.setattr(quality, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))
    quality.main(out, ",".join(ROWS), 1)
    assert f"{ROWS[0]}:" not in capsys.readouterr().out
    results = records.read(out)
    assert results["rows"][ROWS[0]] == first[ROWS[0]]
    stem = results["rows"]["stem"]
    assert all(0 < psnr <= 100 for psnr in stem["psnr"])
    assert all(0 < error < 0.1 for error in stem["attention_error"])
    assert [value is None for value in stem["similarity"]] == [False, False, True]
    assert {name: len(curve) for name, curve in results["curves"].items()} == {
        "inflated": 2,
        "stem": 2,
    }
    text = out.with_suffix(".md").read_text()
    for name in (quality.CEILING, *ROWS):
        assert f"| {name} |" in text
    # Attention over all frames differs from itself by rounding only.
    assert max(values(results, "inflated", "attention_error", world=True)) < 1e-5
    one, two = values(results, "inflated", "psnr", world=True)
    assert re.search(rf"\| inflated \| {(one + two) / 2:.2f} ± ", text)
    assert Image.open(out.with_suffix(".png")).size[0] > 1000
    assert len(out.read_text().splitlines()) < 60
    long = {**results, "rows": {ROWS[3]: results["rows"][ROWS[3]]}, "curves": {}}
    assert f"| {ROWS[3]} |" in table(long)
    draw(long, out.with_suffix(".png"))
    results["measured"]["stem"]["variant"] = "what it was"
    results["rows"]["gone"] = results["rows"]["stem"]
    results["measured"]["gone"] = results["measured"]["stem"]
    records.write(results, out)
    kept = quality.run(out, ROWS[:1], 1)
    assert set(kept["rows"]) == {quality.CEILING, *ROWS} - {"stem"}
    assert set(kept["curves"]) == {"inflated"}
    assert "stem has changed: what it was" in capsys.readouterr().out
    records.write({**results, "model": {}}, out)
    with pytest.raises(SystemExit, match=r"is of another model: \{\}, now .*; move it away"):
        quality.run(out, ROWS, 1)


def test_the_probe_looks_at_the_inversion_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_measure, "PROBED_STEPS", 2)
    pipeline = load_pipeline("embedded")
    clip = render(sample_scene(1), 2, quality_measure.SIZE)
    latents = encode_frames(pipeline, clip.frames)
    probe = quality_measure.Probe(
        pipeline.unet, quality_measure.Source(clip.frames, ""), latents.shape[2:], num_steps=4
    )
    round_trip(
        pipeline, latents, "", 4, InflatedConfig(num_frames=2), on_inverted=probe.on_inverted
    )
    probe.remove()
    assert len(probe.errors) == 2 * len(self_attentions(pipeline.unet))
    assert max(probe.errors) < 1e-5
    round_trip(pipeline, latents, "", 4)
    assert len(probe.errors) == 2 * len(self_attentions(pipeline.unet))
