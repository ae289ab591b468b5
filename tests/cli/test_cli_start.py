"""The command line answers at once: what needs no torch loads none, and no mistake a diffusers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from stem import __version__, names
from stem.editing import METHODS as EDIT_METHODS
from stem.inversion import METHODS
from stem.workflows import ablation_plan

RUN = """
import contextlib, io, json, sys
for name in {absent!r}:
    sys.modules[name] = None  # importing it fails
import stem.cli
found = []
for arguments in {calls!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            status = stem.cli.run(arguments)
        except SystemExit as error:
            status = error.code or 0
    found.append([status, " ".join(out.getvalue().split())])
print(json.dumps(found))
"""
LIGHT = ("torch", "stem_kernels", "diffusers", "transformers", "matplotlib", "torchmetrics", "av")
HEAVY = ("diffusers", "transformers", "matplotlib", "torchmetrics")
COMMANDS = ("ablate", "analyse", "app", "clean", "compare", "demo", "edit", "evaluate", "info")
COMMANDS += ("invert", "list", "reconstruct", "report", "verify")


def ran(absent: tuple[str, ...], *calls: tuple[str, ...]) -> list[tuple[int, str]]:
    """Exit status and output of each call, in one process that lacks some packages."""
    code = RUN.format(absent=absent, calls=[list(call) for call in calls])
    environment = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [(status, said) for status, said in json.loads(done.stdout)]


def test_help_needs_no_torch() -> None:
    calls = [("--help",), ("--version",), *((command, "--help") for command in COMMANDS)]
    found = ran(LIGHT, *calls)
    assert [status for status, _ in found] == [0] * len(calls)
    assert found[1][1] == f"stem {__version__}"
    for command, (_, said) in zip(COMMANDS, found[2:], strict=True):
        assert f"│ {command} " in found[0][1]
        assert f" {command} [OPTIONS]" in said
    listed = found[0][1].partition("Commands")[2]
    assert listed.count(" │ │ ") == len(COMMANDS) - 1  # none that is not tried


def test_folders_are_listed_and_cleaned_without_torch(inversion: str) -> None:
    listed, cleaned = ran(LIGHT, ("list", inversion), ("clean", inversion))
    assert "ddim, 2 of 2 steps, 3 frames of 32x32" in listed[1]
    assert cleaned == (0, "freed: 0 bytes")


def test_the_page_is_refused_in_a_line_where_it_cannot_be_served(tmp_path: Path) -> None:
    app = ("app", "--out", str(tmp_path), "--port", "0")
    expected = {
        app: "pip install 'stem-inversion[app]'",
        (*app, "--host", "0.0.0.0"): "host is '0.0.0.0', which others can reach: give a password",
        (*app, "--auth", "me"): "write USER:PASSWORD",
        (*app, "--port", "65536"): "port is 65536",
        ("app", "--out", __file__): "is a file, not a folder",
    }
    for (call, said), (status, printed) in zip(
        expected.items(), ran((*LIGHT, "gradio"), *expected), strict=True
    ):
        assert status == 2, (call, printed)
        assert said in printed
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_names_need_no_torch() -> None:
    expected = {
        ("edit", "a.mp4", "--prompt", "a", "--method", "p2p"): "take one or more of pnp",
        ("edit", "a.mp4"): "Missing option '--prompt'",
        ("edit", "a.mp4", "--prompt", "a", "--preset", "red"): "'red' is no preset of fusion",
        ("invert", "a.mp4", "--dtype", "int8"): "take one of float32",
        ("compare", "a.mp4", "--chunk", "0"): "write a number of frames",
        ("reconstruct", "a", "--bases", "old"): "take one of estimate",
        ("analyse", "a.mp4", "--flow", "slow"): "take one of dis",
        ("ablate", "a.mp4", "--form", "best"): "take one of defaults",
        ("list", "nowhere"): "nowhere is no folder",
        ("inverse", "a.mp4"): "No such command",
    }
    for (call, said), (status, printed) in zip(
        expected.items(), ran(LIGHT, *expected), strict=True
    ):
        assert status == 2, call
        assert said in printed


def test_mistakes_need_no_diffusers(video: str, inversion: str, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    edit = ("edit", video, "--prompt", "a", *out)
    expected = {
        ("invert", video, "--option", "stem.bases=8", *out): "stem has no option 'bases'",
        ("invert", video, "--steps", "7", *out): "do not divide the 1000 training steps",
        ("invert", video, "--device", "cuda:700", *out): "CUDA GPUs here",
        ("invert", "absent.mp4", *out): "absent.mp4",
        ("compare", video, "--size", "8x8", *out): "smaller than SSIM's window",
        (*edit, "--option", "fusion.mask=maybe"): "mask is 'maybe'",
        (*edit, "--prompt", "a"): "prompts holds 'a' twice",
        ("edit", inversion, "--prompt", "b", "--steps", "5", *out): "belongs to an inversion",
        ("ablate", video, "--only", "Q", *out): "options to change: Q",
        ("edit", inversion, "--prompt", "b", "--deinterlace", *out): "belongs to an inversion",
        ("edit", inversion, "--prompt", "b", "--tone-map", *out): "belongs to an inversion",
        ("evaluate", video, video, "--prompt", "a", "--json", str(tmp_path)): "is a folder; name",
        ("report", inversion): "holds no compare.json",
        ("reconstruct", inversion, "--bases", "cached"): "keep",
    }
    for (call, said), (status, printed) in zip(
        expected.items(), ran(HEAVY, *expected), strict=True
    ):
        assert status == 2, (call, printed)
        assert said in printed


def test_names_are_those_of_what_they_stand_for() -> None:
    assert tuple(METHODS) == names.INVERSION_METHODS
    assert [kind.__name__ for kind in METHODS.values()] == [
        *("PerFrameConfig", "SparseCausalConfig", "InflatedConfig", "StemConfig")
    ]
    assert tuple(EDIT_METHODS) == names.EDIT_METHODS
    for name, kind in EDIT_METHODS.items():
        assert kind.__name__.lower() == f"{name}options"
        assert kind.presets == names.PRESETS.get(name, ())
        for preset in kind.presets:
            needed = {"style": {"equalize": {"a": 2}}, "shape": {"blend_words": (("a",), ("b",))}}
            kind(preset=preset, **(needed.get(preset, {}) if name == "fatezero" else {}))
    assert tuple(ablation_plan.FORMS) == names.FORMS
    assert tuple(ablation_plan.OPTIONS) == names.ABLATED
