"""An edit by bases beside the same edit by all-frame attention, and `--against`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from conftest import write_clip
from controls import make_control_pipeline
from inversions import STEM, clip, inverted
from pipelines import make_pipeline

import stem
from stem import Video, evaluate, read_video
from stem.control import Control, canny
from stem.editing import METHODS, edit_options
from stem.editing.checks import edit_settings
from stem.workflows.dense import dense_edit, open_edit
from stem.workflows.edit_plan import EditPlan
from stem.workflows.edits import write_edits
from stem.workflows.evaluation import Evaluation

EVERY_LAYER = 10**6  # tokens: no layer has as many
OPTIONS: dict[str, dict[str, Any]] = {
    "fatezero": {"preset": "attribute", "blend_words": (("duck",), ("swan",))},
    "fusion": {"preset": "shape", "mask_levels": (0.2, 0.9)},
}


@functools.cache
def attentive() -> Any:
    """`make_pipeline()`, of its own, with self-attention that shows in the pictures."""
    pipeline = make_pipeline.__wrapped__()
    with torch.no_grad():
        for name, module in pipeline.unet.named_modules():
            if name.endswith("attn1"):
                module.to_q.weight.mul_(10)
                module.to_out[0].weight.mul_(30)
    return pipeline


def edited(out: Path, plan: EditPlan | None = None, **settings: Any) -> Path:
    """The folder of an edit, of an inversion in two steps."""
    pipeline = settings.pop("pipeline", None) or attentive()
    inversion = inverted(out / "inversions", pipeline=pipeline, num_steps=2, **settings)
    plan = plan or EditPlan(["a swan"], ["pnp"], {"pnp": {"attention_until": 0.5}}, seed=3)
    found = write_edits(pipeline, inversion, plan, out, note="random weights", progress=False)
    return found.results[0].files.folder


def judged(folder: Path, against: Path, name: str) -> Evaluation:
    edit, other = (read_video(path, multiple_of=1) for path in (folder / "edit.mp4", against))
    other = dataclasses.replace(other, name=name)
    found = evaluate(
        *(clip(), edit, "a duck", "a swan"),
        clip="nobody/clip",
        flow="dis",
        against=other,
    )
    shown = ["PSNR dB", "SSIM", "LPIPS"]
    assert [f.metric for f in found.figures[-3:]] == [f"{metric}, to {name}" for metric in shown]
    assert all(f"to {name}" in figure.measured_by for figure in found.figures[-3:])
    return found


def test_without_bases_both_edits_are_the_same(tmp_path: Path, no_torchvision: None) -> None:
    folder = edited(tmp_path, options={**STEM, "dense_below": EVERY_LAYER})
    found = dense_edit(attentive(), folder, clip(), progress=False)
    assert found.files.folder.parent == tmp_path / "dense"
    figures = judged(folder, found.files.video, "dense")
    assert figures["PSNR dB, to dense"].value == math.inf
    assert figures["SSIM, to dense"].value == 1
    assert "torchvision is not installed" in figures["LPIPS, to dense"].missing


def test_with_bases_they_differ_by_the_attention_alone(
    tmp_path: Path, no_torchvision: None
) -> None:
    folder = edited(tmp_path, options={"num_bases": 2, "calibration": "none"}, chunk=2, cuts=(2,))
    found = dense_edit(attentive(), folder / "edit.mp4", clip(), progress=False)
    ours, theirs = (json.loads(f.read_text()) for f in (folder / "edit.json", found.files.json))
    before, after = ours.pop("inversion_settings"), theirs.pop("inversion_settings")
    assert (before.pop("method"), after.pop("method")) == ("stem", "inflated")
    assert before.pop("attention")["chunk"] == after["attention"]["chunk"] == 2
    assert after.pop("attention") == {"num_frames": 3, "chunk": 2, "cuts": [2]}
    for own in ("backend", "keep_bases"):
        before.pop(own), after.pop(own)
    assert before == after
    for document in (ours, theirs):
        del document["settings"]["inversion"]
    assert ours["settings"] == theirs["settings"]
    assert ours["settings"]["seed"] == 3
    assert ours["note"] == theirs["note"] == "random weights"
    value = judged(folder, found.files.video, "dense")["PSNR dB, to dense"].value
    assert value is not None
    assert 10 < value < 70
    again = dense_edit(attentive(), folder, clip(), progress=False)
    assert again.reused
    assert again.files == found.files


def test_what_an_edit_was_shown_is_shown_again(tmp_path: Path) -> None:
    pipeline, pictures = make_control_pipeline(), canny(clip().frames)
    lines = tmp_path / "lines"
    stem.write_video(lines.with_suffix(".mp4"), 255 - pictures, 25)
    drawn = read_video(lines.with_suffix(".mp4"), size=(24, 16), multiple_of=1).frames
    shown = [Control(drawn, 0.5, source=str(lines.with_suffix(".mp4")))]
    plan = EditPlan(["a swan"], ["pnp"], control=shown)
    folder = edited(tmp_path, plan, pipeline=pipeline, control=Control(pictures, source="canny"))
    found = dense_edit(pipeline, folder, clip(), progress=False)
    document = json.loads(found.files.json.read_text())
    assert document["settings"]["control"] == [shown[0].record()]
    assert document["inversion_settings"]["control"][0]["source"] == "canny"
    stem.write_video(lines.with_suffix(".mp4"), pictures, 25)
    with pytest.raises(ValueError, match=r"control pictures '.*lines.mp4' are gone, or have chang"):
        dense_edit(pipeline, folder, clip(), progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_options_come_back_from_what_an_edit_records(method: str, tmp_path: Path) -> None:
    options = edit_options(method, OPTIONS.get(method))
    inversion = stem.InversionFolder(tmp_path, {}, ())
    asked: dict[str, Any] = {"negative_prompt": "", "guidance": None, "seed": 0}
    settings = edit_settings(inversion, "a", method=method, options=options, **asked)
    recorded = json.loads(json.dumps(settings))
    assert edit_options(method, recorded["options"]) == options
    assert recorded["guidance"] == options.guidance


def test_edits_that_cannot_be_made_again(tmp_path: Path) -> None:
    foreign = tmp_path / "theirs.mp4"
    stem.write_video(foreign, clip().frames, 25)
    with pytest.raises(
        ValueError, match=r"theirs.mp4 is no edit.mp4 beside an edit.json; --against"
    ):
        open_edit(foreign)
    dense = edited(tmp_path / "dense", method="inflated")
    with pytest.raises(ValueError, match="made of an inversion by inflated, which has no bases"):
        open_edit(dense)
    folder = edited(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"no edit.mp4 beside an edit.json"):
        open_edit(folder / "beside.mp4")
    with pytest.raises(
        ValueError, match=r"the source's frames are not those that .*stem-.* \(3 of"
    ):
        dense_edit(attentive(), folder, Video(clip().frames.flip(0), clip().fps))
    with pytest.raises(ValueError, match="was made with the model"):
        dense_edit(make_pipeline("sd1", "v_prediction"), folder, clip())
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "ours", moved)
    assert open_edit(moved / folder.name).inversion.path.parent == moved / "inversions"
    shutil.copy(foreign, moved / folder.name / "edit.mp4")
    with pytest.raises(ValueError, match=r"are not those that its edit.json tells of; .* again"):
        open_edit(moved / folder.name)
    shutil.rmtree(moved / "inversions")
    with pytest.raises(ValueError, match=r"are not those|holds no settings.json"):
        open_edit(moved / folder.name)


@pytest.mark.parametrize(("within", "named"), [("", "."), ("", "edit.mp4"), ("inner", "..")])
def test_an_edit_may_be_named_from_within(
    within: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(tmp_path / "ours")
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "ours", moved)
    inner = moved / folder.name / within
    inner.mkdir(exist_ok=True)
    monkeypatch.chdir(inner)
    made = open_edit(named)
    assert made.files.folder == moved / folder.name
    assert made.inversion.path.parent == moved / "inversions"


def test_another_video_is_compared_by_its_name(
    tmp_path: Path, no_torchvision: None, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("source.mp4", "edit.mp4", "other.mp4")]
    frames = clip().frames
    for path, video in zip(paths, (frames, frames.flip(0), frames[:2]), strict=True):
        stem.write_video(path, video, 25)
    figures = tmp_path / "figures.json"
    prompt = ("--prompt", "a swan", "--clip", "nobody/clip")
    command = ("evaluate", *paths[:2], *prompt, "--flow", "dis")
    # A folder stands for the edit.mp4 in it.
    by_folder = ("evaluate", paths[0], str(tmp_path), *prompt, "--flow", "dis")
    assert run(*by_folder, "--against", paths[1], "--json", str(figures)) == 0
    assert "PSNR dB, to edit.mp4" in capfd.readouterr().out
    found = {f["metric"]: f for f in json.loads(figures.read_text())["figures"]}
    assert found["PSNR dB, to edit.mp4"]["value"] == "inf"
    assert found["SSIM, to edit.mp4"]["value"] == 1
    assert found["PSNR dB"]["value"] < 60
    mistakes = {
        (*command, "--against", paths[2]): "the edit has 3 frames of 24x16 and other.mp4 2 frames",
        (*command, "--against", "dense"): "is no edit.mp4 beside an edit.json",
        (*command, "--against", "gone.mp4"): "gone.mp4: no such file",
        (*command, "--model", "base"): "it goes with --against dense",
        ("evaluate", *paths[:2]): "it is needed for two videos",
    }
    for arguments, said in mistakes.items():
        assert run(*arguments) == 2
        assert said in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_the_command_finds_the_model_and_the_frames(
    model: str,
    tmp_path: Path,
    no_torchvision: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no tries over a network
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "small")
    source = write_clip(tmp_path / "clip.mp4", 4, 36, 44)  # which the model's VAE takes as 40x32
    few = ("--steps", "2", "--frames", "1:4", "--method", "pnp", "--out", "out")
    edit = ("edit", source, "--source-prompt", "a duck", "--prompt", "a swan", *few)
    assert run(*edit, "--model", "small", "--option", "stem.num_bases=4") == 0
    (folder,) = Path("out").glob("pnp-*")
    command = ("evaluate", source, str(folder), "--prompt", "a swan", "--clip", "nobody/clip")
    command += ("--flow", "dis", "--against", "dense")
    for frames in ("4", ":3"):
        assert run(*command, "--frames", frames) == 2
        said = "the source's frames are not those that out/inversions/stem-"
        assert said in capfd.readouterr().err
    Path("small").rename("moved")
    assert run(*command, "--frames", "1:4") == 2
    assert "no pipeline can be loaded from the hub id 'small'" in capfd.readouterr().err
    for reused in (False, True):
        assert run(*command, "--frames", "1:4", "--model", "moved") == 0
        printed = capfd.readouterr().out
        assert f"dense{', reused' if reused else ''}: out/dense/pnp-a-swan-" in printed
        for metric in ("PSNR dB", "SSIM", "LPIPS"):
            assert f"{metric}, to dense attention" in printed


@pytest.mark.long
def test_the_embedded_models_edit_against_dense(
    tmp_path: Path, no_torchvision: None, capfd: pytest.CaptureFixture[str]
) -> None:
    from stem.world import world_edit

    world, source, out = world_edit(40_500_000, "colour", 4), tmp_path / "a.mp4", tmp_path / "out"
    stem.write_video(source, world.source.frames, 8)
    before, after = world.source.caption, world.exact.caption
    prompts = ("--source-prompt", before, "--prompt", after)
    few = ("--steps", "2", "--option", "stem.num_bases=16", "--out", str(out))
    assert run("edit", str(source), *prompts, *few) == 0
    (folder,) = out.glob("fusion-*")
    figures = tmp_path / "figures.json"
    command = ("evaluate", str(source), str(folder), *prompts, "--clip", "judge")
    for reused in (False, True):
        assert run(*command, "--against", "dense", "--json", str(figures)) == 0
        printed = capfd.readouterr().out
        assert f"dense{', reused' if reused else ''}: {out / 'dense'}" in printed
    found = {f["metric"]: f["value"] for f in json.loads(figures.read_text())["figures"]}
    assert 25 < found["PSNR dB, to dense attention"] < 70
    assert 0.9 < found["SSIM, to dense attention"] < 1
    assert run(*command, "--against", "dense", "--frames", "3") == 2
    assert "frames" in capfd.readouterr().err
