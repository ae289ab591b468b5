"""ControlNets from the command line: shown edges, depth or files, recorded, found again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run
from controls import make_control_pipeline, make_controlnet
from pipelines import make_pipeline, make_unet

from stem import cli, read_video
from stem.control import canny
from stem.inversion import InversionFolder

MODEL = ("--model", "base")
EDGES = ("--controlnet", "net", "--control", "canny")
SHORT = ("--steps", "2", "--size", "16x16", "--prompt", "a duck", "--methods", "ddim")


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_pipeline().save_pretrained(folder / "base")
    make_control_pipeline().controlnet.save_pretrained(folder / "net")
    make_controlnet(make_pipeline().unet, 1).save_pretrained(folder / "other")
    make_controlnet(make_unet("sdxl")).save_pretrained(folder / "xl")
    return folder


def inverted(video: str, *arguments: str, out: str = "out") -> InversionFolder:
    assert run("invert", video, *MODEL, *arguments, *SHORT, "--out", out) == 0
    (folder,) = Path(out, "inversions").iterdir()
    return InversionFolder.open(folder)


def write_pictures(folder: Path, frames: torch.Tensor) -> None:
    from PIL import Image

    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame.numpy()).save(folder / f"{number + 8}.png")  # 8, 9, 10, 11


def test_an_inversion_finds_its_control_again(
    video: str, here: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no tries over a network
    numbers = ("--control-scale", "0.5", "--control-end", "0.9")
    inversion = inverted(video, *EDGES, *numbers)
    assert inversion.settings["model"]["controlnets"] == ["net"]
    (control,) = inversion.control()
    frames = read_video(video, size="16x16").frames
    assert torch.equal(control.pictures, canny(frames))
    assert (control.scale, control.start, control.end) == (0.5, 0.0, 0.9)
    assert control.source == "canny"
    assert run("reconstruct", str(inversion.path)) == 0

    edit = ("edit", str(inversion.path), "--prompt", "a swan", "--method", "pnp", "--out", "edits")
    assert run(*edit) == 0
    write_pictures(here / "drawn", 255 - canny(frames))
    assert run(*edit, "--edit-control", "drawn", "--edit-control-scale", "0.8") == 0
    documents = [json.loads(path.read_text()) for path in here.glob("edits/*/edit.json")]
    assert all(each["inversion_settings"]["control"][0]["source"] == "canny" for each in documents)
    (other,) = [each for each in documents if "control" in each["settings"]]
    assert len(documents) == 2
    assert other["settings"]["control"][0]["source"] == "drawn"
    assert other["settings"]["control"][0]["scale"] == 0.8
    assert other["settings"]["control"][0]["end"] == 0.9
    capfd.readouterr()

    for command in (("reconstruct", str(inversion.path)), (*edit, "--method", "sdedit")):
        assert run(*command, "--controlnet", "other") == 2
        printed = " ".join(capfd.readouterr().err.split())
        assert "was made with the ControlNet 'net' (number 1), whose configuration" in printed
    Path("net").rename("moved")
    assert run("reconstruct", str(inversion.path)) == 2
    printed = " ".join(capfd.readouterr().err.split())
    assert "no ControlNet can be loaded from 'net'" in printed
    assert run("reconstruct", str(inversion.path), "--controlnet", "moved") == 0


def test_files_are_read_as_the_video_is(video: str, here: Path) -> None:
    from PIL import Image

    frames = read_video(video, multiple_of=1).frames
    write_pictures(here / "drawn", canny(frames))
    (here / "drawn" / "notes.txt").write_text("no picture")
    both = ("--controlnet", "net", "--control", "drawn", "--controlnet", "other", "--control")
    options = ("--frames", "1:4:2", "--control-scale", "1", "--control-scale", "0.5")
    inversion = inverted(video, *both, video, *options)
    drawn, film = inversion.control()
    expected = read_video(video, size="16x16", frames="1:4:2").frames
    assert torch.equal(film.pictures, expected)
    assert drawn.pictures.shape == expected.shape
    one = Image.fromarray(canny(frames)[3].numpy())
    one.save("one.png")
    assert torch.equal(drawn.pictures[1:], read_video("one.png", size="16x16").frames)
    assert (drawn.scale, film.scale) == (1.0, 0.5)


def test_compare_and_an_edit_of_a_video_under_control(video: str, here: Path) -> None:
    arguments = ("--methods", "ddim", "--steps", "2", "--size", "16x16", "--out", "out")
    assert run("compare", video, *MODEL, *EDGES, *arguments) == 0
    (document,) = here.glob("out/*/compare.json")
    settings = json.loads(document.read_text())["inversions"]["ddim"]
    assert settings["control"][0]["source"] == "canny"
    edit = ("--inversion", "ddim", "--steps", "2", "--size", "16x16", "--out", "edited")
    texts = ("--prompt", "a swan", "--method", "sdedit", "--edit-control-scale", "0.3")
    assert run("edit", video, *MODEL, *EDGES, *edit, *texts) == 0
    (document,) = here.glob("edited/*/edit.json")
    assert json.loads(document.read_text())["settings"]["control"][0]["scale"] == 0.3


@pytest.mark.parametrize(
    ("command", "options"),
    [("analyse", ("--methods", "ddim", "--flow", "dis")), ("ablate", ("--only", "proportional"))],
)
def test_what_looks_inside_shows_control(
    command: str, options: tuple[str, ...], video: str, here: Path
) -> None:
    common = ("--steps", "2", "--size", "16x16", "--out", "out", *options)
    found = []
    for control in (EDGES, (*EDGES, "--control-scale", "0.5")):
        assert run(command, video, *MODEL, *control, *common) == 0
        (document,) = here.glob("out/*/*.json")
        found.append(json.loads(document.read_text()))
        document.unlink()
    figures = "similarity" if command == "analyse" else "rows"
    full, half = found
    assert full["control"][0]["source"] == "canny"
    assert full["control"][0]["weights_sha256"] == half["control"][0]["weights_sha256"]
    assert half["control"][0]["scale"] == 0.5
    assert _steady(full[figures]) != _steady(half[figures])


def _steady(figures: Any) -> Any:
    """Figures without those of time and memory."""
    if isinstance(figures, dict):
        return {k: _steady(v) for k, v in figures.items() if k not in ("seconds", "peak_bytes")}
    return [_steady(each) for each in figures] if isinstance(figures, list) else figures


def test_a_config_file_has_these_options_too(video: str) -> None:
    Path("run.yaml").write_text(
        "model: base\ncontrolnet: [net]\ncontrol: canny\ncontrol-start: [0.5]\n"
    )
    assert run("invert", video, "--config", "run.yaml", *SHORT) == 0
    (folder,) = Path("out/inversions").iterdir()
    assert InversionFolder.open(folder).settings["control"][0]["start"] == 0.5


def test_a_model_that_has_a_control_net_of_its_own(video: str, here: Path, capfd: Any) -> None:
    make_control_pipeline().save_pretrained(here / "both")
    model = ("--model", "both")
    assert run("invert", video, *model, "--control", "canny", *SHORT) == 0
    (folder,) = Path("out/inversions").iterdir()
    assert run("reconstruct", str(folder)) == 0
    capfd.readouterr()
    assert run("invert", video, *model, *SHORT) == 2
    assert "has a ControlNet, and nothing to show it" in capfd.readouterr().err
    assert run("invert", video, *model, *EDGES, *SHORT) == 2
    assert "the model is a StableDiffusionControlNetPipeline, and --c" in capfd.readouterr().err


def test_commands_that_invert_have_the_options() -> None:
    from typer.main import get_command

    options = {"control", "control_scale", "control_start", "control_end", "depth_model"}
    found = {}
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        found[name] = {parameter.name for parameter in command.params} & {*options, "controlnet"}
    assert {name for name, has in found.items() if has == {*options, "controlnet"}} == {
        *("ablate", "analyse", "compare", "edit", "invert")
    }
    assert found["reconstruct"] == {"controlnet"}
    assert found["demo"] == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--controlnet", "net"), "there are 0 for 1 ControlNets; give one for each --controlnet"),
        (("--control", "canny"), "there are 1 for 0 ControlNets"),
        ((*EDGES[:3], "gone.mp4"), "'gone.mp4': there is no such file or folder"),
        (("--controlnet", "net.safetensors", *EDGES[2:]), "cannot be a hub id; --controlnet"),
        ((*EDGES, "--control-scale", "nan"), "scale is nan; it must be finite"),
        ((*EDGES, "--control-start", "1"), "starts at 1.0 and ends at 1.0"),
        ((*EDGES, "--control-end", "0.5", "--control-end", "1"), "there are 2 for 1 ControlNets"),
        (("--control-scale", "0.5"), "it goes with --controlnet and --control"),
        ((*EDGES, "--depth-model", "net"), "it goes with --control depth"),
        (
            (*EDGES[:3], "depth", "--depth-model", "nobody/depth"),
            "the depth model 'nobody/depth' is not on this machine; hf download nobody/depth",
        ),
    ],
)
def test_mistakes_are_found_before_the_video_is_read(
    arguments: tuple[str, ...], message: str, loads: list[str], capfd: Any
) -> None:
    for command in ("invert", "compare"):
        assert run(command, "absent.mp4", *MODEL, *arguments) == 2
        printed = " ".join(capfd.readouterr().err.replace("│", " ").split())
        assert message in printed
    assert loads == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--edit-control", "gone.mp4"), "'gone.mp4': there is no such file or folder"),
        (("--edit-control", "net", "--edit-control", "net"), "there are 2 for 1 ControlNets"),
        (("--edit-control-scale", "inf"), "scale is inf; it must be finite"),
    ],
)
def test_mistakes_of_an_edit_s_control_are_found_before_the_video_is_read(
    arguments: tuple[str, ...], message: str, loads: list[str], capfd: Any
) -> None:
    edit = ("edit", "absent.mp4", *MODEL, *EDGES, "--prompt", "a swan")
    assert run(*edit, *arguments) == 2
    assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert loads == []


def test_the_disk_has_to_hold_the_pictures(
    video: str, capfd: Any, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=15_000))
    assert run("invert", video, *MODEL, *EDGES, *SHORT) == 2
    # 3 latents of 4 frames of 8 x 8 x 4 numbers, and 4 pictures of 16 x 16 pixels
    assert "needs 15,360 bytes, and 15,000 are free" in capfd.readouterr().err
    assert loads == []


def test_damaged_pictures_are_named(video: str, capfd: Any) -> None:
    inversion = inverted(video, *EDGES)
    assert run("verify", str(inversion.path)) == 0
    (inversion.path / "control.safetensors").write_bytes(b"half")
    assert run("verify", str(inversion.path)) == 1
    assert "control.safetensors" in capfd.readouterr().out


def test_a_control_net_of_another_model_is_one_line(video: str, here: Path, capfd: Any) -> None:
    capfd.readouterr()
    wrong = ("--controlnet", "xl", "--control", "canny")
    assert run("invert", video, *MODEL, *wrong, *SHORT) == 2
    printed = capfd.readouterr().err
    assert "has cross_attention_dim 32, and the UNet has 16" in printed
    assert printed.count("\n") == 1
    assert not list(here.glob("out/inversions/*"))


def test_options_of_an_inversion_do_not_go_with_its_folder(video: str, capfd: Any) -> None:
    inversion = inverted(video, *EDGES)
    edit = ("edit", str(inversion.path), "--prompt", "a swan")
    for arguments, message in (
        (("--control", "canny"), "it belongs to an inversion, and the folder's own is made"),
        (("--edit-control", "gone.mp4"), "'gone.mp4': there is no such file or folder"),
        (("--edit-control", video, "--edit-control", video), "there are 2 for 1 ControlNets"),
    ):
        assert run(*edit, *arguments) == 2
        assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())
