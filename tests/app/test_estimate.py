"""What a job will take: counts that hold, times that earlier jobs tell, advice that helps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stem import load_pipeline
from stem.app import estimate as estimating
from stem.app.commands import AskedError, Edits, Inversion
from stem.app.estimate import Estimate, estimate, shape_of, unet_of
from stem.app.jobs import Job
from stem.app.shown import estimated
from stem.diffusion.memory import _probe
from stem.diffusion.pipeline import encode_prompt

SIZE = (640, 360)


@pytest.fixture
def inversion(tmp_path: Path) -> Inversion:
    asked = {"video": "a.mp4", "model": "embedded", "method": "stem", "prompt": "", "steps": 4}
    rest = {"chunk": "auto", "first": 0, "stop": 8, "size": "64", "out": str(tmp_path)}
    return Inversion(**asked, **rest)


def expected(asked: Inversion | Edits, inversion: Inversion, *jobs: Job) -> Estimate:
    return estimate(asked, inversion, SIZE, "cpu", jobs)


def timed(folder: Path, asked: dict[str, object], **seconds: float) -> Job:
    folder.mkdir()
    job = Job(folder, "", (), {**asked, "video_size": list(SIZE)}, device="cpu")
    lines = [
        {"name": name.replace("_", " "), "before": 2, "done": 4, "total": 4, "seconds": value}
        for name, value in seconds.items()
    ]
    job.progress.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job


def test_what_waits_is_counted_as_hooks_find_it() -> None:
    pipeline, unet = load_pipeline("embedded", device="cpu"), unet_of("embedded", half=False)
    assert unet is not None
    conditioning = encode_prompt(pipeline, "", 64, 96)
    _, held = _probe(pipeline, 1, 64, 96, conditioning)
    assert unet.held_bytes(64, 96) == held


def test_a_size_is_what_the_command_makes_of_it() -> None:
    assert shape_of(640, 360, "", 8) == (640, 360)
    assert shape_of(640, 360, "64", 8) == (112, 64)
    assert shape_of(640, 360, "70x50", 8) == (64, 48)


def test_time_is_that_of_earlier_steps_and_grows_with_frames(
    tmp_path: Path, inversion: Inversion
) -> None:
    assert expected(inversion, inversion).seconds is None
    first = timed(tmp_path / "1", inversion.record(), invert_stem=3.0)  # two steps
    assert expected(inversion, inversion, first).seconds == pytest.approx(6)
    longer = dataclasses.replace(inversion, stop=16)
    assert expected(longer, longer, first).seconds == pytest.approx(12)
    everything = dataclasses.replace(inversion, method="inflated")
    assert expected(everything, everything, first).seconds is None
    prompts = {"prompts": ["a", "b"], "methods": ["pnp"], "preset": "", "guidance": None}
    rest = {"negative_prompt": "", "seed": 0, "options": [], "out": inversion.out}
    edits = Edits(inversion, **prompts, **rest)  # type: ignore[arg-type]
    assert expected(edits, inversion, first).seconds is None
    second = timed(tmp_path / "2", edits.record(), edit_pnp=5.0, reconstruct_stem=1.0)
    # Two edits and a reconstruction, each of four steps.
    assert expected(edits, inversion, first, second).seconds == pytest.approx(2 * 10 + 2)
    # In a window each is inverted once more.
    zoomed = dataclasses.replace(edits, methods=["fusion"], zoom=True)
    assert zoomed.arguments()[-1] == "--zoom"
    texts = [f"{prompt}, large" for prompt in edits.prompts]
    described = dataclasses.replace(zoomed, zoom_prompts=texts, zoom_source="a large duck")
    window = ["--zoom", *(f"--zoom-prompt={text}" for text in texts), "--zoom-source=a large duck"]
    assert described.arguments()[-len(window) :] == window
    with pytest.raises(AskedError, match="the window has 1 prompts, and whole frames have 2"):
        dataclasses.replace(zoomed, zoom_prompts=texts[:1])
    with pytest.raises(AskedError, match="it is off; turn it on"):
        dataclasses.replace(described, zoom=False)
    assert "--zoom" not in edits.arguments()
    third = timed(tmp_path / "3", zoomed.record(), edit_fusion=5.0)
    found = expected(zoomed, inversion, first, second, third)
    assert found.seconds == pytest.approx(2 * 10 + 2 + 2 * 6)
    assert found.disk == 3 * expected(inversion, inversion).disk
    with pytest.raises(AskedError, match="a window is for fusion alone, not for pnp"):
        dataclasses.replace(edits, zoom=True)


def test_what_does_not_fit_is_said_with_what_does(
    inversion: Inversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = expected(inversion, inversion)
    assert fits.advice == ""
    assert fits.memory is not None
    monkeypatch.setattr(estimating, "free_bytes", lambda device: int(fits.memory / 0.7) - 1)
    advice = expected(inversion, inversion).advice
    assert advice == "take at most 7 frames of this size"
    fewer = dataclasses.replace(inversion, stop=7)
    assert expected(fewer, fewer).advice == ""
    monkeypatch.setattr(estimating, "free_bytes", lambda device: fits.memory // 8)
    assert "take a s" in expected(inversion, inversion).advice  # a size, or a smaller model


def test_a_smaller_size_makes_the_weights_no_smaller(
    inversion: Inversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = dataclasses.replace(inversion, size="512")
    embedded = unet_of("embedded", half=False)
    assert embedded is not None
    unet = dataclasses.replace(embedded, weights=2**34)
    monkeypatch.setattr(estimating, "unet_of", lambda model, half: unet)
    needed = expected(large, large).memory
    assert needed is not None
    free = unet.weights + (needed - unet.weights) // 9
    monkeypatch.setattr(estimating, "free_bytes", lambda device: int(free / 0.7) + 1)
    advice = expected(large, large).advice
    assert advice == "take a size of 128"  # 9 times fewer pixels are 170 and more
    smaller = dataclasses.replace(large, size="128")
    assert expected(smaller, smaller).advice == ""
    monkeypatch.setattr(estimating, "free_bytes", lambda device: unet.weights)
    assert expected(large, large).advice == "take a smaller model"


def test_only_of_a_model_that_is_not_here_the_page_says_so(
    inversion: Inversion, tmp_path: Path
) -> None:
    file = tmp_path / "whole.safetensors"
    file.touch()
    said = "not on this machine yet, so its memory is not known"
    for model, here in ((str(file), True), ("random", True), ("nobody/nothing", False)):
        asked = dataclasses.replace(inversion, model=model)
        text = estimated(expected(asked, asked), "inversion")
        assert (said in text) != here
        assert "memory is not known before it is loaded" in text


def test_windows_count_in_what_the_disk_takes(
    inversion: Inversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = Edits(inversion, ["a", "b"], ["fusion"], "", None, "", 0, [], inversion.out, zoom=True)
    for asked in (inversion, edits):
        disk = expected(asked, inversion).disk
        assert disk is not None
        room = SimpleNamespace(free=disk - 1)
        with monkeypatch.context() as patch:
            patch.setattr(estimating.shutil, "disk_usage", lambda path, room=room: room)
            assert expected(asked, inversion).advice == "the disk takes 7 frames"
