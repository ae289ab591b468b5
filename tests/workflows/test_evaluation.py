"""Edits judged by every metric, what each says is missing, and `stem evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from commands import run
from conftest import NO_CLIP
from ranks import start
from torch import nn
from torch.nn.functional import cosine_similarity

import stem
from stem import Video, evaluate, write_video
from stem.cli.evaluate import print_evaluation
from stem.metrics import WorldJudge, frame_accuracy, text_alignment, world_flow
from stem.metrics.unmeasured import install_torchvision
from stem.workflows.evaluation import Evaluation, Figure
from stem.world import WorldEdit, world_edit

METRICS = [
    *("PSNR dB", "SSIM", "LPIPS", "CLIP-text x100", "Tem-Con", "Frame-Acc", "Warp-Err x1000"),
    *("WarpSSIM", "Q_edit = WarpSSIM x CLIP-text", "Q_edit = CLIP-text / Warp-Err"),
]


@pytest.fixture(scope="module")
def world() -> WorldEdit:
    return world_edit(40_500_000, "colour", 4)


def test_the_judge_of_the_world_in_the_place_of_clip(world: WorldEdit) -> None:
    judge = WorldJudge()
    before, after = judge.embed_texts([world.source.caption, world.exact.caption])
    assert cosine_similarity(before, after, dim=0) == pytest.approx(0.5)  # of the same shape
    exact, source = (judge.embed_frames(c.frames) for c in (world.exact, world.source))
    assert text_alignment(exact, after) == pytest.approx(100, abs=1e-4)
    assert text_alignment(source, after) == pytest.approx(50, abs=1e-4)
    assert frame_accuracy(exact, before, after) == 1
    assert frame_accuracy(source, before, after) == 0
    nothing = judge.embed_frames(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert text_alignment(nothing, after) == 0
    with pytest.raises(ValueError, match="'a duck on a lake' names no object of the world"):
        judge.embed_texts(["a duck on a lake"])


def videos(edit: WorldEdit) -> tuple[Video, Video]:
    fps = Fraction(8)
    return Video(edit.source.frames, fps, name="ours"), Video(edit.exact.frames, fps, name="theirs")


def values(found: Evaluation) -> dict[str, float | None]:
    return {figure.metric: figure.value for figure in found.figures}


def judged(group: Any = None) -> str:
    """Figures of an edit under an estimated flow, as JSON."""
    edit = world_edit(40_500_000, "colour", 4)
    prompts = edit.source.caption, edit.exact.caption
    found = evaluate(*videos(edit), *prompts, flow="dis", clip=WorldJudge(), group=group)
    return json.dumps({name: value for name, value in values(found).items() if value is not None})


SHARED = """
from stem.distributed import Ranks
from stem.metrics import UnmeasuredError
print(judged(dist.group.WORLD))
ranks = Ranks(dist.group.WORLD)
print(list(ranks.share(70, 32)), ranks.from_each(lambda: rank))
def fail():
    if rank == 1:
        raise UnmeasuredError("rank 1 has no weights", "get them")
try:
    ranks.from_each(fail)
except UnmeasuredError as error:
    print(error.remedy)
"""


def test_processes_share_an_evaluation(tmp_path: Path) -> None:
    processes = start(__name__, tmp_path, 3, SHARED)
    alone = json.loads(judged())
    for process, share in zip(processes, (range(32), range(32, 64), range(64, 70)), strict=True):
        assert process.ended() == 0, process.errors.read_text()[-2000:]
        figures, *rest = process.lines()
        assert json.loads(figures) == pytest.approx(alone, rel=1e-6)
        assert rest == [f"{list(share)} [0, 1, 2]", "get them"]


def test_an_edit_of_the_world_under_its_exact_flow(world: WorldEdit, no_torchvision: None) -> None:
    source, edit = videos(world)
    flow = world_flow(world.scene, 4, 64)
    assert torch.equal(flow.forward, world.source.flow)
    found = evaluate(
        *(source, edit, world.source.caption, world.exact.caption), flow=flow, clip=WorldJudge()
    )
    assert list(values(found)) == METRICS
    assert found["LPIPS"].value is None
    assert found["LPIPS"].remedy == install_torchvision()
    for metric in METRICS:
        by = found[metric].measured_by
        of_flow = "Warp" in metric
        assert ("exact flow of the world" in by) == of_flow
        assert ("judge of the world" in by) == any(w in metric for w in ("CLIP", "Tem", "Frame"))
        assert ("11x11, sigma 1.5, RGB" in by) == ("SSIM" in metric)
    shown = torchmetrics.functional.image.peak_signal_noise_ratio(
        *(v.frames.permute(0, 3, 1, 2) / 255 for v in (edit, source)),
        data_range=1.0,
        dim=(1, 2, 3),
        reduction="elementwise_mean",
    )
    assert found["PSNR dB"].value == pytest.approx(float(shown), abs=1e-3)
    text, error, warped = (
        found[name].value for name in ("CLIP-text x100", "Warp-Err x1000", "WarpSSIM")
    )
    assert text is not None
    assert error is not None
    assert warped is not None
    assert text == pytest.approx(100, abs=1e-4)
    assert found["Q_edit = WarpSSIM x CLIP-text"].value == warped * text
    assert found["Q_edit = CLIP-text / Warp-Err"].value == text / error
    # The frames shuffled: no flow of the source explains them.
    shuffled = Video(edit.frames[[0, 2, 1, 3]], edit.fps)
    worse = evaluate(
        *(source, shuffled, world.source.caption, world.exact.caption),
        flow=flow,
        clip=WorldJudge(),
    )
    assert worse["Warp-Err x1000"].value > error
    assert worse["WarpSSIM"].value < warped
    with pytest.raises(KeyError, match="there are PSNR dB, SSIM"):
        found["VMAF"]


def test_what_is_missing_is_said(world: WorldEdit, no_torchvision: None, clip_folder: str) -> None:
    source, edit = videos(world)
    found = evaluate(source, edit, "a", "b", flow="raft", clip="nobody/clip")
    measured = {name for name, value in values(found).items() if value is not None}
    assert measured == {"PSNR dB", "SSIM"}
    assert {f.remedy for f in found.figures if f.value is None} == {
        install_torchvision(),
        NO_CLIP,
    }
    assert all(f.missing for f in found.figures if f.value is None)
    found = evaluate(source, edit, "", "b", clip=clip_folder)
    absent = {figure.metric: figure.remedy for figure in found.figures if figure.value is None}
    assert absent == {"LPIPS": install_torchvision(), "Frame-Acc": "give --source-prompt"}
    assert found["Warp-Err x1000"].measured_by == "flow of the source: OpenCV DIS, preset medium"
    still = Video(source.frames[:1], source.fps)
    one = evaluate(still, still, "a", "b", clip=clip_folder)
    assert one["PSNR dB"].value == math.inf
    for name in ("Tem-Con", "Warp-Err x1000", "WarpSSIM", "Q_edit = WarpSSIM x CLIP-text"):
        assert one[name].remedy == "give videos of at least 2 frames"
    constant = Video(torch.full_like(source.frames, 100), source.fps)
    found = evaluate(constant, constant, "a", "b", clip=clip_folder)
    assert found["Q_edit = CLIP-text / Warp-Err"].value == math.inf


def test_a_cut_has_no_warp_error(world: WorldEdit) -> None:
    source, edit = videos(world)
    flow = world_flow(world.scene, 4, 64)
    flow.occlusion[2] = True
    found = evaluate(
        *(source, edit, world.source.caption, world.exact.caption), flow=flow, clip=WorldJudge()
    )
    assert "no pixel of frame 2 is seen in the next" in found["Warp-Err x1000"].missing
    assert found["WarpSSIM"].value is not None


def cut(video: Video, change: Callable[[torch.Tensor], torch.Tensor]) -> Video:
    return Video(change(video.frames), video.fps)


def test_videos_that_do_not_belong_together(world: WorldEdit) -> None:
    source, edit = videos(world)
    with pytest.raises(ValueError, match=r"has 4 frames and the edit 3; .* --frames 3"):
        evaluate(source, cut(edit, lambda f: f[:3]), "a", "b")
    with pytest.raises(ValueError, match=r"is 64x64 pixels and the edit 32x64; .* --size 32x64"):
        evaluate(source, cut(edit, lambda f: f[:, :, :32]), "a", "b")
    with pytest.raises(ValueError, match="prompt is empty"):
        evaluate(source, edit, "a", " ")
    assert stem.evaluate is evaluate


def test_brackets_in_names_of_files_are_printed_as_they_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    figure = Figure("SSIM, to [red]a[/b].mp4", 1.0, "SSIM to [red]a[/b].mp4", True)
    print_evaluation(Evaluation("a", "b", "", "c", 3, 8, 8, (figure,)))
    assert capfd.readouterr().out.count("to [red]a[/b].mp4") == 2


def test_the_command(
    world: WorldEdit,
    no_torchvision: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    paths = [str(tmp_path / name) for name in ("source.mp4", "edit.mp4")]
    wide = nn.functional.pad(world.source.frames, (0, 0, 2, 2))  # edits are cropped to 64
    write_video(paths[0], wide, 8)
    write_video(paths[1], world.exact.frames, 8)
    figures = tmp_path / "new" / "figures.json"
    prompts = ("--source-prompt", world.source.caption, "--prompt", world.exact.caption)
    arguments = (*prompts, "--clip", "judge", "--flow", "dis", "--json", str(figures))
    assert run("evaluate", *paths, *arguments) == 0
    printed = capfd.readouterr().out
    assert "68x64 was centre-cropped to 64x64" in printed
    assert f"missing: LPIPS: torchvision is not installed; {install_torchvision()}" in printed
    document = json.loads(figures.read_text())
    assert [figure["metric"] for figure in document["figures"]] == METRICS
    for figure in document["figures"]:
        assert figure["metric"] in printed
        if figure["value"] is not None:
            assert f"{figure['value']:.4g}" in printed
    assert document["provenance"]["versions"]["torchvision"]
    assert run("evaluate", *paths, "--prompt", "b", "--clip", "nobody/clip") == 0
    assert f"not on this machine; {NO_CLIP}" in capfd.readouterr().out
    assert run("evaluate", *paths, "--prompt", "b", "--frames", "2") == 2
    assert "the source has 2 frames and the edit 4" in capfd.readouterr().err
    assert run("evaluate", *paths, "--prompt", "b", "--flow", "horn") == 2
    assert "take one of dis, raft" in capfd.readouterr().err
