"""Edits by several processes over gloo: the bits of one, and what happens when one of them dies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from commands import run
from conftest import write_clip
from controls import make_control_pipeline, pictures
from inversions import clip
from pipelines import make_pipeline
from ranks import one_thread, start

from stem import Control, invert, read_video
from stem.editing import run_edit, run_zoomed_edit, zoomed
from stem.inversion import InversionFolder

FRAMES = 5
WORDS = [["duck"], ["swan"]]
EDITS: list[tuple[str, dict[str, Any]]] = [
    ("pnp", {}),
    ("tokenflow", {"chunk": 2}),
    ("tokenflow", {"chunk": 1, "extended": "stem"}),
    ("sdedit", {"chunk": 4}),
    ("fatezero", {"blend_words": WORDS, "blend_latents": True}),
    ("fusion", {"preset": "colour"}),
    ("fusion", {"preset": "shape", "consensus_until": 0.5}),
]
STORED: list[tuple[str, dict[str, Any]]] = [
    ("fatezero", {"store": "disk"}),
    ("fatezero", {"store": "memory", "blend_words": WORDS}),
]
STEPS = 2
WINDOW = "window"


def edit(
    folder: Path, edits: list[Any], group: Any = None, on_step: Any = None
) -> list[list[float]]:
    """Edit an inversion; sums of the results, which say whether ranks agree."""
    inversion = InversionFolder.open(folder)
    found = []
    for method, options in edits:
        if method == WINDOW:
            found.append(edit_in_window(inversion, options, group))
            continue
        controlled = "control" in inversion.settings
        edited = run_edit(
            make_control_pipeline() if controlled else make_pipeline(),
            inversion,
            "a swan",
            method=method,
            options=options,
            group=group,
            progress=False,
            on_step=on_step,
        )
        found.append(edited.latents.double().sum(dim=(1, 2, 3)).tolist())
    return found


def edit_in_window(inversion: InversionFolder, options: Any, group: Any) -> list[float]:
    """As `edit`, in a window beside the inversion's folder."""
    cores = torch.zeros(FRAMES, 8, 12, dtype=torch.bool)
    cores[:, 3:5, 5:7] = True
    with patch.object(zoomed, "_cores", lambda *_: cores):
        edited = run_zoomed_edit(
            make_pipeline(),
            inversion,
            "a swan",
            inversion.path.parent / WINDOW,
            options=options,
            group=group,
            progress=False,
        )
    assert edited.zoom is not None
    return edited.latents.double().sum(dim=(1, 2, 3)).tolist()


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inverted")
    settings: dict[str, Any] = {
        "options": {"num_bases": 8}, "num_steps": STEPS, "chunk": 2, "progress": False,
    }  # fmt: skip
    video = clip(FRAMES)
    plain = invert(make_pipeline(), video, "a duck", root, **settings)
    control = Control(pictures(FRAMES))
    controlled = invert(make_control_pipeline(), video, "a duck", root, control=control, **settings)
    scenes = invert(make_pipeline(), video, "a duck", root, cuts=(3,), **settings)
    settings["options"] = None
    dense = invert(make_pipeline(), video, "a duck", root, method="inflated", **settings)
    found = {"plain": plain, "controlled": controlled, "scenes": scenes, "dense": dense}
    return {name: each.path for name, each in found.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


WORLDS = """
two = dist.new_group([0, 1])
for ranks, group in ((1, None), (2, two), (3, dist.group.WORLD)):
    if rank < ranks:
        sums = [edit(root / str(ranks) / name, edits, group) for name, edits in {edits!r}]
        print(json.dumps([ranks, sums]), flush=True)
    dist.barrier()
"""


def test_one_two_and_three_processes_give_the_same_bits(
    inverted: dict[str, Path], tmp_path: Path
) -> None:
    asked = {
        "plain": [*EDITS, (WINDOW, {"preset": "shape"})],
        "controlled": EDITS[-1:],
        "scenes": [EDITS[1], EDITS[-1]],
        "dense": STORED,
    }
    edits = {inverted[name]: asked[name] for name in asked}
    for ranks in (1, 2, 3):
        for folder in edits:
            shutil.copytree(folder, tmp_path / str(ranks) / folder.name)
    found = []
    body = WORLDS.format(edits=[(folder.name, made) for folder, made in edits.items()])
    for process in start(__name__, tmp_path, 3, body):
        assert process.ended() == 0, process.errors.read_text()[-2000:]
        found += [json.loads(line) for line in process.lines()]
    assert sorted(ranks for ranks, _ in found) == [1, 2, 2, 3, 3, 3]
    assert all(sums == found[0][1] for _, sums in found)
    for folder, made in edits.items():
        expected, *others = (files(tmp_path / ranks / folder.name) for ranks in "123")
        assert len(expected) == len(files(folder)) + sum(name != WINDOW for name, _ in made)
        assert others == [expected, expected]
    one, *others = (files(tmp_path / ranks / WINDOW) for ranks in "123")
    assert len(one) > STEPS
    assert others == [one, one]


@pytest.mark.parametrize("number", [6])
def test_begun_with_two_killed_and_finished_by_one(
    number: int, inverted: dict[str, Path], tmp_path: Path
) -> None:
    edits, name = EDITS[number : number + 1], inverted["plain"].name
    begun, whole = tmp_path / "begun" / name, tmp_path / "whole" / name
    for folder in (begun, whole):
        shutil.copytree(inverted["plain"], folder)
    body = f"""
told = lambda: (print("step", flush=True), dist.barrier())
edit(root / "begun" / {name!r}, {edits!r}, dist.group.WORLD, told)
"""
    processes = start(__name__, tmp_path, 2, body)
    processes[0].wait_for(["step"])
    processes[1].process.kill()
    for process in processes:
        assert process.ended() != 0
    assert len(list(begun.glob("edit-*"))) == 1
    with one_thread():
        assert edit(begun, edits) == edit(whole, edits)
    assert files(begun) == files(whole)


class SixRanks:
    def size(self) -> int:
        return 6

    def rank(self) -> int:
        return 0


def test_too_few_chunks_for_the_processes(
    inverted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stem.distributed.Ranks.from_main", lambda ranks, make: make())
    with pytest.raises(ValueError, match=r"in 3 chunks.*which 6 processes cannot share; start 3"):
        edit(inverted["plain"], EDITS[:1], SixRanks())


BY_COMMAND = """
import contextlib
from stem.cli import edits
edits.ranks = lambda device: contextlib.nullcontext(dist.group.WORLD)
assert run(*{arguments!r}, "--out", str(root / "two")) == 0
"""


def test_the_command_edits_on_two_processes(tmp_path: Path) -> None:
    video = write_clip(tmp_path / "clip.mp4", 2, 64, 64)
    arguments = ("edit", video, "--prompt", "a blue ball", "--steps", "2", "--size", "64")
    # Two processes find the chunk that leaves each of them one.
    processes = start(__name__, tmp_path, 2, BY_COMMAND.format(arguments=arguments))
    with one_thread():
        assert run(*arguments, "--chunk", "1", "--out", str(tmp_path / "one")) == 0
    for process in processes:
        assert process.ended() == 0, process.errors.read_text()[-2000:]
    one, two = (
        {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*.safetensors")}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert len(one) == 1 + 2 + 1 + 1  # frames, steps, reconstruction, edit
    assert two == one
    (edited,) = (tmp_path / "two").glob("*/edit.mp4")
    assert read_video(edited).num_frames == 2
