"""The command line, from a video file to files a person can look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clips import encode_fields, smooth
from commands import run
from PIL import Image

from stem import InversionFolder, __version__, read_video


def test_compare_writes_table_picture_video_and_json(
    model: str, video: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        *("compare", video, "--model", model, "--prompt", "a duck", "--methods", "ddim,stem"),
        *("--frames", "1:4", "--size", "64x32", "--steps", "2", "--out", str(out)),
        *("--option", "stem.num_bases=16"),
    ]
    assert run(*arguments) == 0
    printed = capfd.readouterr().out
    (folder,) = out.glob("clip-*")
    for part in ("PSNR", "SSIM", "ddim", "stem", "3 frames, 64x32", "resized"):
        assert part in printed
    for kind in ("json", "png", "mp4"):
        assert f"{folder}/compare.{kind}\n" in printed
    document = json.loads((folder / "compare.json").read_text())
    assert [row["method"] for row in document["rows"]] == ["vae", "ddim", "stem"]
    assert document["options"]["stem"] == {"num_bases": 16}
    for row in document["rows"][1:]:
        assert 0 < row["psnr"] < 100
        assert row["invert_seconds"] > 0
        assert row["peak_bytes"] >= 0  # 0 where what earlier tests freed is enough
        assert Path(row["inversion"]).is_dir()
    assert document["note"] == ""
    assert Image.open(folder / "compare.png").size == (3 * 256, 4 * (128 + 24))
    written = read_video(folder / "compare.mp4", multiple_of=1)
    assert written.frames.shape[0] == 3
    assert written.fps == 10
    # a second time everything is reused, and the table says so; what was measured stays
    assert run(*arguments) == 0
    assert capfd.readouterr().out.count("reused") == 4
    assert json.loads((folder / "compare.json").read_text()) == document
    # other results are beside these
    assert run(*arguments, "--prompt", "two ducks") == 0
    assert len(list(out.glob("clip-*/compare.mp4"))) == 2


def test_invert_then_reconstruct(
    model: str, video: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("invert", video, "--model", model, "--methods", "stem", "--size", "32"),
        *("--steps", "2", "--out", str(tmp_path / "out [red]"), "--keep-bases"),
    ]
    assert run(*arguments) == 0
    (line,) = [x for x in capfd.readouterr().out.splitlines() if x.startswith("stem: ")]
    folder = line.removeprefix("stem: ")
    assert Path(folder).parent == tmp_path / "out [red]" / "inversions"
    target = tmp_path / "again.mp4"
    assert run("reconstruct", folder, "--out", str(target), "--bases", "cached") == 0
    assert read_video(target).frames.shape == (4, 32, 40, 3)
    assert run("reconstruct", folder) == 0
    assert (Path(folder) / "reconstruction.mp4").is_file()


def test_what_is_unusual_in_a_video_is_printed_and_mended_where_asked(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encode_fields(tmp_path / "take:1.mp4", smooth(4, 32, 32))
    arguments = ["take:1.mp4", "--model", model, "--methods", "ddim", "--steps", "1"]
    assert run("invert", *arguments, "--out", "out:1") == 0
    printed = capfd.readouterr().out
    assert "take:1.mp4: 2 frames are interlaced and were read as they are" in printed
    assert run("invert", *arguments, "--out", "out:1", "--deinterlace") == 0
    printed = capfd.readouterr().out
    assert "take:1.mp4: the frames were deinterlaced (bwdif)" in printed
    assert "are interlaced" not in printed
    (tmp_path / "run.yaml").write_text("deinterlace: true\n")
    assert run("compare", *arguments, "--config", "run.yaml") == 0
    assert "take:1.mp4: the frames were deinterlaced (bwdif)" in capfd.readouterr().out
    first, second = (InversionFolder.open(path) for path in Path("out:1", "inversions").iterdir())
    assert first.settings["video"]["frames_sha256"] != second.settings["video"]["frames_sha256"]
    target = "back:1.mp4"
    assert run("reconstruct", str(first.path), "--out", target) == 0
    assert read_video(target).frames.shape == (2, 32, 32, 3)


def test_a_file_sets_any_option_and_the_command_line_wins(
    model: str, video: str, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model}\nmethods: [st-ddim, stem]\nsteps: 4\nframes: 0:2\nsize: [32, 32]\n"
        "option:\n  stem: {num_bases: 4, space: key}\n"
        "  st-ddim: {frames: [mid], min_channels: 64}\n"
    )
    out = tmp_path / "out"
    arguments = ["compare", video, "--config", str(config), "--out", str(out), "--steps", "2"]
    assert run(*arguments) == 0
    (file,) = out.glob("clip-*/compare.json")
    document = json.loads(file.read_text())
    assert document["num_steps"] == 2
    assert (document["video"]["width"], document["video"]["height"]) == (32, 32)
    assert document["options"] == {
        "stem": {"num_bases": 4, "space": "key"},
        "st-ddim": {"frames": "mid", "min_channels": 64},
    }
    assert document["video"]["frames"] == 2
    config.write_text(
        config.read_text().split("option:")[0] + "option: [stem.num_bases=4, stem.space=key]\n"
    )
    assert run(*arguments, "--methods", "stem", "--option", "stem.num_bases=8") == 0
    (other,) = set(out.glob("clip-*/compare.json")) - {file}
    assert json.loads(other.read_text())["options"] == {"stem": {"num_bases": 8, "space": "key"}}


def test_a_model_in_another_precision(model: str, video: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--model", model, "--size", "32", "--steps", "2", "--out", str(out))
    assert run("invert", video, *arguments, "--dtype", "bfloat16", "--device", "cpu") == 0
    (folder,) = (out / "inversions").iterdir()
    assert InversionFolder.open(folder).settings["dtype"] == "bfloat16"
    # its own precision is the default of the way back
    assert run("reconstruct", str(folder)) == 0


def test_letters_that_a_terminal_lacks_fail_no_run(tmp_path: Path) -> None:
    (tmp_path / "café" / "steps").mkdir(parents=True)
    (tmp_path / "café" / "settings.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "stem", "list", str(tmp_path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/caf?\n" in done.stdout


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    printed = capfd.readouterr().out
    for part in ("torch ", "triton ", "diffusers ", "usable"):
        assert part in printed


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stem", "--help"], capture_output=True, text=True, check=True
    )
    commands = ("demo", "compare", "invert", "reconstruct", "edit", "info", "list", "verify")
    commands += ("clean", "evaluate")
    for command in commands:
        assert command in done.stdout


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capfd.readouterr().out == f"stem {__version__}\n"


def test_the_demo_compares_world_videos_and_a_real_clip_and_gives_intervals(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    arguments = ["--model", model, "--videos", "2", "--size", "16", "--steps", "2"]
    assert run("demo", *arguments, "--option", "stem.num_bases=8", "--out", str(out)) == 0
    assert "skvideo" not in sys.modules
    printed = capfd.readouterr().out
    (file,) = out.glob("demo-*.json")
    assert str(file) in printed
    document = json.loads(file.read_text())
    assert list(document["psnr"]) == ["vae", "ddim", "st-ddim", "inflated", "stem"]
    edit = json.loads(Path(document["edit"]).read_text())
    assert 0 < edit["psnr_to_exact"] < 100
    assert f"edited: {edit['source_prompt']!r} -> {edit['prompt']!r}\n" in printed
    assert str(Path(document["edit"]).with_name("sheet.png")) in printed
    figures = {figure["metric"]: figure for figure in document["evaluation"]["figures"]}
    assert 0 < figures["Warp-Err x1000"]["value"] < 1000
    assert figures["Warp-Err x1000"]["measured_by"].endswith("exact flow of the world")
    assert f"{figures['WarpSSIM']['value']:.4g}" in printed
    both = []
    for name in ("world-1", "world-2", "carphone_pristine"):
        path = Path(document["comparisons"][name])
        assert path.parent.name.startswith(f"{name}-")
        rows = json.loads(path.read_text())["rows"]
        assert len(rows) == 5
        assert str(path.with_suffix(".png")) in printed
        both.append(rows[4]["psnr"])
    del both[2]
    mean, half_width = document["psnr"]["stem"]
    assert mean == pytest.approx(sum(both) / 2)
    # Student's t for 95 % and one degree of freedom
    assert half_width == pytest.approx(12.706 * abs(both[0] - both[1]) / 2, rel=1e-3)
    assert f"{mean:.2f} ± {half_width:.2f}" in printed
    # the page of all of it is made of what the folder holds, wherever that has gone
    assert f"stem report {file}\n" in printed
    assert run("report", str(out.rename(tmp_path / "moved"))) == 0
    html = (tmp_path / "moved" / "report.html").read_text()
    for text in (f"{mean:.2f} ± {half_width:.2f}", edit["prompt"], "exact flow of the world"):
        assert text in html
