"""Edits of a video of two scenes: a scene that is there twice is edited twice alike."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline

from stem import Video, invert, parking
from stem.attention.waiting import parked
from stem.editing import run_edit
from stem.editing.regions import consensus
from stem.inversion import InversionFolder

FRAMES, STEPS = 4, 2
SHAPE = {"preset": "shape", "mask_threshold": 0.95, "dilation": 0, "consensus_until": 1.0}
BASES = {"num_bases": 8, "num_iters": 2, "temperature": 0.1}


def inverted(root: Path, times: int) -> InversionFolder:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(FRAMES, 3, 3, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(noise, size=(12, 16), mode="bilinear")
    frames = (smooth.permute(0, 2, 3, 1) * 255).to(torch.uint8).repeat(times, 1, 1, 1)
    return invert(
        make_pipeline(),
        Video(frames, Fraction(8)),
        "a red ball",
        root,
        options=BASES,
        num_steps=STEPS,
        chunk=None,
        cuts=(FRAMES,) * (times - 1),
        progress=False,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[InversionFolder]:
    return [inverted(tmp_path_factory.mktemp("inversions"), times) for times in (1, 2)]


def pivots(times: int) -> list[list[int]]:
    """Frames 1 and 2 of the two chunks of each scene, then 0 and 3."""
    rows = [(1, 2), (0, 3)]
    return [[FRAMES * scene + frame for scene in range(times) for frame in row] for row in rows]


METHODS = pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fusion", SHAPE),
        ("tokenflow", {"chunk": 2, "blend": "adjacent", "extended": "stem"}),
        ("fatezero", {"blend_words": [["ball"], ["box"]]}),
    ],
)


@METHODS
def test_a_scene_that_is_there_twice_is_edited_twice_alike(
    folders: list[InversionFolder], method: str, options: dict[str, Any]
) -> None:
    found = []
    for times, folder in enumerate(folders, 1):
        own = dict(options)
        if method == "tokenflow":
            own["pivots"] = pivots(times)
        settings = {"method": method, "options": own, "resume": False, "progress": False}
        found.append(run_edit(make_pipeline(), folder, "a blue box", **settings))
    alone, both = found
    for part in both.latents.split(FRAMES):
        off = (part - alone.latents).norm() / alone.latents.norm()
        assert off < 1e-5, f"{off:.1e} of the latents"
    if alone.masks is not None:
        assert method != "fusion" or 0 < alone.masks.float().mean() < 1
        assert torch.equal(both.masks, alone.masks.repeat(2, 1, 1))


@METHODS
def test_an_edit_in_files_and_by_parts_has_the_same_bits(
    folders: list[InversionFolder],
    method: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a consensus the sums are by parts in either."""
    monkeypatch.setattr(consensus, "FRAMES_AT_ONCE", 3)
    monkeypatch.setattr(parked, "LEAST_BYTES", 1)
    settings = {"method": method, "options": options, "resume": False, "progress": False}
    found = []
    for kind, at_once in (("never", 64), ("disk", 3)):
        monkeypatch.setattr(parked, "FRAMES_AT_ONCE", at_once)
        with parking(kind, tmp_path):
            found.append(run_edit(make_pipeline(), folders[1], "a blue box", **settings))
    assert found[1].latents.untyped_storage().filename is not None
    assert torch.equal(found[0].latents, found[1].latents)


def test_without_cuts_the_scenes_share_their_bases(
    folders: list[InversionFolder], tmp_path: Path
) -> None:
    settings = folders[1].settings
    as_one = {**settings, "attention": {**settings["attention"], "cuts": []}}
    folder, _ = InversionFolder.prepare(tmp_path, as_one, folders[1].timesteps)
    folder.save_x0(folders[1].x0(), {})
    for step in range(STEPS):
        folder.save_latents(step, folders[1].latents(step), folders[1].environment(step))
    edits = [
        run_edit(
            make_pipeline(),
            each,
            "a blue box",
            options=SHAPE,
            resume=False,
            progress=False,
        )
        for each in (folders[1], folder)
    ]
    assert (edits[0].latents - edits[1].latents).norm() > 1e-3 * edits[0].latents.norm()
