"""What is seen of an edit while it runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from inversions import clip, inverted
from PIL import Image
from pipelines import make_pipeline

from stem.editing import run_edit
from stem.editing.run import Preview
from stem.report.edit_files import EditFiles
from stem.workflows.edit_plan import EditPlan
from stem.workflows.edits import write_edits

PLAN = EditPlan(["a goose"])


def test_a_sheet_is_there_while_an_edit_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, folder = make_pipeline(), inverted(tmp_path)  # five steps
    write = EditFiles.write_preview
    seen: list[EditFiles] = []

    def twice(files: EditFiles, *given: Any) -> None:
        write(files, *given)
        seen.append(files)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(EditFiles, "write_preview", twice)
    settings: dict[str, Any] = {"video": clip(), "progress": False}
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        write_edits(pipeline, folder, PLAN, tmp_path / "out", **settings)
    assert f"{seen[0].preview}: after 1 of 5 steps" in caplog.text
    picture = Image.open(seen[0].preview)
    write_edits(pipeline, folder, PLAN, tmp_path / "out", **settings)
    assert len(seen) == 4  # after two steps once more, as the second was not finished, and three
    assert not seen[0].preview.exists()
    assert seen[0].whole
    assert picture.width == Image.open(seen[0].sheet).width


def test_what_is_shown_is_what_the_steps_lead_to(tmp_path: Path) -> None:
    folder = inverted(tmp_path)
    shown: dict[int, torch.Tensor] = {}
    settings: dict[str, Any] = {"method": "pnp", "resume": False, "progress": False}
    found = run_edit(
        make_pipeline(),
        folder,
        "a goose",
        preview=Preview([2, 0], lambda done, total, clean: shown.update({done: clean})),
        **settings,
    )
    assert list(shown) == [1, 2, 3]
    off = [float((clean - found.latents[[2, 0]]).norm()) for clean in shown.values()]
    assert off[0] > off[1] > off[2] > 0
    alone = run_edit(make_pipeline(), folder, "a goose", **settings)
    assert torch.equal(alone.latents, found.latents)
