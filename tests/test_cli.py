"""The command line, from a video file to files a person can look at."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from test_inversion import clip

from stem import InversionFolder, __version__, cli, random_pipeline, read_video, write_video


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
        assert row["peak_bytes"] > 0
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


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that commands loaded; none can be."""
    loaded: list[str] = []

    def record(model: str, **_: Any) -> None:
        loaded.append(model)
        raise ValueError("no model can be loaded in this test")

    monkeypatch.setattr(cli.request, "load_pipeline", record)
    monkeypatch.setattr(cli.commands, "load_pipeline", record)
    monkeypatch.setenv("COLUMNS", "300")
    return loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sdedit"], "take one or more of ddim"),
        (["--option", "stem.bases=3"], "stem has no option 'bases'"),
        (["--option", "stem.temperature=hot"], "temperature is 'hot'"),
        (["--option", "num_bases=3"], "write METHOD.FIELD=VALUE"),
        (["--option", "stem.num_bases=many"], "num_bases is 'many'"),
        (["--steps", "30"], "30 steps do not divide"),
        (["--steps", "999"], "the 1000 training steps, so the inversion would not mirror the "),
        (["--steps", "999"], "sampling; take 200, 250, 500"),
        (["--frames", "2:90"], "90"),
        (["--frames", "two"], "two"),
        (["--size", "4"], "pictures of 6x4 are smaller than the least width and height of 8"),
        (["--size", "1000000"], "size '1000000' is not usable; 8192 pixels a side are the most"),
        (["--size", "8x8"], "frames of 8x8 are smaller than SSIM's window, 11 pixels a side"),
        (["--prompt", "\udcff"], r"'\udcff' is not UTF-8"),
        (["--device", "abacus"], "device is 'abacus'; write cpu, cuda or cuda:NUMBER"),
        (["--device", "meta"], "device is 'meta', and torch "),
        (["--device", "xpu"], " has only cpu"),
        (["--model", f"random:{2**63}"], f"its seed is {2**63}; it must be a whole number of 64"),
        (["--model", "random", "--seed", f"{-(2**63) - 1}"], "it must be a whole number of 64"),
        (["--dtype", "float8"], "'float8'; take one of float32, float16, bfloat16"),
        (["--out", "FILE"], "FILE is a file, not a folder"),
        (["--out", "FILE/below"], "is a file, not a folder"),
    ],
)
def test_mistakes_are_one_line_and_found_before_a_model_is_loaded(
    model: str,
    video: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    loads: list[str],
) -> None:
    file = tmp_path / "FILE"
    file.touch()
    arguments = [text.replace("FILE", str(file)) for text in arguments]
    base = ["compare", video, "--model", model, "--out", str(tmp_path / "out")]
    assert run(*base, *arguments) == 2
    printed = capfd.readouterr().err
    assert message.replace("FILE", str(file)) in printed
    assert "Traceback" not in printed
    assert "Errno" not in printed
    assert loads == []
    assert run(*base) == 2
    assert loads == [model]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "FOLDER"], "is a folder; name a video file in it"),
        (["compare", "FOLDER/absent.mp4"], "absent.mp4: no such file"),
        (["invert", "VIDEO", "--keep-bases", "--methods", "ddim,inflated"], "only stem has bases"),
        (["demo", "--size", "61"], "size is 61; this model takes multiples of 4, such as 60"),
        (["demo", "--size", "8"], "frames of 8x8 are smaller than SSIM's window"),
        (["demo", "--videos", "0"], "videos is 0; it must be at least 1"),
        (["demo", "--steps", "7"], "7 steps do not divide"),
        (["reconstruct", "FOLDER"], "holds no settings.json"),
        (["reconstruct", "FOLDER", "--device", "meta"], "device is 'meta', and torch "),
        (["reconstruct", "FOLDER", "--bases", "mine"], "'mine'; take one of estimate, cached"),
    ],
)
def test_mistakes_of_other_commands(
    video: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    loads: list[str],
) -> None:
    replaced = [x.replace("FOLDER", str(tmp_path)).replace("VIDEO", video) for x in arguments]
    assert run(*replaced) == 2
    assert message in capfd.readouterr().err
    assert loads == []


def test_a_disk_that_is_too_small(
    video: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    arguments = ["invert", video, "--size", "32x32", "--out", str(tmp_path / "out")]
    assert run(*arguments, "--model", "random") == 2
    assert loads == ["random:0"]
    capfd.readouterr()
    # 51 latents of 4 frames of 4x4 take 52,224 bytes a method
    assert run(*arguments, "--model", "random", "--methods", "ddim,stem") == 2
    assert "needs 104,448 bytes, and 100,000 are free" in capfd.readouterr().err
    assert loads == ["random:0"]


def test_the_output_of_a_reconstruction_is_checked_first(
    model: str,
    video: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    out = tmp_path / "out"
    assert (
        run("invert", video, "--model", model, "--size", "32", "--steps", "2", *("--out", str(out)))
        == 0
    )
    (folder,) = (out / "inversions").iterdir()
    loads = request.getfixturevalue("loads")
    (tmp_path / "a.mp4").mkdir()
    for path, message in (
        (tmp_path / "a.gif", "only MP4 is written; use a name that ends in .mp4"),
        (tmp_path / "a.mp4", "is a folder; name a file in it"),
        (tmp_path / "clip.mp4" / "b.mp4", "is a file, not a folder"),
    ):
        assert run("reconstruct", str(folder), "--out", str(path)) == 2
        assert message in capfd.readouterr().err
    assert run("reconstruct", str(folder), "--bases", "cached") == 2
    assert "has no cached bases; invert with keep_bases" in capfd.readouterr().err
    last = sorted((folder / "steps").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    assert run("reconstruct", str(folder)) == 2
    assert "run the same inversion again, it mends" in capfd.readouterr().err
    last.unlink()
    assert run("reconstruct", str(folder)) == 2
    assert "has 1 of 2 steps; run the inversion again" in capfd.readouterr().err
    assert loads == []


def test_a_model_that_is_not_there(
    video: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = ("--out", str(tmp_path / "out"))
    assert run("compare", video, "--model", "no/such-folder", *out) == 2
    assert "no pipeline can be loaded from the hub id 'no/such-folder'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "compare has no option 'stepz'"),
        ("[1, 2]", "must hold a mapping"),
        ("option: {stem: 3}", "option must map methods to their fields"),
        ("a: [", "cannot be read"),
        ("size: {width: 3}", "size is {'width': '3'}; it must be one value or a list"),
        ("methods: [[ddim]]", "methods is [['ddim']]; it must be one value or a list"),
    ],
)
def test_a_bad_configuration_file(
    video: str, tmp_path: Path, text: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    assert run("compare", video, "--config", str(config)) == 2
    assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_a_model_in_another_precision(model: str, video: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--model", model, "--size", "32", "--steps", "2", "--out", str(out))
    assert run("invert", video, *arguments, "--dtype", "bfloat16", "--device", "cpu") == 0
    (folder,) = (out / "inversions").iterdir()
    assert InversionFolder.open(folder).settings["dtype"] == "bfloat16"
    # its own precision is the default of the way back
    assert run("reconstruct", str(folder)) == 0


@pytest.mark.parametrize(
    ("command", "where", "message"),
    [
        ("compare", "request.load_pipeline", "interrupted; finished steps are kept: run the same"),
        ("compare", "commands.compare", "interrupted; finished steps are kept: run the same"),
        (
            "reconstruct",
            "commands.reconstruct_latents",
            "interrupted; finished steps are kept: run the",
        ),
        ("info", "commands.describe", "interrupted\n"),
        ("list", "inversions.InversionFolder.find", "interrupted\n"),
    ],
)
def test_an_interruption_anywhere_is_a_plain_message(
    model: str,
    video: str,
    tmp_path: Path,
    command: str,
    where: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = ("--out", str(tmp_path / "out"))
    size = ("--size", "32", "--steps", "2")
    arguments = {"compare": [video, "--model", model, *size, *out], "list": [str(tmp_path)]}
    if command == "reconstruct":
        assert run("invert", video, "--model", model, *size, *out) == 0
        (folder,) = (tmp_path / "out" / "inversions").iterdir()
        arguments["reconstruct"] = [str(folder)]
        capfd.readouterr()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"stem.cli.{where}", interrupt)
    assert run(command, *arguments.get(command, [])) == 130
    printed = capfd.readouterr().err
    assert printed.startswith(message)
    assert len(printed.splitlines()) == 1


def test_an_interruption_that_a_library_turns_into_an_error(
    video: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(*_: object, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise OSError("Unable to load weights")

    monkeypatch.setattr(cli.request, "load_pipeline", lose)
    assert run("compare", video, "--out", str(tmp_path / "out")) == 130
    assert capfd.readouterr().err.startswith("interrupted; finished steps are kept")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


def test_an_interruption_of_the_imports_is_a_plain_message() -> None:
    code = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from stem.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_interruption_says_how_to_go_on(model: str, video: str, tmp_path: Path) -> None:
    arguments = ["invert", video, "--model", model, "--steps", "500", "--size", "32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stem", *arguments, "--out", str(tmp_path / "out")],
        # A backend that is asked for by name: no word of an extension that is not built.
        env={**os.environ, "STEM_KERNELS_BACKEND": "torch"},
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
    # Off a terminal a record of the log is a line, and nothing else is said: no bars, no warnings.
    started, interrupted = printed.splitlines()
    assert started == "INFO stem: inverting 4 frames in 500 steps"
    assert interrupted.startswith("interrupted; finished steps are kept")
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
