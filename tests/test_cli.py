"""The command line, from a video file to files a person can look at."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_inversion import clip

from stem import InversionFolder, cli, random_pipeline, read_video, write_video
from stem.pictures import contact_sheet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "small"
    random_pipeline(1).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def video(tmp_path: Path) -> str:
    path = tmp_path / "clip.mp4"
    smooth = clip(4).frames.permute(0, 3, 1, 2).float()
    large = torch.nn.functional.interpolate(smooth, size=(70, 100)).permute(0, 2, 3, 1)
    write_video(path, large.to(torch.uint8), 10)
    return str(path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(cli.run(list(arguments)))
    return int(caught.value.code or 0)


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
    for part in ("PSNR", "SSIM", "ddim", "stem", "3 frames, 64x32", "resized", "compare.png"):
        assert part in printed
    document = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in document["rows"]] == ["vae", "ddim", "stem"]
    assert document["options"]["stem"] == {"num_bases": 16}
    for row in document["rows"][1:]:
        assert 0 < row["psnr"] < 100
        assert row["invert_seconds"] > 0
        assert row["peak_bytes"] > 0
        assert Path(row["inversion"]).is_dir()
    assert document["note"] == ""
    assert Image.open(out / "compare.png").size == (3 * 256, 4 * (128 + 24))
    written = read_video(out / "compare.mp4", multiple_of=1)
    assert written.frames.shape[0] == 3
    assert written.fps == 10
    # a second time everything is reused, and the table says so
    assert run(*arguments) == 0
    assert capfd.readouterr().out.count("reused") == 2


def test_invert_then_reconstruct(
    model: str, video: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("invert", video, "--model", model, "--methods", "stem", "--size", "32"),
        *("--steps", "2", "--out", str(tmp_path / "out"), "--keep-bases"),
    ]
    assert run(*arguments) == 0
    (line,) = [x for x in capfd.readouterr().out.splitlines() if x.startswith("stem: ")]
    folder = line.removeprefix("stem: ")
    assert Path(folder).parent == tmp_path / "out" / "inversions"
    target = tmp_path / "again.mp4"
    assert run("reconstruct", folder, "--out", str(target), "--bases", "cached") == 0
    assert read_video(target).frames.shape == (4, 32, 40, 3)
    assert run("reconstruct", folder) == 0
    assert (Path(folder) / "reconstruction.mp4").is_file()


def test_a_file_sets_any_option_and_the_command_line_wins(
    model: str, video: str, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model}\nmethods: [st-ddim, stem]\nsteps: 4\nframes: 0:2\nsize: 32x32\n"
        "option:\n  stem: {num_bases: 4, space: key}\n"
        "  st-ddim: {frames: [mid], min_channels: 64}\n"
    )
    out = tmp_path / "out"
    arguments = ["compare", video, "--config", str(config), "--out", str(out), "--steps", "2"]
    assert run(*arguments) == 0
    document = json.loads((out / "compare.json").read_text())
    assert document["num_steps"] == 2
    assert document["options"] == {
        "stem": {"num_bases": 4, "space": "key"},
        "st-ddim": {"frames": "mid", "min_channels": 64},
    }
    assert document["video"]["frames"] == 2
    config.write_text(config.read_text().split("option:")[0] + "option: [stem.num_bases=4]\n")
    assert run(*arguments, "--methods", "stem") == 0
    document = json.loads((out / "compare.json").read_text())
    assert document["options"] == {"stem": {"num_bases": 4}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sdedit"], "take one or more of ddim"),
        (["--option", "stem.bases=3"], "stem has no option 'bases'"),
        (["--option", "stem.temperature=hot"], "temperature is 'hot'"),
        (["--option", "num_bases=3"], "write METHOD.FIELD=VALUE"),
        (["--option", "stem.num_bases=many"], "num_bases is 'many'"),
        (["--steps", "30"], "30 steps do not divide"),
        (["--frames", "2:90"], "90"),
        (["--frames", "two"], "two"),
        (["--size", "4"], "4"),
        (["--model", "no/such-folder"], "no/such-folder"),
    ],
)
def test_mistakes_are_one_line(
    model: str,
    video: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "300")
    base = ["compare", video, "--model", model, "--out", str(tmp_path / "out")]
    assert run(*base, *arguments) == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "compare has no option 'stepz'"),
        ("[1, 2]", "must hold a mapping"),
        ("option: {stem: 3}", "option must map methods to their fields"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_bad_configuration_file(
    video: str, tmp_path: Path, text: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    assert run("compare", video, "--config", str(config)) == 2
    assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_an_interruption_says_how_to_go_on(model: str, video: str, tmp_path: Path) -> None:
    arguments = ["invert", video, "--model", model, "--steps", "500", "--size", "32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stem", *arguments, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
    )
    inversions = tmp_path / "out" / "inversions"
    deadline = time.monotonic() + 120
    while not list(inversions.glob("*/steps/002-*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished steps are kept" in printed
    assert "Traceback" not in printed
    (path,) = inversions.iterdir()
    assert 3 <= InversionFolder.open(path).steps_done < 500


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    printed = capfd.readouterr().out
    for part in ("torch ", "triton ", "diffusers ", "usable"):
        assert part in printed


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stem", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "compare", "invert", "reconstruct", "info"):
        assert command in done.stdout


def test_the_demo_compares_world_videos_and_a_real_clip_and_gives_intervals(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    arguments = ["--model", model, "--videos", "2", "--size", "16", "--steps", "2"]
    assert run("demo", *arguments, "--option", "stem.num_bases=8", "--out", str(out)) == 0
    assert "skvideo" not in sys.modules
    printed = capfd.readouterr().out
    document = json.loads((out / "demo.json").read_text())
    assert list(document["psnr"]) == ["vae", "ddim", "st-ddim", "inflated", "stem"]
    for name in ("world-1", "world-2", "carphone_pristine"):
        compared = json.loads((out / name / "compare.json").read_text())
        assert len(compared["rows"]) == 5
        assert name in printed
    both = [
        json.loads((out / name / "compare.json").read_text())["rows"][4]["psnr"]
        for name in ("world-1", "world-2")
    ]
    mean, half_width = document["psnr"]["stem"]
    assert mean == pytest.approx(sum(both) / 2)
    # Student's t for 95 % and one degree of freedom
    assert half_width == pytest.approx(12.706 * abs(both[0] - both[1]) / 2, rel=1e-3)
    assert f"{mean:.2f} ± {half_width:.2f}" in printed


def test_a_contact_sheet_shows_the_first_and_the_last_frame() -> None:
    frames = torch.zeros(9, 20, 30, 3, dtype=torch.uint8)
    frames[0], frames[8] = 50, 200
    sheet = contact_sheet({"a": frames, "b": frames}, columns=3)
    assert sheet.size == (3 * 210, 2 * (140 + 24))  # magnified by 7
    assert [sheet.getpixel((210 * column + 105, 100))[0] for column in range(3)] == [50, 0, 200]
