"""The video transformer that comes with the package, and its training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from stem.flow import EmbeddedVideoModel
from stem.flow.loading import EMBEDDED_VIDEO_FOLDER
from stem.world.training.card import CARD, EVALUATION_RECORD, LATENTS, TRAINING_RECORD
from stem.world.training.evaluate_video import LEVELS, Size, evaluate_video
from stem.world.training.video import SHIFT, Recipe, train
from stem.world.training.video_card import video_card

SMALL = Recipe(
    clips=2,
    frames_steps=2,
    windows_steps=1,
    videos_steps=2,
    refinement_steps=1,
    rates_over=(2, 3, 2, 1),
    layers=1,
)
FORMS = {"frames": ((1, 4, 2),), "windows": ((3, 4, 1), (2, 3, 2)), "videos": ((2, 6, 1),)}
FORMS["refinement"] = FORMS["videos"]


def record(name: str) -> Any:
    return json.loads((EMBEDDED_VIDEO_FOLDER / name).read_text())


def test_a_resumed_training_ends_as_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stem.world.training.video.FRAMES", 4)
    monkeypatch.setattr("stem.world.training.video.STAGES", FORMS)
    whole = train(SMALL, tmp_path / "whole")
    assert whole is not None
    shutil.copytree(
        tmp_path / "whole",
        tmp_path / "resumed",
        ignore=lambda _, names: {name for name in names if not name.startswith("clips")},
    )
    for steps in (1, 4):
        assert train(SMALL, tmp_path / "resumed", until=steps) is None
    resumed = train(SMALL, tmp_path / "resumed")
    assert resumed is not None
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())
    folder = tmp_path / "whole" / "video_model"
    saved = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
    assert all(torch.equal(values.float(), saved[name]) for name, values in ours.items())
    assert len(json.loads((folder / LATENTS).read_text())["std"]) == 12
    assert json.loads((folder / TRAINING_RECORD).read_text())["stages"]["frames"]["steps"] == 2


def test_it_is_small_and_loads_in_diffusers() -> None:
    files = [file for file in EMBEDDED_VIDEO_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert {file.suffix for file in files} == {".json", ".md", ".safetensors"}
    transformer = WanTransformer3DModel.from_pretrained(EMBEDDED_VIDEO_FOLDER / "transformer")
    assert transformer.config.in_channels == len(record(LATENTS)["mean"])
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(EMBEDDED_VIDEO_FOLDER / "scheduler")
    assert scheduler.config.shift == SHIFT


def test_the_card_is_that_of_its_records() -> None:
    card = video_card(record(TRAINING_RECORD), record(EVALUATION_RECORD))
    assert (EMBEDDED_VIDEO_FOLDER / CARD).read_text() == card


def test_it_takes_noise_from_videos_and_comes_back() -> None:
    size = Size(clips=1, inverted=1, samples=1, frames=4, sampling_steps=1, inversion_steps=3)
    measured = evaluate_video(EmbeddedVideoModel(EMBEDDED_VIDEO_FOLDER), size)
    for figures, decibels in ((record(EVALUATION_RECORD), 40), (measured, 22)):
        for level in LEVELS:
            row = figures["denoising"][str(level)]
            assert row["error"] < 0.5  # 1 is that of predicting 0
            assert row["psnr"] > row["noisy_psnr"] + 2
        assert figures["inversion"]["psnr_to_vae"] > decibels
