"""Edits through AnimateDiff's layers along frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inversions import STEM, clip
from motion import animated, make_motion_pipeline, make_still_pipeline

from stem import invert
from stem.editing import METHODS, run_edit
from stem.inversion import InversionFolder, reconstruct_latents

STEPS = 2
QUIET: dict[str, Any] = {"resume": False, "progress": False}
PIVOTS = {name: {"chunk": 1} for name in ("tokenflow", "sdedit")}


def inversion_by(pipeline: Any, root: Path) -> InversionFolder:
    return invert(pipeline, clip(), "a duck", root, options=STEM, num_steps=STEPS, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> InversionFolder:
    return inversion_by(make_motion_pipeline(), tmp_path_factory.mktemp("moving"))


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, InversionFolder]]:
    """A pipeline whose layers along frames leave every frame as it is, and one without any."""
    both = (animated(strength=0.0), make_still_pipeline())
    return [(each, inversion_by(each, tmp_path_factory.mktemp("still"))) for each in both]


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_change_nothing_change_no_edit(
    method: str, unmoved: list[tuple[Any, InversionFolder]]
) -> None:
    settings = {"method": method, "options": PIVOTS.get(method), **QUIET}
    found, expected = (run_edit(*each, "a swan", **settings).latents for each in unmoved)
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_a_stopped_edit_goes_on_bit_for_bit(folder: InversionFolder) -> None:
    pipeline = make_motion_pipeline()
    expected = run_edit(pipeline, folder, "a swan", **QUIET).latents
    source = reconstruct_latents(pipeline, folder, **QUIET)
    assert (source - expected).norm() / expected.norm() > 0.01
    steps = 0

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_edit(pipeline, folder, "a swan", progress=False, on_step=stop)
    found = run_edit(pipeline, folder, "a swan", progress=False, on_step=stop).latents
    assert steps == STEPS
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", PIVOTS)
def test_pivots_alone_are_no_video(method: str, folder: InversionFolder) -> None:
    message = r"chunk is 8: the pivot of each chunk .* UNetMotionModel \(motion_modules\).*chunk=1"
    with pytest.raises(ValueError, match=message):
        run_edit(make_motion_pipeline(), folder, "a swan", method=method, **QUIET)
