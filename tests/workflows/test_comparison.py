"""Comparisons: what is measured, and that no results take the place of others."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inversions import clip
from PIL import Image
from pipelines import make_pipeline

import stem
from stem.report.files import write_json
from stem.report.pictures import Grid, contact_sheet, side_by_side
from stem.video import Video
from stem.workflows.comparison import result_name
from stem.workflows.measuring import measure


def compared(out: Path, video: Video, prompt: str = "a duck", steps: int = 2) -> Path:
    found = stem.compare(
        make_pipeline(), video, prompt, out, ["ddim"], num_steps=steps, progress=False
    )
    assert found.json.is_file()
    assert found.sheet.is_file()
    assert found.video.is_file()
    return found.json


def test_results_of_other_inputs_never_share_a_name(tmp_path: Path) -> None:
    first = compared(tmp_path, clip())
    before = first.read_bytes()
    darker = Video(clip().frames // 2, Fraction(25))
    others = {
        compared(tmp_path, darker),
        compared(tmp_path, clip(), prompt="two ducks"),
        compared(tmp_path, clip(), steps=4),
    }
    assert len({first, *others}) == 4
    assert first.read_bytes() == before
    # the same again: the same name, and the figures of the run that did the work
    assert compared(tmp_path, clip()) == first
    assert first.read_bytes() == before
    assert first.parent.name.startswith("video-")
    first.with_name("compare.png").unlink()
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    stale = first.with_name(f".compare.mp4.{killed.pid}.partial")
    stale.touch()
    assert compared(tmp_path, clip()) == first
    assert not stale.exists()


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    figures = compared(tmp_path, clip())
    pictures = [figures.with_suffix(kind) for kind in (".png", ".mp4")]
    before = [file.read_bytes() for file in pictures]
    for file in (figures, *pictures):
        file.write_bytes(b"")
        assert compared(tmp_path, clip()) == figures
        assert [file.read_bytes() for file in pictures] == before
        document = json.loads(figures.read_text())
        assert [row["method"] for row in document["rows"]] == ["vae", "ddim"]
        for row in document["rows"]:
            by_frame = document["psnr_by_frame"][row["method"]]
            assert sum(by_frame) / len(by_frame) == pytest.approx(row["psnr"])


def test_results_are_named_after_the_video() -> None:
    parts = ["ddim-0123456789ab", "stem-0123456789ab"]
    assert result_name("duck", parts) == "duck-" + result_name("", parts).removeprefix("video-")
    assert result_name("duck", parts) != result_name("duck", parts[::-1])
    assert result_name("../a b/*.c", parts).startswith("a-b-.c-")
    assert len(result_name("ü" * 300, parts).encode()) < 255


def test_measuring_writes_nothing_but_inversions(tmp_path: Path) -> None:
    found = measure(
        make_pipeline(),
        clip(),
        "a duck",
        tmp_path,
        ["ddim", "stem"],
        options={"stem": {"num_bases": 8}},
        num_steps=2,
        chunk=None,
        model="",
        group=None,
        progress=False,
    )
    assert [row.method for row in found.rows] == ["vae", "ddim", "stem"]
    assert list(found.reconstructions) == ["vae", "ddim", "stem"]
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"ddim", "stem"}
    for row in found.rows[1:]:
        assert row.invert_seconds is not None
        assert row.invert_seconds > 0
        assert Path(row.inversion or "").parent == tmp_path


def test_what_cannot_be_compared_is_refused_before_any_work(tmp_path: Path) -> None:
    video = Video(torch.zeros(2, 8, 24, 3, dtype=torch.uint8), Fraction(25))
    with pytest.raises(ValueError, match="24x8 are smaller than SSIM's window, 11 pixels"):
        compared(tmp_path, video)
    with pytest.raises(ValueError, match="3 steps do not divide"):
        compared(tmp_path, clip(), steps=3)
    with pytest.raises(ValueError, match="options for stem, which is not among the methods"):
        stem.compare(make_pipeline(), clip(), "", tmp_path, ["ddim"], options={"stem": {}})
    arguments: dict[str, Any] = {"video": clip(), "prompt": "", "methods": ["ddim"]}
    for wrong, said in (
        ({"video": "a.mp4"}, "video is 'a.mp4'; pass a Video, such as read_video gives"),
        ({"prompt": ["a", "b"]}, r"prompt is \['a', 'b'\]; pass one text"),
        ({"methods": "stem"}, r"methods is 'stem'; pass a list of names, such as \['stem'\]"),
    ):
        with pytest.raises(TypeError, match=said):
            stem.compare(make_pipeline(), out=tmp_path, **{**arguments, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_infinity(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"exact": float("inf"), "mean": (1.5, float("nan"))})
    assert json.loads((tmp_path / "a.json").read_text()) == {"exact": "inf", "mean": [1.5, "nan"]}


def test_a_contact_sheet_shows_the_first_and_the_last_frame() -> None:
    frames = torch.zeros(9, 20, 30, 3, dtype=torch.uint8)
    frames[0], frames[8] = 50, 200
    sheet = contact_sheet({"a": frames, "b": frames}, columns=3)
    assert sheet.size == (3 * 210, 2 * (140 + 24))  # magnified by 7
    assert [sheet.getpixel((210 * column + 105, 100))[0] for column in range(3)] == [50, 0, 200]


@pytest.mark.parametrize("size", [(20, 30), (150, 140), (16, 40)])
def test_videos_side_by_side_are_cut_out_again(size: tuple[int, int]) -> None:
    frames = torch.randint(0, 256, (5, 2, *size, 3), dtype=torch.uint8)
    wholes = list(side_by_side({str(index): video for index, video in enumerate(frames)}))
    grid = Grid(5, size[1], size[0])
    for number, whole in enumerate(wholes):
        pictures = grid.cut(Image.fromarray(whole.numpy()))
        for video, picture in zip(frames, pictures, strict=True):
            assert torch.equal(torch.from_numpy(np.array(picture)), video[number])
