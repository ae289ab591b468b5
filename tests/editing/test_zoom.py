"""Edits in a window that follows a small thing."""

from __future__ import annotations

import json
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from controls import make_control_pipeline, pictures
from inversions import clip, inverted
from pipelines import make_pipeline

from stem import Control, InversionFolder, Video, invert
from stem.diffusion.pipeline import decode_latents
from stem.editing import edited_parts, run_edit, run_zoomed_edit, zoomed
from stem.editing.regions.zoom import LEAST, MOST, Zoom, ZoomedVideo
from stem.workflows.dense import dense_edit
from stem.workflows.edit_plan import EditPlan
from stem.workflows.edits import write_edits

FRAMES, HEIGHT, WIDTH = 4, 12, 16  # of the masks


def squares(side: int = 3, frames: int = FRAMES) -> torch.Tensor:
    """Masks of a square that moves to the right by two cells a frame."""
    masks = torch.zeros(frames, HEIGHT, WIDTH, dtype=torch.bool)
    for frame in range(frames):
        masks[frame, 4 : 4 + side, 2 + 2 * frame : 2 + 2 * frame + side] = True
    return masks


def smooth(frames: int = FRAMES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(frames, 3, 4, 5, generator=generator)
    pictures = torch.nn.functional.interpolate(noise, size=(96, 128), mode="bicubic")
    return (pictures.clamp(0, 1).permute(0, 2, 3, 1) * 255).to(torch.uint8)


def test_a_window_follows_and_holds_what_changes() -> None:
    cores = squares()
    zoom = Zoom.of(cores, [range(FRAMES)])
    assert zoom is not None
    assert LEAST <= float(zoom.shares[0]) <= MOST
    assert (zoom.shares == zoom.shares[0]).all()
    assert (zoom.centres[:, 0].diff() > 0.1).all()
    assert (zoom.centres.abs() + zoom.shares[:, None] <= 1 + 1e-6).all()
    white = cores.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None].expand(-1, -1, -1, 3)
    seen = zoom.seen((white * 255).to(torch.uint8))
    shares = (seen > 127)[..., 0].float().mean((1, 2))
    assert (shares > 1.5 * cores.float().mean((1, 2))).all()
    rim = torch.cat([seen[:, 0], seen[:, -1], seen[:, :, 0], seen[:, :, -1]], 1)
    assert (rim < 127).all()


def test_each_scene_has_a_window_of_its_own() -> None:
    cores = torch.cat([squares(), squares(2).flip(2)])
    both = Zoom.of(cores, [range(FRAMES), range(FRAMES, 2 * FRAMES)])
    alone = Zoom.of(cores[FRAMES:], [range(FRAMES)])
    assert both is not None
    assert alone is not None
    torch.testing.assert_close(both[FRAMES : 2 * FRAMES].centres, alone.centres)
    torch.testing.assert_close(both[[4, 5, 6, 7]].shares, alone.shares)
    assert both.shares[0] > both.shares[-1]


@pytest.mark.parametrize("cores", [squares(8), torch.zeros_like(squares())])
def test_what_is_large_or_nowhere_has_no_window(cores: torch.Tensor) -> None:
    assert Zoom.of(cores, [range(FRAMES)]) is None


def test_a_stray_cell_does_not_widen_the_window() -> None:
    cores = squares(4)
    before = Zoom.of(cores, [range(FRAMES)])
    cores[1, 0, 0] = True
    after = Zoom.of(cores, [range(FRAMES)])
    assert before is not None
    assert after is not None
    assert abs(float(after.shares[0] - before.shares[0])) < 0.15


def test_a_frame_in_which_nothing_is_seen_does_not_move_the_window() -> None:
    cores = torch.zeros(8, HEIGHT, WIDTH, dtype=torch.bool)
    cores[:, 4:7, 1:4] = True
    whole = Zoom.of(cores, [range(8)])
    cores[3:6] = False
    hidden = Zoom.of(cores, [range(8)])
    assert whole is not None
    assert hidden is not None
    torch.testing.assert_close(hidden.centres, whole.centres)
    torch.testing.assert_close(hidden.shares, whole.shares)


@pytest.mark.parametrize("other", [squares(8), torch.zeros_like(squares())])
def test_a_scene_without_a_window_shows_whole_frames(other: torch.Tensor) -> None:
    zoom = Zoom.of(torch.cat([squares(), other]), [range(FRAMES), range(FRAMES, 2 * FRAMES)])
    assert zoom is not None
    assert float(zoom.shares[0]) < MOST
    assert (zoom.shares[FRAMES:] == 1).all()
    whole, source = zoom[FRAMES : 2 * FRAMES], smooth()
    assert torch.equal(whole.seen(source), source)
    everywhere = torch.ones(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    assert torch.equal(whole.masks_of_frames(everywhere), everywhere)
    black = torch.zeros_like(source)
    assert torch.equal(whole.pasted(black, source, everywhere), black)


def test_no_edge_of_a_window_shows() -> None:
    """A window's sides fade, but for those on the frame's own edge."""
    zoom = Zoom(torch.tensor([[-0.5, 0.0]]), torch.tensor([0.5]))
    white = torch.full((1, 96, 128, 3), 255, dtype=torch.uint8)
    everywhere = torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool)
    found = zoom.pasted(torch.zeros_like(white), white, everywhere)[0, ..., 0].int()
    assert (found[48, :56] == 0).all()
    assert (found[:, 64:] == 255).all()
    for line in (found[48, 48:], found[24:48, 32].flip(0)):
        assert line.diff().max() <= 80
        assert line.max() > 200


def test_what_is_seen_comes_back_to_where_it_was() -> None:
    source, zoom = smooth(), Zoom.of(squares(), [range(FRAMES)])
    assert zoom is not None
    seen = zoom.seen(source)
    masks = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    masks[:, 3:9, 4:12] = True
    changed = zoom.masks_of_frames(masks)
    same = zoom.pasted(seen, source, masks)
    assert (same.int() - source.int()).abs().max() <= 6
    assert (same.float() - source.float()).abs().mean() < 0.3
    black = zoom.pasted(torch.zeros_like(seen), source, masks)
    pixels = changed.repeat_interleave(8, 1).repeat_interleave(8, 2)
    # The fade is a cell of the window wide.
    around = torch.nn.functional.max_pool2d(pixels.float()[:, None], 17, 1, 8)[:, 0] > 0
    assert torch.equal(black[~around], source[~around])
    within = -torch.nn.functional.max_pool2d(-pixels.float()[:, None], 17, 1, 8)[:, 0] > 0
    assert within.any()
    assert (black[within] == 0).all()


def test_a_video_of_windows_is_that_of_its_frames() -> None:
    source, zoom = smooth(), Zoom.of(squares(), [range(FRAMES)])
    assert zoom is not None
    video = ZoomedVideo(lambda count: iter(source.split(count)), zoom, FRAMES, 96, 128, Fraction(8))
    for count in (1, 3, 8):
        assert torch.equal(torch.cat(list(video.parts(count))), zoom.seen(source))


SETTINGS: dict[str, Any] = {"resume": False, "progress": False}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What random weights would find everywhere is found in a few cells."""
    cores = torch.zeros(3, 8, 12, dtype=torch.bool)
    cores[:, 3:5, 5:7] = True
    monkeypatch.setattr(zoomed, "_cores", lambda *_: cores)
    return cores


@pytest.mark.parametrize("given", [True, False])
def test_an_edit_in_a_window(given: bool, tmp_path: Path, small: torch.Tensor) -> None:
    pipeline, folder = make_pipeline(), inverted(tmp_path)
    options = {"mask_threshold": 0.9, "dilation": 0}
    video = clip() if given else None

    def made() -> Any:
        return run_zoomed_edit(
            pipeline, folder, "a goose", tmp_path / "windows", video=video, options=options,
            zoom_prompt="a large goose", zoom_source="a large duck", **SETTINGS,
        )  # fmt: skip

    found = made()
    assert found.zoom is not None
    assert found.zoomed_masks is not None
    assert found.settings["inversion"] == folder.path.name
    (window,) = (tmp_path / "windows").iterdir()
    assert found.settings["zoom"]["inversion"] == window.name
    assert found.settings["prompt"] == "a goose"
    assert found.settings["zoom"]["prompt"] == "a large goose"
    assert found.settings["zoom"]["source_prompt"] == "a large duck"
    source = None if video is None else [video.frames]
    (frames,) = edited_parts(pipeline, folder, found, source)
    expected = decode_latents(pipeline, folder.x0()) if video is None else video.frames
    far = ~torch.nn.functional.max_pool2d(found.masks.float()[:, None], 5, 1, 2)[:, 0].bool()
    factor = expected.shape[1] // found.masks.shape[1]
    outside = far.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    assert outside.any()
    assert torch.equal(frames[outside], expected[outside])
    assert not torch.equal(frames, expected)
    again = made()
    assert torch.equal(again.latents, found.latents)
    alone = InversionFolder.open(window)
    as_seen = run_edit(pipeline, alone, "a large goose", options=options, **SETTINGS)
    assert torch.equal(as_seen.latents, found.latents)
    one = found.of_frames([1])
    (frame,) = edited_parts(pipeline, folder, one, [expected[[1]]])
    assert torch.equal(frame, frames[[1]])


def test_files_of_an_edit_in_a_window(tmp_path: Path, small: torch.Tensor) -> None:
    pipeline, folder = make_pipeline(), inverted(tmp_path / "inversions")
    options = {"mask_threshold": 0.9, "dilation": 0}
    asked: dict[str, Any] = {"options": {"fusion": options}, "zoom": True}
    plan = EditPlan(["a goose"], **asked, zoom_source="a large duck")
    settings: dict[str, Any] = {"video": clip(), "progress": False}
    (result,) = write_edits(pipeline, folder, plan, tmp_path, **settings).results
    about = json.loads(result.files.json.read_text())
    found = InversionFolder.open(tmp_path / "windows" / about["settings"]["zoom"]["inversion"])
    assert found.settings["prompt"] == "a large duck"
    assert InversionFolder.open(about["inversion"]).path == folder.path
    (again,) = write_edits(pipeline, folder, plan, tmp_path, **settings).results
    assert again.reused
    assert again.files == result.files
    steps = len(folder.timesteps)
    assert about["durations"]["steps_done_in_them"] == 2 * steps
    # Without the video the window is another, and so is one that a text describes.
    empty = EditPlan(["a goose"], **asked, zoom_source="")
    described = EditPlan(["a goose"], **asked)
    large = EditPlan(["a goose"], **asked, zoom_prompts=["a large goose"])
    names = [
        each.shaped_by(folder, "a goose", "fusion", has_video=has_video)
        for each in (plan, empty, described, large)
        for has_video in (True, False)
    ]
    assert len(set(names)) == len(names)
    plain = EditPlan(["a goose"], options={"fusion": options})
    (other,) = write_edits(pipeline, folder, plain, tmp_path, **settings).results
    assert other.files != result.files
    assert other.files.video.read_bytes() != result.files.video.read_bytes()
    with pytest.raises(ValueError, match="was edited in a window"):
        dense_edit(pipeline, result.files.folder, clip())


def test_what_is_large_is_edited_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, folder = make_pipeline(), inverted(tmp_path)
    monkeypatch.setattr(zoomed, "_cores", lambda *_: torch.ones(3, 8, 12, dtype=torch.bool))
    with caplog.at_level(logging.INFO):
        found = run_zoomed_edit(
            pipeline, folder, "a goose", tmp_path / "windows", zoom_prompt="a large goose",
            zoom_source="a large duck", **SETTINGS,
        )  # fmt: skip
    assert "no zoom" in caplog.text
    assert found.zoom is None
    assert found.settings["zoom"] is None
    assert not (tmp_path / "windows").exists()
    assert torch.equal(found.latents, run_edit(pipeline, folder, "a goose", **SETTINGS).latents)


def test_scenes_without_a_window_are_edited_by_the_prompt_of_whole_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, video = make_pipeline(), clip(4)
    folder = invert(
        pipeline, video, "a duck", tmp_path, num_steps=2, chunk=2, cuts=(2,), progress=False,
        options={"num_bases": 8},
    )  # fmt: skip
    cores = torch.zeros(4, 8, 12, dtype=torch.bool)
    cores[:2, 3:5, 5:7] = True
    cores[2:] = True
    monkeypatch.setattr(zoomed, "_cores", lambda *_: cores)
    windows = {"zoom_prompt": "a large goose", "zoom_source": "a large duck"}
    found = run_zoomed_edit(
        pipeline, folder, "a goose", tmp_path / "windows", video=video, **windows, **SETTINGS
    )
    whole = run_edit(pipeline, folder, "a goose", **SETTINGS)
    (window,) = (tmp_path / "windows").iterdir()
    seen = run_edit(pipeline, InversionFolder.open(window), "a large goose", **SETTINGS)
    assert found.zoom is not None
    assert (found.zoom.shares[:2] < 1).all()
    for edit, here in ((seen, slice(2)), (whole, slice(2, 4))):
        assert torch.equal(found.latents[here], edit.latents[here])
        assert found.zoomed_masks is not None
        assert edit.masks is not None
        assert torch.equal(found.zoomed_masks[here], edit.masks[here])
    assert not torch.equal(seen.latents[2:], whole.latents[2:])
    assert found.masks is not None
    assert whole.masks is not None
    assert torch.equal(found.masks[2:], whole.masks[2:])


def test_where_the_prompts_differ_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By random weights everywhere, and by equal prompts nowhere: both have no window."""
    pipeline, folder = make_pipeline(), inverted(tmp_path)
    for prompt in ("a goose", "a duck"):
        found = run_zoomed_edit(pipeline, folder, prompt, tmp_path, **SETTINGS)
        assert found.zoom is None
    # Those of the window do not find it.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_zoomed_edit(
            pipeline, folder, "a duck", tmp_path, zoom_prompt="a large goose",
            zoom_source="a large duck", **SETTINGS,
        )  # fmt: skip
    assert "the prompts differ nowhere" in caplog.text


def test_what_has_no_window_is_refused(tmp_path: Path) -> None:
    folder = inverted(tmp_path)
    with pytest.raises(ValueError, match="which these options turn off"):
        run_zoomed_edit(make_pipeline(), folder, "a goose", tmp_path, options={"preset": "style"})
    video = Video(clip().frames, Fraction(8))
    controlled = invert(
        make_control_pipeline(), video, "a duck", tmp_path, num_steps=1, chunk=None,
        control=Control(pictures(3)), progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="whose pictures have no window"):
        run_zoomed_edit(make_control_pipeline(), controlled, "a goose", tmp_path)
    with pytest.raises(ValueError, match="pass the one that was inverted"):
        run_zoomed_edit(make_pipeline(), folder, "a goose", tmp_path, video=clip(2))
    with pytest.raises(ValueError, match="paste is False"):
        run_zoomed_edit(make_pipeline(), folder, "a goose", tmp_path, options={"paste": False})
    with pytest.raises(ValueError, match="a zoom has no control"):
        EditPlan(["a goose"], zoom=True).check(controlled, tmp_path)
    with pytest.raises(ValueError, match="pnp has none"):
        EditPlan(["a goose"], ["fusion", "pnp"], zoom=True)
    with pytest.raises(ValueError, match="zoom is False"):
        EditPlan(["a goose"], zoom_source="a duck")
    with pytest.raises(ValueError, match="zoom_prompts describes a window, and zoom is False"):
        EditPlan(["a goose"], zoom_prompts=["a duck"])
    with pytest.raises(ValueError, match="zoom_prompts are 2 and prompts 1"):
        EditPlan(["a goose"], zoom=True, zoom_prompts=["a", "b"])
    with pytest.raises(TypeError, match="zoom_prompts is 'b'; pass a list of texts"):
        EditPlan(["a"], zoom=True, zoom_prompts="b")
    bad: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "a zoom_prompt is ' '", {"zoom_prompt": " "}),
        (TypeError, "zoom_source is a int; it must be one text", {"zoom_source": 1}),
        (
            ValueError,
            r"in the window \(zoom_source, zoom_prompt\): 'a duck' has 2 words",
            {"zoom_prompt": "a large goose", "options": {"mapping": "replace"}},
        ),
    ]
    for error, message, given in bad:
        with pytest.raises(error, match=message):
            run_zoomed_edit(make_pipeline(), folder, "a goose", tmp_path, **given)
    with pytest.raises(ValueError, match="a zoom has no control"):
        EditPlan(["a goose"], control=[Control(pictures(3))], zoom=True)
