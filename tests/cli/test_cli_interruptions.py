"""Interruptions of a command: wherever they come, a plain message and what is done stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run

from stem import InversionFolder


@pytest.mark.parametrize(
    ("command", "where", "message"),
    [
        (
            "compare",
            "stem.models.load_pipeline",
            "interrupted; finished steps are kept: run the same",
        ),
        (
            "compare",
            "stem.workflows.comparison.compare",
            "interrupted; finished steps are kept: run the same",
        ),
        (
            "reconstruct",
            "stem.inversion.reconstructing.reconstruct_latents",
            "interrupted; finished steps are kept: run the",
        ),
        ("info", "stem_kernels.info.describe", "interrupted\n"),
        ("list", "stem.inversion.folder.InversionFolder.find", "interrupted\n"),
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

    monkeypatch.setattr(where, interrupt)
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

    monkeypatch.setattr("stem.models.load_pipeline", lose)
    assert run("compare", video, "--out", str(tmp_path / "out")) == 130
    assert capfd.readouterr().err.startswith("interrupted; finished steps are kept")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_of_the_imports_is_a_plain_message() -> None:
    code = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
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
