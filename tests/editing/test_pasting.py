"""Frames of an edit, which are the source's where the edit leaves the source alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inversions import clip, inverted
from pipelines import make_pipeline

from stem.diffusion.pipeline import decode_latents
from stem.editing import edit, edited_parts, run_edit
from stem.editing.pasting import pasted
from stem.editing.regions.masks import dilated


def test_one_fades_into_the_other_over_the_cells_beside_the_mask() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 3:5, 3:5] = True
    source, frames = (torch.full((1, 64, 64, 3), value, dtype=torch.uint8) for value in (50, 250))
    found = pasted(frames, source, masks)[0, ..., 0].int()
    assert (found[24:40, 24:40] == 250).all()
    assert (found[:12] == 50).all()
    assert (found[:, 52:] == 50).all()
    row = found[32]
    assert (row[12:32].diff() >= 0).all()
    assert row[12:24].diff().max() <= 26  # an eighth of 200, rounded
    everywhere = torch.ones_like(masks)
    assert torch.equal(pasted(frames, source, everywhere), frames)


@pytest.mark.parametrize("video", [True, False])
def test_a_masked_edit_shows_the_source_outside(tmp_path: Path, video: bool) -> None:
    pipeline, folder = make_pipeline(), inverted(tmp_path)
    settings: dict[str, Any] = {"resume": False, "progress": False}
    options: dict[str, Any] = {"mask_threshold": 0.95, "dilation": 0}
    found = run_edit(pipeline, folder, "a goose", options=options, **settings)
    assert found.masks is not None
    source = clip().frames if video else decode_latents(pipeline, folder.x0())
    frames = torch.cat(list(edited_parts(pipeline, folder, found, [source] if video else None)))
    plain = decode_latents(pipeline, found.latents)
    factor = source.shape[1] // found.masks.shape[1]
    inside, far = (
        masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        for masks in (found.masks, ~dilated(found.masks, 2))
    )
    assert inside.any()
    assert far.any()
    assert torch.equal(frames[inside], plain[inside])
    assert torch.equal(frames[far], source[far])
    assert not torch.equal(plain[far], source[far])
    off = run_edit(pipeline, folder, "a goose", options={**options, "paste": False}, **settings)
    assert torch.equal(torch.cat(list(edited_parts(pipeline, folder, off))), plain)
    if not video:
        assert torch.equal(
            edit(pipeline, folder, "a goose", options=options, progress=False), frames
        )


def test_without_a_mask_nothing_is_pasted(tmp_path: Path) -> None:
    folder = inverted(tmp_path)
    for method, options in (("fusion", {"preset": "style"}), ("pnp", None)):
        found = run_edit(
            make_pipeline(), folder, "a goose", method=method, options=options, resume=False,
            progress=False,
        )  # fmt: skip
        assert not found.pasted
