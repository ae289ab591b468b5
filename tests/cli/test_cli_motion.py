"""AnimateDiff from the command line: recorded, found again, and what does not go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import run
from inversions import clip
from motion import make_adapter, make_motion_pipeline
from pipelines import make_pipeline

from stem import cli
from stem.inversion import InversionFolder
from stem.workflows.ablation import ablate
from stem.workflows.analysis import analyse

MODEL = ("--model", "base", "--motion-adapter", "motion")
SHORT = ("--steps", "2", "--size", "16x16")

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_pipeline().save_pretrained(folder / "base")
    make_adapter().save_pretrained(folder / "motion")
    make_adapter(strength=0.5).save_pretrained(folder / "other")
    return folder


def test_an_inversion_finds_its_adapter_again(video: str, here: Path, capfd: Any) -> None:
    compare = ("compare", video, *MODEL, *SHORT, "--prompt", "a duck", "--methods", "ddim")
    assert run(*compare, "--motion-window", "3", "--out", "out") == 0
    (folder,) = Path("out", "inversions").iterdir()
    recorded = InversionFolder.open(folder).settings["model"]
    assert recorded["motion_adapter"] == "motion"
    assert recorded["motion_window"] == 3
    (document,) = here.glob("out/*/compare.json")
    assert json.loads(document.read_text())["model"]["motion_window"] == 3
    edit = ("edit", str(folder), "--prompt", "a swan", "--method", "pnp", "--out", "edits")
    assert run(*edit) == 0
    (document,) = here.glob("edits/*/edit.json")
    settings = json.loads(document.read_text())["inversion_settings"]
    assert settings["model"]["motion_adapter"] == "motion"
    capfd.readouterr()
    assert run("reconstruct", str(folder), "--motion-adapter", "other") == 2
    printed = " ".join(capfd.readouterr().err.split())
    assert "with motion adapter motion, motion window 3, whose configuration or weights" in printed


def test_pivots_are_refused_before_the_inversion(video: str, here: Path, capfd: Any) -> None:
    edit = ("edit", video, *MODEL, *SHORT, "--prompt", "a swan", "--method", "pnp,tokenflow")
    assert run(*edit, "--inversion", "ddim", "--out", "edits") == 2
    assert "take chunk=1 (--option METHOD.chunk=1)" in capfd.readouterr().err
    assert not list(here.glob("edits/inversions/*"))


def test_commands_of_plain_unets_refuse_it() -> None:
    given: dict[str, Any] = {"pipeline": make_motion_pipeline(), "video": clip(), "out": "nowhere"}
    for call, more in ((ablate, {}), (analyse, {"methods": ["ddim"]})):
        message = rf"has motion modules \(AnimateDiff\), and {call.__name__} looks at UNets"
        with pytest.raises(ValueError, match=message):
            call(**given, prompt="a duck", **more)


def test_commands_have_the_options() -> None:
    from typer.main import get_command

    options = {"motion_adapter", "motion_window"}
    found = {
        name
        for name, command in get_command(cli.app).commands.items()  # type: ignore[attr-defined]
        if options <= {parameter.name for parameter in command.params}
    }
    assert found == {"compare", "edit", "evaluate", "invert", "reconstruct"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--motion-adapter", "base"), "the motion adapter 'base' is a folder without config.json"),
        (("--motion-adapter", "m.ckpt"), "'m.ckpt' is no folder here, and cannot be a hub id"),
        (("--motion-window", "16"), "motion_window is 16, and there is no motion adapter"),
        (("--motion-adapter", "motion", "--motion-window", "1"), "a number of frames of at least"),
    ],
)
def test_mistakes_are_found_before_the_video_is_read(
    arguments: tuple[str, ...], message: str, loads: list[str], capfd: Any
) -> None:
    assert run("invert", "absent.mp4", "--model", "base", *arguments) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert loads == []
