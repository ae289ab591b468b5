"""`stem edit`: what it asks of the editing package, the files it writes, and how it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from conftest import write_clip
from PIL import Image
from typer import BadParameter

from stem import InversionFolder, read_video, write_video
from stem.attention.waiting.parked import current_parking
from stem.cli.edit_options import split_options, with_preset
from stem.editing import METHODS, Edit, FateZeroOptions, edit_options
from stem.editing.job import Options
from stem.editing.run import Preview
from stem.world import render, sample_scene

OPTIONS = ("--inversion", "ddim", "--size", "32x32", "--steps", "2")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("videos") / "clip.mp4", 3, 32, 40)


@dataclass(frozen=True)
class FateZero(Options):
    equalize: Any = None
    self_replace: Any = 0.8
    blend_words: Any = None


@pytest.fixture(autouse=True)
def _options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that stand in for those of the methods."""
    monkeypatch.setitem(METHODS, "fatezero", FateZero)


class Editing:
    """A stand-in for `run_edit` that keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(
        self,
        pipeline: Any,
        inversion: InversionFolder,
        prompt: str,
        *,
        group: None,
        progress: bool,
        on_step: Callable[[], None],
        preview: Preview,
        **arguments: Any,
    ) -> Edit:
        self.asked.append({"prompt": prompt, **arguments})
        on_step()
        latents = inversion.x0().flip(0)
        preview.show(1, 2, latents[list(preview.frames)])
        cores = torch.zeros(latents.shape[0], *latents.shape[2:], dtype=torch.bool)
        cores[:, 2:4, 2:4] = True
        masks = cores.clone()
        masks[:, 1:5, 1:5] = True
        masked = arguments["method"] == "fusion"
        return Edit(
            latents=latents,
            masks=masks if masked else None,
            cores=cores if masked else None,
            pivots=None if masked else torch.tensor([[0], [1]]),
            settings={"method": arguments["method"], "prompt": prompt},
        )


@pytest.fixture
def editing(monkeypatch: pytest.MonkeyPatch) -> Editing:
    found = Editing()
    monkeypatch.setattr("stem.workflows.edits.run_edit", found)
    return found


def test_a_folder_is_edited_by_every_prompt_and_method(
    inversion: str, tmp_path: Path, editing: Editing, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("edit", inversion, "--out", str(tmp_path), "--method", "fusion,pnp", "--seed", "3"),
        *("--prompt", "a blue ball", "--prompt", "a green ball", "--guidance", "4.5"),
        *("--option", "pnp.attention_until=0.25", "--preset", "shape"),
        *("--negative-prompt", "a star"),
    ]
    assert run(*arguments) == 0
    common = {"negative_prompt": "a star", "guidance": 4.5, "seed": 3}
    by_method = {"fusion": {"preset": "shape"}, "pnp": {"attention_until": 0.25}}
    assert editing.asked == [
        {"prompt": f"a {colour} ball", "method": method, "options": options, **common}
        for colour in ("blue", "green")
        for method, options in by_method.items()
    ]
    printed = capfd.readouterr().out
    folders = sorted(tmp_path.iterdir())
    names = ("edits", "fusion-a-blue-ball", "fusion-a-green-ball", "pnp-a-blue-ball", "pnp-a-green")
    for folder, name in zip(folders, names, strict=True):
        assert folder.name.startswith(name)
        for file in folder.iterdir():
            assert f"{file}\n" in printed
    fusion, pnp = (json.loads((folders[i] / "edit.json").read_text()) for i in (1, 3))
    assert fusion["settings"] == {"method": "fusion", "prompt": "a blue ball"}
    assert fusion["source_prompt"] == "a red ball"
    assert fusion["share_that_may_change"] == 16 / 64
    assert fusion["durations"]["steps_done_in_them"] == 1
    assert "commit" not in fusion["provenance"]
    assert (pnp["share_that_may_change"], pnp["pivots"]) == (None, [[0], [1]])
    # 3 frames, magnified to 128 pixels: source, reconstruction, edit, masks
    assert Image.open(folders[3] / "sheet.png").size == (3 * 128, 3 * 152)
    sheet = Image.open(folders[1] / "sheet.png")
    assert sheet.size == (3 * 128, 4 * 152)
    gray = [sheet.getpixel((16 * cell + 8, 3 * 152 + 24 + 40))[0] for cell in range(8)]
    assert gray == [0, 128, 255, 255, 128, 0, 0, 0]
    assert Image.open(folders[0] / "edits.png").size == (3 * 128, 6 * 152)
    together = json.loads((folders[0] / "edits.json").read_text())
    assert together["edits"] == [str(folders[i] / "edit.json") for i in (1, 3, 2, 4)]
    assert run("report", str(folders[0])) == 0
    html = (folders[0] / "report.html").read_text()
    for text in ("fusion 1", "pnp 2", "fusion 3", "pnp 4", "a green ball", "25.0%"):
        assert text in html
    video = read_video(folders[1] / "edit.mp4")
    assert (video.frames.shape, video.fps) == ((3, 32, 32, 3), 10)
    assert fusion["share_by_frame"] == [16 / 64] * 3
    assert fusion["beside"] == ["source, through the VAE", "reconstruction", "fusion", "mask"]
    beside = read_video(folders[1] / "beside.mp4", multiple_of=1)
    assert (beside.frames.shape, beside.fps) == ((3, 2 * 152, 2 * 128, 3), 10)
    gray = beside.frames[2, 152 + 24 + 40, 128 + 8 :: 16, 0].float()
    expected = torch.tensor([0.0, 128, 255, 255, 128, 0, 0, 0])
    assert (gray - expected).abs().max() < 16  # H.264
    assert pnp["beside"] == ["source, through the VAE", "reconstruction", "pnp"]


def test_a_preset_is_that_of_every_method_that_has_presets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "fatezero", FateZeroOptions)
    methods = ["fatezero", "fusion", "pnp"]
    given, _ = split_options(["fatezero.equalize=blue"], methods, None)
    found = with_preset(given, methods, "style")
    assert found == {
        "fatezero": {"equalize": "blue", "preset": "style"},
        "fusion": {"preset": "style"},
        "pnp": {},
    }
    fatezero = edit_options("fatezero", found["fatezero"])
    assert fatezero == FateZeroOptions(preset="style", equalize={"blue": 10.0})
    with pytest.raises(BadParameter, match=r"'colour' is no preset of fatezero: .*has style, "):
        with_preset({}, methods, "colour")


def test_a_finished_edit_is_reused_and_a_damaged_one_written_again(
    inversion: str, tmp_path: Path, editing: Editing, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["edit", inversion, "--out", str(tmp_path), "--prompt", "a blue ball"]
    assert run(*arguments) == 0
    (folder,) = tmp_path.iterdir()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    capfd.readouterr()
    assert run(*arguments) == 0
    assert "fusion, 'a blue ball': reused" in capfd.readouterr().out
    assert len(editing.asked) == 1
    (folder / "edit.mp4").write_bytes(b"")
    assert run(*arguments) == 0
    assert len(editing.asked) == 2
    assert (folder / "edit.mp4").read_bytes() == before["edit.mp4"]
    assert list(tmp_path.iterdir()) == [folder]
    # another seed is another edit, which takes the place of none
    assert run(*arguments, "--seed", "1") == 0
    assert len(list(tmp_path.iterdir())) == 2
    assert {file.name for file in folder.iterdir()} == before.keys()
    # beside another, all are shown together: those that are there are not written again
    assert run(*arguments, "--prompt", "a green ball") == 0
    assert [call["prompt"] for call in editing.asked[3:]] == ["a blue ball", "a green ball"]
    assert run(*arguments, "--prompt", "a green ball") == 0
    assert len(editing.asked) == 5


def test_a_video_is_inverted_and_its_inversion_reused(
    video: str, tmp_path: Path, editing: Editing, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path))
    arguments = ["edit", video, "--source-prompt", "a red ball", *OPTIONS, *out]
    assert run(*arguments, "--prompt", "a blue ball") == 0
    assert run(*arguments, "--prompt", "a green ball", "--chunk", "all") == 0
    (folder,) = (tmp_path / "inversions").iterdir()
    assert capfd.readouterr().out.count(f"inversion: {folder}\n") == 2
    inverted = InversionFolder.open(folder)
    assert inverted.settings["method"] == "ddim"
    assert inverted.settings["prompt"] == "a red ball"
    assert len(editing.asked) == 2
    # what is seen of the source is the video itself, not the VAE's picture of it
    (edited,) = tmp_path.glob("fusion-a-blue-*")
    sheet = Image.open(edited / "sheet.png")
    source = read_video(video, size="32x32").frames
    for frame in range(3):
        pixels = tuple(source[frame, 16, 16].tolist())
        assert sheet.getpixel((128 * frame + 4 * 16, 24 + 4 * 16)) == pixels


@pytest.mark.parametrize(("text", "cuts"), [(None, [8]), ("none", []), ("3, 9", [3, 9])])
def test_scenes_are_found_or_as_the_command_says(
    tmp_path: Path,
    editing: Editing,
    capfd: pytest.CaptureFixture[str],
    text: str | None,
    cuts: list[int],
) -> None:
    scenes = [render(sample_scene(seed, num_things=1), 8, 32).frames for seed in (1, 2)]
    write_video(tmp_path / "scenes.mp4", torch.cat(scenes), 8)
    said = [] if text is None else ["--cuts", text]
    arguments = ("edit", str(tmp_path / "scenes.mp4"), "--prompt", "a blue ball", *OPTIONS)
    assert run(*arguments, *said, "--out", str(tmp_path)) == 0
    (folder,) = (tmp_path / "inversions").iterdir()
    assert InversionFolder.open(folder).settings["attention"]["cuts"] == cuts
    assert ("other scenes begin with frames 8:" in capfd.readouterr().out) == (text is None)


@pytest.mark.parametrize("kind", ["disk", "never", "auto"])
def test_chunks_wait_where_the_command_says(
    inversion: str, tmp_path: Path, editing: Editing, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seen = []

    def edited(*given: Any, **named: Any) -> Edit:
        parking = current_parking()
        seen.append((parking.kind, parking.folder))
        return editing(*given, **named)

    monkeypatch.setattr("stem.workflows.edits.run_edit", edited)
    out = tmp_path / "out"
    arguments = ("--out", str(out), "--prompt", "a blue ball", "--park", kind)
    assert run("edit", inversion, *arguments) == 0
    assert seen == [(kind, None if kind == "auto" else out)]


def test_values_of_options_from_a_file_and_the_command_line(
    inversion: str, tmp_path: Path, editing: Editing
) -> None:
    config = tmp_path / "edit.yaml"
    config.write_text(
        "prompt: [a blue ball, a pink ball]\nmethod: [fatezero, fusion]\nguidance: 3\n"
        "option:\n  fatezero:\n    equalize: {blue: 10, on: 1e-1}\n"
        "    self_replace: [0, 0.5]\n    blend_words: [[red], [blue, pink]]\n"
    )
    arguments = ["edit", inversion, "--config", str(config), "--out", str(tmp_path / "out")]
    assert run(*arguments, "--option", "fatezero.self_replace=0.25,0.75") == 0
    assert [call["prompt"][:6] for call in editing.asked] == ["a blue"] * 2 + ["a pink"] * 2
    assert editing.asked[0]["guidance"] == 3.0
    options = {
        "equalize": {"blue": 10, "on": 0.1},
        "self_replace": [0.25, 0.75],
        "blend_words": [["red"], ["blue", "pink"]],
    }
    assert editing.asked[0]["options"] == options
    editing.asked.clear()
    typed = ["--option", "fatezero.equalize={on: 2}", "--method", "fatezero"]
    assert run(*arguments, *typed, "--prompt", "a ball on a ball") == 0
    (call,) = editing.asked
    assert (call["prompt"], call["options"]["equalize"]) == ("a ball on a ball", {"on": 2})


def test_an_interruption_says_how_to_go_on(
    inversion: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stem.workflows.edits.run_edit", interrupt)
    assert run("edit", inversion, "--prompt", "a", "--out", str(tmp_path)) == 130
    assert "interrupted; finished steps are kept" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_real_edit_that_is_killed_goes_on_bit_for_bit(
    inversion: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("--prompt", "a blue ball", "--method", "pnp")
    copy = shutil.copytree(inversion, tmp_path / Path(inversion).name)
    assert run("edit", inversion, *arguments, "--out", str(tmp_path / "whole")) == 0
    save = InversionFolder.save_progress

    def interrupted(*given: Any, **named: Any) -> None:
        save(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(InversionFolder, "save_progress", interrupted)
        assert run("edit", str(copy), *arguments, "--out", str(tmp_path / "killed")) == 130
    assert run("edit", str(copy), *arguments, "--out", str(tmp_path / "killed")) == 0
    assert "edit goes on after step 1" in capfd.readouterr().err
    (whole,), (killed,) = ((tmp_path / name).iterdir() for name in ("whole", "killed"))
    for file in ("edit.mp4", "beside.mp4", "sheet.png"):
        assert (whole / file).read_bytes() == (killed / file).read_bytes()
    documents = [json.loads((folder / "edit.json").read_text()) for folder in (whole, killed)]
    assert [found["durations"]["steps_done_in_them"] for found in documents] == [2, 1]
    assert documents[0]["settings"] == documents[1]["settings"]
