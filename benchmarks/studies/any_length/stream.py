"""A long video of several scenes through `stem invert` and `stem reconstruct`.

What is compared went through the same files: a clip that is inverted by itself is read from the
long video, and its reconstruction is written and read, too, as video files alone take decibels.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import stem
from stem.config import StemConfig
from stem.diffusion.pipeline import decode_latents, encode_frames
from stem.inversion import round_trip
from stem.metrics import psnr
from stem.world import render, sample_scene

SEEDS = range(41_000_000, 41_000_004)  # scenes of one object; no training saw them
FRAMES = 2000
STEPS = 10
FIT = 32
SHORT = 8
PIXELS = 64
FPS = Fraction(8)
PROMPT = ""  # no caption is that of all scenes
FORMS = {"long": "auto", "shared": "none"}
"""What `--cuts` says, by the name of the figures."""
_NAMES = {"long": "each scene with bases of its own", "shared": "all scenes share their bases"}

# The kernel's own mark of a process, since the exit status's maximum begins with the parent's.
CHILD = """
import pathlib, re, sys

peak, command, *arguments = sys.argv[1:]
if command == "load":
    import stem
    stem.load_pipeline("embedded")
    status = 0
else:
    from stem.cli import run
    try:
        status = run([command, *arguments])
    except SystemExit as end:
        status = end.code
found = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
pathlib.Path(peak).write_text(found.group(1))
sys.exit(status)
"""


def measure_stream(frames: int = FRAMES, steps: int = STEPS) -> Iterator[dict[str, Any]]:
    """One row: PSNR of every scene's middle frames, peak memory and CPU seconds of each command.

    With bases of each scene's own, and with bases that all scenes share.

    Args:
        frames: Number of frames of the video, a multiple of the scenes.
        steps: Number of steps.
    """
    each = frames // len(SEEDS)
    scenes = [render(sample_scene(seed, num_things=1), each, PIXELS).frames for seed in SEEDS]
    clean = torch.cat(scenes)
    middles = [scene * each + each // 2 - SHORT // 2 for scene in range(len(SEEDS))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = folder / "source.mp4"
        stem.write_video(source, clean, FPS)
        options = ["--prompt", PROMPT, "--steps", str(steps), "--option", f"stem.fit_frames={FIT}"]
        commands: dict[str, dict[str, dict[str, float]]] = {"load": {"": _timed("load")}}
        found = {}
        for form, cuts in FORMS.items():
            out, back = folder / form, folder / f"{form}.mp4"
            asked = [*options, "--cuts", cuts, "--out", str(out)]
            inverted = _timed("invert", str(source), *asked)
            (inversion,) = (out / "inversions").iterdir()
            reconstructed = _timed("reconstruct", str(inversion), "--out", str(back))
            commands[form] = {"invert": inverted, "reconstruct": reconstructed}
            found[form] = stem.read_video(back).frames
        read = stem.read_video(source).frames
        pipeline = stem.load_pipeline("embedded")
        rows: dict[str, list[float]] = {name: [] for name in (*FORMS, "short", "files")}
        for at in middles:
            shown, given = clean[at : at + SHORT], read[at : at + SHORT]
            latents = encode_frames(pipeline, given)
            config = StemConfig(num_frames=SHORT)
            alone = round_trip(pipeline, latents, PROMPT, steps, config)
            for form, back_again in found.items():
                rows[form].append(psnr(back_again[at : at + SHORT], shown))
            rows["short"].append(psnr(_filed(decode_latents(pipeline, alone), folder), shown))
            rows["files"].append(psnr(_filed(given, folder), shown))
    yield {
        "frames": frames,
        "scenes": len(SEEDS),
        "steps": steps,
        "fit_frames": FIT,
        "commands": commands,
        "from": middles,
        "psnr": rows,
    }


def _filed(frames: torch.Tensor, folder: Path) -> torch.Tensor:
    """Frames, written as a video and read."""
    stem.write_video(folder / "short.mp4", frames, FPS)
    return stem.read_video(folder / "short.mp4").frames


def _timed(command: str, *arguments: str) -> dict[str, float]:
    """CPU seconds and peak resident bytes of a command in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        peak = Path(folder) / "peak"
        call = [sys.executable, "-c", CHILD, str(peak), command, *arguments]
        done = subprocess.run(call, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise SystemExit(f"stem {command} failed with status {done.returncode}")
        kibibytes = int(peak.read_text())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return {"seconds": seconds, "peak_bytes": kibibytes * 1024}


def report(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the figures in Markdown."""
    (row,) = rows
    loaded = row["commands"]["load"][""]["peak_bytes"]
    lines = [
        f"{row['frames']} world frames of {PIXELS}x{PIXELS} pixels, {row['scenes']} scenes, "
        f"{row['steps']} steps, fit_frames={row['fit_frames']}; peak resident memory above that of "
        "the loaded model alone.",
        "",
        "| | invert, s of CPU | reconstruct, s of CPU | invert, GiB | reconstruct, GiB |",
        "|---|---|---|---|---|",
    ]
    for form, name in _NAMES.items():
        of_form = row["commands"][form].values()
        seconds = [f"{command['seconds']:.0f}" for command in of_form]
        above = [f"{(command['peak_bytes'] - loaded) / 2**30:.2f}" for command in of_form]
        lines.append(f"| {name} | {' | '.join([*seconds, *above])} |")
    lines += [
        "",
        f"PSNR in dB of {SHORT} frames of each scene to those drawn; all read from video files.",
        "",
        f"| frames from | {' | '.join(_NAMES.values())} | the same {SHORT} by themselves | the "
        "files alone |",
        "|---|---|---|---|---|",
    ]
    for place, at in enumerate(row["from"]):
        cells = [f"{row['psnr'][name][place]:.2f}" for name in (*FORMS, "short", "files")]
        lines.append(f"| {at} | {' | '.join(cells)} |")
    return [*lines, ""]
