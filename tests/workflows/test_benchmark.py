"""Edits of FiVE and of IVEBench judged: folders made up here, figures known in advance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from clips import smooth
from commands import run
from PIL import Image

import stem
from stem.metrics import Tracks
from stem.metrics.unmeasured import install_torchvision
from stem.workflows.benchmark import BenchmarkEvaluation, evaluate_benchmark

FRAMES, HEIGHT, WIDTH = 17, 24, 32  # of which FiVE's metrics take 0, 8 and 16
RED, GREEN, BLUE = torch.eye(3)
LPIPS, MOTION = "LPIPS x1000 outside", "Motion x100"


class Colours:
    """In the place of CLIP: a frame is its mean colour, and a text the colours that it names."""

    name = "mean colours"

    def embed_frames(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.float().mean((1, 2))

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        named = {"red": RED, "green": GREEN, "blue": BLUE, "dark": -(RED + GREEN + BLUE)}
        return torch.stack([sum(named[w] for w in text.split() if w in named) for text in texts])  # type: ignore[misc]


class Steps:
    """In CoTracker's place: points that move to the right in red videos, and down in others."""

    name = "steps"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, list[list[int]] | None]] = []

    def __call__(
        self, frames: torch.Tensor, grid: int, where: torch.Tensor | None = None
    ) -> Tracks:
        box = None if where is None else where.nonzero().aminmax(dim=0)
        self.asked.append((len(frames), grid, box and [side.tolist() for side in box]))
        red = frames.float().mean((0, 1, 2)).argmax() == 0
        step = torch.tensor([1.0, 0.0] if red else [0.0, 1.0])
        places = (torch.arange(float(len(frames)))[:, None] * step).expand(4, -1, -1)
        return Tracks(places, torch.ones(4, len(frames), dtype=torch.bool))


def plain(colour: torch.Tensor, level: int = 200, count: int = FRAMES) -> torch.Tensor:
    return (colour * level).to(torch.uint8).expand(count, HEIGHT, WIDTH, 3)


def write(folder: Path, pictures: torch.Tensor, end: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures, 1):
        Image.fromarray(picture.numpy()).save(folder / f"{number:05d}.{end}")
    return folder


def read(folder: Path) -> torch.Tensor:
    pictures = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(pictures))


def five(folder: Path, **items: tuple[tuple[str, str, str], ...]) -> Path:
    """FiVE's folder of items (video, save_dir, prompt) by type, without pictures."""
    (folder / "edit_prompt").mkdir(parents=True)
    for kind, edits in items.items():
        lines = [
            {
                "video_name": video,
                "editing_type_id": kind.removeprefix("edit"),
                "save_dir": save_dir,
                "source_prompt": "a [red] ball",
                "target_prompt": prompt,
                "instruction": "change it",
            }
            for video, save_dir, prompt in edits
        ]
        (folder / "edit_prompt" / f"{kind}_FiVE.json").write_text(json.dumps(lines))
    return folder


MASK = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.uint8)
MASK[:, 4:16, 8:24] = 3  # anything above 0
MASK[8] = 255  # all of it: this frame has no background
SHARE = 1 - 12 * 16 / (HEIGHT * WIDTH)


def judged(found: BenchmarkEvaluation, name: str) -> dict[str, float | None]:
    (edit,) = [edit for edit in found.edits if edit.name == name]
    return {figure.metric: figure.value for figure in edit.figures}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.usefixtures("no_torchvision", "hub")
def test_five_measures_outside_the_masks(tmp_path: Path) -> None:
    ball, wave = "0001_ball", "0002_wave"
    folder = five(
        tmp_path / "FiVE",
        edit1=((wave, "brighter", "a red wave"), (wave, "short", "a red wave")),
        edit3=((ball, "blue", "a [blue] ball"), (ball, "dark", "a dark ball")),
        edit6=((wave, "gone", "a red sea"),),
    )
    sources = {ball: plain(RED), wave: smooth(FRAMES, HEIGHT, WIDTH) // 2}
    for name, frames in sources.items():
        write(folder / "images" / name, frames, "jpg")
        write(folder / "bmasks" / name, MASK)
    ball_read, wave_read = (read(folder / "images" / name) for name in (ball, wave))
    edits = tmp_path / "edits"
    inside_only = torch.where((MASK > 0)[..., None], plain(BLUE), ball_read)
    write(edits / ball / "blue", inside_only)
    write(edits / ball / "dark", plain(BLUE))
    write(edits / wave / "brighter", wave_read + 10)
    write(edits / wave / "short", wave_read[:9] + 20)

    tracker = Steps()
    found = evaluate_benchmark(folder, edits, clip=Colours(), tracker=tracker, progress=False)
    assert found.benchmark == "FiVE"
    assert found.asked == {"1 rigid object": 2, "3 colour": 2, "6 removal": 1, "all": 5}
    assert list(found.asked) == ["1 rigid object", "3 colour", "6 removal", "all"]
    assert found.absent == ("0002_wave/gone",)
    assert found.problems == ()
    assert all(edit.prompt.count("[") == 0 for edit in found.edits)

    blue = judged(found, "0001_ball/blue")
    assert blue["PSNR dB outside"] == math.inf
    assert blue["MSE x10000 outside"] == 0
    assert blue["SSIM x100 outside"] == 100
    assert blue["CLIP-source x100"] == pytest.approx(100, abs=0.1)
    assert blue["CLIP-text x100 inside"] == pytest.approx(100, abs=0.1)
    part = Colours().embed_frames(inside_only[[0, 8, 16]])
    cosines = torch.nn.functional.cosine_similarity(part, BLUE[None])
    assert blue["CLIP-text x100"] == pytest.approx(100 * float(cosines.mean()), abs=1e-3)
    assert judged(found, "0001_ball/dark")["CLIP-text x100"] == 0  # the cosine is -0.58

    # Frame 8 has no background; in frames 0 and 16 the background alone differs, by 10 of 255.
    error = SHARE * (10 / 255) ** 2
    brighter = judged(found, "0002_wave/brighter")
    assert brighter["MSE x10000 outside"] == pytest.approx(10_000 * error, rel=1e-5)
    assert brighter["PSNR dB outside"] == pytest.approx(-10 * math.log10(error), abs=1e-4)
    kept = (MASK == 0)[[0, 16], None]
    pairs = [v[[0, 16]].permute(0, 3, 1, 2) / 255 * kept for v in (wave_read + 10, wave_read)]
    similar = torchmetrics.functional.image.structural_similarity_index_measure(
        *pairs, data_range=1.0
    )
    assert brighter["SSIM x100 outside"] == pytest.approx(100 * float(similar), abs=1e-2)
    # Of an edit of 9 frames, 0 and 8 are compared with the source's.
    short = judged(found, "0002_wave/short")
    assert short["MSE x10000 outside"] == pytest.approx(40_000 * error, rel=1e-5)

    box = [[0, 0], [22, 30]]  # around all masks, without its last row and column
    assert tracker.asked == [
        (frames, 55, where) for frames in (17, 9, 17, 17) for where in (None, None, box, box)
    ]
    # All points of a video move alike, so each has another that moves as it does, or none at all.
    for name, expected in {"0001_ball/blue": 100, "0001_ball/dark": 0}.items():
        for metric in (MOTION, f"{MOTION} in the box"):
            assert judged(found, name)[metric] == pytest.approx(expected)

    means = {figure.metric: figure for figure in found.means}
    mean = means["MSE x10000 outside"].means
    assert mean["1 rigid object"] == pytest.approx(25_000 * error, rel=1e-5)
    assert mean["6 removal"] is None
    assert means["MSE x10000 outside"].counts == {
        "1 rigid object": 2, "3 colour": 2, "6 removal": 0, "all": 4,
    }  # fmt: skip
    assert means[LPIPS].means["all"] is None
    lacking = [figure for figure in found.edits[0].figures if figure.value is None]
    assert [(f.metric, f.remedy) for f in lacking] == [(LPIPS, install_torchvision())]


@pytest.mark.usefixtures("no_torchvision", "hub")
def test_five_edits_that_cannot_be_compared_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("film", "ours", "half", "long", "torn", "short", "empty")
    folder = five(tmp_path / "FiVE", edit5=tuple(("ball", name, "a blue ball") for name in names))
    edits, source = tmp_path / "edits" / "ball", plain(RED)
    edits.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no folder images; unpack its images.zip there"):
        evaluate_benchmark(folder, edits.parent)
    write(folder / "images" / "ball", source, "jpg")
    write(folder / "bmasks" / "ball", MASK)
    with pytest.raises(ValueError, match=r"holds none of the 7 edits of FiVE; .*ball/film.mp4"):
        evaluate_benchmark(folder, edits.parent)
    write(edits / "torn", source)
    (edits / "torn" / "00009.png").write_bytes(b"no picture")
    (write(edits / "short", source, "jpg") / "00009.jpg").write_bytes(
        (edits / "short" / "00001.jpg").read_bytes()[:-200]
    )
    (edits / "empty").mkdir()
    command = ("evaluate", str(folder), str(edits.parent), "--clip", "nobody/clip")
    assert run(*command) == 2
    assert "no edit of FiVE in" in capfd.readouterr().err

    stem.write_video(edits / "film.mp4", source, 8)
    stem.write_video(edits / "ours" / "edit.mp4", source, 8)
    write(edits / "half", source[:, ::2, ::2])
    write(edits / "long", plain(RED, count=18))
    assert run(*command, "--json", str(tmp_path / "figures.json")) == 0
    printed = capfd.readouterr().out
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [edit["name"] for edit in found["edits"]] == ["ball/film", "ball/ours", "ball/half"]
    for edit in found["edits"]:
        figures = {figure["metric"]: figure["value"] for figure in edit["figures"]}
        assert float(figures["PSNR dB outside"]) > 35
    assert "ball/long: has 18 frames, and the source 17; FiVE takes at most as many" in printed
    assert "torn/00009.png: cannot be read as a picture" in printed
    assert "short/00009.jpg: cannot be read as a picture" in printed
    assert "ball/empty: holds no picture" in printed
    assert "│ edits judged" in printed
    assert "3 of 7" in printed
    assert "missing: CLIP-source x100, CLIP-text x100, CLIP-text x100 inside, of 3" in printed
    assert "hf download nobody/clip" in printed
    assert "missing: Motion x100, Motion x100 in the box, of 3 edits: CoTracker's hub" in printed
    assert (
        f"LPIPS x1000 outside, of 3 edits: torchvision is not installed; {install_torchvision()}"
        in printed
    )
    assert found["provenance"]["versions"]["transformers"]

    mistakes = {
        ("--prompt", "a"): "it is for two videos",
        ("--frames", "3"): "it is for two videos",
        ("--against", "dense"): "it is for two videos",
        ("--model", "base"): "it goes with --against dense",
    }
    for arguments, said in mistakes.items():
        assert run(*command, *arguments) == 2
        assert said in " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert run("evaluate", str(folder), str(edits / "film.mp4")) == 2
    assert "film.mp4 is no folder" in capfd.readouterr().err


def ivebench(folder: Path, *items: dict[str, str]) -> Path:
    folder.mkdir()
    lines = [
        {
            "id": number,
            "category": "style_editing",
            "subcategory": "",
            "source_prompt": "a red ball",
            "edit_prompt": "make it blue",
            "target_prompt": "a blue ball",
            **item,
        }
        for number, item in enumerate(items)
    ]
    (folder / "prompts.json").write_text(json.dumps(lines))
    (folder / "about.json").write_text('{"name": "IVEBench"}')
    return folder


@pytest.mark.usefixtures("no_torchvision", "hub")
def test_ivebench_measures_whole_frames(tmp_path: Path) -> None:
    folder = ivebench(
        tmp_path / "IVEBench",
        {"src_video_name": "ball.mp4"},
        {"src_video_name": "wave.mp4"},
        {"src_video_name": "turn.mp4", "category": "camera_motion_editing"},
        {"src_video_name": "rain.mp4", "subcategory": "event effect"},
        {"src_video_name": "cut.mp4"},
        {"src_video_name": "gone.mp4"},
    )
    edits, wave = tmp_path / "edits", smooth(6, HEIGHT, WIDTH) // 2
    (folder / "short").mkdir()
    stem.write_video(folder / "short" / "ball.mp4", plain(RED, count=6), 8)
    for name in ("wave", "turn", "rain", "cut"):
        write(folder / "frames" / name, wave)
        write(edits / name, wave[:5] if name == "cut" else wave + 5)
    stem.write_video(edits / "ball.mp4", plain(BLUE, count=6), 8)
    tracker = Steps()
    found = evaluate_benchmark(folder, edits, clip=Colours(), tracker=tracker, progress=False)
    assert found.benchmark == "IVEBench"
    assert found.asked == {"style_editing": 5, "camera_motion_editing": 1, "all": 6}
    assert found.absent == ("gone",)
    assert found.problems == (
        f"{edits / 'cut'}: has 5 frames, and the source 6; compare the frames that were edited",
    )
    figures = judged(found, "wave")
    assert list(figures) == ["PSNR dB", "SSIM", "LPIPS", "CLIP-text x100", "Motion"]
    assert figures["PSNR dB"] == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
    assert figures["LPIPS"] is None
    assert figures["Motion"] == 1
    ball = judged(found, "ball")
    assert ball["CLIP-text x100"] == pytest.approx(100, abs=0.5)
    assert ball["Motion"] is not None
    assert ball["Motion"] < 0.9  # to the right, and down
    assert tracker.asked == [(6, 10, None)] * 4  # of two edits
    for name in ("turn", "rain"):
        assert judged(found, name)["Motion"] is None
    (motion,) = [figure for figure in found.means if figure.metric == "Motion"]
    assert motion.counts == {"style_editing": 2, "camera_motion_editing": 0, "all": 2}
    assert motion.means["all"] == pytest.approx((1 + ball["Motion"]) / 2)


def test_folders_of_no_benchmark(tmp_path: Path) -> None:
    folder = tmp_path / "IVEBench"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"neither edit_prompt/edit1_FiVE.json.*\(there is none\)"):
        evaluate_benchmark(folder, tmp_path)
    with pytest.raises(NotADirectoryError, match="gone is no folder; a benchmark takes two"):
        evaluate_benchmark(folder, tmp_path / "gone")
    for name in ("a.json", "b.json"):
        (folder / name).write_text('[{"src_video_name": "ball.mp4", "source_prompt": "a"}]')
    with pytest.raises(ValueError, match=r"\(a.json, b.json\)"):
        evaluate_benchmark(folder, tmp_path)
    (folder / "b.json").write_text("[{")
    with pytest.raises(ValueError, match=r"a.json: an edit's target_prompt is None; it must be a"):
        evaluate_benchmark(folder, tmp_path)
    five(tmp_path / "FiVE", edit1=())
    (tmp_path / "FiVE" / "edit_prompt" / "edit1_FiVE.json").write_text("[{")
    for part in ("images", "bmasks"):
        (tmp_path / "FiVE" / part).mkdir()
    with pytest.raises(ValueError, match=r"edit1_FiVE.json is no JSON .*; fetch it again"):
        evaluate_benchmark(tmp_path / "FiVE", tmp_path)
