"""The files that `write_edits` writes of an edit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inversions import clip, inverted
from pipelines import make_pipeline

from stem import write_video
from stem.editing import run_edit
from stem.editing.pasting import edited_frames
from stem.workflows.edit_plan import EditPlan
from stem.workflows.edits import write_edits


@pytest.mark.parametrize("given", [False, True])
def test_no_frame_is_decoded_twice_for_the_videos(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, folder = make_pipeline(), inverted(tmp_path)
    video = clip() if given else None
    found = run_edit(pipeline, folder, "a goose", progress=False)
    assert found.pasted
    frames = edited_frames(pipeline, folder, found, clip().frames if given else None)
    decoded, decode = [], pipeline.vae.decode

    def counted(latents: torch.Tensor, *args: object, **kwargs: object) -> object:
        decoded.append(latents.shape[0])
        return decode(latents, *args, **kwargs)

    monkeypatch.setattr(pipeline.vae, "decode", counted)
    plan = EditPlan(["a goose"])
    edits = write_edits(pipeline, folder, plan, tmp_path / "out", video=video, progress=False)
    count = found.latents.shape[0]
    # The edit, the reconstruction and, where no video is given, the source; and each for the sheet.
    assert sum(decoded) <= 2 * count * (2 if given else 3)
    write_video(tmp_path / "frames.mp4", frames, clip().fps)
    assert edits.results[0].files.video.read_bytes() == (tmp_path / "frames.mp4").read_bytes()
