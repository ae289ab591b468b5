"""Mistakes on the command line: one line each, and said before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import run


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
        (["invert", "VIDEO", "--cuts", "second 3"], "auto, none, or numbers of frames"),
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


def test_a_file_whose_name_begins_as_a_world_video(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("world:3.mp4").write_bytes(b"no video")
    assert run("analyse", "world:3.mp4") == 2
    assert "world:3.mp4: cannot be read as a video" in capfd.readouterr().err
    assert run("analyse", "world:4.mp4") == 2
    assert "a world video takes a seed" in " ".join(capfd.readouterr().err.replace("│", "").split())


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


@pytest.mark.parametrize(
    "said", ["DefaultCPUAllocator: can't allocate memory", "Triton Error [CUDA]: out of memory"]
)
def test_lacking_memory_is_one_line(
    said: str,
    model: str,
    video: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def load(*arguments: object, **_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("stem.models.load_pipeline", load)
    assert run("compare", video, "--model", model, "--out", str(tmp_path)) == 2
    assert f"error: {said}. Take fewer or smaller frames" in capfd.readouterr().err
