"""`stem invert`, `reconstruct` and `edit` through a video transformer, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from conftest import write_clip
from flow_models import PROMPT, write_embedded
from interruptions import stop_after

from stem import InversionFolder, read_video
from stem.flow import load_video_model
from stem.inversion import invert_video, reconstruct_video
from stem.metrics import psnr

SIZE = ("--size", "16x16", "--steps", "3")
BASES = {"tokens_per_base": 8}
OPTION = ("--option", "stem.tokens_per_base=8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video_models")
    write_clip(folder / "clip.mp4", 3, 16, 20)
    write_embedded(folder / "model")
    return folder


def inverted(method: str = "midpoint") -> InversionFolder:
    return InversionFolder.open(next(Path("out/inversions").glob(f"{method}-*")))


def test_invert_and_reconstruct(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("invert", "clip.mp4", "--model", "model", *SIZE, *OPTION, "--prompt", PROMPT)
    assert run(*asked, "--methods", "midpoint,euler") == 0
    said = capsys.readouterr().out
    folder = inverted()
    assert f"midpoint: {Path('out/inversions') / folder.path.name}" in said
    assert folder.settings["model"]["name"] == "model"
    model, video = load_video_model("model", device="cpu"), read_video("clip.mp4", size="16x16")
    expected = invert_video(
        model, video, PROMPT, here / "own", options=BASES, num_steps=3, source="model"
    )
    assert expected.path.name == folder.path.name
    assert torch.equal(expected.latents(-1), folder.latents(-1))
    assert run("reconstruct", str(folder.path)) == 0
    path, figure = capsys.readouterr().out.splitlines()[-2:]
    assert path == str(folder.path / "reconstruction.mp4")
    assert read_video(path).frames.shape == (3, 16, 16, 3)
    frames = reconstruct_video(model, folder, progress=False)
    assert (
        figure
        == f"PSNR to the source through the VAE: {psnr(frames, model.decode(folder.x0())):.2f} dB"
    )
    assert run("list", "out") == 0
    assert "euler, 3 of 3 steps, 3 frames of 16x16, " in capsys.readouterr().out


def test_an_interrupted_command_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = stop_after(2)
    save = InversionFolder.save_latents

    def stopping(folder: InversionFolder, *arguments: Any) -> None:
        save(folder, *arguments)
        stop()

    asked = ("invert", "clip.mp4", "--model", "model", *SIZE, *OPTION)
    with monkeypatch.context() as patch:
        patch.setattr(InversionFolder, "save_latents", stopping)
        assert run(*asked) == 130
    folder = inverted()
    assert folder.steps_done == 2
    assert run("verify", "out") == 0
    assert f"unfinished: {folder.path} has 2 of 3 steps" in capsys.readouterr().out
    assert run(*asked) == 0
    assert run("verify", "out") == 0
    assert f"whole: {folder.path}" in capsys.readouterr().out
    last = sorted((folder.path / "steps").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert run("verify", "out") == 1


def test_edit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("edit", "clip.mp4", "--model", "model", "--method", "flowedit", *SIZE, *OPTION)
    words = ("--source-prompt", PROMPT, "--prompt", "a blue ball", "--guidance", "3")
    assert run(*asked, *words, "--option", "flowedit.n_max=2", "--out", "out") == 0
    said = capsys.readouterr().out.splitlines()
    document = json.loads(Path(said[-1]).read_text())
    assert document["settings"]["options"]["n_max"] == 2
    assert document["settings"]["guidance"] == 3.0
    assert document["source_prompt"] == PROMPT
    assert document["inversion_settings"]["attention"]["tokens_per_base"] == 8
    assert read_video(Path(said[-1]).with_name("edit.mp4")).frames.shape == (3, 16, 16, 3)
    kept = inverted("source")
    assert f"source: {Path('out/inversions') / kept.path.name}" in said
    assert run("verify", "out") == 0
    kept_x0 = kept.path / "x0.safetensors"
    kept_x0.write_bytes(kept_x0.read_bytes()[:-1])
    assert run("verify", "out") == 1
    assert run("invert", "clip.mp4", "--model", "model", *SIZE, "--prompt", PROMPT) == 0
    capsys.readouterr()
    again = ("edit", str(inverted().path), "--method", "flowedit", "--prompt", "a blue ball")
    assert run(*again, "--out", "out") == 0
    written = Path(capsys.readouterr().out.splitlines()[-1])
    document = json.loads(written.read_text())
    assert document["beside"] == ["source, through the VAE", "reconstruction", "flowedit"]
    assert run("report", str(written.parent), said[-1], "--out", "report.html") == 0


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    loaded: list[str] = []

    def record(model: str, **_: Any) -> None:
        loaded.append(model)
        raise ValueError("no model can be loaded in this test")

    monkeypatch.setattr("stem.flow.loading.load_video_model", record)
    return loaded


def test_options_that_do_not_go_with_it(
    here: Path, nothing_loads: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    invert = ("invert", "clip.mp4", "--model", "model")
    edit = ("edit", "clip.mp4", "--model", "model", "--method", "flowedit", "--prompt", "a ball")
    expected = {
        (*invert, "--lora", "a.safetensors"): "--lora: it does not go with a video transformer:",
        (*invert, "--chunk", "2"): "--chunk: it does not go with a video transformer: all frames",
        (*invert, "--controlnet", "x"): "ControlNets are made for Stable Diffusion's UNets; leave",
        (*invert, "--offload", "model"): "--offload: it does not go with a video transformer: its",
        (*invert, "--seed", "1"): "--seed: it does not go with a video transformer: nothing is",
        (*invert, "--keep-bases"): "its bases are of one call, and are not kept; leave it out",
        (*invert, "--methods", "stem"): "through a video transformer take one or more of midpoint",
        (*invert, "--methods", "midpoint,ddim"): "take one or more of midpoint, euler",
        (*invert, "--option", "stem.num_bases=8"): "has no option 'num_bases'; it has enabled, w",
        (*invert, "--option", "midpoint.window=1"): "METHOD.FIELD=VALUE with a method of stem",
        (*invert, "--steps", "0"): "num_steps is 0",
        (*invert, "--device", "cuda:700"): "CUDA GPUs here",
        ("invert", "clip.mp4", "--methods", "euler"): "no model can be loaded in this test",
        (*edit, "--inversion", "ddim"): "--inversion: it does not go with a video transformer: fl",
        (*edit, "--preset", "style"): "'style' is no preset of flowedit",
        (*edit, "--edit-control", "x"): "--edit-control: it does not go with a video transformer",
        (*edit, "--option", "flowedit.n_min=1"): "flowedit has no option 'n_min'",
        (*edit, "--prompt", "a ball"): "prompts holds 'a ball' twice",
        ("edit", "clip.mp4", "--method", "flowedit,pnp", "--prompt", "a"): "or flowedit alone",
        ("edit", "clip.mp4", "--model", "model", "--prompt", "a"): "stem edit --method flowedit, b",
        ("compare", "clip.mp4", "--model", "model"): "is a video transformer; through it go stem i",
    }
    for call, said in expected.items():
        assert run(*call) == 2, call
        printed = " ".join(capfd.readouterr().err.split())
        assert said in printed, (call, printed)
    assert nothing_loads == ["embedded-video"]
    assert not Path("out").exists()


def test_one_process_alone(
    here: Path,
    nothing_loads: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("invert", "clip.mp4", "--model", "model") == 2
    assert "stem invert runs in one process, and WORLD_SIZE is 2" in capfd.readouterr().err
    assert nothing_loads == []


def test_folders_of_unets_are_told_apart(
    inversion: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("edit", inversion, "--method", "flowedit", "--prompt", "a ball") == 2
    assert "was made by ddim, through a UNet; edit it by another method" in capfd.readouterr().err
