"""The scripts of examples/ run, the long video's on two processes with the bits of one."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.readme import ROOT
from stem import read_video

EXAMPLES = ROOT / "examples"
Script = Callable[..., str]
TINY = ("--frames", "2", "--steps", "2")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Script:
    """A function that runs a script in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_the_drop_in_is_near(run: Script) -> None:
    printed = run("drop_in.py")
    assert "stem_attention:" in printed
    assert float(printed.split("overall=")[1].split(",")[0]) < 0.05


def test_a_pipeline_s_pictures_share_bases(run: Script) -> None:
    printed = run("pipeline.py", *TINY, "--out", "shared.mp4")
    assert printed.count("True") == 2
    assert read_video("shared.mp4").num_frames == 2


def test_an_edit_is_written(run: Script) -> None:
    printed = run("edit.py", *TINY, "--out", "edits")
    assert "dB to the exact answer" in printed
    assert read_video("edits/edit.mp4").num_frames == 2


def rank(number: int, port: int, arguments: tuple[str, ...]) -> None:
    """The long video's script as torchrun starts it, process `number` of two."""
    launched = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    sys.argv = ["long_video.py", *arguments]
    runpy.run_path(str(EXAMPLES / "long_video.py"), run_name="__main__")


def latents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def test_a_long_video_on_two_processes(run: Script, tmp_path: Path) -> None:
    settings = ("--frames", "4", "--chunk", "2", "--steps", "2", "--out")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers.pipelines.stable_diffusion", "stem.inversion"])
    processes = [
        context.Process(target=rank, args=(number, port, (*settings, str(tmp_path / "two"))))
        for number in range(2)
    ]
    for process in processes:
        process.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert "by 1 processes" in run("long_video.py", *settings, "one")
    finally:
        torch.set_num_threads(threads)
        for process in processes:
            process.join(timeout=120)
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert read_video("two/reconstruction.mp4").num_frames == 4
    assert len(latents(tmp_path / "one")) == 1 + 2 + 1
    assert latents(tmp_path / "one") == latents(tmp_path / "two")
